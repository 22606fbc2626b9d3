"""What a client wants done, and all its executions: the aggregate that owns the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vespera_exec.model import transitions
from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.enums import EventType, ExecutionStatus, TaskStatus
from vespera_exec.model.events import Json, new_id
from vespera_exec.model.execution import EnhancedTaskExecution
from vespera_exec.model.jsonable import whole_json
from vespera_exec.model.ledger import IdempotencyRecord, Ledger, Part, Sink
from vespera_exec.model.record import unrecorded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from vespera_exec.model.record import TaskRecord
    from vespera_exec.model.session import ExecutionSession


class Task:
    """A task. Alone in memory, or, with a `sink`, written to the log as it changes.

    `status` follows its executions: DOING while one is active, DONE when it completed, CANCELLED when
    it was cancelled; after a failure TODO while retries are left, else FAILED.

    Raises:
        InvalidInput: `inputs` are deeper than 32 levels.
    """

    def __init__(
        self,
        id: str | None = None,
        title: str = "",
        description: str = "",
        *,
        role: str | None = None,
        inputs: Mapping[str, Json] | None = None,
        priority: int = 5,
        sla_seconds: float | None = None,
        max_retries: int = 3,
        principal: str = "local",
        parent_execution_id: str | None = None,
        step_id: str | None = None,
        cancelled_status: TaskStatus = TaskStatus.CANCELLED,
        sink: Sink | None = None,
        clock: Clock = SYSTEM_CLOCK,
        **execution_options: Any,
    ) -> None:
        self._ledger = Ledger(sink=sink, clock=clock)
        self._record = Part(unrecorded(id or new_id()))
        self._cancelled_status = cancelled_status
        self.execution = EnhancedTaskExecution(
            ledger=self._ledger,
            record=self._record,
            on_begin=self._doing,
            on_end=self._session_ended,
            **execution_options,
        )
        fields: dict[str, Json] = {
            "title": title,
            "description": description,
            "assigned_role": role,
            "inputs": whole_json(inputs or {}, "the inputs"),
            "priority": priority,
            "sla_seconds": sla_seconds,
            "max_retries": max_retries,
            "principal": principal,
        }
        if parent_execution_id is not None:
            fields |= {"parent_execution_id": parent_execution_id, "step_id": step_id}
        with self._ledger:
            self._ledger.record(
                EventType.TASK_CREATED, (self._record,), task_id=self.id, message=title, details={"fields": fields}
            )

    @classmethod
    def restored(
        cls,
        record: TaskRecord,
        *,
        sink: Sink | None = None,
        clock: Clock = SYSTEM_CLOCK,
        cancelled_status: TaskStatus = TaskStatus.CANCELLED,
        **execution_options: Any,
    ) -> Task:
        """The task that this stored record describes."""
        task = cls.__new__(cls)
        task._ledger = Ledger(sink=sink, clock=clock)
        task._record = Part(record)
        task._cancelled_status = cancelled_status
        task._ledger.resume_at(record.task_id, record.sequence)
        task.execution = EnhancedTaskExecution(
            ledger=task._ledger,
            record=task._record,
            on_begin=task._doing,
            on_end=task._session_ended,
            **execution_options,
        )
        return task

    def __repr__(self) -> str:
        return f"<Task {self.id[:8]} {self.status.value} {self.title!r}>"

    @property
    def ledger(self) -> Ledger:
        """`with task.ledger:` makes several changes one decision."""
        return self._ledger

    @property
    def record(self) -> TaskRecord:
        return self._record.value

    @property
    def id(self) -> str:
        return self._record.value.task_id

    @property
    def title(self) -> str:
        return self._record.value.title

    @property
    def description(self) -> str:
        return self._record.value.description

    @property
    def inputs(self) -> Mapping[str, Json]:
        return self._record.value.inputs

    @property
    def priority(self) -> int:
        return self._record.value.priority

    @property
    def sla_seconds(self) -> float | None:
        return self._record.value.sla_seconds

    @property
    def status(self) -> TaskStatus:
        return self._record.value.status

    @property
    def created_at(self) -> datetime | None:
        return self._record.value.created_at

    @property
    def updated_at(self) -> datetime | None:
        """When the task or the progress of its running session last changed."""
        changed, session = self._record.value.updated_at, self.execution.current_session
        if changed is None or session is None:
            return changed
        return max(changed, session.progress.overall.updated_at)

    def update_status(self, status: TaskStatus, reason: str = "") -> bool:
        """Change the task's own status as its table allows; False when it is that already.

        Raises:
            InvalidTransitionError: the table does not list the change.
        """
        with self._ledger:
            old = self.status
            if old is status:
                return False
            transitions.check_task(old, status)
            self._ledger.record(
                EventType.STATUS_CHANGE,
                (self._record,),
                task_id=self.id,
                message=reason,
                details={"scope": "task", "old": old.value, "new": status.value},
            )
            return True

    def reopen(self) -> bool:
        """DONE, FAILED or CANCELLED back to TODO, with the retries reset; False when it is open."""
        with self._ledger:
            if self.status in (TaskStatus.TODO, TaskStatus.DOING):
                return False
            self.update_status(TaskStatus.TODO, "Reopened")
            self.execution.reset_retries()
            return True

    def start_execution(self, role_name: str | None = None, *, enable_monitoring: bool = True) -> ExecutionSession:
        """Begin a session (PREPARING); the task is DOING. A task that has ended is reopened by it.

        Raises:
            AlreadyExecuting: one is active. Nothing has changed.
        """
        return self.execution.start_new_session(self.id, role_name, enable_monitoring)

    def enqueue_execution(self, role_name: str | None = None, **queueing: Any) -> ExecutionSession:
        """Queue a session (PENDING); the task is DOING.

        Raises:
            AlreadyExecuting: one is active. Nothing has changed.
        """
        return self.execution.enqueue_session(self.id, role_name, **queueing)

    def remember_key(
        self, principal: str, operation: str, key: str, run_id: str | None = None, *, digest: bytes | None = None
    ) -> None:
        """Store, with the running decision, that this key has been used, and for which request."""
        self._ledger.keep(
            IdempotencyRecord(
                principal=principal, key=key, operation=operation, task_id=self.id, run_id=run_id, digest=digest
            )
        )

    def update_execution_progress(self, progress: float, message: str = "") -> None:
        """
        Raises:
            NotExecuting: no session is active.
            InvalidProgress: the value was refused.
        """
        self.execution.update_progress(progress, message)

    def complete_execution(self, success: bool = True, output: str = "", error: str | None = None) -> bool:
        """Conclude the active session; the task moves only if it did. False when there was none."""
        return self.execution.complete_execution(success, output, error)

    def get_execution_status(self) -> dict[str, Json]:
        return self.execution.get_current_status()

    def _doing(self) -> None:
        self.reopen()
        self.update_status(TaskStatus.DOING, "Execution started")

    def _session_ended(self, session: ExecutionSession, retrying: bool) -> None:
        """Within the decision that ended the session. Where somebody has moved the task meanwhile, that stands."""
        if self.status is not TaskStatus.DOING:
            return
        match session.lifecycle.status:
            case ExecutionStatus.COMPLETED:
                self.update_status(TaskStatus.DONE, "Execution completed")
            case ExecutionStatus.CANCELLED:
                self.update_status(self._cancelled_status, "Execution cancelled")
            case _ if retrying:
                pass
            case _:
                recoverable = session.lifecycle.error.get("recoverable", True)
                left = recoverable and self.execution.can_retry()
                self.update_status(TaskStatus.TODO if left else TaskStatus.FAILED, "Execution failed")
