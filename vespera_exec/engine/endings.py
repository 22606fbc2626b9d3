"""What the end of an execution means: its status, its result, whether another attempt or another worker follows."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import orjson

from vespera_exec.engine.work import InputNeeded, Parked, Stopped, WorkerNeeded
from vespera_exec.errors import CancellationException, ExecutionError, InvalidInput, failure_names_of
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus, MessageLevel
from vespera_exec.model.ledger import ResultRecord
from vespera_exec.model.progress import ProgressReport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.engine.jobs import Job, Outcome, PutBack
    from vespera_exec.engine.work import WorkResult
    from vespera_exec.model.clock import Clock
    from vespera_exec.model.events import Json
    from vespera_exec.model.session import ExecutionSession

S = ExecutionStatus


class Endings:
    """Decides, and records what was decided; whoever calls waits for the disk."""

    def __init__(self, *, owner: str, clock: Clock, result_limit_bytes: int) -> None:
        self._owner = owner
        self._clock = clock
        self._result_limit_bytes = result_limit_bytes

    def conclude(self, job: Job, outcome: Outcome) -> Job | None:
        """Decide what the outcome means; the next attempt, where there is one, or `job`, where that is parked."""
        session, error = job.session, outcome.error or _reported(outcome.result)
        result = error.reached if isinstance(error, Stopped) else outcome.result
        if isinstance(error, WorkerNeeded) and outcome.rung is not None:
            outcome = replace(outcome, rung="abandoned")
        details = _details(outcome)
        record = None
        try:
            record = self._record(session, result)
        except TypeError as fault:
            error = ExecutionError(f"The result is not JSON: {fault}", code="BAD_RESULT", recoverable=False)
        with job.task.ledger:
            if session.lifecycle.status.is_terminal:
                return None  # concluded by somebody else
            if outcome.put_back is not None and session.lifecycle.status is not S.CANCELLING:
                put_back(session, outcome.put_back, standing=_standing(session, outcome.pause_wanted))
                return job
            if session.lifecycle.status is S.PAUSED and not isinstance(error, WorkerNeeded):
                session.resume("The work has ended")
            for warning in result.warnings if result else ():
                session.note(MessageLevel.WARNING, warning)
            if isinstance(error, CancellationException) and not outcome.timed_out:
                session.request_cancellation(error.reason)
            if session.lifecycle.status is S.CANCELLING:
                session.end_cancelled(outcome=details, result=record)
            elif outcome.timed_out:
                limit = job.policy.timeout_seconds
                late = ExecutionError(f"Timed out after {limit:g} seconds of work", code="TIMEOUT")
                return self._fail(job, late, details, record, timed_out=True)
            elif isinstance(error, Parked):
                return self._put_aside(job, error, details, outcome.pause_wanted)
            elif error is not None:
                return self._fail(job, error, details, record)
            else:
                session.update_status(S.COMPLETING, "Finalizing")
                session.enter_phase(ExecutionPhase.FINALIZATION, "Finalizing")
                session.complete("Execution completed successfully", outcome=details, result=record)
        return None

    def _put_aside(self, job: Job, parked: Parked, details: Mapping[str, Json], pause_wanted: str | None) -> Job | None:
        """`job`, which is parked; or as `_fail`, where what it asks cannot be asked."""
        if isinstance(parked, WorkerNeeded):
            return self._offer_again(job, str(parked), details, pause_wanted)
        job.session.end_lease(f"It has to wait: {parked}")
        if not isinstance(parked, InputNeeded):
            job.session.park(str(parked))
            return job
        problem = "it asks what has been answered"
        try:
            if job.session.ask(parked.questions):
                return job
        except InvalidInput as error:
            problem = error.message
        return self._fail(job, ExecutionError(problem, code="BAD_QUESTION", recoverable=False), details, None)

    def _offer_again(self, job: Job, why: str, details: Mapping[str, Json], pause_wanted: str | None) -> Job | None:
        """To RECOVERING, for the next worker; one that is, or was to be, paused stands still first.

        As `_fail`, where that was too often.
        """
        session, before = job.session, job.session.lifecycle
        session.end_lease(why)
        if before.recovery_attempts >= session.max_recovery_attempts:
            last = f"{why}; that was the last of {session.max_recovery_attempts} recoveries"
            return self._fail(job, ExecutionError(last, code="WORKER_LOST"), details, None)
        at = before.checkpoint_at.isoformat() if before.checkpoint_at is not None else None
        _recover(session, why, {"checkpoint_at": at}, standing=_standing(session, pause_wanted))
        return job

    def _fail(
        self,
        job: Job,
        error: BaseException,
        details: Mapping[str, Json],
        record: ResultRecord | None,
        *,
        timed_out: bool = False,
    ) -> Job | None:
        session, rule = job.session, job.policy.retry
        recoverable = getattr(error, "recoverable", True)
        attempt = session.lifecycle.attempt
        if rule is not None and recoverable and any(rule.applies(each, attempt) for each in failure_names_of(error)):
            following = job.task.execution.fail_for_retry(
                error,
                retry_at=self._clock.now() + timedelta(seconds=rule.delay(attempt)),
                owner=self._owner,
                timed_out=timed_out,
                outcome=details,
                result=record,
            )
            return replace(job, session=following) if following is not None else None
        if timed_out:
            session.time_out(str(error), outcome=details, result=record)
        else:
            session.fail(error, outcome=details, result=record)
        return None

    def _record(self, session: ExecutionSession, result: WorkResult | None) -> ResultRecord | None:
        if result is None or result.output is None:
            return None
        body = orjson.dumps(result.output, option=orjson.OPT_NON_STR_KEYS, default=str)
        limit = self._result_limit_bytes
        if len(body) <= limit:
            return ResultRecord(execution_id=session.session_id, body=body)
        head = body[: limit // 2].decode("utf-8", "ignore")
        cut = orjson.dumps({"truncated": True, "size_bytes": len(body), "head": head})
        return ResultRecord(execution_id=session.session_id, body=cut, truncated=True)


def put_back(session: ExecutionSession, place: PutBack, *, standing: str | None) -> None:
    """To RECOVERING, to go on from `place`; where it is to stand still (`standing` says why), it does that first.

    Raises:
        InvalidTransitionError: its recoveries are used up, or it has ended. Nothing has changed.
    """
    with session.ledger:
        why = f"It goes back to checkpoint {place.checkpoint_id}"
        session.end_lease(why)
        details: dict[str, Json] = {"checkpoint_id": place.checkpoint_id}
        _recover(session, why, details, standing=standing)
        session.put_checkpoint_back(place.checkpoint, place.checkpoint_at, checkpoint_id=place.checkpoint_id)
        session.report(ProgressReport(current=place.percentage, message=why, reset=True))


def _recover(session: ExecutionSession, why: str, details: Mapping[str, Json], *, standing: str | None) -> None:
    session.recover(why, details=details)
    session.enter_phase(ExecutionPhase.RECOVERY, why)
    if standing is not None:
        session.update_status(S.PREPARING, "It is to stand still, and does")
        session.pause(standing)


def _standing(session: ExecutionSession, pause_wanted: str | None) -> str | None:
    """Why it is to stand still; None where it is not to."""
    life = session.lifecycle
    return life.status_message if life.status is S.PAUSED else pause_wanted


def _reported(result: WorkResult | None) -> ExecutionError | None:
    """The failure that the work itself reports."""
    if result is None or result.success:
        return None
    return ExecutionError(
        result.error or "Execution failed",
        code=result.error_code,
        recoverable=result.recoverable,
        context=dict(result.error_context),
    )


def _details(outcome: Outcome) -> dict[str, Json]:
    details: dict[str, Json] = {}
    if outcome.rung is not None:
        details["rung"] = outcome.rung
        details["forced"] = outcome.rung not in ("token", "sigint")
    if outcome.result is not None:
        if outcome.result.returncode is not None:
            details["returncode"] = outcome.result.returncode
        if outcome.result.quality_score is not None:
            details["quality_score"] = outcome.result.quality_score
    return details
