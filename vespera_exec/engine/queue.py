"""Who is next: higher priority first, then whoever came first, none before its time."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_WORTH_TIDYING = 64


@dataclass(slots=True)
class _Place(Generic[T]):
    item: T | None
    """None once it was taken out: the place stays in its heap until it comes up or the heap is tidied."""


class WaitingQueue(Generic[T]):
    """Items by priority (higher first) and arrival. An item with `not_before` is held back until then.

    Times are on the caller's monotonic scale, in seconds. What was taken out is let go of at once.
    """

    def __init__(self) -> None:
        self._ready: list[tuple[int, int, str, _Place[T]]] = []
        self._held: list[tuple[float, int, int, str, _Place[T]]] = []
        self._places: dict[str, _Place[T]] = {}
        self._arrival = itertools.count()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def put(self, key: str, item: T, *, priority: int, not_before: float | None = None) -> None:
        """Put it last among its equals; one of the same key that is in gives way."""
        self.discard(key)
        place = self._places[key] = _Place(item)
        arrival = next(self._arrival)
        if not_before is None:
            heapq.heappush(self._ready, (-priority, arrival, key, place))
        else:
            heapq.heappush(self._held, (not_before, arrival, -priority, key, place))

    def discard(self, key: str) -> bool:
        """Take it out, wherever it stands. False when it was not in."""
        place = self._places.pop(key, None)
        if place is None:
            return False
        place.item = None
        if len(self._ready) + len(self._held) > 2 * len(self._places) + _WORTH_TIDYING:
            self._tidy()
        return True

    def pop(self, now: float) -> T | None:
        """The next one whose time has come, or None."""
        found = self.first(now)
        if found is None:
            return None
        del self._places[heapq.heappop(self._ready)[2]]
        return found[1]

    def first(self, now: float) -> tuple[int, T] | None:
        """The one that `pop` would give, behind its priority, or None."""
        while self._held and self._held[0][0] <= now:
            _, arrival, rank, key, place = heapq.heappop(self._held)
            heapq.heappush(self._ready, (rank, arrival, key, place))
        while self._ready:
            rank, _, _, place = self._ready[0]
            if place.item is not None:
                return -rank, place.item
            heapq.heappop(self._ready)
        return None

    def next_time(self) -> float | None:
        """When the first held item becomes ready, or None."""
        while self._held and self._held[0][4].item is None:
            heapq.heappop(self._held)
        return self._held[0][0] if self._held else None

    def _tidy(self) -> None:
        self._ready = [entry for entry in self._ready if entry[3].item is not None]
        self._held = [entry for entry in self._held if entry[4].item is not None]
        heapq.heapify(self._ready)
        heapq.heapify(self._held)
