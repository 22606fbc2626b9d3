"""One sampler for all executions: what their processes use, once a second."""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.enums import ResourceType
from vespera_exec.monitoring.trees import MEGABYTE, Footprint, ProcessTrees, Tree
from vespera_exec.monitoring.usage import system_process_trees

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping
    from datetime import datetime
    from types import TracebackType
    from typing import Self

log = logging.getLogger(__name__)

# After a watch begins its first sample is sought at these times: a short run has one as well.
_FIRST_LOOKS = (0.1, 0.2, 0.4, 0.8)
# The system counts CPU in hundredths of a second: a shorter window says nothing.
_SHORTEST_CPU_WINDOW = 0.05
_WATCHES_PER_TURN = 16


@dataclass(frozen=True, slots=True)
class UsageSample:
    """What one execution's processes used. Units are in `model.enums.RESOURCE_UNITS`.

    CPU_USAGE is the mean since the sample before (of the first: since the start), in percent of one
    core, so two busy cores show 200. DISK_* count from the start of the watch and never fall. A
    measure that this system or user cannot read is missing.
    """

    key: str
    at: datetime
    values: Mapping[ResourceType, float]
    processes: int


class Watch:
    """One execution under the sampler. `latest` is None, `peaks` empty, until its first sample."""

    def __init__(
        self,
        sampler: UsageSampler,
        key: str,
        roots: Callable[[], tuple[int, ...]],
        on_sample: Callable[[UsageSample], None],
        *,
        since: float,
    ) -> None:
        self.key = key
        self.latest: UsageSample | None = None
        self.peaks: dict[ResourceType, float] = {}
        self._sampler = sampler
        self.roots = roots
        self.on_sample = on_sample
        self.tree = Tree()
        self.looks = 0
        self.since = since
        self.due = since + _FIRST_LOOKS[0]
        self.sampled_at: float | None = None
        self.cpu_seconds = 0.0
        self.stopped = False

    def stop(self) -> None:
        """Take a last sample if anything still runs, then end. May be called again."""
        self._sampler.end(self)


