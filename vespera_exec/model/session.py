"""One execution: decides, records, and shows where it stands."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vespera_exec.errors import ExecutionError, InvalidInput, InvalidTransitionError
from vespera_exec.model import transitions
from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus, MessageLevel
from vespera_exec.model.events import Json, new_id
from vespera_exec.model.faults import fault, fault_of
from vespera_exec.model.holding import HoldingLog
from vespera_exec.model.inputs import MAX_QUESTIONS
from vespera_exec.model.jsonable import details_of
from vespera_exec.model.leases import Lease, digest_of, new_key
from vespera_exec.model.ledger import Ledger
from vespera_exec.model.lifecycle import Lifecycle, idle
from vespera_exec.model.progress import Progress
from vespera_exec.model.stays import PARKED
from vespera_exec.model.stopwatch import Stopwatch, unread_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime, timedelta

    from vespera_exec.model.cancellation import CancellationToken
    from vespera_exec.model.inputs import Answer, Question
    from vespera_exec.model.ledger import ResultRecord
    from vespera_exec.model.progress import CustomMetric

MAX_EVENTS = 1000
MAX_SAMPLES = 1000
AWAITING_INPUT = "awaiting_input"
"""The reason, in the details of the change to PAUSED, of one that waits for an answer."""

S = ExecutionStatus
# Looked up once: in Python 3.11 that takes as long as a function call.
_IDLE = S.IDLE
_CANCELLED = (S.CANCELLING, S.CANCELLED)
_STATUS_CHANGE = EventType.STATUS_CHANGE
_LEVELS = {EventType.ERROR: MessageLevel.ERROR}
_log = logging.getLogger(__name__)


class ExecutionSession(HoldingLog):
    """One attempt at a task, in memory or in an engine.

    `execution_id` is `session_id`. Thread-safe. Every public method either changes the state and records
    it, or raises and changes nothing. Alone it needs no loop, store or thread; within a task it shares
    the task's ledger, and so the task's order of facts.
    """

    def __init__(
        self,
        session_id: str | None = None,
        task_id: str = "",
        role_name: str | None = None,
        *,
        ledger: Ledger | None = None,
        clock: Clock = SYSTEM_CLOCK,
        max_events: int = MAX_EVENTS,
        max_samples: int = MAX_SAMPLES,
        max_recovery_attempts: int = 3,
        cancellation_token: CancellationToken | None = None,
        custom_metrics: Mapping[str, CustomMetric] | None = None,
        monitoring_enabled: bool = True,
        baseline: timedelta | None = None,
        on_end: Callable[[ExecutionSession], None] | None = None,
    ) -> None:
        identity = session_id or new_id()
        super().__init__(
            idle(identity, task_id, role_name),
            ledger=ledger if ledger is not None else Ledger(clock=clock),
            max_events=max_events,
            max_samples=max_samples,
            baseline=baseline,
            monitoring_enabled=monitoring_enabled,
        )
        self.max_recovery_attempts = max_recovery_attempts
        if custom_metrics:
            self._custom_metrics = custom_metrics
        self._on_end = on_end
        if cancellation_token is not None:
            self.cancellation_token = cancellation_token

    @classmethod
    def restored(
        cls,
        lifecycle: Lifecycle,
        progress: Progress,
        *,
        measured_at: datetime | None = None,
        ledger: Ledger | None = None,
        **options: Any,
    ) -> ExecutionSession:
        """The session that these stored values describe.

        Its clocks go on from the last event that they know of, or from `measured_at`, when its work was last
        measured; the time without an owner is in none. Record a `change_owner` with it: the facts of the new owner
        are timed from there.
        """
        session = cls(lifecycle.execution_id, lifecycle.task_id, ledger=ledger, **options)
        session._life.value = lifecycle
        session._progress.value = progress
        if lifecycle.status.is_terminal:
            session._ledger.unlisten(session._stream.emit)
        else:
            session._ledger.resume_at(lifecycle.execution_id, max(lifecycle.sequence, progress.sequence))
            clock = session._ledger.clock
            last = max(progress.updated_at, measured_at or progress.updated_at)
            unread = unread_seconds(lifecycle, last, clock.now())
            parked = lifecycle.is_parked
            session._watch.value = Stopwatch.of(lifecycle.status, clock.monotonic() - unread, parked=parked)
        return session

    @classmethod
    def from_dict(cls, data: Mapping[str, Json], *, ledger: Ledger | None = None, **options: Any) -> ExecutionSession:
        life, progress = Lifecycle.from_dict(data["lifecycle"]), Progress.from_dict(data["progress"])
        return cls.restored(life, progress, ledger=ledger, **options)

    @property
    def cancellation_token(self) -> CancellationToken | None:
        return self._token

    @cancellation_token.setter
    def cancellation_token(self, token: CancellationToken | None) -> None:
        if self._token is not None:
            self._token.forget(self._token_cancelled)
        self._token = token
        if token is not None:
            token.on_cancel(self._token_cancelled)

    # status

    def start_execution(self, role_name: str | None = None) -> None:
        """IDLE (or PENDING) to PREPARING. None keeps the role it was made with.

        Raises:
            InvalidTransitionError: it has been started before.
        """
        with self._ledger:
            if self._life.value.status not in (S.IDLE, S.PENDING):
                transitions.check(self._life.value.status, S.IDLE)
            self._transition(S.PREPARING, "Execution session started", role=role_name)

    def enqueue(
        self,
        *,
        run_id: str | None = None,
        attempt: int = 1,
        parent_execution_id: str | None = None,
        priority: int = 5,
        not_before: datetime | None = None,
        owner: str | None = None,
        checkpoint: Json = None,
        checkpoint_at: datetime | None = None,
        inputs: Sequence[Question] = (),
        restored_from: str | None = None,
        message: str = "Queued",
    ) -> None:
        """IDLE to PENDING: accepted, and waiting for its turn.

        `checkpoint` is of an earlier attempt, `checkpoint_at` when that recorded it; without the latter there is none.
        `inputs` are what earlier attempts have asked; what was answered is not asked again. `restored_from` is the
        checkpoint of an execution that has ended, from which this one begins.
        """
        made: dict[str, Json] = {"attempt": attempt, "parent": parent_execution_id, "priority": priority}
        made |= {"run_id": run_id or self.session_id, "owner": owner}
        made["not_before"] = not_before.isoformat() if not_before else None
        if checkpoint_at is not None:
            made |= {"checkpoint": checkpoint, "checkpoint_at": checkpoint_at.isoformat()}
        if answered := [each.to_dict() for each in inputs if each.answer is not None]:
            made["inputs"] = answered
        if restored_from is not None:
            made["restored_from"] = restored_from
        with self._ledger:
            self._transition(S.PENDING, message, made=made)

    def update_status(self, new_status: ExecutionStatus, message: str = "") -> bool:
        """Change the status as the table allows; False, without an event, when it is that already.

        Raises:
            InvalidTransitionError: the table does not list the change. Nothing has changed.
        """
        with self._ledger:
            error = None
            if new_status in (S.FAILED, S.TIMED_OUT):
                code = "TIMEOUT" if new_status is S.TIMED_OUT else "EXECUTION_FAILED"
                error = fault(message, code=code, kind=None, phase=self.current_phase)
            return self._transition(new_status, message, error=error)

    def pause(self, reason: str = "", *, details: Mapping[str, Json] | None = None) -> bool:
        """To PAUSED; the clock stops. Call it when the work has really stopped."""
        with self._ledger:
            return self._transition(S.PAUSED, reason, details=details)

    def resume(self, reason: str = "", *, queued: bool = False) -> bool:
        """From PAUSED back to where it was paused. `queued`: it waits for its turn first, up to its next phase."""
        with self._ledger:
            origin = self._life.value.paused_from
            if self._life.value.status is not S.PAUSED or origin is None:
                raise InvalidTransitionError(self.status.value, "resumed", ())
            self._transition(origin, reason)
            if queued:
                self._ledger.put(self._watch, Stopwatch(queued=self._ledger.clock.monotonic()))
            return True

    def park(self, reason: str, *, details: Mapping[str, Json] | None = None) -> None:
        """To PAUSED, since its work has ended for now and is called again later. Nothing of it runs meanwhile.

        Raises:
            InvalidTransitionError: it is not at work.
        """
        with self._ledger:
            self.enter_phase(self.current_phase or ExecutionPhase.INITIALIZATION)
            self.phases.exit(reason, outcome=PARKED)
            self.release_capacity("Nothing of it runs")
            self.pause(reason, details=details)

    def stand_by(self, reason: str) -> None:
        """Leave its phase, since all that it does is to wait. The clock of its work stands until the next phase."""
        with self._ledger:
            if self.phases.exit(reason, outcome=PARKED):
                self._ledger.put(self._watch, Stopwatch(queued=self._ledger.clock.monotonic()))

    def ask(self, questions: Sequence[Question]) -> tuple[Question, ...]:
        """Record what was not asked before, and park until the last of them is answered; those that are open.

        Empty, and nothing has changed, where all of them were answered before.

        Raises:
            InvalidInput: they are more than 32 in this run.
            InvalidTransitionError: it is not at work.
        """
        with self._ledger:
            known = {each.key: each for each in self._life.value.inputs}
            new = {each.key: each for each in questions if each.key not in known}
            if len(known) + len(new) > MAX_QUESTIONS:
                raise InvalidInput(f"a run asks at most {MAX_QUESTIONS} questions")
            if not new and all(known[each.key].answer is not None for each in questions):
                return ()
            for each in new.values():
                self._record(
                    EventType.APPROVAL_REQUESTED,
                    phase=self.current_phase,
                    message=each.message,
                    details=each.details(),
                )
            waiting = self._life.value.open_inputs
            keys = ", ".join(each.key for each in waiting)
            self.park(f"Waiting for an answer: {keys}", details={"reason": AWAITING_INPUT})
            return waiting

    def answer(self, answers: Mapping[str, Answer], *, by: str) -> tuple[str, ...]:
        """Record answers to open questions; which they were. Other keys are passed over.

        After the last one it goes on; an approval that is not given ends it FAILED, with code APPROVAL_REJECTED.

        Raises:
            InvalidInput: the content of one does not fit its form. Nothing has changed.
        """
        with self._ledger:
            waiting = [each for each in self._life.value.open_inputs if each.key in answers]
            given = [(each, each.checked(answers[each.key])) for each in waiting]
            for question, answer in given:
                kind = EventType.APPROVAL_APPROVED if answer.accepted else EventType.APPROVAL_REJECTED
                self._record(
                    kind,
                    message=f"{question.key}: {answer.action}",
                    details={"key": question.key, **answer.told(), "by": by},
                )
            rejected = next((question for question, answer in given if question.is_rejected_by(answer)), None)
            if rejected is not None:
                text = f"Not approved by {by}: {rejected.key}"
                self.fail(ExecutionError(text, code="APPROVAL_REJECTED", recoverable=False))
            elif given and not self._life.value.open_inputs and self._life.value.status is S.PAUSED:
                self.resume("Answered")
            return tuple(each.key for each in waiting)

    def recover(self, reason: str, *, details: Mapping[str, Json] | None = None) -> bool:
        """To RECOVERING, from a fault or a dead owner.

        Raises:
            InvalidTransitionError: the recovery attempts are used up.
        """
        with self._ledger:
            if self._life.value.recovery_attempts >= self.max_recovery_attempts:
                raise InvalidTransitionError(self.status.value, S.RECOVERING.value, (S.FAILED.value,))
            self.release_capacity(reason)
            return self._transition(S.RECOVERING, reason, details=details)

    def complete(
        self, message: str = "", *, outcome: Mapping[str, Json] | None = None, result: ResultRecord | None = None
    ) -> bool:
        """To COMPLETED, through COMPLETING where that was not entered. `result` is stored with it.

        Called while CANCELLING it ends CANCELLED: the request was first.
        """
        with self._ledger:
            status = self._life.value.status
            if status.is_terminal:
                return False
            if status is S.CANCELLING:
                return self.end_cancelled(outcome={**(outcome or {}), "finished_anyway": True}, result=result)
            if status is S.PAUSED:
                self.resume()
            if self._life.value.status is not S.COMPLETING:
                self._transition(S.COMPLETING, message)
            return self._transition(S.COMPLETED, message, outcome=outcome, result=result)

    def fail(
        self,
        error: BaseException | str,
        *,
        outcome: Mapping[str, Json] | None = None,
        result: ResultRecord | None = None,
    ) -> bool:
        """To FAILED, with the error kept in `error_context`; False when it had ended."""
        with self._ledger:
            status = self._life.value.status
            if status.is_terminal:
                return False
            if status is S.CANCELLING:
                return self.end_cancelled(outcome={**(outcome or {}), "cleanup_error": str(error)}, result=result)
            context = fault_of(error, self.current_phase)
            return self._transition(S.FAILED, context["message"], outcome=outcome, error=context, result=result)

    def time_out(
        self, message: str = "", *, outcome: Mapping[str, Json] | None = None, result: ResultRecord | None = None
    ) -> bool:
        """To TIMED_OUT; False when it had ended."""
        with self._ledger:
            if self._life.value.status.is_terminal:
                return False
            if self._life.value.status is S.CANCELLING:
                return self.end_cancelled(outcome=outcome, result=result)
            text = message or "Timed out"
            error = fault(text, code="TIMEOUT", kind="Timeout", phase=self.current_phase)
            return self._transition(S.TIMED_OUT, text, outcome=outcome, error=error, result=result)

    def end_cancelled(self, *, outcome: Mapping[str, Json] | None = None, result: ResultRecord | None = None) -> bool:
        """CANCELLING (or PENDING) to CANCELLED, once everything of it is gone."""
        with self._ledger:
            reason = self._life.value.cancellation_reason or ""
            return self._transition(S.CANCELLED, reason, outcome=outcome, result=result)

    def request_cancellation(self, reason: str = "") -> bool:
        """Ask it to stop. True when the request is accepted or was made before; False when it is too late.

        PENDING ends at once; COMPLETING and the ended refuse.
        """
        with self._ledger:
            status = self._life.value.status
            if status is S.CANCELLING:
                return True
            if status.is_terminal or status in (S.COMPLETING, S.IDLE):
                return False
            if status is S.PENDING:
                self._transition(S.CANCELLED, reason, details={"reason": reason})
            else:
                text = f"Cancellation requested: {reason}" if reason else "Cancellation requested"
                self._transition(S.CANCELLING, text, details={"reason": reason})
            return True

    # the worker, where it is done elsewhere

    def grant_lease(self, worker: str, principal: str, *, seconds: float) -> str:
        """Give it to a worker; the key that this one shows from now on, of which the log has only the digest.

        Raises:
            InvalidTransitionError: the execution has ended, or a worker has it.
        """
        with self._ledger:
            self._refuse_after_the_end("lease")
            life = self._life.value
            if life.lease is not None:
                raise InvalidTransitionError(life.status.value, "claimed again", ())
            key = new_key()
            lease = Lease(
                worker=worker,
                principal=principal,
                fence=life.claims + 1,
                seconds=seconds,
                digest=digest_of(key),
            )
            self._record(EventType.LEASE_GRANTED, message=f"Claimed by {worker}", details={"lease": lease.to_dict()})
            return key

    def end_lease(self, reason: str) -> bool:
        """Fence the worker off; False when none had it.

        Raises:
            InvalidTransitionError: the execution has ended.
        """
        with self._ledger:
            self._refuse_after_the_end("lease")
            lease = self._life.value.lease
            if lease is None:
                return False
            details: dict[str, Json] = {"worker": lease.worker, "fence": lease.fence}
            self._record(EventType.LEASE_ENDED, message=reason, details=details)
            return True

    # inside

    def _transition(
        self,
        new: ExecutionStatus,
        message: str,
        *,
        details: Mapping[str, Json] | None = None,
        made: dict[str, Json] | None = None,
        role: str | None = None,
        outcome: Mapping[str, Json] | None = None,
        error: Mapping[str, Json] | None = None,
        result: ResultRecord | None = None,
    ) -> bool:
        """Within a decision: `new`, with its milestones; False where it is that already."""
        ledger, life = self._ledger, self._life.value
        old, ends = life.status, new.is_terminal
        if old is new:
            return False
        transitions.check(old, new, life.paused_from)
        if ends and life.capacity and self.release_capacity("It has ended"):
            life = self._life.value
        now = ledger.clock.monotonic()
        noted = details_of(details)
        if clock := self._watch.value.reading(life, now, leaves_phase=ends):
            noted["clock"] = clock
        ledger.put(self._watch, Stopwatch.of(new, now, parked=life.is_parked))
        if role is not None:
            noted["role"] = role
        if old is _IDLE:
            noted["session"] = {**_MADE, "run_id": life.execution_id, **(made or {}), "role": role or life.role_name}
            ledger.afterwards(self._judge_token)
        if ends:
            noted["outcome"] = self._outcome(outcome, error)
        self._record(
            _STATUS_CHANGE,
            old_status=old,
            new_status=new,
            phase=life.current_phase,
            message=message,
            details=noted,
        )
        for kind in transitions.milestones(old, new):
            self._record(kind, phase=life.current_phase, message=message, level=_LEVELS.get(kind))
        if result is not None:
            ledger.keep(result)
        if new in _CANCELLED:
            ledger.afterwards(self._cancel_token)
        if ends:
            ledger.afterwards(self._archived)
            if self._on_end is not None:
                self._on_end(self)
        return True

    def _outcome(self, given: Mapping[str, Json] | None, error: Mapping[str, Json] | None) -> dict[str, Json]:
        outcome = details_of(given)
        if error is not None:
            outcome["error"] = dict(error)
        if self._usage is not None:
            outcome["peaks"] = {kind.value: peak for kind, peak in self._usage.peaks().items()}
        return outcome

    def _archived(self) -> None:
        """Ended and heard: callbacks and token are let go of, and the ledger lets go of the session."""
        self._ledger.unlisten(self._stream.emit)
        self._ledger.forget(self.session_id)
        if self._token is not None:
            self._token.forget(self._token_cancelled)
            self._token.detach()
        self._stream.close_when_idle()

    def _judge_token(self) -> None:
        """A token that was cancelled before the start is heard now."""
        if self._token is not None and self._token.is_cancelled:
            self._token_cancelled(self._token)

    def _cancel_token(self) -> None:
        if self._token is not None:
            self._token.cancel(self._life.value.cancellation_reason or "")

    def _token_cancelled(self, token: CancellationToken) -> None:
        with self._ledger:
            if not token.timed_out:
                self.request_cancellation(token.cancellation_reason)
            elif self._life.value.status not in (S.IDLE, S.CANCELLING, S.COMPLETING):
                self.time_out(token.cancellation_reason)


_MADE: Mapping[str, Json] = {
    "attempt": 1,
    "parent": None,
    "priority": 5,
    "not_before": None,
    "owner": None,
    "generation": 1,
}
