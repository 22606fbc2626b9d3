"""The process that owns a data directory: one `Vespera` behind every door, until it is told to go or idle."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vespera_exec import paths
from vespera_exec.app.owning import check_unowned
from vespera_exec.errors import DaemonUnavailable, VesperaError
from vespera_exec.server.launch import accepts
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM, SIGINT or idleness. Exit code 0 then, 1 when it could not start."""
    parser = argparse.ArgumentParser(prog="vespera_exec.server.daemon", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        settings = Settings.load(data_dir=arguments.data_dir.resolve())
        _look_for_another(settings.data_dir)
        _serve(settings)
    except VesperaError as error:
        sys.stderr.write(f"vespera-exec: {error.message} ({error.error_code}); {error.hint}\n")
        return 1
    return 0


def _look_for_another(data_dir: Path) -> None:
    """Raises DataDirectoryInUse, without the wait that a successor grants, when a daemon serves there already."""
    try:
        mcp_path, _ = paths.socket_paths(data_dir, os.environ)
    except OSError as fault:
        raise DaemonUnavailable(
            f"no folder for sockets: {fault}", hint="name one of your own in VESPERA_RUNTIME_DIR"
        ) from fault
    if accepts(mcp_path):
        check_unowned(data_dir)


def _serve(settings: Settings) -> None:
    # Imports make no garbage worth looking for: a tenth of the start. What they leave stays for good.
    gc.disable()
    import anyio

    from vespera_exec.server import logs
    from vespera_exec.server.doors import serve

    gc.freeze()
    gc.enable()
    logs.configure(settings.log_level)
    anyio.run(serve, settings)


if __name__ == "__main__":
    sys.exit(main())
