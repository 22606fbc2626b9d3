"""How long the rest will take, as an interval that says how far it can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vespera_exec.model.enums import ExecutionPhase

HORIZON_SECONDS = 30 * 24 * 3600.0
"""Beyond this an estimate is worth nothing, and none is given."""

NAIVE_BAND = 0.5
"""Half the width of the naive interval, as a share of the remaining time. Stated, not measured."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Remaining seconds and the interval around them.

    `confidence` is the measured coverage of the interval (0 to 1), None while `label` is "uncalibrated".
    """

    remaining_seconds: float
    low_seconds: float
    high_seconds: float
    label: str = "uncalibrated"
    confidence: float | None = None


class NaiveEstimator:
    """Goes on as it went so far: elapsed time by the fraction done, within 50 % either way."""

    def estimate(
        self,
        *,
        role: str | None,
        elapsed_seconds: float,
        fraction: float | None,
        phase: ExecutionPhase | None = None,
        history: Sequence[float] = (),
    ) -> Estimate | None:
        """The rest of a run that has worked `elapsed_seconds` (pauses left out) and done `fraction` (0 to 1).

        Call it at the time of reading: between two reports the estimate grows with the time that passes,
        so a stall is seen. `history` holds the active seconds of the role's completed runs, newest first;
        this method does not use `role`, `phase` and `history`. None when nothing can be said: less than a
        second has passed, nothing is done, a value is not finite, or the end is beyond `HORIZON_SECONDS`.
        """
        if fraction is None or not math.isfinite(fraction) or not math.isfinite(elapsed_seconds):
            return None
        if elapsed_seconds < 1.0 or fraction <= 0.0:
            return None
        done = min(fraction, 1.0)
        remaining = elapsed_seconds / done - elapsed_seconds
        if not remaining <= HORIZON_SECONDS:
            return None
        return Estimate(remaining, remaining * (1 - NAIVE_BAND), remaining * (1 + NAIVE_BAND))
