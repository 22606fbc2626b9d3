"""Ends a plan before its steps have come to their ends: what goes on, and then what has not begun."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vespera_exec.engine.plans.agenda import Agenda
    from vespera_exec.engine.plans.children import ChildEngine
    from vespera_exec.engine.plans.course import Course
    from vespera_exec.engine.plans.ends import Ends
    from vespera_exec.engine.plans.following import Children
    from vespera_exec.model.session import ExecutionSession


class WindingUp:
    def __init__(
        self,
        session: ExecutionSession,
        engine: ChildEngine,
        course: Course,
        agenda: Agenda,
        children: Children,
        ends: Ends,
    ) -> None:
        self._session = session
        self._engine = engine
        self._course = course
        self._agenda = agenda
        self._children = children
        self._ends = ends
        self._is_aborting = False

    async def abort(self, reason: str) -> None:
        """Ask what goes on to end, and end all that has not begun; the plan goes on following the former."""
        if not self._is_aborting:
            self._is_aborting = True
            self._turn()
            self._children.cancel(reason)
            await self._agenda.cancel_rest(reason, but=self._children)

    async def wind_up(self, reason: str) -> None:
        """Returns when nothing of the plan runs, and each step has ended."""
        self._turn()
        self._course.abort(reason)
        await self._end_children(reason)
        if self._agenda.has_board:
            if not self._course.is_open:
                self._agenda.reschedule()
            self._children.conclude(self._ends.concluded)
            await self._agenda.cancel_rest(reason, but=self._children)

    def _turn(self) -> None:
        self._course.turn()
        self._agenda.stop_deciding()

    async def _end_children(self, reason: str) -> None:
        """Cancel them, and wait until nothing of them is left: each ends by its own ladder, which bounds it.

        That their ends are on disk is not waited for, which may take as long as the disk refuses: the plan's own end
        comes after theirs in the log.
        """
        known = {child.run for child in self._children.at_work}
        unknown = [run for run in self._engine.runs_of(self._session.session_id) if run not in known]
        for run in (*known, *unknown):
            run.session.request_cancellation(reason)
        await self._children.over()
        for run in unknown:  # a fault came before they were followed
            await run.done.wait()
