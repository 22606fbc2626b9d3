"""Where one execution stands and how it got there: the cold part of its state, folded from the log."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from vespera_exec.model import capacity
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus
from vespera_exec.model.events import ExecutionEvent, Json, mapping
from vespera_exec.model.inputs import Answer, Question, folded, questions
from vespera_exec.model.leases import Lease
from vespera_exec.model.rows import Readers, iso, present, stamp
from vespera_exec.model.stays import PARKED, PhaseRecord, closed, moved
from vespera_exec.model.values import copier

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from vespera_exec.model.capacity import CapacityUse

_T = TypeVar("_T")

# Looked up once: in Python 3.11 that takes as long as a function call.
_PENDING = ExecutionStatus.PENDING
_PREPARING = ExecutionStatus.PREPARING
_PAUSED = ExecutionStatus.PAUSED
_RECOVERING = ExecutionStatus.RECOVERING
_CANCELLED = (ExecutionStatus.CANCELLING, ExecutionStatus.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifecycle:
    """Status, clock, phases and outcome. Only `evolve` makes a new one.

    `active_seconds`, `paused_seconds` and `queue_seconds` are as of `clock_read_at`; whoever shows a running
    clock adds the time since. `outcome` is filled once, by the terminal event.
    """

    execution_id: str
    task_id: str = ""
    run_id: str = ""
    attempt: int = 1
    parent_execution_id: str | None = None
    role_name: str | None = None
    status: ExecutionStatus = ExecutionStatus.IDLE
    status_message: str = ""
    paused_from: ExecutionStatus | None = None
    priority: int = 5
    not_before: datetime | None = None
    owner: str | None = None
    generation: int = 0
    created_at: datetime | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None
    paused_at: datetime | None = None
    resumed_at: datetime | None = None
    completed_at: datetime | None = None
    active_seconds: float = 0.0
    paused_seconds: float = 0.0
    queue_seconds: float = 0.0
    clock_read_at: datetime | None = None
    """Of the last change of status, phase or owner."""
    current_phase: ExecutionPhase | None = None
    phase_entered_active: float = 0.0
    """`active_seconds` when the current phase was entered."""
    phases: tuple[PhaseRecord, ...] = ()
    cancellation_reason: str | None = None
    recovery_attempts: int = 0
    checkpoint: Json = None
    checkpoint_at: datetime | None = None
    restored_from: str | None = None
    """The place in a log, its own or an ended one's, that it began or was last put back to."""
    claims: int = 0
    """How often a worker has claimed it."""
    lease: Lease | None = None
    """Of the worker that does it; one that has ended keeps the last."""
    inputs: tuple[Question, ...] = ()
    """All questions of the run so far, open and answered, in order."""
    capacity: tuple[CapacityUse, ...] = ()
    """What it holds and held, in the order in which it was given."""
    outcome: Mapping[str, Json] = field(default_factory=dict[str, Json])
    sequence: int = 0

    @property
    def error(self) -> Mapping[str, Json]:
        return self.outcome.get("error") or {}

    @property
    def open_inputs(self) -> tuple[Question, ...]:
        """The questions that wait for an answer; none once it has ended, or is to end."""
        if not self.inputs or self.status.is_terminal or self.status is ExecutionStatus.CANCELLING:
            return ()
        return tuple(each for each in self.inputs if each.answer is None)

    @property
    def answers(self) -> dict[str, Answer]:
        """What was answered in this run so far, by key."""
        return {each.key: each.answer for each in self.inputs if each.answer is not None}

    @property
    def held_capacity(self) -> tuple[CapacityUse, ...]:
        """What it holds now."""
        return tuple(each for each in self.capacity if each.ended_at is None) if self.capacity else ()

    @property
    def is_parked(self) -> bool:
        """Its work has ended for now: nothing of it runs, up to its next phase."""
        if self.current_phase is not None or not self.phases or self.status.is_terminal:
            return False
        return self.phases[-1].outcome == PARKED

    def evolve(self, event: ExecutionEvent) -> Lifecycle:
        """The state after `event`; events that only annotate leave it as it was."""
        fold = _FOLDS.get(event.event_type)
        return self if fold is None else fold(self, event)

    def to_dict(self) -> dict[str, Json]:
        return {
            "execution_id": self.execution_id,
            "task_id": self.task_id,
            "run_id": self.run_id,
            "attempt": self.attempt,
            "parent_execution_id": self.parent_execution_id,
            "role_name": self.role_name,
            "status": self.status.value,
            "status_message": self.status_message,
            "paused_from": self.paused_from.value if self.paused_from else None,
            "priority": self.priority,
            "not_before": iso(self.not_before),
            "owner": self.owner,
            "generation": self.generation,
            "created_at": iso(self.created_at),
            "queued_at": iso(self.queued_at),
            "started_at": iso(self.started_at),
            "paused_at": iso(self.paused_at),
            "resumed_at": iso(self.resumed_at),
            "completed_at": iso(self.completed_at),
            "active_seconds": self.active_seconds,
            "paused_seconds": self.paused_seconds,
            "queue_seconds": self.queue_seconds,
            "clock_read_at": iso(self.clock_read_at),
            "current_phase": self.current_phase.value if self.current_phase else None,
            "phase_entered_active": self.phase_entered_active,
            "phases": [phase.to_dict() for phase in self.phases],
            "cancellation_reason": self.cancellation_reason,
            "recovery_attempts": self.recovery_attempts,
            "checkpoint": self.checkpoint,
            "checkpoint_at": iso(self.checkpoint_at),
            "restored_from": self.restored_from,
            "claims": self.claims,
            "lease": self.lease.to_dict() if self.lease else None,
            "inputs": [each.to_dict() for each in self.inputs],
            "capacity": [each.to_dict() for each in self.capacity],
            "outcome": dict(self.outcome),
            "sequence": self.sequence,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> Lifecycle:
        """The inverse of `to_dict`; keys that an older version did not write take their defaults."""
        return cls(**present(data, _NAMES, _READERS))


def idle(execution_id: str, task_id: str, role_name: str | None) -> Lifecycle:
    """Of an execution that has just been made, the first of its run."""
    return _copy(_IDLE, execution_id=execution_id, task_id=task_id, run_id=execution_id, role_name=role_name)


def _phases(stored: list[Mapping[str, Json]]) -> tuple[PhaseRecord, ...]:
    return tuple(PhaseRecord.from_dict(each) for each in stored)


def _changed(life: Lifecycle, event: ExecutionEvent) -> Lifecycle:
    new, at, details = _required(event.new_status), event.timestamp, event.details
    clock = mapping(details.get("clock"))
    changes: dict[str, Any] = {
        "status": new,
        "status_message": event.message,
        "sequence": event.sequence,
        "active_seconds": clock.get("active", life.active_seconds),
        "paused_seconds": clock.get("paused", life.paused_seconds),
        "queue_seconds": clock.get("queued", life.queue_seconds),
        "clock_read_at": at,
    }
    if (made := details.get("session")) is not None:
        changes |= _made(life, made) | {"task_id": event.task_id, "created_at": at}
    if (role := details.get("role")) is not None:
        changes["role_name"] = role
    if new is _PENDING:
        changes["queued_at"] = at
    elif new is _PREPARING and life.started_at is None:
        changes["started_at"] = at
    elif new is _RECOVERING:
        changes["recovery_attempts"] = life.recovery_attempts + 1
    elif new in _CANCELLED and life.cancellation_reason is None:
        changes["cancellation_reason"] = details.get("reason", event.message)
    if new is _PAUSED:
        changes |= {"paused_at": at, "paused_from": life.status}
    elif life.status is _PAUSED:
        changes |= {"paused_at": None, "paused_from": None, "resumed_at": at}
    if new.is_terminal:
        changes |= {"completed_at": at, "current_phase": None, "outcome": details.get("outcome") or {}}
        changes["phases"] = closed(life.phases, event, new.value)
    return _copy(life, **changes)


def _made(life: Lifecycle, made: Mapping[str, Json]) -> dict[str, Any]:
    """What the first change says of the session as such."""
    return {
        "run_id": made.get("run_id") or life.execution_id,
        "attempt": made.get("attempt", 1),
        "parent_execution_id": made.get("parent"),
        "role_name": made.get("role"),
        "priority": made.get("priority", 5),
        "not_before": stamp(made["not_before"]) if made.get("not_before") else None,
        "owner": made.get("owner"),
        "generation": made.get("generation", 1),
        "checkpoint": made.get("checkpoint"),
        "checkpoint_at": stamp(made["checkpoint_at"]) if made.get("checkpoint_at") else None,
        "restored_from": made.get("restored_from"),
        "inputs": questions(made.get("inputs") or ()),
    }


def _entered(life: Lifecycle, event: ExecutionEvent) -> Lifecycle:
    clock = mapping(event.details.get("clock"))
    active = clock.get("active", life.active_seconds)
    return _copy(
        life,
        current_phase=event.phase,
        phase_entered_active=active,
        phases=moved(life.phases, event),
        active_seconds=active,
        paused_seconds=clock.get("paused", life.paused_seconds),
        queue_seconds=clock.get("queued", life.queue_seconds),
        clock_read_at=event.timestamp,
        sequence=event.sequence,
    )


def _owned(life: Lifecycle, event: ExecutionEvent) -> Lifecycle:
    clock = mapping(event.details.get("clock"))
    return _copy(
        life,
        owner=event.details["owner"],
        generation=event.details["generation"],
        active_seconds=clock.get("active", life.active_seconds),
        paused_seconds=clock.get("paused", life.paused_seconds),
        queue_seconds=clock.get("queued", life.queue_seconds),
        clock_read_at=event.timestamp,
        sequence=event.sequence,
    )


def _leased(life: Lifecycle, event: ExecutionEvent) -> Lifecycle:
    lease = Lease.from_dict(event.details["lease"])
    return _copy(life, lease=lease, claims=lease.fence, sequence=event.sequence)


def _unleased(life: Lifecycle, event: ExecutionEvent) -> Lifecycle:
    return _copy(life, lease=None, sequence=event.sequence)


def _checkpointed(life: Lifecycle, event: ExecutionEvent) -> Lifecycle:
    if "state" not in event.details:
        return life
    return _copy(
        life,
        checkpoint=event.details["state"],
        checkpoint_at=_checkpoint_time(event),
        restored_from=event.details.get("restored_from", life.restored_from),
        sequence=event.sequence,
    )


def _asked(life: Lifecycle, event: ExecutionEvent) -> Lifecycle:
    inputs = folded(life.inputs, event)
    return life if inputs is life.inputs else _copy(life, inputs=inputs, sequence=event.sequence)


def _holding(life: Lifecycle, event: ExecutionEvent) -> Lifecycle:
    if event.step_id is not None:
        return life
    return _copy(life, capacity=capacity.folded(life.capacity, event), sequence=event.sequence)


_FOLDS: Mapping[EventType, Callable[[Lifecycle, ExecutionEvent], Lifecycle]] = {
    EventType.STATUS_CHANGE: _changed,
    EventType.PHASE_CHANGE: _entered,
    EventType.OWNER_CHANGED: _owned,
    EventType.LEASE_GRANTED: _leased,
    EventType.LEASE_ENDED: _unleased,
    EventType.CHECKPOINT_CREATED: _checkpointed,
    EventType.APPROVAL_REQUESTED: _asked,
    EventType.APPROVAL_APPROVED: _asked,
    EventType.APPROVAL_REJECTED: _asked,
    EventType.RESOURCE_ALLOCATED: _holding,
    EventType.RESOURCE_RELEASED: _holding,
}
"""What `evolve` looks at: most events are none of these."""
_copy = copier(Lifecycle)
_IDLE = Lifecycle(execution_id="")
_NAMES = tuple(each.name for each in fields(Lifecycle))
_READERS: Readers = {
    "status": ExecutionStatus,
    "paused_from": ExecutionStatus,
    "current_phase": ExecutionPhase,
    "phases": _phases,
    "inputs": questions,
    "capacity": capacity.uses_of,
    "lease": Lease.from_dict,
    **dict.fromkeys(
        (
            "not_before",
            "created_at",
            "queued_at",
            "started_at",
            "paused_at",
            "resumed_at",
            "completed_at",
            "checkpoint_at",
            "clock_read_at",
        ),
        stamp,
    ),
}


def _checkpoint_time(event: ExecutionEvent) -> datetime | None:
    """When the work made the checkpoint of the event: earlier, where it was put back to it; None where to none."""
    if "at" not in event.details:
        return event.timestamp
    at = event.details["at"]
    return stamp(at) if at else None


def _required(value: _T | None) -> _T:
    if value is None:
        raise ValueError("the event lacks a field that its type requires")
    return value
