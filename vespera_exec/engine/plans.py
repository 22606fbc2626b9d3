"""The coordinator of a plan: begins its steps when their turn comes, follows them, and decides what their ends mean."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel

from vespera_exec.engine.plan_children import QUEUED_SECONDS, Child
from vespera_exec.engine.plan_control import PlanControl
from vespera_exec.engine.plan_ends import TELLING_SECONDS
from vespera_exec.engine.plan_outcome import MOST_OUTPUTS, last_steps, outcome
from vespera_exec.errors import CancellationException, ExecutionError, VesperaError
from vespera_exec.model.board import PlanBoard
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus, StepStatus
from vespera_exec.model.events import new_id
from vespera_exec.model.references import lookup_in, references, resolve
from vespera_exec.model.transitions import AT_WORK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vespera_exec.engine.engine import Engine, Run
    from vespera_exec.engine.plan_children import StepHost
    from vespera_exec.engine.work import Work, WorkResult
    from vespera_exec.model.events import Json
    from vespera_exec.model.plan import ExecutionPlan
    from vespera_exec.model.session import ExecutionSession

S = ExecutionStatus

_STANDING_BY_SECONDS: Final = 1.0
"""That everything has to wait before the clock of the plan's work stands."""
_AT_ONCE: Final = 64
"""Steps that are begun, or ended, before others in the loop get their turn."""


