"""Where one execution stands and how it got there: the cold part of its state, folded from the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import NamedTuple, TypeVar

from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus
from vespera_exec.model.events import ExecutionEvent, Json, mapping

_T = TypeVar("_T")


class PhaseRecord(NamedTuple):
    """One stay in a phase. `exited_at`, `duration_seconds` and `outcome` are None while it lasts."""

    phase: ExecutionPhase
    entered_at: datetime
    exited_at: datetime | None = None
    duration_seconds: float | None = None
    outcome: str | None = None  # "completed", or the terminal status that ended it

    def to_dict(self) -> dict[str, Json]:
        return {
            "phase": self.phase.value,
            "entered_at": self.entered_at.isoformat(),
            "exited_at": self.exited_at.isoformat() if self.exited_at else None,
            "duration_seconds": self.duration_seconds,
            "outcome": self.outcome,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> PhaseRecord:
        return cls(
            ExecutionPhase(data["phase"]),
            datetime.fromisoformat(data["entered_at"]),
            _when(data["exited_at"]),
            data["duration_seconds"],
            data["outcome"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifecycle:
    """Status, clock, phases and outcome. Only `evolve` makes a new one.

    `active_seconds` and `paused_seconds` are as of the last status change; whoever shows a running
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
    current_phase: ExecutionPhase | None = None
    phases: tuple[PhaseRecord, ...] = ()
    cancellation_reason: str | None = None
    recovery_attempts: int = 0
    checkpoint: Json = None
    checkpoint_at: datetime | None = None
    outcome: Mapping[str, Json] = field(default_factory=dict[str, Json])
    sequence: int = 0

    @property
    def error(self) -> Mapping[str, Json]:
        return self.outcome.get("error") or {}

    def evolve(self, event: ExecutionEvent) -> Lifecycle:
        """The state after `event`; events that only annotate leave it as it was."""
        match event.event_type:
            case EventType.STATUS_CHANGE:
                return self._changed(event)
            case EventType.PHASE_CHANGE:
                return replace(
                    self,
                    current_phase=event.phase,
                    phases=(*self._closed(event, "completed"), PhaseRecord(_required(event.phase), event.timestamp)),
                    sequence=event.sequence,
                )
            case EventType.OWNER_CHANGED:
                return replace(
                    self,
                    owner=event.details["owner"],
                    generation=event.details["generation"],
                    sequence=event.sequence,
                )
            case EventType.CHECKPOINT_CREATED:
                return replace(
                    self,
                    checkpoint=event.details["state"],
                    checkpoint_at=event.timestamp,
                    sequence=event.sequence,
                )
            case _:
                return self

    def _changed(self, event: ExecutionEvent) -> Lifecycle:
        new, at, details = _required(event.new_status), event.timestamp, event.details
        clock = mapping(details.get("clock"))
        changed = replace(
            self,
            status=new,
            status_message=event.message,
            sequence=event.sequence,
            active_seconds=clock.get("active", self.active_seconds),
            paused_seconds=clock.get("paused", self.paused_seconds),
            queue_seconds=clock.get("queued", self.queue_seconds),
        )
        made = details.get("session")
        if made is not None:
            changed = replace(
                changed,
                task_id=event.task_id,
                run_id=made["run_id"],
                attempt=made["attempt"],
                parent_execution_id=made["parent"],
                role_name=made["role"],
                priority=made["priority"],
                not_before=_when(made["not_before"]),
                owner=made["owner"],
                generation=made["generation"],
                created_at=at,
            )
        match new:
            case ExecutionStatus.PENDING:
                changed = replace(changed, queued_at=at)
            case ExecutionStatus.PREPARING if self.started_at is None:
                changed = replace(changed, started_at=at)
            case ExecutionStatus.PAUSED:
                changed = replace(changed, paused_at=at, paused_from=self.status)
            case ExecutionStatus.RECOVERING:
                changed = replace(changed, recovery_attempts=self.recovery_attempts + 1)
            case _:
                pass
        if self.status is ExecutionStatus.PAUSED:
            changed = replace(changed, paused_at=None, paused_from=None, resumed_at=at)
        if new in (ExecutionStatus.CANCELLING, ExecutionStatus.CANCELLED) and self.cancellation_reason is None:
            changed = replace(changed, cancellation_reason=details.get("reason", event.message))
        if new.is_terminal:
            changed = replace(
                changed,
                completed_at=at,
                current_phase=None,
                phases=self._closed(event, new.value),
                outcome=details.get("outcome") or {},
            )
        return changed

    def _closed(self, event: ExecutionEvent, outcome: str) -> tuple[PhaseRecord, ...]:
        """The phases with the current one ended."""
        if not self.phases or self.phases[-1].exited_at is not None:
            return self.phases
        last = self.phases[-1]
        duration = mapping(event.details.get("clock")).get("phase")
        return (*self.phases[:-1], last._replace(exited_at=event.timestamp, duration_seconds=duration, outcome=outcome))

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
            "not_before": _iso(self.not_before),
            "owner": self.owner,
            "generation": self.generation,
            "created_at": _iso(self.created_at),
            "queued_at": _iso(self.queued_at),
            "started_at": _iso(self.started_at),
            "paused_at": _iso(self.paused_at),
            "resumed_at": _iso(self.resumed_at),
            "completed_at": _iso(self.completed_at),
            "active_seconds": self.active_seconds,
            "paused_seconds": self.paused_seconds,
            "queue_seconds": self.queue_seconds,
            "current_phase": self.current_phase.value if self.current_phase else None,
            "phases": [phase.to_dict() for phase in self.phases],
            "cancellation_reason": self.cancellation_reason,
            "recovery_attempts": self.recovery_attempts,
            "checkpoint": self.checkpoint,
            "checkpoint_at": _iso(self.checkpoint_at),
            "outcome": dict(self.outcome),
            "sequence": self.sequence,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> Lifecycle:
        return cls(
            execution_id=data["execution_id"],
            task_id=data["task_id"],
            run_id=data["run_id"],
            attempt=data["attempt"],
            parent_execution_id=data["parent_execution_id"],
            role_name=data["role_name"],
            status=ExecutionStatus(data["status"]),
            status_message=data["status_message"],
            paused_from=ExecutionStatus(data["paused_from"]) if data["paused_from"] else None,
            priority=data["priority"],
            not_before=_when(data["not_before"]),
            owner=data["owner"],
            generation=data["generation"],
            created_at=_when(data["created_at"]),
            queued_at=_when(data["queued_at"]),
            started_at=_when(data["started_at"]),
            paused_at=_when(data["paused_at"]),
            resumed_at=_when(data["resumed_at"]),
            completed_at=_when(data["completed_at"]),
            active_seconds=data["active_seconds"],
            paused_seconds=data["paused_seconds"],
            queue_seconds=data["queue_seconds"],
            current_phase=ExecutionPhase(data["current_phase"]) if data["current_phase"] else None,
            phases=tuple(PhaseRecord.from_dict(each) for each in data["phases"]),
            cancellation_reason=data["cancellation_reason"],
            recovery_attempts=data["recovery_attempts"],
            checkpoint=data["checkpoint"],
            checkpoint_at=_when(data["checkpoint_at"]),
            outcome=data["outcome"],
            sequence=data["sequence"],
        )


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def _when(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _required(value: _T | None) -> _T:
    if value is None:
        raise ValueError("the event lacks a field that its type requires")
    return value
