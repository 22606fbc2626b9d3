"""The work's way into the log: phases drive statuses, reports become progress, a fence shuts out the late."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.errors import CancellationException
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus, MessageLevel
from vespera_exec.model.transitions import ALLOWED, AT_WORK

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vespera_exec.model.events import Json
    from vespera_exec.model.progress import ProgressReport
    from vespera_exec.model.session import ExecutionSession

_STATUS_OF_PHASE = {
    ExecutionPhase.VALIDATION: ExecutionStatus.VALIDATING,
    ExecutionPhase.SETUP: ExecutionStatus.PREPARING,
    ExecutionPhase.EXECUTION: ExecutionStatus.RUNNING,
}


class SessionTracking:
    """`Tracking` over a session. Once fenced, whatever is left of the work, and still speaks, is refused.

    While the log cannot be written (`refusing`), progress and notes are dropped: what is decided is kept in
    memory until there is room, and must not grow with what the work says meanwhile.
    """

    __slots__ = ("_fenced", "_refusing", "_session")

    def __init__(self, session: ExecutionSession, refusing: Callable[[], bool] = lambda: False) -> None:
        self._session = session
        self._refusing = refusing
        self._fenced = False

    def fence(self) -> None:
        self._fenced = True

    def enter_phase(self, phase: ExecutionPhase, message: str = "") -> None:
        self._check()
        session = self._session
        with session.ledger:
            if session.lifecycle.status.is_terminal:
                raise CancellationException("the execution has ended")
            status, now = _STATUS_OF_PHASE.get(phase), session.lifecycle.status
            # Called again after it was RUNNING, it goes through the first phases as that.
            if status is not None and now in AT_WORK and status in ALLOWED[now]:
                session.update_status(status, message)
            session.enter_phase(phase, message)

    def milestone(self, percentage: float, message: str = "") -> None:
        self._check()
        self._session.milestone(percentage, message)

    def progress(self, report: ProgressReport) -> None:
        self._check()
        if self._refusing():
            return
        self._session.report(report, ExecutionPhase.EXECUTION if report.metric is None else None)

    def log(self, level: MessageLevel, message: str, details: Mapping[str, Json] | None = None) -> None:
        self._check()
        if self._refusing():
            return
        self._session.note(level, message, details)

    def checkpoint(self, state: Json) -> None:
        self._check()
        self._session.record_checkpoint(state)

    def _check(self) -> None:
        if self._fenced:
            raise CancellationException("this work is over; its reports are refused")
