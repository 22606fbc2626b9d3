"""The way of a plan back to a checkpoint: announced, then everything that runs is ended, then the board is put back."""

from __future__ import annotations

import logging
from itertools import islice
from typing import TYPE_CHECKING

import anyio.lowlevel

from vespera_exec.engine.plans.looping import AT_ONCE
from vespera_exec.errors import Conflict
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.plans.restoring import put_back
from vespera_exec.model.transitions import AT_WORK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.engine.plans.agenda import Agenda
    from vespera_exec.engine.plans.children import ChildEngine
    from vespera_exec.engine.plans.course import Course
    from vespera_exec.engine.plans.following import Children
    from vespera_exec.engine.plans.looping import PlanLoop
    from vespera_exec.model.events import Json
    from vespera_exec.model.plans.plan import ExecutionPlan
    from vespera_exec.model.plans.steps import StepState
    from vespera_exec.model.session import ExecutionSession

S = ExecutionStatus
_log = logging.getLogger(__name__)


class GoingBack:
    def __init__(
        self,
        session: ExecutionSession,
        plan: ExecutionPlan,
        engine: ChildEngine,
        course: Course,
        agenda: Agenda,
        children: Children,
        loop: PlanLoop,
    ) -> None:
        self._session = session
        self._plan = plan
        self._engine = engine
        self._course = course
        self._agenda = agenda
        self._children = children
        self._loop = loop

    async def restore(
        self,
        then: Mapping[str, StepState],
        variables: Mapping[str, Json],
        *,
        checkpoint_id: str,
        keeps_recoveries: bool = False,
    ) -> bool:
        """Go back to where the board stood `then`: what runs is cancelled, and ended, first.

        False where the plan has been cancelled, or has ended, before it was there. It goes back also when this call is
        given up, and when the owner dies. `keeps_recoveries` as in `put_back`.

        Raises:
            Conflict: the plan is ending, or goes back already.
        """
        course, board, status = self._course, self._agenda.board, self._session.lifecycle.status
        is_ending = not course.is_open or course.aborted is not None
        if is_ending or course.goes_back or status not in (*AT_WORK, S.PAUSED):
            does = "it does so already" if course.goes_back else f"it is {status.value}, and ending or not begun"
            raise Conflict(f"The plan cannot go back: {does}", hint="try again")
        with self._session.ledger:
            board.going_back(checkpoint_id, variables=variables, keeps_recoveries=keeps_recoveries)
            if status is not S.PAUSED:
                self._session.update_status(S.RECOVERING, f"Back to checkpoint {checkpoint_id}")
        self.set_out(then)
        await course.arrived.wait()
        return not course.goes_back and not board.state.restoring

    def set_out(self, then: Mapping[str, StepState] | None = None) -> None:
        """All of `restore` that comes after its announcement; `then` None: to what the log has announced."""
        epoch = self._course.set_out()
        self._agenda.stop_deciding()
        self._loop.start(self._go_back, then, epoch)

    async def _go_back(self, then: Mapping[str, StepState] | None, epoch: int) -> None:
        board = self._agenda.board
        back = board.state.restoring
        # The supervisor of the way back: without it the plan would stand for ever.
        try:
            if then is None:
                then = await self._board_at(back["checkpoint_id"])
            await self._children.leave(f"The plan goes back to checkpoint {back['checkpoint_id']}")
            self._agenda.forget()
            states = put_back(then, board.states, keeps_recoveries=back["keeps_recoveries"])
            steps = iter(states)
            while (some := list(islice(steps, AT_ONCE))) and self._may_go_back(epoch):
                board.go_back({step: states[step] for step in some})
                await anyio.lowlevel.checkpoint()
            with self._session.ledger:
                if self._may_go_back(epoch):
                    board.reset(states, back["variables"], checkpoint_id=back["checkpoint_id"])
                    self._agenda.reschedule()
                    if self._session.lifecycle.status is S.RECOVERING:
                        self._session.update_status(S.RUNNING, "The plan goes on")
        except Exception as fault:  # noqa: BLE001
            _log.exception("Plan %s could not go back", self._session.session_id)
            self._course.abort(f"It could not go back to checkpoint {back['checkpoint_id']}: {fault}")
        finally:
            self._agenda.stop_deciding()  # of what failed on the way
            self._course.arrive()
            self._loop.rouse()

    def _may_go_back(self, epoch: int) -> bool:
        """Nobody has ended the plan, or asked for that, since it set out."""
        return epoch == self._course.epoch and self._session.lifecycle.status in (*AT_WORK, S.PAUSED, S.RECOVERING)

    async def _board_at(self, checkpoint_id: str) -> Mapping[str, StepState]:
        """
        Raises:
            LookupError: the checkpoint is not known any more.
        """
        checkpoints, execution = self._engine.checkpoints, self._session.session_id
        found = await checkpoints.at(self._plan, execution, checkpoint_id=checkpoint_id) if checkpoints else None
        if found is None:
            raise LookupError("it is not known any more")
        return found[1]