class Coordinator(PlanControl):
    """Executes one plan, in the engine's loop. Its `run` is the work of the plan's execution.

    Nothing polls: children say that they have news, timers say that something is due. All that it knows it reads from
    the board, so that after a restart another one goes on from there.
    """

    def __init__(
        self,
        session: ExecutionSession,
        plan: ExecutionPlan,
        host: StepHost,
        engine: Engine,
        *,
        board: PlanBoard | None = None,
    ) -> None:
        """`board` None: an earlier owner has opened it, and it is read from the store."""
        super().__init__(session, plan, host, engine, board)
        self._news: deque[Child] = deque()
        self._moved: set[Child] = set()
        """Those of which something is to be told with the next tick."""
        self._percentage = -1.0
        self._checkpoint_at: float | None = None
        self._checkpointed = 0
        self._waits_since: float | None = None

    async def run(self, work: Work) -> WorkResult:
        """The outcome of the plan, once nothing of it runs any more.

        Raises:
            CancellationException: it was asked to stop, and has.
        """
        self._loop = asyncio.get_running_loop()
        undo = work.token.on_cancel(lambda _: self._rouse())
        ended: WorkResult | Exception = CancellationException("cancelled")
        try:
            async with anyio.create_task_group() as self._group:
                # The supervisor of one plan: its children are not left alone, whatever is wrong with it.
                try:
                    ended = await self._coordinated(work)
                except Exception as fault:  # noqa: BLE001
                    ended = fault
                    if not isinstance(fault, CancellationException):
                        await self._end_children("The plan has failed")
                self._group.cancel_scope.cancel()
        finally:
            undo()
            for child in self._children.values():
                child.forget()
        if isinstance(ended, Exception):
            raise ended
        return ended

    async def _coordinated(self, work: Work) -> WorkResult:
        await self._open()
        while True:
            if work.token.is_cancelled or self._session.lifecycle.status is S.CANCELLING:
                reason = work.token.cancellation_reason or self._session.lifecycle.cancellation_reason or "Cancelled"
                await self._end_children(reason)
                await self._cancel_rest(reason)
                raise CancellationException(reason)
            self._heed_news()
            self._heed_time()
            if self._aborted is not None:
                await self._abort(self._aborted)
            elif not self._paused and not self._restoring:
                await self._begin_ready(work)
            if self._is_over:
                return await self._result()
            self._stand_by_or_work()
            await self._rest()

    async def _open(self) -> None:
        """The board as it is, and the children that have begun."""
        if self._board is None:
            stored = await self._host.stored()
            if stored is None:
                raise ExecutionError("the steps of this plan are not known any more", code="INTERRUPTED")
            self._board = PlanBoard.restored(self._session, self._plan, stored[1], stored[0])
            await self._find_children()
        self._reschedule()
        if self._plan.checkpoint_interval_seconds:
            self._checkpoint_at = self._now + self._plan.checkpoint_interval_seconds

    async def _find_children(self) -> None:
        """After a restart: follow what goes on, conclude what has ended, make what was never made."""
        for state in list(self.board.states.values()):
            if state.status not in (StepStatus.RUNNING, StepStatus.WAITING) or state.task_id is None:
                continue
            run = self._engine.run_of(state.task_id)
            if run is not None and run.run_id == state.run_id:
                self._follow(state.step_id, run)
            elif attempts := await self._host.attempts(state.run_id or ""):
                self._left.append((state.step_id, attempts[-1]))
            else:
                self._unmade.append(state.step_id)

    # beginning

    async def _begin_ready(self, work: Work) -> None:
        while self._unmade:
            await self._begin(self._unmade.pop(), work)
        begun = 0
        while len(self._children) + len(self._deciding) < self._plan.max_parallel and not self._is_held(work):
            if (step_id := self._schedule.pop()) is None:
                return
            if not self.board.step(step_id).status.is_terminal:
                await self._begin(step_id, work)
            if (begun := begun + 1) % _AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()
                self._heed_news()

    def _is_held(self, work: Work) -> bool:
        return self._paused or self._restoring or self._aborted is not None or work.token.is_cancelled

    async def _begin(self, step_id: str, work: Work) -> None:
        """Make the step's child, or end it where its output is known or it cannot begin."""
        step, state, epoch = self._steps[step_id], self.board.step(step_id), self._epoch
        fallback = step.fallback if state.is_fallback else None
        role = fallback.role if fallback is not None else step.role
        given = step.inputs if fallback is None or fallback.inputs is None else fallback.inputs
        announced = None if state.status is StepStatus.PENDING else state.task_id
        made: VesperaError | None = None
        ready = None
        try:
            inputs = await self._resolved(dict(given))
            ready = await self._host.ready(step, role, inputs, task_id=announced)
        except VesperaError as error:
            made = error
        if epoch != self._epoch or self.board.step(step_id) != state:
            return  # put back, or cancelled, meanwhile
        if self._is_held(work):
            if state.status is StepStatus.PENDING:
                self._schedule.put_back(step_id)
            else:
                self._unmade.append(step_id)
            return
        if ready is None:
            assert made is not None
            self._failed(step_id, _as_failure(made), None)
        elif ready.cached is not None and state.status is StepStatus.PENDING:
            with self._session.ledger:
                self.board.completed(step_id, result_of=ready.cached, cached=True, message="Known already")
                self._settle(step_id, lets_on=True)
        else:
            task_id, run_id = state.task_id or "", state.run_id or ""
            if state.status is StepStatus.PENDING:
                task_id, run_id = new_id(), new_id()
                self.board.started(
                    step_id,
                    role=ready.role,
                    attempt=state.attempt + 1,
                    task_id=task_id,
                    run_id=run_id,
                    is_fallback=state.is_fallback,
                )
            self._follow(step_id, ready.begin(task_id, run_id))

    async def _resolved(self, template: Json) -> Json:
        """
        Raises:
            MissingReference: what it refers to is not there.
            ExecutionError: the output of a step was not kept whole.
        """
        found = references(template)
        if not found:
            return template
        states, outputs = self.board.states, dict[str, "Json"]()
        for reference in found:
            if reference.kind == "output" and reference.name not in outputs:
                state = states[reference.name]
                if state.status is StepStatus.COMPLETED:
                    outputs[reference.name] = await self._host.output(state.result_of) if state.result_of else None
        return resolve(template, lookup_in(states, self.board.state.variables, outputs))

    def _follow(self, step_id: str, run: Run) -> None:
        child = self._children[step_id] = Child(step_id, run, self._hear, now=self._now)
        run.done.then(lambda: self._hear(child))
        self._look_at(child)
        heapq.heappush(self._timers, (self._now + QUEUED_SECONDS, next(self._turns), step_id))

    # what is heard

    def _hear(self, child: Child) -> None:
        """From any thread."""
        self._news.append(child)
        self._rouse()

    def _heed_news(self) -> None:
        while self._news:
            child = self._news.popleft()
            child.is_told = False
            if self._children.get(child.step) is not child:
                continue
            self._mirror(child)
            if child.run.done.is_set():
                del self._children[child.step]
                self._moved.discard(child)
                child.forget()
                self._write_notes(child)
                self._concluded(child.step, child.run.session.lifecycle, child.run)
            else:
                self._look_at(child)

    def _look_at(self, child: Child) -> None:
        """Record what it waits for, where that is new; how far it is comes with the next tick."""
        waits = child.waits_for(self._now)
        if waits != child.shown:
            child.shown = waits
            self.board.waiting(child.step, *waits)
        if child not in self._moved:
            self._moved.add(child)
            if self._tell_at is None:
                self._tell_at = max(self._now, self._told_at + TELLING_SECONDS)

    def _mirror(self, child: Child) -> None:
        while child.allocated:
            event = child.allocated.popleft()
            self._session.record_fact(
                event.event_type, (), step_id=child.step, message=event.message, details=dict(event.details)
            )

    def _heed_time(self) -> None:
        now = self._now
        while self._timers and self._timers[0][0] <= now:
            step_id = heapq.heappop(self._timers)[2]
            if (child := self._children.get(step_id)) is not None:
                self._look_at(child)
            elif self._retrying.get(step_id, math.inf) <= now:
                del self._retrying[step_id]
                self._schedule.put_back(step_id)
        if self._tell_at is not None and self._tell_at <= now:
            self._tell()
        if self._checkpoint_at is not None and self._checkpoint_at <= now:
            self._checkpoint_at = now + self._plan.checkpoint_interval_seconds
            if self._session.ledger.sequence(self._session.session_id) > self._checkpointed:
                self.checkpoint("interval")
                self._checkpointed = self._session.ledger.sequence(self._session.session_id)

    def _tell(self) -> None:
        """How far the steps are, and so the plan."""
        self._tell_at, self._told_at = None, self._now
        moved, self._moved = self._moved, set()
        for child in moved:
            if self._children.get(child.step) is not child:
                continue  # the plan went back to where it did not run
            before, reached = self.board.step(child.step).percentage or 0.0, child.percentage
            if reached is not None and reached - before >= 1.0:
                self.board.progress(child.step, min(reached, 100.0))
            self._write_notes(child)
        self._tell_percentage()

    def _write_notes(self, child: Child) -> None:
        """What the work of a step has said, in the plan's own log too."""
        while child.notes:
            note = child.notes.popleft()
            self._session.record_fact(
                note.event_type,
                (),
                step_id=child.step,
                message=note.message,
                details=dict(note.details),
                level=note.level,
            )

    def _tell_percentage(self) -> None:
        reached = self.board.percentage
        if abs(reached - self._percentage) >= 1.0 and self._session.lifecycle.status in AT_WORK:
            self._percentage = reached
            ended = sum(number for status, number in self.board.counts.items() if status.is_terminal)
            self._session.milestone(reached, f"{ended} of {len(self._steps)} steps")

    # standing and ending

    @property
    def _is_over(self) -> bool:
        busy = self._children or self._deciding or self._unmade or self._paused or self._restoring
        return not busy and self._schedule.is_done

    def _stand_by_or_work(self) -> None:
        """RUNNING; and in a phase unless all that is done is to wait, when the clock of the work stands."""
        status = self._session.lifecycle.status
        if status not in AT_WORK and (status is not S.RECOVERING or self._restoring):
            self._waits_since = None
            return
        waits = not self._deciding and all(child.shown[0] is not None for child in self._children.values())
        if not waits:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = self._now
        if status is not S.RUNNING:
            self._session.update_status(S.RUNNING, "The plan goes on" if status is S.RECOVERING else "Executing steps")
        if not waits or self._now - (self._waits_since or 0.0) < _STANDING_BY_SECONDS:
            self._session.enter_phase(ExecutionPhase.EXECUTION, "Executing steps")
        elif not self._session.lifecycle.is_parked:
            self._session.stand_by("All that goes on waits")

    async def _rest(self) -> None:
        """Until there is news, or something is due."""
        due = [at for at in (self._tell_at, self._checkpoint_at) if at is not None]
        if self._timers:
            due.append(self._timers[0][0])
        if self._waits_since is not None and not self._session.lifecycle.is_parked:
            due.append(self._waits_since + _STANDING_BY_SECONDS)
        with anyio.move_on_after(max(0.0, min(due) - self._now) if due else None):
            await self._wake.wait()
        self._wake.clear()
        self._roused = False

    async def _end_children(self, reason: str) -> None:
        """Cancel them, and wait until nothing of them is left. The ladder above bounds it."""
        self._epoch += 1
        self._deciding.clear()
        self._aborted = self._aborted or reason
        for child in list(self._children.values()):
            child.run.session.request_cancellation(reason)
        for child in (*self._children.values(), *self._leaving):
            await child.run.done.wait()
        if self._board is not None:
            self._heed_news()

    async def _abort(self, reason: str) -> None:
        """End what goes on, and all that has not begun."""
        for child in list(self._children.values()):
            child.run.session.request_cancellation(reason)
        await self._cancel_rest(reason)

    async def _cancel_rest(self, reason: str) -> None:
        if self._board is None:
            return
        self._unmade.clear()
        self._retrying.clear()
        for number, step in enumerate(self._plan.steps):
            state = self.board.step(step.id)
            if state.status.is_terminal or step.id in self._children:
                continue
            with self._session.ledger:
                self.board.cancelled(step.id, reason)
                self._settle(step.id, lets_on=False, status=StepStatus.CANCELLED)
            if number % _AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()

    async def _result(self) -> WorkResult:
        self._tell_percentage()
        states, output = self.board.states, None
        missing: ExecutionError | None = None
        try:
            if self._plan.output is not None:
                output = await self._resolved(self._plan.output)
            else:
                output = await self._outputs(last_steps(self._plan))
        except ExecutionError as error:
            missing = error
        ended = outcome(self._plan, states, output, aborted=self._aborted)
        if missing is not None and ended.success:
            raise missing
        return ended

    async def _outputs(self, steps: Sequence[str]) -> dict[str, Json]:
        outputs: dict[str, Json] = {}
        for step_id in steps[:MOST_OUTPUTS]:
            state = self.board.step(step_id)
            if state.status is StepStatus.COMPLETED and state.result_of is not None:
                outputs[step_id] = await self._host.output(state.result_of)
        return outputs


def _as_failure(error: VesperaError) -> ExecutionError:
    if isinstance(error, ExecutionError):
        return error
    return ExecutionError(error.message, code=error.code, recoverable=False)
