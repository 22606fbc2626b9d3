"""The metrics of document 003 for one execution, computed from what its log has folded to; nothing is guessed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

from vespera_exec.app.executions.result import ExecutionMetrics, ResourceUsage
from vespera_exec.model import capacity
from vespera_exec.model.enums import EventType, ExecutionStatus
from vespera_exec.model.events import mapping

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from vespera_exec.model.capacity import CapacityUse
    from vespera_exec.model.events import ExecutionEvent, Json
    from vespera_exec.model.lifecycle import Lifecycle

S = ExecutionStatus

_COUNTS_WORK = frozenset({S.PREPARING, S.VALIDATING, S.RUNNING, S.COMPLETING, S.CANCELLING, S.RECOVERING})
_ENDS_WORK = frozenset(
    {
        EventType.STEP_COMPLETED,
        EventType.STEP_FAILED,
        EventType.STEP_SKIPPED,
        EventType.STEP_CANCELLED,
        EventType.STEP_RESET,
        EventType.RECOVERY_INITIATED,
    }
)


class Clocks(NamedTuple):
    """Seconds: at work, paused, waiting for its turn (with the back-off before it)."""

    active: float = 0.0
    paused: float = 0.0
    queued: float = 0.0

    @property
    def total(self) -> float:
        return self.active + self.paused + self.queued


class Counted(NamedTuple):
    """Of steps, or of attempts at them: how many completed, how many failed."""

    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the metrics are computed from. `result` is what the work returned; None is what is not known."""

    clocks: Clocks
    steps: Counted
    effective: float | None = None
    """Seconds in which it was at work."""
    attempts: Counted | None = None
    usage: Sequence[ResourceUsage] = field(default_factory=tuple)
    result: Json = None


def metrics(seen: Measured) -> ExecutionMetrics:
    total = max(0.0, seen.clocks.total)
    effective = None if seen.effective is None else _milliseconds(min(max(0.0, seen.effective), total))
    return ExecutionMetrics(
        total_duration=_milliseconds(total),
        effective_duration=effective,
        total_cost=total_cost(seen.usage),
        resource_efficiency=resource_efficiency(seen.usage),
        quality_score=quality_score(seen.result),
        success_rate=_share(seen.steps.completed, sum(seen.steps)),
        throughput=seen.steps.completed / total if total else None,
        error_rate=_share(seen.attempts.failed, sum(seen.attempts)) if seen.attempts is not None else None,
    )


def clocks(lives: Iterable[Lifecycle], *, now: datetime) -> Clocks:
    """The clocks of the attempts of a run, added up; the one that runs is read at `now`."""
    active = paused = queued = 0.0
    for life in lives:
        active, paused, queued = active + life.active_seconds, paused + life.paused_seconds, queued + life.queue_seconds
        since = 0.0
        if life.clock_read_at is not None and not life.status.is_terminal and life.status is not S.IDLE:
            since = max(0.0, (now - life.clock_read_at).total_seconds())
        if life.status is S.PAUSED:
            paused += since
        elif life.status in (S.PENDING, S.RECOVERING) or life.is_parked:
            queued += since
        else:
            active += since
    return Clocks(active, paused, queued)


def attempts(lives: Iterable[Lifecycle]) -> Counted:
    """How the attempts of a run ended; cancelled ones count as neither."""
    ends = [life.status for life in lives]
    return Counted(ends.count(S.COMPLETED), ends.count(S.FAILED) + ends.count(S.TIMED_OUT))


def seconds_at_work(events: Iterable[ExecutionEvent], *, now: datetime | None = None) -> float:
    """How long at least one step of a plan was at work, out of the events of the plan's execution, in order.

    A step that waits (for a slot, capacity, an answer), that backs off, or about which a recovery strategy decides is
    not at work; nor is any while the plan is paused. The time without an owner is left out. `now` closes what runs.
    """
    work = _AtWork()
    for event in events:
        work.hear(event)
    if now is not None:
        work.pass_to(now)
    return work.seconds


def usage(events: Iterable[ExecutionEvent]) -> tuple[ResourceUsage, ...]:
    """The capacity that the events tell of, in the order in which it was given; one line for each allocation."""
    uses: dict[str, CapacityUse] = {}
    steps: dict[str, str | None] = {}
    for event in events:
        if event.event_type is EventType.RESOURCE_ALLOCATED:
            given = capacity.folded((), event)
            steps |= dict.fromkeys((each.allocation_id for each in given), event.step_id)
        elif event.event_type is EventType.RESOURCE_RELEASED:
            ended = [mapping(each).get("allocation_id") for each in event.details.get("allocations") or ()]
            given = capacity.folded(tuple(uses[each] for each in ended if each in uses), event)
        else:
            continue
        uses |= {each.allocation_id: each for each in given}
    return tuple(ResourceUsage.of(use, step=steps.get(allocation_id)) for allocation_id, use in uses.items())


def total_cost(used: Iterable[ResourceUsage]) -> float | None:
    """Of what has been given back; None where that is nothing."""
    costs = [each.cost for each in used if each.cost is not None]
    return math.fsum(costs) if costs else None


def resource_efficiency(used: Iterable[ResourceUsage]) -> float | None:
    """Used by allocated: each allocation weighs as much as its amount times its time; None where none was measured."""
    weighed = [
        (each.amount_used * each.duration, each.efficiency)
        for each in used
        if each.efficiency is not None and each.duration
    ]
    weight = sum(each for each, _ in weighed)
    return min(1.0, sum(each * efficiency for each, efficiency in weighed) / weight) if weight else None


def quality_score(result: Json) -> float | None:
    """What the result says of itself under `quality_score`, else the mean of what its members say; 0 to 1."""
    told = _score(result)
    if told is not None or not isinstance(result, dict):
        return told
    of_steps = [score for each in cast("dict[str, Json]", result).values() if (score := _score(each)) is not None]
    return sum(of_steps) / len(of_steps) if of_steps else None


class _AtWork:
    """Adds up the time between events in which something is at work."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._steps: set[str] = set()
        self._is_on = False
        self._at: datetime | None = None

    def hear(self, event: ExecutionEvent) -> None:
        if event.event_type is EventType.OWNER_CHANGED:
            self._at = event.timestamp  # nobody worked since the event before
            return
        self.pass_to(event.timestamp)
        step = event.step_id
        if event.event_type is EventType.STATUS_CHANGE and event.new_status is not None:
            self._is_on = event.new_status in _COUNTS_WORK
        elif step is None:
            return
        elif event.event_type is EventType.STEP_STARTED:
            self._steps.add(step)
        elif event.event_type is EventType.STEP_WAITING:
            (self._steps.discard if event.details.get("for") else self._steps.add)(step)
        elif event.event_type in _ENDS_WORK:
            self._steps.discard(step)

    def pass_to(self, at: datetime) -> None:
        if self._at is not None and self._is_on and self._steps:
            self.seconds += max(0.0, (at - self._at).total_seconds())
        self._at = at


def _score(value: Json) -> float | None:
    told = mapping(value).get("quality_score")
    if isinstance(told, bool) or not isinstance(told, int | float) or not math.isfinite(told) or not 0 <= told <= 1:
        return None
    return float(told)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
