"""Marks where a plan stands as a place to go back to: when that is asked for, and at intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.engine.plans.agenda import Agenda
    from vespera_exec.engine.plans.course import Course
    from vespera_exec.model.events import Json
    from vespera_exec.model.ledger import CheckpointRecord
    from vespera_exec.model.session import ExecutionSession


class Marking:
    """`interval_seconds` 0: only where it is asked for."""

    def __init__(self, session: ExecutionSession, course: Course, agenda: Agenda, *, interval_seconds: float) -> None:
        self._session = session
        self._course = course
        self._agenda = agenda
        self._interval_seconds = interval_seconds
        self._due_at: float | None = None
        self._marked = 0
        """The place in the log up to which there is nothing new since the last of an interval."""

    @property
    def due_at(self) -> float | None:
        return self._due_at

    def begin(self) -> None:
        """The intervals count from now on."""
        if self._interval_seconds:
            self._due_at = self._session.ledger.clock.monotonic() + self._interval_seconds

    def heed_time(self, now: float) -> None:
        """Mark the end of an interval in which something has happened, but not on the way back."""
        if self._due_at is None or self._due_at > now:
            return
        self._due_at = now + self._interval_seconds
        if not self._course.goes_back and self._reached > self._marked:
            self.checkpoint("interval")
            self._marked = self._reached

    def checkpoint(self, kind: str, metadata: Mapping[str, Json] | None = None) -> CheckpointRecord:
        """
        Raises:
            Conflict: it is on its way back to another.
        """
        if self._course.goes_back:
            raise Conflict("The plan goes back to a checkpoint just now", hint="try again")
        return self._agenda.board.checkpoint(kind, metadata=metadata)

    @property
    def _reached(self) -> int:
        return self._session.ledger.sequence(self._session.session_id)
