"""The coordinator of a plan: begins its steps when their turn comes, follows them, and decides what their ends mean."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import anyio.lowlevel

from vespera_exec.engine.plans.agenda import Agenda
from vespera_exec.engine.plans.beginning import Beginning
from vespera_exec.engine.plans.control import Control
from vespera_exec.engine.plans.course import Course
from vespera_exec.engine.plans.ends import Ends
from vespera_exec.engine.plans.following import Children
from vespera_exec.engine.plans.going_back import GoingBack
from vespera_exec.engine.plans.looping import PlanLoop
from vespera_exec.engine.plans.marking import Marking
from vespera_exec.engine.plans.outputs import PlanOutputs
from vespera_exec.engine.plans.standing_by import StandingBy
from vespera_exec.engine.plans.taking_over import TakingOver
from vespera_exec.engine.plans.telling import Telling
from vespera_exec.engine.plans.winding_up import WindingUp
from vespera_exec.engine.work import Stopped
from vespera_exec.errors import CancellationException, ExecutionError
from vespera_exec.model.enums import ExecutionStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sized

    from vespera_exec.engine.done import Done
    from vespera_exec.engine.plans.children import ChildEngine, StepHost
    from vespera_exec.engine.work import Work, WorkResult
    from vespera_exec.model.events import Json
    from vespera_exec.model.ledger import CheckpointRecord
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.plans.board import PlanBoard
    from vespera_exec.model.plans.plan import ExecutionPlan
    from vespera_exec.model.plans.steps import StepState
    from vespera_exec.model.session import ExecutionSession


class Coordinator:
    """Executes one plan, in the engine's loop. Its `run` is the work of the plan's execution.

    Nothing polls: children say that they have news, timers say that something is due. All that it knows it reads from
    the board, so that after a restart another one goes on from there.

    Its parts know each other in the order in which they are made, and each keeps what it alone changes: the course of
    the whole, the agenda with the board, the children, the way back, what ends mean. Here is the order of a turn.
    """

    def __init__(
        self,
        session: ExecutionSession,
        plan: ExecutionPlan,
        host: StepHost,
        engine: ChildEngine,
        *,
        board: PlanBoard | None = None,
        refused: ExecutionError | None = None,
    ) -> None:
        """`board` None: an earlier owner has opened it, and it is read from the store.

        `refused`: why the plan does not go on; all that it does is to end what is open.
        """
        self._session = session
        self._clock = session.ledger.clock
        self._refused = refused
        self._loop = loop = PlanLoop()
        self._course = course = Course()
        self._telling = telling = Telling(session, host)
        self._agenda = agenda = Agenda(session, plan, board, course, telling)
        self._children = children = Children(engine, course, agenda, telling, loop, clock=self._clock)
        self._going_back = going_back = GoingBack(session, plan, engine, course, agenda, children, loop)
        self._ends = ends = Ends(session, plan, host, engine, course, agenda, going_back, loop)
        self._outputs = outputs = PlanOutputs(plan, host)
        self._beginning = Beginning(session, host, outputs, course, agenda, children, ends, most=plan.max_parallel)
        self._winding_up = WindingUp(session, engine, course, agenda, children, ends)
        self._control = control = Control(session, engine, course, agenda, children, loop)
        self._taking_over = TakingOver(session, plan, host, engine, course, agenda, telling, children, control)
        self._marking = Marking(session, course, agenda, interval_seconds=plan.checkpoint_interval_seconds)
        self._standing_by = StandingBy(session, course, agenda, children)
        self._timed = (children, agenda, self._marking, self._standing_by)

    # the work

    async def run(self, work: Work) -> WorkResult:
        """The outcome of the plan, once nothing of it runs any more.

        Raises:
            CancellationException: it was asked to stop, and has.
        """
        undo = work.token.on_cancel(lambda _: self._loop.rouse())
        ended: WorkResult | Exception = CancellationException("cancelled")
        try:
            async with self._loop.running():
                # The supervisor of one plan: its children are not left alone, whatever is wrong with it.
                try:
                    ended = await self._coordinated(work)
                except Exception as fault:  # noqa: BLE001
                    ended = fault
                    if not isinstance(fault, CancellationException):
                        await self._winding_up.wind_up(self._course.aborted or "The plan has failed")
        finally:
            undo()
            self._course.end()
            self._children.forget()
        if isinstance(ended, Exception):
            raise ended
        return ended

    async def _coordinated(self, work: Work) -> WorkResult:
        await self._open()
        if self._refused is not None:
            return await self._as_refused(self._refused)
        while True:
            if work.token.is_cancelled or self._session.lifecycle.status is ExecutionStatus.CANCELLING:
                reason = work.token.cancellation_reason or self._session.lifecycle.cancellation_reason or "Cancelled"
                await self._winding_up.wind_up(reason)
                raise Stopped(reason, await self._result())
            await self._children.heed_news(self._ends.concluded)
            self._children.heed_pause()
            self._heed_time()
            await self._agenda.skip_doomed()
            if self._course.aborted is not None:
                await self._winding_up.abort(self._course.aborted)
            else:
                await self._begin_ready(work)
            if self._is_over:
                self._course.close()
                return await self._result()
            self._standing_by.heed(self._clock.monotonic())
            await self._rest()

    async def _open(self) -> None:
        """The board as it is, and the children that have begun."""
        left: list[tuple[str, Lifecycle]] = []
        if not self._agenda.has_board:
            left = await self._taking_over.taken_over()
        if self._refused is not None:
            self._course.abort(self._refused.message)
        self._agenda.reschedule()
        if self._agenda.board.state.restoring:
            self._going_back.set_out()
        else:
            for step_id, life in left:
                self._ends.concluded(step_id, life, None)
        self._course.open()
        await anyio.lowlevel.checkpoint()  # of a large plan, that was much
        self._marking.begin()

    async def _begin_ready(self, work: Work) -> None:
        await self._beginning.announced(work.token)
        while await self._beginning.some(work.token):
            await anyio.lowlevel.checkpoint()
            await self._children.heed_news(self._ends.concluded)

    def _heed_time(self) -> None:
        """What is due; `_rest` comes back at once for what is left."""
        now = self._clock.monotonic()
        self._children.heed_time(now)
        self._agenda.heed_time(now)
        self._marking.heed_time(now)

    @property
    def _is_over(self) -> bool:
        return not (self._children or self._course.is_paused or self._course.goes_back) and self._agenda.is_done

    async def _rest(self) -> None:
        """Until there is news, or something is due."""
        due = [at for each in self._timed if (at := each.due_at) is not None]
        await self._loop.rest(max(0.0, min(due) - self._clock.monotonic()) if due else None)

    async def _result(self) -> WorkResult:
        self._telling.percentage(self.board)
        return await self._outputs.result(self.board, aborted=self._course.aborted)

    async def _as_refused(self, refused: ExecutionError) -> WorkResult:
        await self._winding_up.wind_up(refused.message)
        return replace(
            await self._result(),
            error=refused.message,
            error_code=refused.failure_code,
            recoverable=refused.recoverable,
            error_context=refused.context,
        )

    # what others see of it

    @property
    def is_open(self) -> bool:
        """It knows where its steps stand, and may be asked and told."""
        return self._course.is_open

    @property
    def opened(self) -> Done:
        """Set once it is open, or has ended."""
        return self._course.opened

    @property
    def board(self) -> PlanBoard:
        return self._agenda.board

    @property
    def under_way(self) -> tuple[str, ...]:
        """The steps that have begun and not ended, and perhaps some more."""
        return (*self._children.steps, *self._agenda.under_way)

    # what others ask of it; `Stoppable`: what runs apart are its children

    @property
    def running(self) -> Sized:
        return (self,)  # it stands by beginning nothing, also where it has no children

    def check_stoppable(self) -> None:
        """
        Raises:
            PauseUnsupported: this system cannot stop what a child runs.
        """
        self._control.check_stoppable()

    async def pause(self) -> None:
        await self._control.pause()

    async def resume(self) -> None:
        self._control.resume()

    def cancel_step(self, step_id: str, reason: str) -> bool:
        """End a step, whether it has begun or not; False where it has ended, or is about to.

        Raises:
            NotFound: the plan has no such step.
            Conflict: the plan goes back to a checkpoint, before or after which it may be tried.
        """
        return self._control.cancel_step(step_id, reason)

    def checkpoint(self, kind: str = "call", metadata: Mapping[str, Json] | None = None) -> CheckpointRecord:
        """Mark where the plan stands, to go back to.

        Raises:
            Conflict: it is on its way back to another.
        """
        return self._marking.checkpoint(kind, metadata)

    async def restore(
        self, then: Mapping[str, StepState], variables: Mapping[str, Json], *, checkpoint_id: str
    ) -> bool:
        """Go back to where the board stood `then`: what runs is cancelled, and ended, first.

        False where the plan has been cancelled, or has ended, before it was there. It goes back also when this call is
        given up, and when the owner dies.

        Raises:
            Conflict: the plan is ending, or goes back already.
        """
        return await self._going_back.restore(then, variables, checkpoint_id=checkpoint_id)
