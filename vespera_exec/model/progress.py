"""How far the work is: validated, monotonic, one value per scope."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType

from vespera_exec.errors import InvalidProgress
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus, ProgressType
from vespera_exec.model.events import ExecutionEvent, Json, mapping


def _now() -> datetime:
    return datetime.now(UTC)


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidProgress(f"{name} must be a number, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise InvalidProgress(f"{name} is too large") from None
    if not math.isfinite(number):
        raise InvalidProgress(f"{name} must be finite, not {number}")
    if number < 0:
        raise InvalidProgress(f"{name} must not be negative, not {number:g}")
    return number


@dataclass(frozen=True, slots=True)
class ProgressState:
    """The measure of one scope: the whole execution, a phase, or a named custom metric.

    PERCENTAGE counts `current` from 0 to 100 and takes no total. The other types count units of
    `unit` towards `total`; without a total they are indeterminate.

    Raises:
        InvalidProgress: a number is negative, not finite, or does not fit the type.
    """

    progress_type: ProgressType = ProgressType.PERCENTAGE
    current: float = 0.0
    total: float | None = None
    unit: str = ""
    message: str = ""
    details: Mapping[str, Json] = field(default_factory=dict[str, Json])
    updated_at: datetime = field(default_factory=_now)

    def __post_init__(self) -> None:
        current = _finite("progress", self.current)
        if self.progress_type is ProgressType.PERCENTAGE:
            if self.total is not None:
                raise InvalidProgress("a percentage takes no total; use steps, items or bytes")
            if current > 100:
                raise InvalidProgress(f"a percentage is at most 100, not {current:g}")
        elif self.total is not None:
            object.__setattr__(self, "total", _finite("total", self.total))
        object.__setattr__(self, "current", current)

    def get_percentage(self) -> float | None:
        """0 to 100, or None while it cannot be said (no total, or a total of 0)."""
        if self.progress_type is ProgressType.PERCENTAGE:
            return self.current
        if self.total is None or self.total == 0:
            return None
        return min(100.0, self.current / self.total * 100.0)

    def is_complete(self) -> bool:
        """100 percent are reached. An indeterminate measure is never complete; the status says when it ends."""
        percentage = self.get_percentage()
        return percentage is not None and percentage >= 100.0

    def to_dict(self) -> dict[str, Json]:
        return {
            "type": self.progress_type.value,
            "current": self.current,
            "total": self.total,
            "percentage": self.get_percentage(),
            "unit": self.unit,
            "message": self.message,
            "details": dict(self.details),
            "updated_at": self.updated_at.isoformat(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> ProgressState:
        return cls(
            progress_type=ProgressType(data.get("type", "percentage")),
            current=data.get("current", 0.0),
            total=data.get("total"),
            unit=data.get("unit", ""),
            message=data.get("message", ""),
            details=data.get("details") or {},
            updated_at=datetime.fromisoformat(data["updated_at"]) if data.get("updated_at") else _now(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressReport:
    """What the work says of its own progress: one value, in one of six types.

    `metric` names a custom metric; without it the report is about the work itself. `reset` allows the
    value to go back (a rollback, a second pass).
    """

    progress_type: ProgressType = ProgressType.PERCENTAGE
    current: float | None = None
    total: float | None = None
    unit: str = ""
    message: str = ""
    details: Mapping[str, Json] = field(default_factory=dict[str, Json])
    metric: str | None = None
    reset: bool = False

    @classmethod
    def percentage(cls, value: float, message: str = "") -> ProgressReport:
        return cls(current=value, message=message)

    @classmethod
    def steps(cls, done: float, total: float | None = None, message: str = "") -> ProgressReport:
        return cls(progress_type=ProgressType.STEPS, current=done, total=total, unit="steps", message=message)

    def applied_to(self, before: ProgressState | None, now: datetime) -> ProgressState:
        """The state after this report; `current` None keeps the value and changes the message only.

        Raises:
            InvalidProgress: the numbers are refused, or the value would run backwards.
        """
        if self.current is None:
            kept = before or ProgressState(self.progress_type, updated_at=now)
            return replace(kept, message=self.message or kept.message, updated_at=now)
        state = ProgressState(
            self.progress_type,
            self.current,
            self.total,
            self.unit,
            self.message or (before.message if before else ""),
            self.details,
            now,
        )
        same_scale = before is not None and before.progress_type is state.progress_type and before.total == state.total
        if before is not None and same_scale and state.current < before.current and not self.reset:
            raise InvalidProgress(f"progress went back from {before.current:g} to {state.current:g}")
        return state


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """All progress of one execution; the hot part of its state, folded from `progress_update` events.

    `overall` is what is shown. `phases[EXECUTION]` is the work's own, which the ETA reads.
    """

    execution_id: str
    overall: ProgressState = field(default_factory=ProgressState)
    phases: Mapping[ExecutionPhase, ProgressState] = field(default_factory=lambda: MappingProxyType({}))
    custom: Mapping[str, ProgressState] = field(default_factory=lambda: MappingProxyType({}))
    completed: bool = False
    sequence: int = 0

    @property
    def percentage(self) -> float | None:
        """What is shown: 0 to 99, and 100 only when the execution is COMPLETED; None while indeterminate."""
        shown = self.overall.get_percentage()
        return shown if shown is None or self.completed else min(shown, 99.0)

    def evolve(self, event: ExecutionEvent) -> Progress:
        """The state after a `progress_update`, or after the completion, which alone sets 100."""
        if event.event_type is EventType.STATUS_CHANGE and event.new_status is ExecutionStatus.COMPLETED:
            overall = ProgressState(current=100.0, message=self.overall.message, updated_at=event.timestamp)
            return replace(self, overall=overall, completed=True, sequence=event.sequence)
        if event.event_type is EventType.PHASE_CHANGE and event.phase is not None and event.phase not in self.phases:
            entered = {**self.phases, event.phase: ProgressState(updated_at=event.timestamp)}
            return replace(self, phases=entered, sequence=event.sequence)
        if event.event_type is not EventType.PROGRESS_UPDATE:
            return self
        seen = event.details
        overall, phases, custom = self.overall, self.phases, self.custom
        if event.progress_data is not None:
            overall = _state(event.progress_data, event.timestamp)
        if (of_phase := seen.get("phase_progress")) is not None and event.phase is not None:
            phases = {**phases, event.phase: _state(of_phase, event.timestamp)}
        if of_metrics := mapping(seen.get("custom")):
            custom = {**custom, **{name: _state(state, event.timestamp) for name, state in of_metrics.items()}}
        return replace(self, overall=overall, phases=phases, custom=custom, sequence=event.sequence)

    def to_dict(self) -> dict[str, Json]:
        return {
            "execution_id": self.execution_id,
            "overall": self.overall.to_dict(),
            "phases": {phase.value: state.to_dict() for phase, state in self.phases.items()},
            "custom": {name: state.to_dict() for name, state in self.custom.items()},
            "completed": self.completed,
            "sequence": self.sequence,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> Progress:
        return cls(
            execution_id=data["execution_id"],
            overall=ProgressState.from_dict(data["overall"]),
            phases={ExecutionPhase(name): ProgressState.from_dict(state) for name, state in data["phases"].items()},
            custom={name: ProgressState.from_dict(state) for name, state in data["custom"].items()},
            completed=data["completed"],
            sequence=data["sequence"],
        )


CustomMetric = Callable[[Progress, float], ProgressState | float | None]
"""A computed metric: `(progress, elapsed_seconds)` to its value, or None where it has none yet."""

PHASE_WINDOWS: Mapping[ExecutionPhase, tuple[float, float]] = MappingProxyType(
    {
        ExecutionPhase.VALIDATION: (0.0, 10.0),
        ExecutionPhase.SETUP: (10.0, 25.0),
        ExecutionPhase.EXECUTION: (30.0, 90.0),
        ExecutionPhase.CLEANUP: (90.0, 95.0),
        ExecutionPhase.FINALIZATION: (95.0, 99.0),
    }
)
"""Where the progress of a phase stands in the overall percentage."""


def rolled_up(overall: ProgressState, phase: ExecutionPhase, state: ProgressState, *, reset: bool) -> ProgressState:
    """The overall progress after a phase reported: never lower, unless the report was a reset."""
    window, percentage = PHASE_WINDOWS.get(phase), state.get_percentage()
    message = state.message or overall.message
    if window is None or percentage is None:
        return replace(overall, message=message, updated_at=state.updated_at)
    reached = window[0] + percentage / 100.0 * (window[1] - window[0])
    if not reset:
        reached = max(reached, overall.get_percentage() or 0.0)
    return ProgressState(current=reached, message=message, updated_at=state.updated_at)


def measured(state: ProgressState) -> dict[str, Json]:
    """A state as it stands in an event: current, total, percentage, message, and what differs from the default."""
    data: dict[str, Json] = {
        "current": state.current,
        "total": state.total,
        "percentage": state.get_percentage(),
        "message": state.message,
    }
    if state.progress_type is not ProgressType.PERCENTAGE:
        data["type"] = state.progress_type.value
    if state.unit:
        data["unit"] = state.unit
    if state.details:
        data["details"] = dict(state.details)
    return data


def _state(data: Mapping[str, Json], at: datetime) -> ProgressState:
    return ProgressState(
        ProgressType(data.get("type", "percentage")),
        data["current"],
        data["total"],
        data.get("unit", ""),
        data["message"],
        data.get("details") or {},
        at,
    )
