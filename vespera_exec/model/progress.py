"""How far the work is: validated, monotonic, one value per scope."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, NamedTuple

from vespera_exec.errors import InvalidProgress
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus, ProgressType
from vespera_exec.model.events import ExecutionEvent, Json, mapping
from vespera_exec.model.rows import stamp
from vespera_exec.model.values import drafts

# Shared and never written; typed as mappings, which cannot be. (A proxy could not be copied or pickled.)
_NOTHING: Mapping[str, Json] = {}

# Looked up once: in Python 3.11 that takes as long as a function call.
_PERCENTAGE: Final = ProgressType.PERCENTAGE
_IDLE: Final = ExecutionStatus.IDLE
_COMPLETED: Final = ExecutionStatus.COMPLETED

SHOWN_BEFORE_THE_END = 99.0
"""Nothing shows 100 before the completion event has set it."""


def _now() -> datetime:
    return datetime.now(UTC)


def amount(name: str, value: object) -> float:
    """`value` as a number of progress.

    Raises:
        InvalidProgress: it is no number, not finite, or negative.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
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


def percentage_of(kind: ProgressType, current: float, total: float | None) -> float | None:
    """0 to 100, or None while it cannot be said (no total, or a total of 0)."""
    if kind is _PERCENTAGE:
        return current
    if total is None or total == 0:
        return None
    return min(100.0, current / total * 100.0)


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
        current, total = measure(self.progress_type, self.current, self.total)
        object.__setattr__(self, "current", current)
        object.__setattr__(self, "total", total)

    def get_percentage(self) -> float | None:
        """0 to 100, or None while it cannot be said (no total, or a total of 0)."""
        return percentage_of(self.progress_type, self.current, self.total)

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
        """The inverse of `to_dict`; keys that an older version did not write take their defaults."""
        return cls(
            progress_type=ProgressType(data.get("type", "percentage")),
            current=data.get("current", 0.0),
            total=data.get("total"),
            unit=data.get("unit", ""),
            message=data.get("message", ""),
            details=data.get("details") or {},
            updated_at=stamp(data["updated_at"]) if data.get("updated_at") else _now(),
        )


def measure(kind: ProgressType, current: object, total: object) -> tuple[float, float | None]:
    """The two numbers of a measure, checked.

    Raises:
        InvalidProgress: one is refused, or does not fit the type.
    """
    number = current if type(current) is float and 0.0 <= current < math.inf else amount("progress", current)
    if kind is _PERCENTAGE:
        if total is not None:
            raise InvalidProgress("a percentage takes no total; use steps, items or bytes")
        if number > 100:
            raise InvalidProgress(f"a percentage is at most 100, not {number:g}")
        return number, None
    return number, None if total is None else amount("total", total)


class ProgressReport(NamedTuple):
    """What the work says of its own progress: one value, in one of six types.

    `current` None keeps the value and changes the message only. `metric` names a custom metric, which
    may rise and fall; without it the report is about the work itself. `reset` allows the value to go
    back (a rollback, a second pass). Name the fields: their order is no promise.
    """

    current: float | None = None
    message: str = ""
    progress_type: ProgressType = ProgressType.PERCENTAGE
    total: float | None = None
    unit: str = ""
    details: Mapping[str, Json] = _NOTHING
    metric: str | None = None
    reset: bool = False

    @classmethod
    def percentage(cls, value: float, message: str = "") -> ProgressReport:
        return cls(current=value, message=message)

    @classmethod
    def steps(cls, done: float, total: float | None = None, message: str = "") -> ProgressReport:
        return cls(progress_type=ProgressType.STEPS, current=done, total=total, unit="steps", message=message)


