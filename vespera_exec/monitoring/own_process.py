"""Usage of a whole process for sessions in memory: what an embedding program attaches to its own work."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Protocol

import psutil

from vespera_exec.model.enums import ExecutionStatus, ResourceType
from vespera_exec.monitoring.psutil_trees import Io, Memory, read_cpu_seconds, read_io, read_memory
from vespera_exec.monitoring.trees import MEGABYTE

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_FIRST_SAMPLE_SECONDS = 0.1


class MeasuredSession(Protocol):
    """What a monitor needs of a session; `ExecutionSession` has it."""

    @property
    def status(self) -> ExecutionStatus: ...

    def record_resource_usage(self, resource_type: ResourceType, value: float) -> None: ...


class MemoryTracker:
    """Memory of one process (this one unless `pid` is given), in MB of 1024 * 1024 bytes."""

    def __init__(self, pid: int | None = None) -> None:
        self._process = psutil.Process(pid)
        self.peak_rss_mb: float | None = None

    def read(self) -> Memory | None:
        """Bytes now, resident and virtual. None where they cannot be read."""
        memory = read_memory(self._process)
        if memory is not None:
            rss_mb = memory.rss_bytes / MEGABYTE
            self.peak_rss_mb = rss_mb if self.peak_rss_mb is None else max(rss_mb, self.peak_rss_mb)
        return memory


class IOTracker:
    """Disk traffic of one process (this one unless `pid` is given) since this object was made."""

    def __init__(self, pid: int | None = None) -> None:
        self._process = psutil.Process(pid)
        self._start = read_io(self._process)

    def read(self) -> Io | None:
        """Bytes read and written since then. None where this system does not count them."""
        now = read_io(self._process)
        if now is None or self._start is None:
            return None
        return Io(now.read_bytes - self._start.read_bytes, now.written_bytes - self._start.written_bytes)


class ResourceMonitor:
    """Records usage into a session, each `interval_seconds`, from `start` until `stop` or the session's end.

    The values are those of the whole process (`scope`), not of one session in it. CPU is in percent of
    one core. All monitors share one thread, which ends with the last of them.
    """

    scope = "process"

    def __init__(self, session: MeasuredSession, *, interval_seconds: float = 1.0, pid: int | None = None) -> None:
        self.session = session
        self.interval_seconds = interval_seconds
        self._process = psutil.Process(pid)
        self._memory = MemoryTracker(pid)
        self._pid = pid
        self._io: IOTracker | None = None
        self._cpu: tuple[float, float] | None = None
        self._sampling = threading.Lock()
        self.due = 0.0

    def start(self) -> None:
        """Begin; the session may still be idle. Starting twice does nothing."""
        if _shared.knows(self):
            return
        now = time.monotonic()
        used = read_cpu_seconds(self._process)
        self._cpu = None if used is None else (now, used)
        self._io = IOTracker(self._pid)
        self.due = now + min(_FIRST_SAMPLE_SECONDS, self.interval_seconds)
        _shared.add(self)

    def stop(self) -> None:
        """Take a last sample and end. Stopping twice does nothing."""
        if _shared.remove(self):
            self.sample()

    def sample(self) -> bool:
        """Record one sample now. False when the session has ended."""
        with self._sampling:
            if self.session.status.is_terminal:
                return False
            for kind, value in self._measure().items():
                self.session.record_resource_usage(kind, value)
            return True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _measure(self) -> dict[ResourceType, float]:
        values: dict[ResourceType, float] = {}
        now = time.monotonic()
        used = read_cpu_seconds(self._process)
        if used is not None and self._cpu is not None and now - self._cpu[0] >= _FIRST_SAMPLE_SECONDS / 2:
            then, before = self._cpu
            values[ResourceType.CPU_USAGE] = 100.0 * max(0.0, used - before) / (now - then)
            self._cpu = now, used
        memory = self._memory.read()
        if memory is not None:
            values[ResourceType.MEMORY_RSS] = memory.rss_bytes / MEGABYTE
            values[ResourceType.MEMORY_VMS] = memory.vms_bytes / MEGABYTE
        traffic = None if self._io is None else self._io.read()
        if traffic is not None:
            values[ResourceType.DISK_READ] = float(traffic.read_bytes)
            values[ResourceType.DISK_WRITE] = float(traffic.written_bytes)
        return values


class _SharedThread:
    """Runs while there is a monitor, and no longer than the program's main thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._monitors: set[ResourceMonitor] = set()
        self._thread: threading.Thread | None = None

    def knows(self, monitor: ResourceMonitor) -> bool:
        with self._changed:
            return monitor in self._monitors

    def add(self, monitor: ResourceMonitor) -> None:
        with self._changed:
            self._monitors.add(monitor)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vespera-resource-monitor")
                self._thread.start()
            self._changed.notify()

    def remove(self, monitor: ResourceMonitor) -> bool:
        with self._changed:
            if monitor not in self._monitors:
                return False
            self._monitors.discard(monitor)
            thread = None if self._monitors else self._thread
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            # Bounded: the caller may hold what the thread's last sample waits for.
            thread.join(timeout=1.0)
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                # A program that forgot to stop its monitors may end all the same.
                if not self._monitors or not threading.main_thread().is_alive():
                    self._thread = None
                    return
                now = time.monotonic()
                due = [monitor for monitor in self._monitors if monitor.due <= now]
                if not due:
                    wait = min(monitor.due for monitor in self._monitors) - now
                    self._changed.wait(min(wait, 1.0))
                    continue
            for monitor in due:
                monitor.due = time.monotonic() + monitor.interval_seconds
                if not monitor.sample():
                    with self._changed:
                        self._monitors.discard(monitor)


_shared = _SharedThread()
