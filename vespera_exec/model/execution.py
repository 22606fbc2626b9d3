"""All executions of one task: the running session, the last ones, and what they add up to."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from vespera_exec.errors import AlreadyExecuting, InvalidInput, NotExecuting
from vespera_exec.model.cancellation import CancellationToken
from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus
from vespera_exec.model.events import ExecutionEvent, Json, new_id
from vespera_exec.model.ledger import Ledger, Part, ResultRecord
from vespera_exec.model.listeners import Callback, Subscription
from vespera_exec.model.progress import CustomMetric
from vespera_exec.model.record import TaskRecord
from vespera_exec.model.session import MAX_EVENTS, ExecutionSession
from vespera_exec.model.timing import HISTORY_LIMIT

MAX_SESSIONS = 10
_MAX_RECORDS = 100

S = ExecutionStatus


@dataclass
class TaskExecution:
    """The execution record that documents before 000 knew. Its API is kept exactly."""

    assigned_role: str | None = None
    execution_history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    current_execution_id: str | None = None
    retry_count: int = 0
    max_retries: int = 3
    last_error: str | None = None
    execution_context: dict[str, Any] = field(default_factory=dict[str, Any])

    def add_execution_record(
        self,
        role_name: str,
        status: str,
        output: str = "",
        error: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Append a record; "failed" with an error counts as a retry, and nothing else does."""
        self.execution_history.append(
            {
                "execution_id": new_id(),
                "timestamp": datetime.now(UTC).isoformat(),
                "role_name": role_name,
                "status": status,
                "output": output,
                "error": error,
                "metadata": metadata or {},
            }
        )
        if status == "failed" and error:
            self.last_error = error
            self.retry_count += 1

    def can_retry(self) -> bool:
        return self.retry_count < self.max_retries

    def reset_retries(self) -> None:
        self.retry_count = 0
        self.last_error = None


