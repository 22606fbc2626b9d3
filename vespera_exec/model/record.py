"""What a task is, apart from its executions: folded from the log, stored as one row."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from vespera_exec.model.enums import EventType, TaskStatus
from vespera_exec.model.events import ExecutionEvent, Json
from vespera_exec.model.rows import Readers, iso, present, stamp
from vespera_exec.model.values import copier

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecord:
    """The fields of a task. Counters count ended executions over the task's whole life."""

    task_id: str
    title: str = ""
    description: str = ""
    assigned_role: str | None = None
    inputs: Mapping[str, Json] = field(default_factory=dict[str, Json])
    priority: int = 5
    sla_seconds: float | None = None
    principal: str = "local"
    parent_execution_id: str | None = None
    """The execution of a plan that it is a step of."""
    step_id: str | None = None
    status: TaskStatus = TaskStatus.TODO
    created_at: datetime | None = None
    updated_at: datetime | None = None
    current_execution_id: str | None = None
    last_execution_id: str | None = None
    retry_count: int = 0
    max_retries: int = 3
    last_error: str | None = None
    execution_context: Mapping[str, Json] = field(default_factory=dict[str, Json])
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    duration_sum: float = 0.0
    sequence: int = 0

    def evolve(self, event: ExecutionEvent) -> TaskRecord:
        """The state after `event`."""
        fold = _FOLDS.get(event.event_type)
        return self if fold is None else fold(self, event)

    def to_dict(self) -> dict[str, Json]:
        return {
            "task_id": self.task_id,
            "title": self.title,
            "description": self.description,
            "assigned_role": self.assigned_role,
            "inputs": dict(self.inputs),
            "priority": self.priority,
            "sla_seconds": self.sla_seconds,
            "principal": self.principal,
            "parent_execution_id": self.parent_execution_id,
            "step_id": self.step_id,
            "status": self.status.value,
            "created_at": iso(self.created_at),
            "updated_at": iso(self.updated_at),
            "current_execution_id": self.current_execution_id,
            "last_execution_id": self.last_execution_id,
            "retry_count": self.retry_count,
            "max_retries": self.max_retries,
            "last_error": self.last_error,
            "execution_context": dict(self.execution_context),
            "completed": self.completed,
            "failed": self.failed,
            "cancelled": self.cancelled,
            "timed_out": self.timed_out,
            "duration_sum": self.duration_sum,
            "sequence": self.sequence,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> TaskRecord:
        """The inverse of `to_dict`; keys that an older version did not write take their defaults."""
        return cls(**present(data, _NAMES, _READERS))


_copy = copier(TaskRecord)
_NEW = TaskRecord(task_id="")


def _created(record: TaskRecord, event: ExecutionEvent) -> TaskRecord:
    return _copy(_updated(record, event), created_at=event.timestamp)


def _updated(record: TaskRecord, event: ExecutionEvent) -> TaskRecord:
    changes = event.details["fields"]
    if "status" in changes:
        changes = {**changes, "status": TaskStatus(changes["status"])}
    return _copy(record, **changes, updated_at=event.timestamp, sequence=event.sequence)


def _changed(record: TaskRecord, event: ExecutionEvent) -> TaskRecord:
    details = event.details
    if details.get("scope") != "task":
        return record
    status = TaskStatus(details["new"])
    return _copy(record, status=status, updated_at=event.timestamp, sequence=event.sequence)


_FOLDS: Mapping[EventType, Callable[[TaskRecord, ExecutionEvent], TaskRecord]] = {
    EventType.TASK_CREATED: _created,
    EventType.TASK_UPDATED: _updated,
    EventType.STATUS_CHANGE: _changed,
}
_NAMES = tuple(each.name for each in fields(TaskRecord))
_READERS: Readers = {"status": TaskStatus, "created_at": stamp, "updated_at": stamp}


def unrecorded(task_id: str) -> TaskRecord:
    """Of a task before its first event."""
    return _copy(_NEW, task_id=task_id)
