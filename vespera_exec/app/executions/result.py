"""An execution in the words of document 003: its result, its updates, its metrics.

Each shape has `to_dict()`, JSON-safe; with `by_alias` the keys are those of the document (`executionId`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

from vespera_exec.errors import ExecutionError
from vespera_exec.model.enums import EventType, MessageLevel
from vespera_exec.model.events import ExecutionEvent, mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.model.capacity import CapacityUse
    from vespera_exec.model.enums import ExecutionStatus
    from vespera_exec.model.events import Json


class Shape:
    """What all of them can."""

    __slots__ = ()

    def to_dict(self, *, by_alias: bool = False) -> dict[str, Json]:
        return _members(self, by_alias=by_alias)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionMetrics(Shape):
    """Of one execution. Durations in milliseconds; None where nothing is known, never a guess.

    Of a plan the tasks that are counted are its steps; a plain task is a plan of one step.
    """

    total_duration: float | None = None
    """From its acceptance to its end, or until now; the time without an owner is left out."""
    effective_duration: float | None = None
    """Of that, the time in which it was at work: neither queued, nor paused, nor backing off."""
    total_cost: float | None = None
    """What the capacity that it was given costs; None where it was given none."""
    resource_efficiency: float | None = None
    """Of the capacity that was given, the share that was used, 0 to 1; None where nothing measured it."""
    quality_score: float | None = None
    """0 to 1, as the work itself reported it (`quality_score` in its result)."""
    success_rate: float | None = None
    """Steps that completed, of those that completed or failed."""
    throughput: float | None = None
    """Steps that completed, per second of the total duration."""
    error_rate: float | None = None
    """Attempts that failed, of all attempts that completed or failed."""

    @property
    def efficiency(self) -> float | None:
        """The effective share of the total duration; None where that is 0 or unknown."""
        if not self.total_duration or self.effective_duration is None:
            return None
        return self.effective_duration / self.total_duration


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceUsage(Shape):
    """Capacity that was held. `cost`, `end_time` are None while it is; `efficiency` where nothing measured it."""

    resource_id: str
    resource_type: str
    amount_used: float
    cost: float | None
    start_time: datetime
    end_time: datetime | None = None
    efficiency: float | None = None
    task_id: str | None = None
    """The step that held it."""

    @classmethod
    def of(cls, use: CapacityUse, *, step: str | None = None) -> ResourceUsage:
        return cls(
            resource_id=use.allocation_id,
            resource_type=use.type,
            amount_used=use.amount,
            cost=use.cost,
            start_time=use.started_at,
            end_time=use.ended_at,
            efficiency=use.efficiency,
            task_id=step,
        )

    @property
    def duration(self) -> float | None:
        """Milliseconds; None while it is held."""
        if self.end_time is None:
            return None
        return max(0.0, (self.end_time - self.start_time).total_seconds() * 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionProgress(Shape):
    """How far it is. `estimated_time_remaining` in milliseconds, None where nothing can be said."""

    percentage: float
    completed_tasks: int
    total_tasks: int
    estimated_time_remaining: float | None
    current_phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionMessage(Shape):
    """A line that the work, or the engine, has written into the log."""

    level: MessageLevel
    message: str
    timestamp: datetime
    task_id: str | None = None
    """The step."""
    context: Mapping[str, Json] = field(default_factory=dict[str, "Json"])

    @classmethod
    def of(cls, event: ExecutionEvent) -> ExecutionMessage | None:
        """What an event says to a reader; None where it only records."""
        level = event.level or _LEVELS.get(event.event_type)
        if level is None or not event.message:
            return None
        return cls(
            level=level,
            message=event.message,
            timestamp=event.timestamp,
            task_id=event.step_id,
            context=event.details,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionUpdate(Shape):
    """Where an execution stands, and what has happened since the update before.

    `metrics` hold what is known so far. `current_task` is the step that is at work, of a plain task its title.
    """

    execution_id: str
    timestamp: datetime
    status: ExecutionStatus
    progress: ExecutionProgress
    current_task: str | None
    metrics: ExecutionMetrics
    events: tuple[ExecutionEvent, ...]
    messages: tuple[ExecutionMessage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionResult(Shape):
    """How an execution ended, with all that its log tells.

    An execution here is a run: with its automatic attempts, under the id of the first. `started_at` is None where it
    ended before its work began. `plan_id` is the id of the plan; a plain task is its own plan.
    """

    execution_id: str
    plan_id: str
    task_id: str
    status: ExecutionStatus
    started_at: datetime | None
    completed_at: datetime | None
    result: Json
    result_truncated: bool
    """The result was larger than the limit, and is not whole."""
    error: ExecutionError | None
    metrics: ExecutionMetrics
    resource_usage: tuple[ResourceUsage, ...]
    timeline: tuple[ExecutionEvent, ...]
    """Every event of it, in order."""

    @property
    def output(self) -> Json:
        """What the work returned: of a plan its output, without the counts beside it in `result`."""
        return self.result if self.plan_id == self.task_id else mapping(self.result).get("output")


_LEVELS = {
    EventType.INFO: MessageLevel.INFO,
    EventType.WARNING: MessageLevel.WARNING,
    EventType.ERROR: MessageLevel.ERROR,
    EventType.STEP_FAILED: MessageLevel.ERROR,
    EventType.RECOVERY_INITIATED: MessageLevel.WARNING,
}


def _members(shape: object, *, by_alias: bool) -> dict[str, Json]:
    names = [each.name for each in fields(cast("Any", shape))]
    return {_alias(name) if by_alias else name: _json(getattr(shape, name), by_alias=by_alias) for name in names}


def _json(value: object, *, by_alias: bool) -> Json:
    """Shapes, stamps and enumerations as JSON; what is JSON already stays as it is."""
    if isinstance(value, ExecutionEvent):
        return _event(value) if by_alias else value.to_stream_message()
    if isinstance(value, ExecutionError):
        told = value.to_dict()
        return {_alias(name): each for name, each in told.items()} if by_alias else told
    if is_dataclass(value) and not isinstance(value, type):
        return _members(value, by_alias=by_alias)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_json(each, by_alias=by_alias) for each in cast("tuple[object, ...]", value)]
    return value


def _event(event: ExecutionEvent) -> dict[str, Json]:
    """The `ExecutionEvent` of document 003, whose task is our step, and its place in the log."""
    return {
        "id": event.event_id,
        "type": event.event_type.value,
        "timestamp": event.timestamp.isoformat(),
        "taskId": event.step_id,
        "description": event.message,
        "data": event.details,
        "sequence": event.sequence,
        "cursor": event.cursor,
    }


def _alias(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(each.capitalize() for each in rest)
