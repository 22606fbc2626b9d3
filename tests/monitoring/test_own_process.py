"""Usage of this process, attached to a session in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from deadlines import WITHIN

from vespera_exec.model.enums import ResourceType
from vespera_exec.model.session import ExecutionSession
from vespera_exec.monitoring.own_process import IOTracker, MemoryTracker, ResourceMonitor

if TYPE_CHECKING:
    from collections.abc import Callable


def wait_until(holds: Callable[[], bool], *, within: float = WITHIN) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if holds():
            return True
        threading.Event().wait(0.01)
    return False


def monitor_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vespera-resource-monitor"]


def samples(session: ExecutionSession, kind: ResourceType = ResourceType.MEMORY_RSS) -> int:
    return len(session.resource_metrics.get(kind, []))


def test_a_monitor_started_while_the_session_is_idle_goes_on_through_every_status() -> None:
    session = ExecutionSession()
    monitor = ResourceMonitor(session, interval_seconds=0.05)
    monitor.start()
    assert wait_until(lambda: samples(session) >= 1)
    session.start_execution()
    seen = samples(session)
    assert wait_until(lambda: samples(session) >= seen + 2)
    monitor.stop()
    assert session.peak_resource_usage[ResourceType.MEMORY_RSS] > 1
    assert monitor_threads() == []


def test_a_monitor_ends_by_itself_with_its_session() -> None:
    session = ExecutionSession()
    session.start_execution()
    monitor = ResourceMonitor(session, interval_seconds=0.05)
    monitor.start()
    assert wait_until(lambda: samples(session) >= 1)
    session.fail("done for")
    assert wait_until(lambda: monitor_threads() == [])
    count = samples(session)
    monitor.stop()
    assert samples(session) == count


def test_all_monitors_share_one_thread_that_ends_with_the_last() -> None:
    sessions = [ExecutionSession() for _ in range(5)]
    monitors = [ResourceMonitor(session, interval_seconds=0.05) for session in sessions]
    for monitor in monitors:
        monitor.start()
        monitor.start()
    assert wait_until(lambda: all(samples(session) >= 2 for session in sessions))
    assert len(monitor_threads()) == 1
    for monitor in monitors[:-1]:
        monitor.stop()
    assert len(monitor_threads()) == 1
    monitors[-1].stop()
    assert monitor_threads() == []


def test_stop_leaves_a_sample_even_of_the_shortest_run() -> None:
    session = ExecutionSession()
    with ResourceMonitor(session):
        pass
    assert samples(session) == 1


def test_cpu_is_never_the_zero_of_a_first_call() -> None:
    session = ExecutionSession()
    since = datetime.now(UTC)
    with ResourceMonitor(session, interval_seconds=3600):
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
    used = 0.0
    for at, percent in session.resource_metrics[ResourceType.CPU_USAGE]:
        used += percent / 100 * (at - since).total_seconds()
        since = at
    assert used >= 0.25


def test_disk_traffic_counts_from_the_start_of_the_monitor() -> None:
    tracker = IOTracker()
    traffic = tracker.read()
    if traffic is not None:
        assert traffic.read_bytes < 1024 * 1024
        assert traffic.written_bytes < 1024 * 1024


def test_the_memory_tracker_keeps_its_peak() -> None:
    tracker = MemoryTracker()
    held = bytearray(os.urandom(1024)) * (60 * 1024)
    high = tracker.read()
    del held
    low = tracker.read()
    assert high is not None
    assert low is not None
    assert tracker.peak_rss_mb == max(high.rss_bytes, low.rss_bytes) / 1024**2


def test_a_process_that_is_gone_is_measured_as_unknown() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    memory, traffic = MemoryTracker(process.pid), IOTracker(process.pid)
    process.communicate(b"\n")
    assert memory.read() is None
    assert traffic.read() is None


def test_a_program_that_forgets_its_monitor_still_ends() -> None:
    program = (
        "from vespera_exec.model.session import ExecutionSession\n"
        "from vespera_exec.monitoring.own_process import ResourceMonitor\n"
        "ResourceMonitor(ExecutionSession()).start()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=WITHIN, check=False, capture_output=True)
    assert done.returncode == 0
    assert done.stderr == b""