_NO_PHASES: Mapping[ExecutionPhase, ProgressState] = {}
_NO_METRICS: Mapping[str, ProgressState] = {}
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
_UNTOUCHED = ProgressState(details=_NOTHING, updated_at=_LONG_AGO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """All progress of one execution; the hot part of its state, folded from its events.

    `overall` is what is shown, `reached` the highest percentage of it so far. `phases[EXECUTION]` is the
    work's own, which the ETA reads. `sequence` and `updated_at` are those of the last event of the execution,
    of any type.
    """

    execution_id: str
    overall: ProgressState = _UNTOUCHED
    phases: Mapping[ExecutionPhase, ProgressState] = field(default_factory=lambda: _NO_PHASES)
    custom: Mapping[str, ProgressState] = field(default_factory=lambda: _NO_METRICS)
    reached: float = 0.0
    completed: bool = False
    sequence: int = 0
    updated_at: datetime = _LONG_AGO

    @property
    def percentage(self) -> float | None:
        """What is shown: 0 to 99, and 100 only when the execution is COMPLETED; None while indeterminate."""
        shown = self.overall.get_percentage()
        return shown if shown is None or self.completed else min(shown, SHOWN_BEFORE_THE_END)

    def evolve(self, event: ExecutionEvent) -> Progress:
        """The state after `event`: a report, a phase that is entered, or the completion, which alone sets 100."""
        fold = _FOLDS.get(event.event_type)
        return _after(self, event) if fold is None else fold(self, event)

    def to_dict(self) -> dict[str, Json]:
        return {
            "execution_id": self.execution_id,
            "overall": self.overall.to_dict(),
            "phases": {phase.value: state.to_dict() for phase, state in self.phases.items()},
            "custom": {name: state.to_dict() for name, state in self.custom.items()},
            "reached": self.reached,
            "completed": self.completed,
            "sequence": self.sequence,
            "updated_at": self.updated_at.isoformat(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> Progress:
        """The inverse of `to_dict`; keys that an older version did not write take their defaults."""
        overall = ProgressState.from_dict(mapping(data.get("overall")))
        return cls(
            execution_id=data["execution_id"],
            overall=overall,
            phases={
                ExecutionPhase(name): ProgressState.from_dict(state)
                for name, state in mapping(data.get("phases")).items()
            },
            custom={name: ProgressState.from_dict(state) for name, state in mapping(data.get("custom")).items()},
            reached=data.get("reached", overall.get_percentage() or 0.0),
            completed=data.get("completed", False),
            sequence=data.get("sequence", 0),
            updated_at=stamp(data["updated_at"]) if data.get("updated_at") else overall.updated_at,
        )


def untouched(execution_id: str) -> Progress:
    """Of an execution that has just been made: the same as `Progress(...)` gives, in a third of the time."""
    return _sealed(execution_id, _UNTOUCHED, _NO_PHASES, _NO_METRICS, 0.0, False, 0, _LONG_AGO)


def _reported(before: Progress, event: ExecutionEvent) -> Progress:
    overall, phases, custom, reached = before.overall, before.phases, before.custom, before.reached
    data, seen, at = event.progress_data, event.details, event.timestamp
    if data is not None:
        overall = _state(data, at)
        if (shown := data["percentage"]) is not None:
            reached = shown  # lower than before only after a reset: `accepted` refuses all else
    if seen:
        if (of_phase := seen.get("phase_progress")) is not None and event.phase is not None:
            phases = {**phases, event.phase: _state(of_phase, at)}
        if of_metrics := mapping(seen.get("custom")):
            custom = {**custom, **{name: _state(state, at) for name, state in of_metrics.items()}}
    return _sealed(before.execution_id, overall, phases, custom, reached, before.completed, event.sequence, at)


def _changed(before: Progress, event: ExecutionEvent) -> Progress:
    at = event.timestamp
    if event.new_status is _COMPLETED:
        overall = _percent(100.0, event.message or before.overall.message, at)
        return _sealed(before.execution_id, overall, before.phases, before.custom, 100.0, True, event.sequence, at)
    if event.old_status is _IDLE and before.overall is _UNTOUCHED:
        return _after(before, event, overall=_percent(0.0, "", at))
    return _after(before, event)


def _moved(before: Progress, event: ExecutionEvent) -> Progress:
    """The phase that is left as completed stands at 100; the one that is entered, also again, at 0."""
    phases = dict(before.phases)
    left = event.details.get("left")
    if left is not None and event.details.get("outcome") == "completed":
        stood = phases.get(ExecutionPhase(left))
        if stood is None or stood.progress_type is _PERCENTAGE:
            message = stood.message if stood else ""
            phases[ExecutionPhase(left)] = _percent(100.0, message, event.timestamp)
    if event.phase is not None:
        phases[event.phase] = _percent(0.0, "", event.timestamp)
    return _after(before, event, phases=phases)


def _after(
    before: Progress,
    event: ExecutionEvent,
    *,
    overall: ProgressState | None = None,
    phases: Mapping[ExecutionPhase, ProgressState] | None = None,
) -> Progress:
    """As it was, but for what is given, and for the place in the log."""
    return _sealed(
        before.execution_id,
        before.overall if overall is None else overall,
        before.phases if phases is None else phases,
        before.custom,
        before.reached,
        before.completed,
        event.sequence,
        event.timestamp,
    )


_FOLDS: Mapping[EventType, Callable[[Progress, ExecutionEvent], Progress]] = {
    EventType.PROGRESS_UPDATE: _reported,
    EventType.STATUS_CHANGE: _changed,
    EventType.PHASE_CHANGE: _moved,
}
"""What an event changes besides the place in the log."""

CustomMetric = Callable[[Progress, float], ProgressState | float | None]
"""A computed metric: `(progress, elapsed_seconds)` to its value, or None where it has none yet."""


def measured(state: ProgressState) -> dict[str, Json]:
    """A state as it stands in an event: current, total, percentage, message, and what differs from the default."""
    return measurement(state.progress_type, state.current, state.total, state.unit, state.message, state.details)


def measurement(
    kind: ProgressType, current: float, total: float | None, unit: str, message: str, details: Mapping[str, Json]
) -> dict[str, Json]:
    """As `measured`, of the parts of a state."""
    data: dict[str, Json] = {
        "current": current,
        "total": total,
        "percentage": percentage_of(kind, current, total),
        "message": message,
    }
    if kind is not _PERCENTAGE:
        data["type"] = kind.value
    if unit:
        data["unit"] = unit
    if details:
        data["details"] = dict(details)
    return data


_draft_state, _draft = drafts(ProgressState), drafts(Progress)


def _state(data: Mapping[str, Json], at: datetime) -> ProgressState:
    """What `measurement` has said, at that time; its numbers were checked when the event was made."""
    made = _draft_state()
    kind = data.get("type")
    made.progress_type = _PERCENTAGE if kind is None else _KINDS[kind]
    made.current = data["current"]
    made.total = data["total"]
    made.unit = data.get("unit", "")
    made.message = data["message"]
    made.details = data.get("details", _NOTHING)
    made.updated_at = at
    made.__class__ = ProgressState
    return made


def _percent(current: float, message: str, at: datetime) -> ProgressState:
    return _state({"current": current, "total": None, "message": message}, at)


_KINDS = {kind.value: kind for kind in ProgressType}


def _sealed(
    execution_id: str,
    overall: ProgressState,
    phases: Mapping[ExecutionPhase, ProgressState],
    custom: Mapping[str, ProgressState],
    reached: float,
    completed: bool,
    sequence: int,
    updated_at: datetime,
) -> Progress:
    made = _draft()
    made.execution_id = execution_id
    made.overall = overall
    made.phases = phases
    made.custom = custom
    made.reached = reached
    made.completed = completed
    made.sequence = sequence
    made.updated_at = updated_at
    made.__class__ = Progress
    return made
