"""Who is next: higher priority first, then whoever came first, none before its time."""

from __future__ import annotations

import heapq
import itertools
from typing import Generic, TypeVar

T = TypeVar("T")


class WaitingQueue(Generic[T]):
    """Items by priority (higher first) and arrival. An item with `not_before` is held back until then.

    Times are on the caller's monotonic scale, in seconds.
    """

    def __init__(self) -> None:
        self._ready: list[tuple[int, int, str, T]] = []
        self._held: list[tuple[float, int, int, str, T]] = []
        self._present: set[str] = set()
        self._arrival = itertools.count()

    def __len__(self) -> int:
        return len(self._present)

    def __contains__(self, key: str) -> bool:
        return key in self._present

    def put(self, key: str, item: T, *, priority: int, not_before: float | None = None) -> None:
        self._present.add(key)
        arrival = next(self._arrival)
        if not_before is None:
            heapq.heappush(self._ready, (-priority, arrival, key, item))
        else:
            heapq.heappush(self._held, (not_before, arrival, -priority, key, item))

    def discard(self, key: str) -> bool:
        """Take it out, wherever it stands. False when it was not in."""
        if key not in self._present:
            return False
        self._present.discard(key)
        return True

    def pop(self, now: float) -> T | None:
        """The next one whose time has come, or None."""
        while self._held and self._held[0][0] <= now:
            _, arrival, rank, key, item = heapq.heappop(self._held)
            heapq.heappush(self._ready, (rank, arrival, key, item))
        while self._ready:
            _, _, key, item = heapq.heappop(self._ready)
            if key in self._present:
                self._present.discard(key)
                return item
        return None

    def next_time(self) -> float | None:
        """When the first held item becomes ready, or None."""
        while self._held and self._held[0][3] not in self._present:
            heapq.heappop(self._held)
        return self._held[0][0] if self._held else None
