"""What was measured of one execution: the last samples of each kind, and the peaks."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from vespera_exec.errors import InvalidInput
from vespera_exec.model.enums import RESOURCE_UNITS

if TYPE_CHECKING:
    from datetime import datetime

    from vespera_exec.model.enums import ResourceType
    from vespera_exec.model.events import Json


class Usage:
    """Not thread-safe; its session guards it."""

    __slots__ = ("_counts", "_limit", "_means", "_peaks", "_samples")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._samples: dict[ResourceType, deque[tuple[datetime, float]]] = {}
        self._peaks: dict[ResourceType, float] = {}
        self._means: dict[ResourceType, float] = {}
        self._counts: dict[ResourceType, int] = {}

    def add(self, kind: ResourceType, value: float, at: datetime) -> None:
        """
        Raises:
            InvalidInput: the value is not finite.
        """
        if not math.isfinite(value):
            raise InvalidInput(f"{kind.value} must be finite, not {value}")
        samples = self._samples.get(kind)
        if samples is None:
            samples = self._samples[kind] = deque(maxlen=self._limit)
        samples.append((at, value))
        self._peaks[kind] = max(value, self._peaks.get(kind, value))
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        mean = self._means.get(kind, 0.0)
        self._means[kind] = mean + (value - mean) / count

    def samples(self) -> dict[ResourceType, list[tuple[datetime, float]]]:
        return {kind: list(samples) for kind, samples in self._samples.items()}

    def peaks(self) -> dict[ResourceType, float]:
        return dict(self._peaks)

    def means(self) -> dict[ResourceType, float]:
        """Over all samples, also those that are kept no more."""
        return dict(self._means)

    def shown(self) -> dict[str, Json]:
        """`{type: {"current", "peak", "unit"}}`; `current` is None where no samples are kept."""
        return {
            kind.value: {
                "current": samples[-1][1] if samples else None,
                "peak": self._peaks[kind],
                "unit": RESOURCE_UNITS[kind],
            }
            for kind, samples in self._samples.items()
        }
