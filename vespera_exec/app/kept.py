"""What was kept of the request of a run, as whoever executes again, or goes back, reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from vespera_exec.model.events import mapping

if TYPE_CHECKING:
    from vespera_exec.model.events import Json

_OF_ALL = {"principal": str, "scopes": list, "over_tcp": bool, "cwd": str | None}


def request_kept(body: bytes | None) -> dict[str, Json]:
    """Nothing, where none was, or it is not what anybody wrote."""
    try:
        told = mapping(orjson.loads(body)) if body is not None else {}
    except orjson.JSONDecodeError:
        return {}
    whole = all(name in told and isinstance(told[name], kind) for name, kind in _OF_ALL.items())
    return dict(told) if whole else {}