class _Folded:
    """A legacy field over the task's record: reading shows the fold, assigning records an event."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, owner: EnhancedTaskExecution | None, kind: type) -> Any:
        if owner is None:
            return self
        value = getattr(owner.record, self._name)
        return dict(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else value

    def __set__(self, owner: EnhancedTaskExecution, value: Any) -> None:
        owner.change(**{self._name: dict(value) if isinstance(value, Mapping) else value})  # pyright: ignore[reportUnknownArgumentType]


class EnhancedTaskExecution(TaskExecution):
    """`TaskExecution` with sessions: started, tracked, cancelled, concluded and counted.

    The session that has ended stays readable through `last_session`; the last ten are in
    `session_history`. With a store, the database has all of them.
    """

    assigned_role = cast("str | None", _Folded("assigned_role"))
    current_execution_id = cast("str | None", _Folded("current_execution_id"))
    retry_count = cast("int", _Folded("retry_count"))
    max_retries = cast("int", _Folded("max_retries"))
    last_error = cast("str | None", _Folded("last_error"))
    execution_context = cast("dict[str, Any]", _Folded("execution_context"))

    def __init__(
        self,
        assigned_role: str | None = None,
        execution_history: list[dict[str, Any]] | None = None,
        current_execution_id: str | None = None,
        retry_count: int = 0,
        max_retries: int = 3,
        last_error: str | None = None,
        execution_context: dict[str, Any] | None = None,
        *,
        monitoring_enabled: bool = True,
        enable_event_streaming: bool = True,
        max_events_in_memory: int = MAX_EVENTS,
        max_sessions_in_memory: int = MAX_SESSIONS,
        ledger: Ledger | None = None,
        record: Part[TaskRecord] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        custom_metrics: Mapping[str, CustomMetric] | None = None,
        on_end: Callable[[ExecutionSession, bool], None] | None = None,
    ) -> None:
        if max_events_in_memory < 0 or max_sessions_in_memory < 1:
            raise InvalidInput("max_events_in_memory is at least 0 and max_sessions_in_memory at least 1")
        self._ledger = ledger if ledger is not None else Ledger(clock=clock)
        self._record = record or Part(
            TaskRecord(
                task_id=new_id(),
                assigned_role=assigned_role,
                current_execution_id=current_execution_id,
                retry_count=retry_count,
                max_retries=max_retries,
                last_error=last_error,
                execution_context=execution_context or {},
            )
        )
        self.execution_history: list[dict[str, Any]] = list(execution_history or [])
        self.monitoring_enabled = monitoring_enabled
        self.enable_event_streaming = enable_event_streaming
        self.max_events_in_memory = max_events_in_memory
        self.current_session: ExecutionSession | None = None
        self.last_session: ExecutionSession | None = None
        self._archive: deque[ExecutionSession] = deque(maxlen=max_sessions_in_memory)
        self._durations: deque[float] = deque(maxlen=HISTORY_LIMIT)
        self._phase_seconds: dict[str, float] = {}
        self._custom_metrics = dict(custom_metrics or {})
        self._global_token: CancellationToken | None = None
        self._subscriptions: list[Subscription] = []
        self._on_end = on_end
        self._retrying = False
        self._output = ""
        self._unlisten = self._ledger.listen(self._heard)

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"<EnhancedTaskExecution of {self.record.task_id[:8]}, {self.record.current_execution_id or 'idle'}>"

    # state

    @property
    def record(self) -> TaskRecord:
        return self._record.value

    @property
    def is_executing(self) -> bool:
        return self.current_session is not None

    @property
    def session_history(self) -> list[ExecutionSession]:
        """The last sessions that ended, oldest first."""
        with self._ledger:
            return list(self._archive)

    @property
    def performance_profile(self) -> dict[str, Any]:
        """Seconds per phase over the retained sessions, and the durations of the last ten that completed."""
        with self._ledger:
            return {"phase_seconds": dict(self._phase_seconds), "durations_seconds": list(self._durations)}

    @property
    def global_cancellation_token(self) -> CancellationToken:
        """Cancels whatever runs now, and all that would start after."""
        with self._ledger:
            if self._global_token is None:
                self._global_token = CancellationToken(clock=self._ledger.clock)
            return self._global_token

    def change(self, **fields: Json) -> None:
        """Record new values of the task's own fields; none that are the same, no event."""
        with self._ledger:
            before = self.record
            changed = {name: value for name, value in fields.items() if getattr(before, name) != value}
            if changed:
                self._ledger.record(
                    EventType.TASK_UPDATED, (self._record,), task_id=before.task_id, details={"fields": changed}
                )

    # one session after the other

    def start_new_session(
        self,
        task_id: str,
        role_name: str | None = None,
        enable_monitoring: bool = True,
        *,
        supersede: bool = False,
    ) -> ExecutionSession:
        """A session that has begun (PREPARING).

        Raises:
            AlreadyExecuting: one is running. With `supersede` it is cancelled first.
        """
        with self._ledger:
            if self.current_session is not None and supersede:
                self._supersede(self.current_session)
            session = self._new_session(task_id, role_name)
            session.start_execution()
            self._begun(session, task_id)
            return session

    def enqueue_session(self, task_id: str, role_name: str | None = None, **queueing: Any) -> ExecutionSession:
        """A session that waits for its turn (PENDING); `queueing` as in `ExecutionSession.enqueue`.

        Raises:
            AlreadyExecuting: one is waiting or running.
        """
        with self._ledger:
            session = self._new_session(task_id, role_name)
            session.enqueue(**queueing)
            self._begun(session, task_id)
            return session

    def adopt(self, session: ExecutionSession) -> None:
        """Take in a session that was restored from the store."""
        with self._ledger:
            session._on_end = self._session_ended  # pyright: ignore[reportPrivateUsage]
            if session.status.is_terminal:
                self.last_session = session
            else:
                self.current_session = session
                self._link_token(session)

    def update_progress(self, progress: float, message: str = "", phase: ExecutionPhase | None = None) -> None:
        """
        Raises:
            NotExecuting: there is no session.
            InvalidProgress: the value was refused.
        """
        session = self.current_session
        if session is None:
            raise NotExecuting("no execution is running")
        session.update_progress(progress, message=message, phase=phase)

    def complete_execution(self, success: bool = True, output: str = "", error: str | None = None) -> bool:
        """Conclude the running session; False when there was none, or another caller was first.

        While CANCELLING it ends CANCELLED whatever `success` says.
        """
        with self._ledger:
            session = self.current_session
            if session is None:
                return False
            self._output = output
            try:
                if success:
                    return session.complete(output or "Execution completed successfully", outcome={"output": output})
                return session.fail(error or output or "Execution failed", outcome={"output": output} if output else {})
            finally:
                self._output = ""

    def fail_for_retry(
        self,
        error: BaseException | str,
        *,
        retry_at: datetime,
        owner: str | None = None,
        timed_out: bool = False,
        outcome: Mapping[str, Json] | None = None,
        result: ResultRecord | None = None,
    ) -> ExecutionSession | None:
        """End the running session FAILED (or TIMED_OUT) and queue the next attempt, in one decision.

        Returns the next attempt, or None where the task's retries are used up or the session ended
        otherwise (a cancel was first).
        """
        with self._ledger:
            session = self.current_session
            if session is None:
                raise NotExecuting("no execution is running")
            self._retrying = self.record.retry_count + 1 < self.record.max_retries
            try:
                if timed_out:
                    session.time_out(str(error), outcome=outcome, result=result)
                else:
                    session.fail(error, outcome=outcome, result=result)
                again = self._retrying and session.lifecycle.status in (S.FAILED, S.TIMED_OUT)
            finally:
                self._retrying = False
            if not again:
                return None
            ended = session.lifecycle
            following = self.enqueue_session(
                ended.task_id,
                ended.role_name,
                run_id=ended.run_id,
                attempt=ended.attempt + 1,
                parent_execution_id=ended.execution_id,
                priority=ended.priority,
                not_before=retry_at,
                owner=owner,
                message=f"Attempt {ended.attempt + 1} follows",
            )
            following.emit_status_event(
                "retry_scheduled",
                f"Attempt {ended.attempt + 1} of this run",
                {"after": ended.execution_id, "not_before": retry_at.isoformat()},
            )
            return following

    def request_cancellation(self, reason: str = "User requested") -> bool:
        """True when the running session takes the request; False without one, or when it is too late."""
        session = self.current_session
        return session is not None and session.request_cancellation(reason)

    # listening

    def add_status_callback(self, callback: Callback) -> Subscription:
        """Call back for every event of this task's executions, the coming ones included."""
        subscription = Subscription(callback)
        subscription.undo = lambda: self._drop(subscription)
        with self._ledger:
            self._subscriptions.append(subscription)
        return subscription

    # answers

    def get_current_status(self) -> dict[str, Json]:
        """One shape, idle or not: the running session, else the last one that ended, else none."""
        with self._ledger:
            session = self.current_session or self.last_session
            record = self.record
            executing = self.current_session is not None
        status = session.lifecycle.status if session else S.IDLE
        return {
            "executing": executing,
            "status": status.value,
            "lifecycle": status.lifecycle,
            "session_id": session.session_id if session else None,
            "session": session.get_execution_summary() if session else None,
            "legacy_compatibility": {
                "assigned_role": record.assigned_role,
                "execution_id": record.current_execution_id or record.last_execution_id,
                "retry_count": record.retry_count,
                "last_error": record.last_error,
            },
        }

    def get_performance_metrics(self) -> dict[str, Json]:
        """Totals over the task's life; a running session counts when it has ended.

        `success_rate` is 0 to 1 and leaves cancelled ones out; None where nothing has ended.
        """
        with self._ledger:
            record = self.record
            durations = list(self._durations)
        judged = record.completed + record.failed + record.timed_out
        rate = record.completed / judged if judged else None
        return {
            "total_executions": judged + record.cancelled,
            "completed": record.completed,
            "failed": record.failed,
            "cancelled": record.cancelled,
            "timed_out": record.timed_out,
            "success_rate": rate,
            "success_rate_percent": rate * 100 if rate is not None else None,
            "average_duration_seconds": record.duration_sum / record.completed if record.completed else None,
            "median_duration_seconds": statistics.median(durations) if durations else None,
            "retry_count": record.retry_count,
            "last_error": record.last_error,
        }

    # inside

    def _new_session(self, task_id: str, role_name: str | None) -> ExecutionSession:
        if self.current_session is not None:
            raise AlreadyExecuting(task_id, self.current_session.session_id)
        session = ExecutionSession(
            task_id=task_id,
            role_name=role_name or self.record.assigned_role,
            ledger=self._ledger,
            max_events=self.max_events_in_memory if self.enable_event_streaming else 0,
            custom_metrics=self._custom_metrics,
            on_end=self._session_ended,
        )
        if self._durations:
            session._baseline = timedelta(seconds=statistics.median(self._durations))  # pyright: ignore[reportPrivateUsage]
        return session

    def _begun(self, session: ExecutionSession, task_id: str) -> None:
        fields: dict[str, Json] = {"current_execution_id": session.session_id}
        if session.role_name is not None:
            fields["assigned_role"] = session.role_name
        if task_id and task_id != self.record.task_id:
            fields["task_id"] = task_id
        self.change(**fields)
        self.current_session = session
        self._link_token(session)

    def _link_token(self, session: ExecutionSession) -> None:
        token = CancellationToken(clock=self._ledger.clock)
        if self._global_token is not None:
            token = self._global_token.child()
        session.cancellation_token = token

    def _supersede(self, session: ExecutionSession) -> None:
        session.request_cancellation("Superseded by a new execution")
        if not session.lifecycle.status.is_terminal:
            if session.lifecycle.status is S.CANCELLING:
                session.end_cancelled()
            else:
                raise AlreadyExecuting(self.record.task_id, session.session_id)

    def _session_ended(self, session: ExecutionSession) -> None:
        """Within the decision that ended it: count, keep the record, make room for the next."""
        life, record = session.lifecycle, self.record
        fields: dict[str, Json] = {"current_execution_id": None, "last_execution_id": session.session_id}
        match life.status:
            case S.COMPLETED:
                fields |= {"completed": record.completed + 1, "retry_count": 0, "last_error": None}
                fields["duration_sum"] = round(record.duration_sum + life.active_seconds, 6)
                self._durations.append(life.active_seconds)
            case S.CANCELLED:
                fields["cancelled"] = record.cancelled + 1
            case _:
                counter = "timed_out" if life.status is S.TIMED_OUT else "failed"
                fields |= {counter: getattr(record, counter) + 1, "retry_count": record.retry_count + 1}
                fields["last_error"] = life.error.get("message") or life.status_message
        self.change(**fields)
        for phase in life.phases:
            if phase.duration_seconds is not None:
                seconds = self._phase_seconds.get(phase.phase.value, 0.0) + phase.duration_seconds
                self._phase_seconds[phase.phase.value] = round(seconds, 6)
        self.execution_history.append(self._legacy_record(session))
        del self.execution_history[:-_MAX_RECORDS]
        self.current_session = None
        self.last_session = session
        self._archive.append(session)
        if self._on_end is not None:
            self._on_end(session, self._retrying)

    def _legacy_record(self, session: ExecutionSession) -> dict[str, Any]:
        life = session.lifecycle
        return {
            "execution_id": life.execution_id,
            "timestamp": (life.completed_at or self._ledger.clock.now()).isoformat(),
            "role_name": life.role_name,
            "status": life.status.value,
            "output": self._output,
            "error": life.error.get("message"),
            "metadata": {},
            "session_summary": session.get_execution_summary(),
        }

    def _heard(self, event: ExecutionEvent) -> None:
        if event.execution_id is None or not self.enable_event_streaming:
            return
        for subscription in tuple(self._subscriptions):
            subscription.offer(event)

    def _drop(self, subscription: Subscription) -> None:
        with self._ledger:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)
