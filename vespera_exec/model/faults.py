"""The record of a failure: what `error_context` holds."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

from vespera_exec.errors import ExecutionError, network_code
from vespera_exec.model.jsonable import clean_text, details_of

if TYPE_CHECKING:
    from vespera_exec.model.enums import ExecutionPhase
    from vespera_exec.model.events import Json

_TRACEBACK_LIMIT = 8000  # characters, the last ones


def fault(message: str, *, code: str, kind: str | None, phase: ExecutionPhase | None) -> dict[str, Json]:
    """`{"code", "type", "message", "phase"}` for a failure that no exception stands for."""
    return {"code": code, "type": kind, "message": clean_text(message), "phase": phase.value if phase else None}


def fault_of(error: BaseException | str, phase: ExecutionPhase | None) -> dict[str, Json]:
    """The record of `error`: the four keys of `fault`, for exceptions also "recoverable" and, where it has one,
    "context" (an `ExecutionError`) or "traceback" (any other)."""
    if isinstance(error, str):
        return fault(error, code=ExecutionError.code, kind=None, phase=phase)
    kind = type(error).__name__
    code: object = getattr(error, "failure_code", None) or getattr(error, "code", None) or network_code(error)
    record = fault(
        str(error) or kind, code=code if isinstance(code, str) else ExecutionError.code, kind=kind, phase=phase
    )
    record["recoverable"] = bool(getattr(error, "recoverable", True))
    if isinstance(error, ExecutionError):
        if error.context:
            record["context"] = details_of(error.context)
    elif error.__traceback__ is not None:
        record["traceback"] = clean_text("".join(traceback.format_exception(error))[-_TRACEBACK_LIMIT:])
    return record
