"""The coordinator of a plan: begins its steps when their turn comes, follows them, and decides what their ends mean."""

from __future__ import annotations

import asyncio
import heapq
import math
import threading
from collections import deque
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel

from vespera_exec.engine.plans.children import QUEUED_SECONDS, Child
from vespera_exec.engine.plans.control import PlanControl
from vespera_exec.engine.plans.ends import AT_ONCE, TELLING_SECONDS, why_aborted
from vespera_exec.engine.plans.outputs import PlanOutputs
from vespera_exec.engine.work import Stopped
from vespera_exec.errors import CancellationException, ExecutionError, VesperaError
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus, StepStatus
from vespera_exec.model.events import new_id
from vespera_exec.model.plans.board import PlanBoard
from vespera_exec.model.plans.schedule import Schedule
from vespera_exec.model.transitions import AT_WORK

if TYPE_CHECKING:
    from vespera_exec.engine.jobs import Run
    from vespera_exec.engine.plans.children import ChildEngine, StepHost
    from vespera_exec.engine.work import Work, WorkResult
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.plans.plan import ExecutionPlan
    from vespera_exec.model.session import ExecutionSession

S = ExecutionStatus

_STANDING_BY_SECONDS: Final = 1.0
"""That everything has to wait before the clock of the plan's work stands."""


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
        engine: ChildEngine,
        *,
        board: PlanBoard | None = None,
        refused: ExecutionError | None = None,
    ) -> None:
        """`board` None: an earlier owner has opened it, and it is read from the store.

        `refused`: why the plan does not go on; all that it does is to end what is open.
        """
        super().__init__(session, plan, host, engine, board)
        self._refused = refused
        self._outputs = PlanOutputs(plan, host)
        self._news: deque[Child] = deque()
        self._moved: set[Child] = set()
        """Those of which something is to be told with the next tick."""
        self._percentage = -1.0
        self._checkpoint_at: float | None = None
        self._checkpointed = 0
        self._waits_since: float | None = None
        self._is_aborting = False
        self._pause_told = False

    async def run(self, work: Work) -> WorkResult:
        """The outcome of the plan, once nothing of it runs any more.

        Raises:
            CancellationException: it was asked to stop, and has.
        """
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
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
                        await self._wind_up(self._aborted or "The plan has failed")
                self._group.cancel_scope.cancel()
        finally:
            undo()
            self._is_open = False
            self.opened.set()
            self._arrived.set()
            for child in self._children.values():
                child.forget()
        if isinstance(ended, Exception):
            raise ended
        return ended

    async def _coordinated(self, work: Work) -> WorkResult:
        if self._refused is not None:
            self._aborted = self._refused.message
        await self._open()
        if self._refused is not None:
            return await self._as_refused(self._refused)
        while True:
            if work.token.is_cancelled or self._session.lifecycle.status is S.CANCELLING:
                reason = work.token.cancellation_reason or self._session.lifecycle.cancellation_reason or "Cancelled"
                await self._wind_up(reason)
                raise Stopped(reason, await self._result())
            await self._heed_news()
            self._heed_pause()
            self._heed_time()
            await self._skip_doomed()
            if self._aborted is not None:
                await self._abort(self._aborted)
            else:
                await self._begin_ready(work)
            if self._is_over:
                self._is_open = False  # nothing can change it from here on
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
            if not self._paused and self._session.lifecycle.status is not S.PAUSED:
                self._let_go()  # an owner may have died in the middle of a pause, or of its end
            ending = next((state for state in self.board.states.values() if state.ends_plan), None)
            if ending is not None:
                self._aborted = why_aborted(ending.step_id, ending.error)
        if self.board.state.restoring:
            self._schedule = Schedule(self._plan, self.board.states)
            self._set_out(None)
        else:
            self._reschedule()
        self._is_open = True
        self.opened.set()
        await anyio.lowlevel.checkpoint()  # of a large plan, that was much
        if self._plan.checkpoint_interval_seconds:
            self._checkpoint_at = self._now + self._plan.checkpoint_interval_seconds

    async def _find_children(self) -> None:
        """After a restart: follow what goes on, conclude what has ended, make what was never made."""
        going_on: dict[str, Lifecycle] = {}
        for state in list(self.board.states.values()):
            if state.status not in (StepStatus.RUNNING, StepStatus.WAITING) or state.task_id is None:
                continue
            run = self._engine.run_of(state.task_id)
            if run is not None and run.run_id == state.run_id:
                going_on[state.step_id] = run.session.lifecycle
                self._follow(state.step_id, run)
            elif attempts := await self._host.attempts(state.run_id or ""):
                self._left.append((state.step_id, attempts[-1]))
            else:
                self._unmade.append(state.step_id)
        await self._telling.missed(self.board, going_on)

    # beginning

    async def _begin_ready(self, work: Work) -> None:
        while self._unmade and not self._is_held(work):
            await self._begin(self._unmade.pop(), work)
        begun = 0
        while len(self._children) + len(self._deciding) < self._plan.max_parallel and not self._is_held(work):
            if (step_id := self._schedule.pop()) is None:
                return
            if not self.board.step(step_id).status.is_terminal:
                await self._begin(step_id, work)
            if (begun := begun + 1) % AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()
                await self._heed_news()

    def _is_held(self, work: Work) -> bool:
        return self._paused or self._restoring or self._aborted is not None or work.token.is_cancelled

    async def _begin(self, step_id: str, work: Work) -> None:
        """Make the step's child, or end it where its output is known or it cannot begin."""
        step, state, epoch = self._steps[step_id], self.board.step(step_id), self._epoch
        fallback = step.fallback if state.is_fallback else None
        role = fallback.role if fallback is not None else step.role
        given = step.inputs if fallback is None or fallback.inputs is None else fallback.inputs
        announced, after = (None, state.run_id) if state.status is StepStatus.PENDING else (state.task_id, None)
        made: VesperaError | None = None
        ready = None
        try:
            inputs = await self._outputs.resolved(dict(given), self.board)
            ready = await self._host.ready(step, role, inputs, task_id=announced, after=after)
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

    def _follow(self, step_id: str, run: Run) -> None:
        child = self._children[step_id] = Child(step_id, run, self._hear, now=self._now)
        state = self.board.step(step_id)
        if state.status is StepStatus.WAITING:  # as an earlier owner has said
            child.shown, child.since = (state.waiting_for, state.message), self._now - QUEUED_SECONDS
            short = self._engine.waits_for(run.session.session_id)
            child.wants_capacity = f"Waiting for {short}" if short is not None else ""
        run.done.then(lambda: self._hear(child))
        self._look_at(child)
        heapq.heappush(self._timers, (self._now + QUEUED_SECONDS, next(self._turns), step_id))

    # what is heard

    def _hear(self, child: Child) -> None:
        """From any thread."""
        self._news.append(child)
        self._rouse()

    async def _heed_news(self) -> None:
        for number in range(1, len(self._news) + 1):
            child = self._news.popleft()
            child.is_told = False
            if self._children.get(child.step) is not child:
                continue
            if child.run.done.is_set():
                self._end(child)
            else:
                self._telling.capacity(child)
                self._look_at(child)
            if number % AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()

    def _end(self, child: Child) -> None:
        del self._children[child.step]
        self._moved.discard(child)
        child.forget()
        self._telling.capacity(child)
        self._telling.notes(child)
        self._concluded(child.step, child.run.session.lifecycle, child.run)

    def _look_at(self, child: Child) -> None:
        """Record what it waits for, where that is new; how far it is comes with the next tick."""
        waits = child.waits_for(self._now, held=self._paused)
        if waits != child.shown:
            child.shown = waits
            self.board.waiting(child.step, *waits)
        if child not in self._moved:
            self._moved.add(child)
            if self._tell_at is None:
                self._tell_at = max(self._now, self._told_at + TELLING_SECONDS)

    def _heed_pause(self) -> None:
        """What waits for its turn waits for the end of a pause, from its beginning on."""
        if self._paused is not self._pause_told:
            self._pause_told = self._paused
            for child in self._children.values():
                self._look_at(child)

    def _heed_time(self) -> None:
        """What is due, or the first of it, where that is much: `_rest` comes back at once for what is left."""
        now = self._now
        for _ in range(AT_ONCE):
            if not self._timers or self._timers[0][0] > now:
                break
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
            if not self._restoring and self._session.ledger.sequence(self._session.session_id) > self._checkpointed:
                self.checkpoint("interval")
                self._checkpointed = self._session.ledger.sequence(self._session.session_id)

    def _tell(self) -> None:
        """How far the steps are, and so the plan."""
        moved = list(islice(self._moved, AT_ONCE))
        self._moved.difference_update(moved)
        self._told_at = self._now
        self._tell_at = self._told_at if self._moved else None
        for child in moved:
            if self._children.get(child.step) is not child:
                continue  # the plan went back to where it did not run
            before, reached = self.board.step(child.step).percentage or 0.0, child.percentage
            if reached is not None and reached - before >= 1.0:
                self.board.progress(child.step, min(reached, 100.0))
            self._telling.notes(child)
        if not self._moved:
            self._tell_percentage()

    def _tell_percentage(self) -> None:
        reached = self.board.percentage
        if abs(reached - self._percentage) >= 1.0 and self._session.lifecycle.status in AT_WORK:
            self._percentage = reached
            ended = sum(number for status, number in self.board.counts.items() if status.is_terminal)
            self._session.milestone(reached, f"{ended} of {len(self._steps)} steps")

    # standing and ending

    @property
    def _is_over(self) -> bool:
        busy = self._children or self._deciding or self._unmade or self._doomed or self._paused or self._restoring
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

    async def _wind_up(self, reason: str) -> None:
        """End all of it before its own end: what goes on, and then what has not begun."""
        self._epoch += 1
        self._deciding.clear()
        self._aborted = self._aborted or reason
        await self._end_children(reason)
        if self._board is not None:
            if not self._is_open:
                self._schedule = Schedule(self._plan, self.board.states)
                self._doomed = dict(self._schedule.doomed)
            for child in list(self._children.values()):
                self._end(child)
            await self._cancel_rest(reason)

    async def _end_children(self, reason: str) -> None:
        """Cancel them, and wait until nothing of them is left: each ends by its own ladder, which bounds it.

        That their ends are on disk is not waited for, which may take as long as the disk refuses: the plan's own end
        comes after theirs in the log.
        """
        known = {child.run for child in (*self._children.values(), *self._leaving)}
        unknown = [run for run in self._engine.runs_of(self._session.session_id) if run not in known]
        for run in (*known, *unknown):
            run.session.request_cancellation(reason)
        going_on = {child for child in (*self._children.values(), *self._leaving) if not child.is_over}
        while going_on:
            while self._news:  # those first that came before: whoever is in it does not rouse us
                child = self._news.popleft()
                child.is_told = False
                if child.is_over:
                    going_on.discard(child)
            if going_on:
                await self._wake.wait()
                self._wake.clear()
                self._roused = False
        for run in unknown:  # a fault came before they were followed
            await run.done.wait()

    async def _abort(self, reason: str) -> None:
        """End what goes on, and all that has not begun."""
        if self._is_aborting:
            return
        self._is_aborting = True
        self._epoch += 1
        self._deciding.clear()
        for child in list(self._children.values()):
            child.run.session.request_cancellation(reason)
        await self._cancel_rest(reason)

    async def _cancel_rest(self, reason: str) -> None:
        self._unmade.clear()
        self._retrying.clear()
        await self._skip_doomed()
        for number, step in enumerate(self._plan.steps, 1):
            if self.board.step(step.id).status.is_terminal or step.id in self._children or step.id in self._doomed:
                continue
            with self._session.ledger:
                self.board.cancelled(step.id, reason)
                self._settle(step.id, lets_on=False, status=StepStatus.CANCELLED)
            if number % AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()
        await self._skip_doomed()

    async def _result(self) -> WorkResult:
        self._tell_percentage()
        return await self._outputs.result(self.board, aborted=self._aborted)

    async def _as_refused(self, refused: ExecutionError) -> WorkResult:
        await self._wind_up(refused.message)
        return replace(
            await self._result(),
            error=refused.message,
            error_code=refused.failure_code,
            recoverable=refused.recoverable,
            error_context=refused.context,
        )


def _as_failure(error: VesperaError) -> ExecutionError:
    if isinstance(error, ExecutionError):
        return error
    return ExecutionError(error.message, code=error.code, recoverable=False)
