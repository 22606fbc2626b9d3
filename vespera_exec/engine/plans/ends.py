"""What the end of a step means: for the step, for those that need it, and for the plan."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel

from vespera_exec.engine.done import Done
from vespera_exec.engine.plans.strategies import Decision, decided
from vespera_exec.engine.plans.telling import Telling
from vespera_exec.errors import Conflict, ExecutionError
from vespera_exec.model.enums import EventType, ExecutionStatus, RecoveryAction, StepStatus
from vespera_exec.model.plans.restoring import put_back, state_of_plan
from vespera_exec.model.plans.schedule import Schedule
from vespera_exec.model.transitions import AT_WORK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anyio.abc import TaskGroup

    from vespera_exec.engine.capacity.pools import PoolState
    from vespera_exec.engine.jobs import Run
    from vespera_exec.engine.plans.children import Child, ChildEngine, StepHost
    from vespera_exec.model.events import Json
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.plans.board import PlanBoard
    from vespera_exec.model.plans.plan import ExecutionPlan, PlanStep
    from vespera_exec.model.plans.steps import StepState
    from vespera_exec.model.session import ExecutionSession

S = ExecutionStatus
_log = logging.getLogger(__name__)

TELLING_SECONDS: Final = 0.1
"""Between two records of how far the steps are."""
AT_ONCE: Final = 16
"""Steps that are begun, or ended, before others in the loop get their turn."""
_REJECTED: Final = "APPROVAL_REJECTED"


class PlanEnds:
    """The part of a `Coordinator` that concludes steps. To be used on the loop, but for `_rouse`."""

    _schedule: Schedule

    def __init__(
        self,
        session: ExecutionSession,
        plan: ExecutionPlan,
        host: StepHost,
        engine: ChildEngine,
        board: PlanBoard | None,
    ) -> None:
        self._session = session
        self._plan = plan
        self._host = host
        self._engine = engine
        self._board: PlanBoard | None = board
        self._telling = Telling(session, host)
        self._steps = {step.id: step for step in plan.steps}
        self._children: dict[str, Child] = {}
        """By step."""
        self._leaving: set[Child] = set()
        """Those that are being ended, since the plan goes back to where they did not run."""
        self._deciding: set[str] = set()
        """Steps whose run has failed, while strategies decide what follows."""
        self._retrying: dict[str, float] = {}
        """Steps that are to be tried again later, and when; a timer of an earlier run of theirs may ring before."""
        self._unmade: list[str] = []
        """Steps that have begun, as the log says, whose child was not made before the owner died."""
        self._doomed: dict[str, str] = {}
        """Steps that can never begin, and why; they are skipped soon."""
        self._left: list[tuple[str, Lifecycle]] = []
        """Steps whose run ended without this coordinator, and how."""
        self._aborted: str | None = None
        """Why the plan is ended before its steps have."""
        self._epoch: int = 0
        """Counts the times when everything was put back or ended; what was begun in another does not count."""
        self._is_open = False
        self.opened = Done()
        """Set once it knows where its steps stand, or has ended."""
        self._paused = False
        self._restoring = False
        self._arrived = Done()
        """Set when the last way back to a checkpoint has come to its end."""
        self._tell_at: float | None = None
        self._told_at = 0.0
        self._timers: list[tuple[float, int, str]] = []
        """When something is due, and the step that it is about."""
        self._turns = itertools.count()
        self._wake = asyncio.Event()
        self._roused = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: int | None = None
        """Of the loop."""
        self._group: TaskGroup | None = None

    @property
    def board(self) -> PlanBoard:
        if self._board is None:
            raise RuntimeError("the board is not read yet")
        return self._board

    @property
    def _now(self) -> float:
        return self._session.ledger.clock.monotonic()

    def _rouse(self) -> None:
        """From any thread."""
        if self._roused or self._loop is None or self._loop.is_closed():
            return
        self._roused = True
        if threading.get_ident() == self._thread:
            self._wake.set()
        else:
            self._loop.call_soon_threadsafe(self._wake.set)

    def _reschedule(self) -> None:
        self._schedule = Schedule(self._plan, self.board.states, now=self._session.ledger.clock.now())
        self._doomed = dict(self._schedule.doomed)
        for step_id in self._schedule.delayed:
            self._retry_later(step_id)
        left, self._left = self._left, []
        for step_id, life in left:
            self._concluded(step_id, life, None)
        self._rouse()

    # what an end means

    def _concluded(self, step_id: str, life: Lifecycle, run: Run | None) -> None:
        if self.board.step(step_id).status.is_terminal:
            return
        session_id = life.execution_id
        match life.status:
            case S.COMPLETED:
                kept = self._host.answered(self._steps[step_id], run) if run is not None else None
                with self._session.ledger:
                    self.board.completed(step_id, session_id=session_id, result_of=session_id)
                    if kept is not None:
                        self._session.ledger.keep(kept)
                    self._settle(step_id, lets_on=True)
            case S.CANCELLED:
                with self._session.ledger:
                    self.board.cancelled(step_id, life.cancellation_reason or "Cancelled")
                    self._settle(step_id, lets_on=False, status=StepStatus.CANCELLED)
            case status if not status.is_terminal:
                lost = ExecutionError("its run did not go on under the next owner", code="INTERRUPTED")
                self._failed(step_id, lost, session_id)
            case _:
                said = life.error
                error = ExecutionError(
                    said.get("message") or life.status_message,
                    code=said.get("code"),
                    recoverable=said.get("recoverable", True),
                    context=said.get("context"),
                )
                self._failed(step_id, error, session_id)

    def _failed(self, step_id: str, error: ExecutionError, session_id: str | None) -> None:
        """Let the strategies decide where there are any for this, else its fallback, else it has failed for good."""
        step, strategies = self._steps[step_id], self._engine.strategies
        ending = self._aborted is not None or self._session.lifecycle.status is S.CANCELLING
        if ending or self._group is None or not strategies.applying(error.failure_code, step.recovery):
            self._fail(step, error, session_id)
            return
        self._deciding.add(step_id)
        self._group.start_soon(self._decide, step, error, session_id, self._epoch)

    async def _decide(self, step: PlanStep, error: ExecutionError, session_id: str | None, epoch: int) -> None:
        board, decision = self.board, None
        state = board.step(step.id)
        # The boundary to the strategies, which are somebody else's code: without an answer the plan's own rules hold.
        try:
            decision = await decided(
                self._engine.strategies,
                step,
                state,
                error,
                plan=self._plan,
                read_state=lambda: state_of_plan(board.states, board.state.variables, current=step.id),
                resources=tuple(_shown(each) for each in self._engine.grants.states()),
                most=self._session.max_recovery_attempts,
            )
        except Exception:  # noqa: BLE001
            _log.exception("The recovery strategies of step %s failed", step.id)
        if epoch != self._epoch:
            return
        self._deciding.discard(step.id)
        self._rouse()
        if board.step(step.id).status.is_terminal or self._aborted is not None:
            return
        if decision is None:
            self._fail(step, error, session_id)
        elif decision.action is RecoveryAction.CHECKPOINT_RESTORE:
            await self._restore_for(step, error, session_id, decision)
        else:
            self._follow_decision(step, error, session_id, decision)

    def _follow_decision(
        self, step: PlanStep, error: ExecutionError, session_id: str | None, decision: Decision
    ) -> None:
        state = self.board.step(step.id)
        with self._session.ledger:
            self._announce(step, decision)
            if decision.variables is not None:
                self.board.set_variables(decision.variables)
            match decision.action:
                case RecoveryAction.RETRY:
                    self.board.failed(
                        step.id,
                        _told(error),
                        session_id=session_id,
                        final=False,
                        not_before=self._session.ledger.clock.now() + timedelta(seconds=decision.delay_seconds),
                        recoveries=state.recoveries + 1,
                    )
                    self._retry_later(step.id)
                case RecoveryAction.SKIP:
                    self.board.skipped(step.id, decision.message, continues=True)
                    self._settle(step.id, lets_on=True)
                case RecoveryAction.FALLBACK:
                    self._fall_back(step, error, session_id)
                case _:
                    self._fail(step, error, session_id, aborted=decision.message)

    def _announce(self, step: PlanStep, decision: Decision) -> None:
        details: dict[str, Json] = {"strategy": decision.strategy_id, "action": decision.action.value}
        details["attempt"] = self.board.step(step.id).recoveries + 1
        self._session.record_fact(
            EventType.RECOVERY_INITIATED, (), step_id=step.id, message=decision.message, details=details
        )

    def _fail(
        self, step: PlanStep, error: ExecutionError, session_id: str | None, *, aborted: str | None = None
    ) -> None:
        state = self.board.step(step.id)
        may_go_on = aborted is None and self._aborted is None and error.failure_code != _REJECTED  # somebody said no
        if step.fallback is not None and not state.is_fallback and may_go_on:
            self._fall_back(step, error, session_id)
            return
        continues = step.continue_on_failure and aborted is None
        told = _told(error)
        if aborted is None and self._plan.on_failure == "abort" and not continues:
            aborted = why_aborted(step.id, told)
        with self._session.ledger:
            self.board.failed(step.id, told, session_id=session_id, continues=continues, ends_plan=aborted is not None)
            self._settle(step.id, lets_on=continues)
        if aborted is not None and self._aborted is None:
            self._aborted = aborted

    def _fall_back(self, step: PlanStep, error: ExecutionError, session_id: str | None) -> None:
        self.board.failed(step.id, _told(error), session_id=session_id, final=False, is_fallback=True)
        self._schedule.put_back(step.id)

    # going back

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
        status = self._session.lifecycle.status
        is_ending = not self._is_open or self._aborted is not None
        if is_ending or self._restoring or self._group is None or status not in (*AT_WORK, S.PAUSED):
            does = "it does so already" if self._restoring else f"it is {status.value}, and ending or not begun"
            raise Conflict(f"The plan cannot go back: {does}", hint="try again")
        with self._session.ledger:
            self.board.going_back(checkpoint_id, variables=variables, keeps_recoveries=keeps_recoveries)
            if status is not S.PAUSED:
                self._session.update_status(S.RECOVERING, f"Back to checkpoint {checkpoint_id}")
        self._set_out(then)
        await self._arrived.wait()
        return not self._restoring and not self.board.state.restoring

    def _set_out(self, then: Mapping[str, StepState] | None) -> None:
        """All of `restore` that comes after its announcement; `then` None: as the log says."""
        assert self._group is not None
        self._restoring, self._arrived = True, Done()
        self._epoch += 1
        self._deciding.clear()
        self._group.start_soon(self._go_back, then, self._epoch)

    async def _go_back(self, then: Mapping[str, StepState] | None, epoch: int) -> None:
        back = self.board.state.restoring
        # The supervisor of the way back: without it the plan would stand for ever.
        try:
            if then is None:
                then = await self._board_at(back["checkpoint_id"])
            await self._leave(f"The plan goes back to checkpoint {back['checkpoint_id']}")
            states = put_back(then, self.board.states, keeps_recoveries=back["keeps_recoveries"])
            steps = iter(states)
            while (some := list(itertools.islice(steps, AT_ONCE))) and self._may_go_back(epoch):
                self.board.go_back({step: states[step] for step in some})
                await anyio.lowlevel.checkpoint()
            with self._session.ledger:
                if self._may_go_back(epoch):
                    self.board.reset(states, back["variables"], checkpoint_id=back["checkpoint_id"])
                    self._restoring = False
                    self._reschedule()
                    if self._session.lifecycle.status is S.RECOVERING:
                        self._session.update_status(S.RUNNING, "The plan goes on")
        except Exception as fault:  # noqa: BLE001
            _log.exception("Plan %s could not go back", self._session.session_id)
            self._aborted = self._aborted or f"It could not go back to checkpoint {back['checkpoint_id']}: {fault}"
        finally:
            self._restoring = False
            self._arrived.set()
            self._rouse()

    def _may_go_back(self, epoch: int) -> bool:
        """Nobody has ended the plan, or asked for that, since it set out."""
        return epoch == self._epoch and self._session.lifecycle.status in (*AT_WORK, S.PAUSED, S.RECOVERING)

    async def _leave(self, reason: str) -> None:
        """End all that runs, and forget what was to begin; what becomes of it no longer counts for its step."""
        gone = list(self._children.values())
        self._children.clear()
        self._leaving.update(gone)
        for child in gone:
            child.run.session.request_cancellation(reason)
        for child in gone:
            await child.run.done.wait()
            child.forget()
            self._telling.capacity(child)
        self._leaving.clear()
        self._retrying.clear()
        self._unmade.clear()
        self._left.clear()

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

    async def _restore_for(
        self, step: PlanStep, error: ExecutionError, session_id: str | None, decision: Decision
    ) -> None:
        """What a strategy has decided; the step has failed where there is no checkpoint to go back to."""
        checkpoints, now, epoch = self._engine.checkpoints, self.board.step(step.id), self._epoch
        found = None
        if checkpoints is not None:
            found = await checkpoints.at(
                self._plan, self._session.session_id, checkpoint_id=decision.checkpoint_id, before=now.started_at
            )
        if epoch != self._epoch or self.board.step(step.id).status.is_terminal:
            return  # put back, or cancelled, meanwhile
        if found is None or self._aborted is not None or self._session.lifecycle.status not in (*AT_WORK, S.PAUSED):
            self._fail(step, error, session_id)
            return
        checkpoint_id, then, state = found
        with self._session.ledger:
            self._announce(step, decision)
            self.board.failed(step.id, _told(error), session_id=session_id, final=False, recoveries=now.recoveries + 1)
        variables = decision.variables if decision.variables is not None else state.variables
        await self.restore(then, variables, checkpoint_id=checkpoint_id, keeps_recoveries=True)

    # inside

    def _settle(self, step_id: str, *, lets_on: bool, status: StepStatus = StepStatus.FAILED) -> None:
        """It has ended: what needs it may begin, or can never begin, and is skipped soon."""
        self._doomed.update(self._schedule.settled(step_id, lets_on, status))
        if self._tell_at is None:
            self._tell_at = max(self._now, self._told_at + TELLING_SECONDS)

    async def _skip_doomed(self) -> None:
        """What can never begin ends, in portions. After a crash in between the next owner finds the rest as doomed."""
        while self._doomed:
            with self._session.ledger:
                for step_id, reason in list(itertools.islice(self._doomed.items(), AT_ONCE)):
                    del self._doomed[step_id]
                    if self._aborted is None:
                        self.board.skipped(step_id, reason)
                    else:
                        self.board.cancelled(step_id, self._aborted)
            await anyio.lowlevel.checkpoint()

    def _retry_later(self, step_id: str) -> None:
        not_before = self.board.step(step_id).not_before
        assert not_before is not None
        delay = (not_before - self._session.ledger.clock.now()).total_seconds()
        self._retrying[step_id] = due = self._now + max(0.0, delay)
        heapq.heappush(self._timers, (due, next(self._turns), step_id))


def _shown(state: PoolState) -> Mapping[str, Json]:
    pool = state.pool
    return {"name": pool.id, "type": pool.type, "total": pool.capacity, "free": state.available}


def why_aborted(step_id: str, error: Mapping[str, Json]) -> str:
    return f"Step {step_id} failed: {error.get('code')}: {error.get('message')}"


def _told(error: ExecutionError) -> dict[str, Json]:
    return {"code": error.failure_code, "message": error.message}
