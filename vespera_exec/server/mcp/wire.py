"""The SDK's models of the wire, three hundred of them: each built when its first message comes, not all at the import.

Building them is a tenth of what the import takes, and a client uses a dozen. To be called before `mcp` is imported;
after that it changes nothing.
"""

from __future__ import annotations

from contextlib import suppress


def build_wire_models_late() -> None:
    # The name is the SDK's own; where it no longer has it, only time is lost.
    with suppress(ImportError):
        from mcp_types._wire_base import WireModel

        WireModel.model_config["defer_build"] = True
