"""Takes over a plan from an earlier owner: reads where its steps stand, and finds their children."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.engine.plans.ends import why_aborted
from vespera_exec.errors import ExecutionError
from vespera_exec.model.enums import ExecutionStatus, StepStatus
from vespera_exec.model.plans.board import PlanBoard

if TYPE_CHECKING:
    from vespera_exec.engine.plans.agenda import Agenda
    from vespera_exec.engine.plans.children import ChildEngine, StepHost
    from vespera_exec.engine.plans.control import Control
    from vespera_exec.engine.plans.course import Course
    from vespera_exec.engine.plans.following import Children
    from vespera_exec.engine.plans.telling import Telling
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.plans.plan import ExecutionPlan
    from vespera_exec.model.session import ExecutionSession


class TakingOver:
    def __init__(
        self,
        session: ExecutionSession,
        plan: ExecutionPlan,
        host: StepHost,
        engine: ChildEngine,
        course: Course,
        agenda: Agenda,
        telling: Telling,
        children: Children,
        control: Control,
    ) -> None:
        self._session = session
        self._plan = plan
        self._host = host
        self._engine = engine
        self._course = course
        self._agenda = agenda
        self._telling = telling
        self._children = children
        self._control = control

    async def taken_over(self) -> list[tuple[str, Lifecycle]]:
        """The steps whose run ended with nobody who followed it, and how.

        Raises:
            ExecutionError: nothing is stored of the steps.
        """
        stored = await self._host.stored()
        if stored is None:
            raise ExecutionError("the steps of this plan are not known any more", code="INTERRUPTED")
        board = PlanBoard.restored(self._session, self._plan, stored[1], stored[0])
        self._agenda.take(board)
        left = await self._find_children()
        if not self._course.is_paused and self._session.lifecycle.status is not ExecutionStatus.PAUSED:
            self._control.let_go()  # an owner may have died in the middle of a pause, or of its end
        ending = next((state for state in board.states.values() if state.ends_plan), None)
        if ending is not None:
            self._course.abort(why_aborted(ending.step_id, ending.error))
        return left

    async def _find_children(self) -> list[tuple[str, Lifecycle]]:
        """Follow what goes on, and note what was never made; returns what has ended."""
        board = self._agenda.board
        going_on: dict[str, Lifecycle] = {}
        left: list[tuple[str, Lifecycle]] = []
        for state in list(board.states.values()):
            if state.status not in (StepStatus.RUNNING, StepStatus.WAITING) or state.task_id is None:
                continue
            run = self._engine.run_of(state.task_id)
            if run is not None and run.run_id == state.run_id:
                going_on[state.step_id] = run.session.lifecycle
                self._children.follow(state.step_id, run)
            elif attempts := await self._host.attempts(state.run_id or ""):
                left.append((state.step_id, attempts[-1]))
            else:
                self._agenda.put_unmade(state.step_id)
        await self._telling.missed(board, going_on)
        return left
