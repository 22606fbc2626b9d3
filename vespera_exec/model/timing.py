"""How long it has taken, and the simplest guess at how long it will: pauses excluded, frozen at the end."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from vespera_exec.errors import InvalidInput
from vespera_exec.model.clock import SYSTEM_CLOCK, Clock

HISTORY_LIMIT = 10
HORIZON_SECONDS = 30 * 24 * 3600.0
"""Nothing is predicted beyond this."""
_MIN_ELAPSED_SECONDS = 1.0


def remaining_seconds(elapsed: float, fraction: float | None, baseline: float | None = None) -> float | None:
    """Elapsed over fraction, drawn towards `baseline - elapsed` while little has been done.

    None where nothing can be said: no fraction, less than a second elapsed, or beyond the horizon.
    """
    if fraction is None or not 0 < fraction <= 1 or elapsed < _MIN_ELAPSED_SECONDS:
        return None
    by_rate = elapsed * (1 - fraction) / fraction
    if baseline is not None and baseline > 0:
        by_rate = fraction * by_rate + (1 - fraction) * max(0.0, baseline - elapsed)
    return by_rate if math.isfinite(by_rate) and by_rate <= HORIZON_SECONDS else None


@dataclass(slots=True)
class TimeTracking:
    """The clock of one execution.

    Driven by `start`, `pause`, `resume`, `finish` it counts monotonic time. Set by hand (`started_at`,
    `paused_at`, `paused_duration`) it takes the difference of the stamps. `historical_durations` holds
    the last ten, and `performance_baseline` is their median.
    """

    started_at: datetime | None = None
    paused_at: datetime | None = None
    resumed_at: datetime | None = None
    estimated_duration: timedelta | None = None
    paused_duration: timedelta = timedelta(0)
    eta_calculated_at: datetime | None = None
    estimated_completion: datetime | None = None
    confidence_level: float = 0.0
    """Stays 0.0: a naive estimate has no measured coverage."""
    historical_durations: list[timedelta] = field(default_factory=list[timedelta])
    performance_baseline: timedelta | None = None
    completed_at: datetime | None = None
    clock: Clock = field(default=SYSTEM_CLOCK, repr=False, compare=False)
    _active: float = field(default=0.0, repr=False)
    _since: float | None = field(default=None, repr=False)
    _paused_since: float | None = field(default=None, repr=False)
    _driven: bool = field(default=False, repr=False)

    @property
    def elapsed_time(self) -> timedelta:
        return self.get_elapsed_time()

    @property
    def is_paused(self) -> bool:
        if self._driven:
            return self._paused_since is not None
        if self.paused_at is None:
            return False
        return self.resumed_at is None or self.resumed_at < self.paused_at

    def start(self) -> None:
        """
        Raises:
            InvalidInput: it has been started before.
        """
        if self.started_at is not None:
            raise InvalidInput("the clock runs already")
        self.started_at = self.clock.now()
        self._since = self.clock.monotonic()
        self._driven = True

    def pause(self) -> None:
        """Stop counting; no effect while paused or ended."""
        if self._since is None:
            return
        now = self.clock.monotonic()
        self._active += now - self._since
        self._since, self._paused_since = None, now
        self.paused_at = self.clock.now()

    def resume(self) -> None:
        """Count on; no effect unless paused."""
        if self._paused_since is None:
            return
        now = self.clock.monotonic()
        self.paused_duration += timedelta(seconds=now - self._paused_since)
        self._since, self._paused_since = now, None
        self.resumed_at = self.clock.now()

    def finish(self) -> None:
        """Freeze. No effect when frozen or never started."""
        if self.started_at is None or self.completed_at is not None:
            return
        now = self.clock.monotonic()
        if self._since is not None:
            self._active += now - self._since
        if self._paused_since is not None:
            self.paused_duration += timedelta(seconds=now - self._paused_since)
        self._since = self._paused_since = None
        self.completed_at = self.clock.now()

    def get_elapsed_time(self) -> timedelta:
        """Time at work: pauses excluded, 0 before the start, frozen while paused and after the end."""
        if self.started_at is None:
            return timedelta(0)
        if self._driven:
            running = self.clock.monotonic() - self._since if self._since is not None else 0.0
            return timedelta(seconds=self._active + running)
        end = (self.paused_at if self.is_paused else None) or self.completed_at or self.clock.now()
        return max(timedelta(0), end - self.started_at - self.paused_duration)

    def calculate_eta(self, progress_percentage: float | None) -> datetime | None:
        """When it will be done at this rate, or None where nothing can be said. Frozen once it has ended."""
        if self.completed_at is not None:
            return self.completed_at
        if progress_percentage is None or not 0 < progress_percentage <= 100:
            return None
        elapsed = self.get_elapsed_time().total_seconds()
        baseline = self.performance_baseline.total_seconds() if self.performance_baseline else None
        remaining = remaining_seconds(elapsed, progress_percentage / 100, baseline)
        if remaining is None:
            return None
        self.eta_calculated_at = self.clock.now()
        self.estimated_duration = timedelta(seconds=elapsed + remaining)
        self.estimated_completion = self.eta_calculated_at + timedelta(seconds=remaining)
        return self.estimated_completion

    def update_historical_data(self, duration: timedelta) -> None:
        """Add the duration of a completed run; the last ten count."""
        self.historical_durations = [*self.historical_durations, duration][-HISTORY_LIMIT:]
        seconds = [each.total_seconds() for each in self.historical_durations]
        self.performance_baseline = timedelta(seconds=statistics.median(seconds))
