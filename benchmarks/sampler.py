"""What it costs to sample 100 children once a second: ours, against a thread per session with psutil.

Run: `python benchmarks/sampler.py [SECONDS]`. Each child hangs under a root of its own, as in the daemon.
The two take turns on the same children; CPU is that of this process, idle time included.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import anyio
import psutil

from vespera_exec.monitoring.sampler import UsageSample, UsageSampler

if TYPE_CHECKING:
    from collections.abc import Callable

CHILDREN = 100
ROUNDS = 3
CPU_BUDGET_PERCENT = 0.3
RATIO_BUDGET = 0.15

ROOT = "sleep 3600 & echo $!; wait"


def main(seconds: float) -> int:
    roots = [
        subprocess.Popen(["/bin/sh", "-c", ROOT], stdout=subprocess.PIPE, start_new_session=True)
        for _ in range(CHILDREN)
    ]
    try:
        children = [int(root.stdout.readline()) for root in roots if root.stdout is not None]
        ours: list[float] = []
        floor: list[float] = []
        for _ in range(ROUNDS):
            floor.append(thread_per_session(children, seconds))
            ours.append(anyio.run(shared_sampler, [root.pid for root in roots], seconds))
    finally:
        for root in roots:
            os.killpg(root.pid, 9)
            with root:
                root.wait()
    cpu, threads = statistics.median(ours), statistics.median(floor)
    print(f"{CHILDREN} children at 1 Hz, {ROUNDS} rounds of {seconds:g} s, medians, percent of one core")
    print(f"  thread per session, psutil  {threads:.2f} %")
    print(f"  shared sampler              {cpu:.2f} %   budget <= {CPU_BUDGET_PERCENT} %")
    print(f"  ratio                       {cpu / threads:.3f}    budget <= {RATIO_BUDGET}")
    return 0 if cpu <= CPU_BUDGET_PERCENT and cpu / threads <= RATIO_BUDGET else 1


async def shared_sampler(roots: list[int], seconds: float) -> float:
    """CPU percent of one `UsageSampler` over all, once its first samples are taken."""
    count = 0

    def received(_: UsageSample) -> None:
        nonlocal count
        count += 1

    def root_of(pid: int) -> Callable[[], tuple[int, ...]]:
        return lambda: (pid,)

    async with UsageSampler() as sampler:
        for pid in roots:
            sampler.watch(str(pid), root_of(pid), received)
        await anyio.sleep(1.1)
        count, began, used = 0, time.perf_counter(), time.process_time()
        await anyio.sleep(seconds)
        cpu = 100 * (time.process_time() - used) / (time.perf_counter() - began)
        if count < len(roots) * (seconds - 1):
            raise RuntimeError(f"only {count} samples arrived")
    return cpu


def thread_per_session(children: list[int], seconds: float) -> float:
    """CPU percent of the way of document 000: a thread for each session, five psutil figures a second."""
    stop = threading.Event()

    def sample(pid: int) -> None:
        process = psutil.Process(pid)
        while not stop.wait(1.0):
            process.cpu_percent()
            process.memory_info()
            process.io_counters()

    threads = [threading.Thread(target=sample, args=(pid,)) for pid in children]
    for thread in threads:
        thread.start()
    time.sleep(1.1)
    began, used = time.perf_counter(), time.process_time()
    time.sleep(seconds)
    cpu = 100 * (time.process_time() - used) / (time.perf_counter() - began)
    stop.set()
    for thread in threads:
        thread.join()
    return cpu


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0))
