"""What the end of a step means: for the step, for those that need it, and for the plan."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from vespera_exec.engine.plans.strategies import Decision, decided
from vespera_exec.errors import ExecutionError
from vespera_exec.model.enums import EventType, ExecutionStatus, RecoveryAction
from vespera_exec.model.plans.restoring import state_of_plan
from vespera_exec.model.transitions import AT_WORK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.engine.capacity.pools import PoolState
    from vespera_exec.engine.jobs import Run
    from vespera_exec.engine.plans.agenda import Agenda
    from vespera_exec.engine.plans.children import ChildEngine, StepHost
    from vespera_exec.engine.plans.course import Course
    from vespera_exec.engine.plans.going_back import GoingBack
    from vespera_exec.engine.plans.looping import PlanLoop
    from vespera_exec.model.events import Json
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.plans.plan import ExecutionPlan, PlanStep
    from vespera_exec.model.session import ExecutionSession

S = ExecutionStatus
_log = logging.getLogger(__name__)

_REJECTED: Final = "APPROVAL_REJECTED"


class Ends:
    """Of the steps of one plan, and what follows from them."""

    def __init__(
        self,
        session: ExecutionSession,
        plan: ExecutionPlan,
        host: StepHost,
        engine: ChildEngine,
        course: Course,
        agenda: Agenda,
        going_back: GoingBack,
        loop: PlanLoop,
    ) -> None:
        self._session = session
        self._plan = plan
        self._host = host
        self._engine = engine
        self._course = course
        self._agenda = agenda
        self._going_back = going_back
        self._loop = loop

    def concluded(self, step_id: str, life: Lifecycle, run: Run | None) -> None:
        """Its last execution is over, or went on with nobody; `run` None: it ended under another owner."""
        board = self._agenda.board
        if board.step(step_id).status.is_terminal:
            return
        session_id = life.execution_id
        match life.status:
            case S.COMPLETED:
                kept = self._host.answered(self._agenda.steps[step_id], run) if run is not None else None
                with self._session.ledger:
                    board.completed(step_id, session_id=session_id, result_of=session_id)
                    if kept is not None:
                        self._session.ledger.keep(kept)
                    self._agenda.settle(step_id, lets_on=True)
            case S.CANCELLED:
                self._agenda.cancelled(step_id, life.cancellation_reason or "Cancelled")
            case status if not status.is_terminal:
                lost = ExecutionError("its run did not go on under the next owner", code="INTERRUPTED")
                self.failed(step_id, lost, session_id)
            case _:
                said = life.error
                error = ExecutionError(
                    said.get("message") or life.status_message,
                    code=said.get("code"),
                    recoverable=said.get("recoverable", True),
                    context=said.get("context"),
                )
                self.failed(step_id, error, session_id)

    def failed(self, step_id: str, error: ExecutionError, session_id: str | None) -> None:
        """Let the strategies decide where there are any for this, else its fallback, else it has failed for good."""
        step = self._agenda.steps[step_id]
        ending = self._course.aborted is not None or self._session.lifecycle.status is S.CANCELLING
        if ending or not self._engine.strategies.applying(error, step.recovery):
            self._fail(step, error, session_id)
            return
        self._agenda.decide(step_id)
        self._loop.start(self._decide, step, error, session_id, self._course.epoch)

    async def _decide(self, step: PlanStep, error: ExecutionError, session_id: str | None, epoch: int) -> None:
        board, decision = self._agenda.board, None
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
        if epoch != self._course.epoch or self._course.goes_back:
            return
        self._agenda.decided(step.id)
        self._loop.rouse()
        if board.step(step.id).status.is_terminal or self._course.aborted is not None:
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
        board = self._agenda.board
        state = board.step(step.id)
        with self._session.ledger:
            self._announce(step, decision)
            if decision.variables is not None:
                board.set_variables(decision.variables)
            match decision.action:
                case RecoveryAction.RETRY:
                    board.failed(
                        step.id,
                        _told(error),
                        session_id=session_id,
                        final=False,
                        not_before=self._session.ledger.clock.now() + timedelta(seconds=decision.delay_seconds),
                        recoveries=state.recoveries + 1,
                    )
                    self._agenda.retry_later(step.id)
                case RecoveryAction.SKIP:
                    board.skipped(step.id, decision.message, continues=True)
                    self._agenda.settle(step.id, lets_on=True)
                case RecoveryAction.FALLBACK:
                    self._fall_back(step, error, session_id)
                case _:
                    self._fail(step, error, session_id, aborted=decision.message)

    async def _restore_for(
        self, step: PlanStep, error: ExecutionError, session_id: str | None, decision: Decision
    ) -> None:
        """What a strategy has decided; the step has failed where there is no checkpoint to go back to."""
        board, checkpoints, epoch = self._agenda.board, self._engine.checkpoints, self._course.epoch
        now = board.step(step.id)
        found = None
        if checkpoints is not None:
            found = await checkpoints.at(
                self._plan, self._session.session_id, checkpoint_id=decision.checkpoint_id, before=now.started_at
            )
        if epoch != self._course.epoch or board.step(step.id).status.is_terminal:
            return  # put back, or cancelled, meanwhile
        is_ending = self._course.aborted is not None or self._session.lifecycle.status not in (*AT_WORK, S.PAUSED)
        if found is None or is_ending:
            self._fail(step, error, session_id)
            return
        checkpoint_id, then, state = found
        with self._session.ledger:
            self._announce(step, decision)
            board.failed(step.id, _told(error), session_id=session_id, final=False, recoveries=now.recoveries + 1)
        variables = decision.variables if decision.variables is not None else state.variables
        await self._going_back.restore(then, variables, checkpoint_id=checkpoint_id, keeps_recoveries=True)

    def _announce(self, step: PlanStep, decision: Decision) -> None:
        details: dict[str, Json] = {"strategy": decision.strategy_id, "action": decision.action.value}
        details["attempt"] = self._agenda.board.step(step.id).recoveries + 1
        self._session.record_fact(
            EventType.RECOVERY_INITIATED, (), step_id=step.id, message=decision.message, details=details
        )

    def _fail(
        self, step: PlanStep, error: ExecutionError, session_id: str | None, *, aborted: str | None = None
    ) -> None:
        board = self._agenda.board
        # A fallback is not for what somebody has said no to.
        may_go_on = aborted is None and self._course.aborted is None and error.failure_code != _REJECTED
        if step.fallback is not None and not board.step(step.id).is_fallback and may_go_on:
            self._fall_back(step, error, session_id)
            return
        continues = step.continue_on_failure and aborted is None
        told = _told(error)
        if aborted is None and self._plan.on_failure == "abort" and not continues:
            aborted = why_aborted(step.id, told)
        with self._session.ledger:
            board.failed(step.id, told, session_id=session_id, continues=continues, ends_plan=aborted is not None)
            self._agenda.settle(step.id, lets_on=continues)
        if aborted is not None:
            self._course.abort(aborted)

    def _fall_back(self, step: PlanStep, error: ExecutionError, session_id: str | None) -> None:
        self._agenda.board.failed(step.id, _told(error), session_id=session_id, final=False, is_fallback=True)
        self._agenda.put_back(step.id)


def _shown(state: PoolState) -> Mapping[str, Json]:
    pool = state.pool
    return {"name": pool.id, "type": pool.type, "total": pool.capacity, "free": state.available}


def why_aborted(step_id: str, error: Mapping[str, Json]) -> str:
    return f"Step {step_id} failed: {error.get('code')}: {error.get('message')}"


def _told(error: ExecutionError) -> dict[str, Json]:
    return {"code": error.failure_code, "message": error.message}
