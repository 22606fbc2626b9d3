"""The three clocks of an execution (at work, paused, waiting) between two facts of its log."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vespera_exec.model.enums import ExecutionStatus

if TYPE_CHECKING:
    from datetime import datetime

    from vespera_exec.model.events import Json
    from vespera_exec.model.lifecycle import Lifecycle

_AT_WORK = (
    ExecutionStatus.PREPARING,
    ExecutionStatus.VALIDATING,
    ExecutionStatus.RUNNING,
    ExecutionStatus.COMPLETING,
    ExecutionStatus.CANCELLING,
)
_WAITING = (ExecutionStatus.PENDING, ExecutionStatus.RECOVERING)
_PAUSED = ExecutionStatus.PAUSED  # looked up once: in Python 3.11 that takes as long as a function call
_DIGITS = 6  # a microsecond; readings are rounded like the facts, so that they never run backwards


class Stopwatch(NamedTuple):
    """Since when each clock runs, in monotonic seconds; None where it stands.

    What they had counted before is in the `Lifecycle`.
    """

    active: float | None = None
    paused: float | None = None
    queued: float | None = None

    @classmethod
    def of(cls, status: ExecutionStatus, now: float, *, parked: bool = False) -> Stopwatch:
        """The clocks that run in `status`, from `now`. `parked`: nothing of its work runs; it waits for its turn."""
        if status in _AT_WORK:
            return cls(queued=now) if parked else cls(active=now)
        return cls(None, now if status is _PAUSED else None, now if status in _WAITING else None)

    def active_seconds(self, life: Lifecycle, now: float) -> float:
        """Time at work: pauses excluded, frozen at the end."""
        running = now - self.active if self.active is not None else 0.0
        return round(life.active_seconds + running, _DIGITS)

    def reading(self, life: Lifecycle, now: float, *, leaves_phase: bool = False) -> dict[str, Json]:
        """What the clocks that run show, as an event keeps it; with the time at work in the phase that is left."""
        shown: dict[str, Json] = {}
        if self.active is not None:
            shown["active"] = self.active_seconds(life, now)
        if self.paused is not None:
            shown["paused"] = round(life.paused_seconds + now - self.paused, _DIGITS)
        if self.queued is not None:
            shown["queued"] = round(life.queue_seconds + now - self.queued, _DIGITS)
        if leaves_phase and life.current_phase is not None:
            shown["phase"] = round(self.active_seconds(life, now) - life.phase_entered_active, _DIGITS)
        return shown


def unread_seconds(life: Lifecycle, last: datetime, now: datetime) -> float:
    """From the last reading of the clocks to the `last` sign of its owner, as a later one knows it by their stamps.

    Never negative, nor beyond `now`, whatever the wall clock did in between.
    """
    if life.clock_read_at is None:
        return 0.0
    return max(0.0, (min(last, now) - life.clock_read_at).total_seconds())
