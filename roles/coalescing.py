"""Progress reports are held back so that a burst of them becomes few events, the last value of each exact."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from vespera_exec.errors import InvalidProgress
from vespera_exec.model.progress import measure

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from vespera_exec.model.progress import ProgressReport

INTERVAL_SECONDS: Final = 0.05


class Coalescer:
    """Passes on one report per scope (the work itself, or a metric) and interval, in the order of arrival.

    The first report after a quiet time goes on at once; a newer one replaces one that waits. A reset or
    another type lets the waiting one out first, once per interval. Any thread may call it.
    """

    def __init__(
        self,
        record: Callable[[ProgressReport], None],
        refused: Callable[[str], None],
        interval: float = INTERVAL_SECONDS,
    ) -> None:
        """`record` may refuse by InvalidProgress: `refused` is told why. `interval` is in seconds; 0 holds nothing."""
        self._record = record
        self._refused = refused
        self._interval = interval
        # Reentrant: a listener to the event that is recorded may report in its turn.
        self._lock = threading.RLock()
        self._waiting: dict[str | None, ProgressReport] = {}
        self._last: dict[str | None, ProgressReport] = {}
        self._since = -math.inf
        self._recorded: set[str | None] = set()
        self._parted: set[str | None] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._late: Callable[[], None] = self.flush
        self._armed = False

    def offer(self, report: ProgressReport) -> None:
        """Pass `report` on, now or within the interval.

        Raises:
            InvalidProgress: its numbers are refused, or it goes back behind the report before it.
            CancellationException: from `record`.
        """
        scope = report.metric
        with self._lock:
            self._check(report)
            if (before := self._waiting.get(scope)) is not None and self._parts(before, report):
                self._parted.add(scope)
                self.flush()
            if (before := self._waiting.pop(scope, None)) is not None:
                report = _merged(before, report)
            self._waiting[scope] = report
            if time.monotonic() - self._since >= self._interval:
                self._turn()
                self.flush()
            elif len(self._waiting) == 1 and scope not in self._recorded:
                self.flush()
            else:
                self._arm()

    def flush(self) -> None:
        """Pass on what waits.

        Raises:
            CancellationException: from `record`.
        """
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            for scope, report in waiting.items():
                self._recorded.add(scope)
                try:
                    self._record(report)
                except InvalidProgress as error:
                    self._refused(str(error))
                    continue
                if report.current is not None:
                    self._last[scope] = report

    @contextmanager
    def on_time(self, late: Callable[[], None]) -> Generator[None]:
        """Within, what waits goes on after the interval by `late` (a guarded `flush`), called on the running loop.

        At its end nothing waits, and nothing does from then on.
        """
        self._loop, self._late = asyncio.get_running_loop(), late
        try:
            yield
        finally:
            with self._lock:
                self._loop, self._interval = None, 0.0
                late()

    def _turn(self) -> None:
        """Begin the next interval."""
        self._since = time.monotonic()
        self._recorded.clear()
        self._parted.clear()

    def _arm(self) -> None:
        if self._loop is not None and not self._armed:
            self._armed = True
            self._loop.call_soon_threadsafe(self._wait)

    def _wait(self) -> None:
        if self._loop is not None:
            self._loop.call_later(max(0.0, self._since + self._interval - time.monotonic()), self._due)

    def _due(self) -> None:
        with self._lock:
            self._armed = False
            if self._loop is not None and self._waiting:
                self._turn()
                self._late()

    def _check(self, report: ProgressReport) -> None:
        """What the log would say, had it seen every report. Metrics may fall."""
        if report.current is None:
            return
        current, _ = measure(report.progress_type, report.current, report.total)
        before = self._waiting.get(report.metric)
        if before is None or before.current is None:
            before = self._last.get(report.metric)
        if before is None or report.reset or report.metric is not None:
            return
        if _behind(report, before):
            raise InvalidProgress(f"progress went back from {before.current:g} to {current:g}")

    def _parts(self, before: ProgressReport, report: ProgressReport) -> bool:
        """Whether `before` has to be recorded, and not replaced by `report`."""
        if report.current is None or before.current is None:
            return False
        if report.metric not in self._parted and (report.reset or report.progress_type is not before.progress_type):
            return True
        if report.metric is not None or report.reset or before.reset:
            return False
        # Back on a scale that was left meanwhile: the log takes a lower value only if it saw the other scale.
        last = self._last.get(None)
        return last is not None and _behind(report, last)


def _merged(before: ProgressReport, report: ProgressReport) -> ProgressReport:
    """One report that leaves the log where the two would have."""
    if report.current is None and before.current is not None:
        return before._replace(message=report.message or before.message)
    message, reset = report.message or before.message, report.reset or before.reset
    if message == report.message and reset == report.reset:
        return report
    return report._replace(message=message, reset=reset)


def _behind(report: ProgressReport, before: ProgressReport) -> bool:
    if report.current is None or before.current is None:
        return False
    same_scale = report.progress_type is before.progress_type and report.total == before.total
    return same_scale and report.current < before.current
