"""Where the time of a task's executions goes, phase by phase."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus
from vespera_exec.model.timing import HISTORY_LIMIT

if TYPE_CHECKING:
    from vespera_exec.model.events import Json
    from vespera_exec.model.lifecycle import Lifecycle


class PhaseProfile(NamedTuple):
    """What the stays in one phase come to; seconds at work."""

    phase: ExecutionPhase
    stays: int = 0
    seconds: float = 0.0
    longest_seconds: float = 0.0

    @property
    def mean_seconds(self) -> float:
        return round(self.seconds / self.stays, 6) if self.stays else 0.0

    def after(self, seconds: float) -> PhaseProfile:
        """With one more stay."""
        total = round(self.seconds + seconds, 6)
        return PhaseProfile(self.phase, self.stays + 1, total, max(self.longest_seconds, seconds))


@dataclass(frozen=True, slots=True)
class PerformanceProfiler:
    """The profile of executions that have ended; `after` makes the next one. Holds no session.

    `durations` are the active seconds of the last ten that completed.
    """

    phases: tuple[PhaseProfile, ...] = ()
    durations: tuple[float, ...] = ()

    @property
    def baseline(self) -> timedelta | None:
        """The median of the durations; None without any."""
        return timedelta(seconds=statistics.median(self.durations)) if self.durations else None

    def after(self, ended: Lifecycle) -> PerformanceProfiler:
        """With one more execution, however it ended; only a completed one counts among the durations."""
        phases = {each.phase: each for each in self.phases}
        for stay in ended.phases:
            if stay.duration_seconds is not None:
                known = phases.get(stay.phase) or PhaseProfile(stay.phase)
                phases[stay.phase] = known.after(stay.duration_seconds)
        durations = self.durations
        if ended.status is ExecutionStatus.COMPLETED:
            durations = (*durations, ended.active_seconds)[-HISTORY_LIMIT:]
        return PerformanceProfiler(tuple(phases.values()), durations)

    def profile(self) -> dict[str, Json]:
        """JSON-safe, in seconds at work: `phase_seconds` by phase, `phases` with `stays`, `mean_seconds` and
        `longest_seconds` of each, and `durations_seconds`.
        """
        return {
            "phase_seconds": {each.phase.value: each.seconds for each in self.phases},
            "phases": {
                each.phase.value: {
                    "stays": each.stays,
                    "mean_seconds": each.mean_seconds,
                    "longest_seconds": each.longest_seconds,
                }
                for each in self.phases
            },
            "durations_seconds": list(self.durations),
        }