class UsageSampler:
    """Samples every watched execution each `interval_seconds`; 0 samples nothing.

    Use it as `async with UsageSampler() as sampler:`, or run `run()` in a task group of yours. Belongs
    to one event loop. It sleeps while nothing is watched.
    """

    def __init__(
        self,
        interval_seconds: float = 1.0,
        *,
        clock: Clock = SYSTEM_CLOCK,
        trees: ProcessTrees | None = None,
    ) -> None:
        self._interval = interval_seconds
        self._clock = clock
        self._trees = trees or system_process_trees()
        self._watches: dict[Watch, None] = {}
        self._changed = anyio.Event()
        self._epoch = clock.monotonic()
        self._running: AbstractAsyncContextManager[None] | None = None

    def watch(self, key: str, roots: Callable[[], tuple[int, ...]], on_sample: Callable[[UsageSample], None]) -> Watch:
        """Sample the descendants of `roots()` (asked at each sample) until `Watch.stop`.

        The roots themselves are left out. The first sample comes about 100 ms after the start, or when
        the first process has appeared. `on_sample` runs on the event loop; its faults are logged.
        """
        watch = Watch(self, key, roots, on_sample, since=self._clock.monotonic())
        if self._interval > 0:
            self._trees.add(watch.tree)
            self._watches[watch] = None
            self._changed.set()
        return watch

    def end(self, watch: Watch) -> None:
        if watch.stopped:
            return
        watch.stopped = True
        if watch not in self._watches:
            return
        try:
            if watch.latest is None:
                watch.tree.roots = watch.roots()
                self._trees.refresh((watch.tree,))
            self._sample(watch)
        except OSError:
            log.warning("last_usage_sample_failed", extra={"key": watch.key}, exc_info=True)
        finally:
            del self._watches[watch]
            self._trees.remove(watch.tree)

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            self._changed = anyio.Event()
            due = min((watch.due for watch in self._watches), default=None)
            if due is None:
                await self._changed.wait()
                continue
            with anyio.move_on_after(due - self._clock.monotonic()):
                await self._changed.wait()
                continue
            try:
                await self._tick()
            except OSError:
                # No descriptors left, for one: usage may be missing for a while, the executions go on.
                log.warning("usage_sample_failed", exc_info=True)

    async def __aenter__(self) -> Self:
        self._running = self._run_aside()
        await self._running.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        if isinstance(error, Exception):
            # The body's own error leaves as it is, not wrapped into the task group's.
            await running.__aexit__(None, None, None)
        else:
            await running.__aexit__(kind, error, traceback)

    @asynccontextmanager
    async def _run_aside(self) -> AsyncGenerator[None]:
        async with anyio.create_task_group() as group:
            group.start_soon(self.run)
            try:
                yield
            finally:
                for watch in list(self._watches):
                    watch.stop()
                group.cancel_scope.cancel()

    async def _tick(self) -> None:
        now = self._clock.monotonic()
        due = [watch for watch in self._watches if watch.due <= now]
        for watch in due:
            watch.due = now + self._interval
            watch.tree.roots = watch.roots()
        self._trees.refresh([watch.tree for watch in due])
        for index, watch in enumerate(due):
            if watch.stopped:
                continue
            self._sample(watch)
            watch.looks += 1
            watch.due = self._next_due(watch)
            if index % _WATCHES_PER_TURN == _WATCHES_PER_TURN - 1:
                await anyio.lowlevel.checkpoint()

    def _next_due(self, watch: Watch) -> float:
        now = self._clock.monotonic()
        if watch.sampled_at is None and watch.looks < len(_FIRST_LOOKS):
            return max(now, watch.since + _FIRST_LOOKS[watch.looks])
        # All meet at the same instants, so that one pass over the process table serves them; an instant
        # that would follow the last sample too closely is left out.
        earliest = now + self._interval / 2
        return self._epoch + self._interval * (int((earliest - self._epoch) / self._interval) + 1)

    def _sample(self, watch: Watch) -> None:
        footprint = self._trees.measure(watch.tree)
        if footprint is None:
            return
        values = self._values(watch, footprint)
        peaks = watch.peaks
        for kind, value in values.items():
            if kind not in peaks or value > peaks[kind]:
                peaks[kind] = value
        sample = UsageSample(watch.key, self._clock.now(), MappingProxyType(values), footprint.processes)
        watch.latest = sample
        try:
            watch.on_sample(sample)
        except Exception:
            # The sampler's boundary: one listener's fault must not end it for all.
            log.exception("usage_listener_failed", extra={"key": watch.key})

    def _values(self, watch: Watch, footprint: Footprint) -> dict[ResourceType, float]:
        tree, now = watch.tree, self._clock.monotonic()
        values: dict[ResourceType, float] = {}
        since = min(watch.since, now - footprint.age_seconds) if watch.sampled_at is None else watch.sampled_at
        window = now - since
        if window >= _SHORTEST_CPU_WINDOW:
            values[ResourceType.CPU_USAGE] = 100.0 * (tree.cpu_seconds - watch.cpu_seconds) / window
            watch.sampled_at = now
            watch.cpu_seconds = tree.cpu_seconds
        elif watch.latest is not None and ResourceType.CPU_USAGE in watch.latest.values:
            values[ResourceType.CPU_USAGE] = watch.latest.values[ResourceType.CPU_USAGE]
        values[ResourceType.MEMORY_RSS] = footprint.rss_bytes / MEGABYTE
        values[ResourceType.MEMORY_VMS] = footprint.vms_bytes / MEGABYTE
        if tree.io_known:
            values[ResourceType.DISK_READ] = float(tree.read_bytes)
            values[ResourceType.DISK_WRITE] = float(tree.written_bytes)
        return values
