"""Whether a plan works or only waits: while it waits, the clock of its work stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus
from vespera_exec.model.transitions import AT_WORK

if TYPE_CHECKING:
    from vespera_exec.engine.plans.agenda import Agenda
    from vespera_exec.engine.plans.course import Course
    from vespera_exec.engine.plans.following import Children
    from vespera_exec.model.session import ExecutionSession

S = ExecutionStatus

_STANDING_BY_SECONDS: Final = 1.0
"""That everything has to wait before the clock of the plan's work stands."""


class StandingBy:
    def __init__(self, session: ExecutionSession, course: Course, agenda: Agenda, children: Children) -> None:
        self._session = session
        self._course = course
        self._agenda = agenda
        self._children = children
        self._waits_since: float | None = None

    @property
    def due_at(self) -> float | None:
        """When everything has waited long enough, if it goes on waiting; None where it works, or stands by already."""
        if self._waits_since is None or self._session.lifecycle.is_parked:
            return None
        return self._waits_since + _STANDING_BY_SECONDS

    def heed(self, now: float) -> None:
        """RUNNING; and in a phase unless all that is done is to wait."""
        status = self._session.lifecycle.status
        if status not in AT_WORK and (status is not S.RECOVERING or self._course.goes_back):
            self._waits_since = None
            return
        waits = not self._agenda.decisions and self._children.all_wait
        if not waits:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = now
        if status is not S.RUNNING:
            self._session.update_status(S.RUNNING, "The plan goes on" if status is S.RECOVERING else "Executing steps")
        if not waits or now - (self._waits_since or 0.0) < _STANDING_BY_SECONDS:
            self._session.enter_phase(ExecutionPhase.EXECUTION, "Executing steps")
        elif not self._session.lifecycle.is_parked:
            self._session.stand_by("All that goes on waits")
