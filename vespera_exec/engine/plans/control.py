"""What others ask of a plan that is executed: to stand still, to go on, to cancel a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.engine.plans.children import HELD
from vespera_exec.errors import Conflict
from vespera_exec.model.enums import ExecutionStatus

if TYPE_CHECKING:
    from vespera_exec.engine.plans.agenda import Agenda
    from vespera_exec.engine.plans.children import ChildEngine
    from vespera_exec.engine.plans.course import Course
    from vespera_exec.engine.plans.following import Children
    from vespera_exec.engine.plans.looping import PlanLoop
    from vespera_exec.model.session import ExecutionSession

S = ExecutionStatus


class Control:
    """To stand still means: the children that wait are held, those that run are paused."""

    def __init__(
        self,
        session: ExecutionSession,
        engine: ChildEngine,
        course: Course,
        agenda: Agenda,
        children: Children,
        loop: PlanLoop,
    ) -> None:
        self._session = session
        self._engine = engine
        self._course = course
        self._agenda = agenda
        self._children = children
        self._loop = loop

    def cancel_step(self, step_id: str, reason: str) -> bool:
        """End a step, whether it has begun or not; False where it has ended, or is about to.

        Raises:
            NotFound: the plan has no such step.
            Conflict: the plan goes back to a checkpoint, before or after which it may be tried.
        """
        self._agenda.board.step(step_id)
        if self._course.goes_back:
            raise Conflict("the plan goes back to a checkpoint", hint="try again in a moment")
        if (child := self._children.of(step_id)) is not None:
            return child.run.session.request_cancellation(reason)
        accepted = self._agenda.cancel(step_id, reason)
        self._loop.rouse()
        return accepted

    def check_stoppable(self) -> None:
        """
        Raises:
            PauseUnsupported: this system cannot stop what a child runs.
        """
        for child in self._children:
            if (execution := self._engine.execution_of(child.run.session.session_id)) is not None:
                execution.check_stoppable()

    async def pause(self) -> None:
        """Returns when all children stand; where the plan goes back, those that there are then."""
        self._course.pause()
        self._engine.hold(self._session.session_id)
        self._loop.rouse()
        await self._children_stand()
        while self._course.goes_back:
            await self._course.arrived.wait()
            await self._children_stand()

    def resume(self) -> None:
        self._course.resume()
        self.let_go()
        self._engine.go_on(self._session.session_id)
        self._loop.rouse()

    def let_go(self) -> None:
        """What was paused with the plan goes on, also where an earlier owner has paused it."""
        for child in self._children:
            session = child.run.session
            execution = self._engine.execution_of(session.session_id)
            if execution is not None:
                if execution.pause_reason == HELD:
                    execution.resume("Its plan goes on")
                continue
            with session.ledger:
                life = session.lifecycle
                if life.status is not S.PAUSED or life.status_message != HELD:
                    continue
                session.resume("Its plan goes on", queued=True)
            self._engine.unpark(session)

    async def _children_stand(self) -> None:
        for child in self._children:
            while not child.run.done.is_set():
                execution = self._engine.execution_of(child.run.session.session_id)
                if execution is None:
                    break  # it waits, and is held
                if execution.pause(HELD):
                    await execution.settled()
                    if child.run.session.lifecycle.status is S.PAUSED:
                        break
                if execution.over:
                    await execution.concluded.wait()
