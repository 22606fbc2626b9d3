"""All executions of one task: the running session, the last ones, and what they add up to."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Self, cast

from vespera_exec.errors import AlreadyExecuting, InvalidInput, NotExecuting
from vespera_exec.model.cancellation import CancellationToken
from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus
from vespera_exec.model.events import new_id
from vespera_exec.model.jsonable import details_of, jsonable, whole_json
from vespera_exec.model.ledger import Cell, Ledger, Part
from vespera_exec.model.legacy import LEGACY_FIELDS, FoldedField, TaskExecution, legacy_record
from vespera_exec.model.listeners import Subscribers
from vespera_exec.model.recent import Recent, copy, counted
from vespera_exec.model.record import TaskRecord
from vespera_exec.model.session import MAX_EVENTS, ExecutionSession
from vespera_exec.model.summary import current_status, performance_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from vespera_exec.model.events import ExecutionEvent, Json
    from vespera_exec.model.ledger import ResultRecord
    from vespera_exec.model.listeners import Callback, Subscription
    from vespera_exec.model.progress import CustomMetric

MAX_SESSIONS = 10
_MAX_RECORDS = 100

S = ExecutionStatus


class EnhancedTaskExecution(TaskExecution):
    """`TaskExecution` with sessions: started, tracked, cancelled, concluded and counted.

    The session that has ended stays readable through `last_session`; the last ten are in
    `session_history`. With a store, the database has all of them.
    """

    assigned_role = cast("str | None", FoldedField("assigned_role"))
    current_execution_id = cast("str | None", FoldedField("current_execution_id"))
    retry_count = cast("int", FoldedField("retry_count"))
    max_retries = cast("int", FoldedField("max_retries"))
    last_error = cast("str | None", FoldedField("last_error"))
    execution_context = cast("dict[str, Any]", FoldedField("execution_context"))

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
        current_session: ExecutionSession | None = None,
        session_history: Sequence[ExecutionSession] = (),
        global_cancellation_token: CancellationToken | None = None,
        custom_metrics: Mapping[str, CustomMetric] | None = None,
        on_begin: Callable[[], None] | None = None,
        on_end: Callable[[ExecutionSession, bool], None] | None = None,
    ) -> None:
        if max_events_in_memory < 0 or max_sessions_in_memory < 1:
            raise InvalidInput("max_events_in_memory is at least 0 and max_sessions_in_memory at least 1")
        self._ledger = ledger if ledger is not None else Ledger(clock=clock)
        self._owned = record is not None
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
        archive = tuple(session_history)[-max_sessions_in_memory:]
        self._recent = Cell(Recent(last=archive[-1] if archive else None, archive=archive))
        self.execution_history: list[dict[str, Any]] = execution_history if execution_history is not None else []
        self.monitoring_enabled = monitoring_enabled
        self.enable_event_streaming = enable_event_streaming
        self.max_events_in_memory = max_events_in_memory
        self.max_sessions_in_memory = max_sessions_in_memory
        self._custom_metrics = dict(custom_metrics) if custom_metrics else None
        self._global_token = global_cancellation_token
        self._subscribers: Subscribers | None = None
        """From the first callback on."""
        self._on_begin = on_begin
        self._on_end = on_end
        self._retrying = False
        self._output = ""
        if current_session is not None:
            self.adopt(current_session)

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
    def current_session(self) -> ExecutionSession | None:
        """The one that waits or runs."""
        return self._recent.value.current

    @property
    def last_session(self) -> ExecutionSession | None:
        """The last one that ended."""
        return self._recent.value.last

    @property
    def is_executing(self) -> bool:
        return self._recent.value.current is not None

    @property
    def session_history(self) -> list[ExecutionSession]:
        """The last sessions that ended, oldest first."""
        return list(self._recent.value.archive)

    @property
    def performance_profile(self) -> dict[str, Any]:
        """Where the time of the sessions that have ended went: see `PerformanceProfiler.profile`."""
        return self._recent.value.profiler.profile()

    @property
    def global_cancellation_token(self) -> CancellationToken:
        """Cancels whatever runs now, and all that would start after."""
        with self._ledger:
            if self._global_token is None:
                self._global_token = CancellationToken(clock=self._ledger.clock)
                session = self.current_session
                if session is not None and session.cancellation_token is not None:
                    self._global_token.adopt(session.cancellation_token)
            return self._global_token

    def change(self, **fields: Json) -> None:
        """Record new values of the task's own fields; none that are the same, no event.

        Raises:
            InvalidInput: there is no such field, or it follows from something else (`status`, `sequence`),
                or `inputs` are deeper than 32 levels.
        """
        if unknown := [name for name in fields if name not in _OWN_FIELDS]:
            raise InvalidInput(f"a task has no field {unknown[0]!r} that may be set")
        fields = {
            name: whole_json(value, "the inputs") if name == "inputs" else jsonable(value)
            for name, value in fields.items()
        }
        with self._ledger:
            self._change(fields)

    # one session after the other

    def start_new_session(
        self,
        task_id: str,
        role_name: str | None = None,
        enable_monitoring: bool = True,
        *,
        supersede: bool = False,
    ) -> ExecutionSession:
        """A session that has begun (PREPARING). `enable_monitoring` False asks an attached sampler to leave it alone.

        Raises:
            AlreadyExecuting: one is running. With `supersede` it is cancelled first.
        """
        with self._ledger:
            if self.current_session is not None and supersede:
                self._supersede(self.current_session)
            session = self._new_session(task_id, role_name)
            session.monitoring_enabled = enable_monitoring and self.monitoring_enabled
            session.start_execution()
            self._begun(session)
            return session

    def enqueue_session(
        self, task_id: str, role_name: str | None = None, *, session_id: str | None = None, **queueing: Any
    ) -> ExecutionSession:
        """A session that waits for its turn (PENDING); `queueing` as in `ExecutionSession.enqueue`.

        `session_id` is one that was made with `new_id` before; None makes one.

        Raises:
            AlreadyExecuting: one is waiting or running.
        """
        with self._ledger:
            session = self._new_session(task_id, role_name, session_id)
            session.enqueue(**queueing)
            self._begun(session)
            return session

    def adopt(self, session: ExecutionSession) -> None:
        """Take in a session that was restored from the store."""
        with self._ledger:
            session._on_end = self._session_ended  # pyright: ignore[reportPrivateUsage]
            if session.status.is_terminal:
                self._hold(last=session)
            else:
                self._hold(current=session)
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

        The next attempt begins with the last checkpoint of this one. Returns it, or None where the attempts of
        this run are used up (`max_retries`) or the session ended otherwise (a cancel was first).
        """
        with self._ledger:
            session = self.current_session
            if session is None:
                raise NotExecuting("no execution is running")
            self._retrying = session.lifecycle.attempt < self.record.max_retries
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
                checkpoint=ended.checkpoint,
                checkpoint_at=ended.checkpoint_at,
                inputs=ended.inputs,
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
        with self._ledger:
            if self._subscribers is None:
                self._subscribers = Subscribers()
                self._ledger.listen(self._heard)
            return self._subscribers.add(callback)

    # answers

    def get_current_status(self) -> dict[str, Json]:
        """See `current_status`: of the running session, else of the last one that ended, else of none."""
        with self._ledger:
            session = self.current_session or self.last_session
            summary = session.get_execution_summary() if session else None
            # From here on: reading the summary may have ended it, a deadline is judged when read.
            status = session.lifecycle.status if session else S.IDLE
            return current_status(self.record, status, summary, executing=self.is_executing)

    def get_performance_metrics(self) -> dict[str, Json]:
        """Totals over the task's life: see `performance_metrics`. A running session counts when it has ended."""
        with self._ledger:
            return performance_metrics(self.record, self._recent.value.profiler.durations)

    def to_dict(self) -> dict[str, Any]:
        """The legacy fields, the task's id and totals ("record"), and the session that runs ("current_session")."""
        with self._ledger:
            session = self.current_session
            return {
                **super().to_dict(),
                "record": self.record.to_dict(),
                "current_session": session.to_dict() if session else None,
            }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; also reads what the legacy class wrote."""
        restored = cls(**{name: data[name] for name in LEGACY_FIELDS if data.get(name) is not None})
        if data.get("record"):
            restored._record.value = TaskRecord.from_dict(data["record"])
            restored._ledger.resume_at(restored.record.task_id, restored.record.sequence)
        if data.get("current_session"):
            restored.adopt(ExecutionSession.from_dict(data["current_session"], ledger=restored._ledger))
        return restored

    # inside

    def _new_session(self, task_id: str, role_name: str | None, session_id: str | None = None) -> ExecutionSession:
        if self.current_session is not None:
            raise AlreadyExecuting(task_id, self.current_session.session_id)
        if self._on_begin is not None:
            self._on_begin()
        if task_id and task_id != self.record.task_id:
            if self._owned:
                raise InvalidInput(f"this is the execution of task {self.record.task_id}, not of {task_id}")
            self._ledger.put(
                self._record, replace(self.record, task_id=task_id)
            )  # alone, it takes the name it is given
        return ExecutionSession(
            session_id,
            task_id=task_id,
            role_name=role_name or self.record.assigned_role,
            ledger=self._ledger,
            max_events=self.max_events_in_memory if self.enable_event_streaming else 0,
            custom_metrics=self._custom_metrics,
            baseline=self._recent.value.profiler.baseline,
            monitoring_enabled=self.monitoring_enabled,
            on_end=self._session_ended,
        )

    def _change(self, fields: Mapping[str, Json]) -> None:
        """Within a decision: `change`, to fields that there are, by values that are JSON."""
        before = self._record.value
        changed = {name: value for name, value in fields.items() if getattr(before, name) != value}
        if changed:
            self._ledger.record(
                EventType.TASK_UPDATED, (self._record,), task_id=before.task_id, details={"fields": changed}
            )

    def _hold(self, **changes: Any) -> None:
        self._ledger.put(self._recent, copy(self._recent.value, **changes))

    def _begun(self, session: ExecutionSession) -> None:
        fields: dict[str, Json] = {"current_execution_id": session.session_id}
        if session.role_name is not None:
            fields["assigned_role"] = jsonable(session.role_name)
        self._change(fields)
        self._hold(current=session)
        self._link_token(session)

    def _link_token(self, session: ExecutionSession) -> None:
        """A token of its own, which follows the task's."""
        if session.cancellation_token is None:
            parent = self._global_token
            session.cancellation_token = parent.child() if parent else CancellationToken(clock=self._ledger.clock)

    def _supersede(self, session: ExecutionSession) -> None:
        session.request_cancellation("Superseded by a new execution")
        if not session.lifecycle.status.is_terminal:
            if session.lifecycle.status is S.CANCELLING:
                session.end_cancelled()
            else:
                raise AlreadyExecuting(self.record.task_id, session.session_id)

    def _session_ended(self, session: ExecutionSession) -> None:
        """Within the decision that ended it: count, keep the record, make room for the next."""
        self._change(details_of(counted(self.record, session)))
        self._ledger.put(self._recent, self._recent.value.after(session, self.max_sessions_in_memory))
        ended = legacy_record(session.lifecycle, session.get_execution_summary(), self._output)
        self._ledger.settling(lambda: self._remember(ended))
        if self._on_end is not None:
            self._on_end(session, self._retrying)

    def _remember(self, ended: dict[str, Any]) -> None:
        self.execution_history.append(ended)
        del self.execution_history[:-_MAX_RECORDS]

    def _heard(self, event: ExecutionEvent) -> None:
        if event.execution_id is not None and self.enable_event_streaming and self._subscribers is not None:
            self._subscribers.offer(event)


_OWN_FIELDS = frozenset(each.name for each in fields(TaskRecord)) - {
    "task_id",
    "status",
    "created_at",
    "updated_at",
    "sequence",
}
