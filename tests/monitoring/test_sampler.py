"""The shared sampler: when it looks, what it hands over, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio
import psutil
import pytest
from deadlines import WITHIN

from vespera_exec.model.enums import ResourceType
from vespera_exec.monitoring.sampler import UsageSample, UsageSampler

if TYPE_CHECKING:
    from collections.abc import Generator

ROOT = "import os, sys, time\nif os.fork() == 0:\n    {}\n    os._exit(0)\nos.wait(); time.sleep(60)"
IDLE = "print('up', flush=True); time.sleep(60)"
SPIN = "print('up', flush=True)\n    while True: pass"
SLACK = 0.1
"""Seconds between a stamp and the reading that it is for."""
GROW = (
    "print('up', flush=True); sys.stdin.readline(); held = b'x' * 60_000_000; print('up', flush=True); time.sleep(60)"
)


@contextmanager
def tree(child: str) -> Generator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", ROOT.format(child)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            yield process
        finally:
            os.killpg(process.pid, 9)


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Samples:
    def __init__(self) -> None:
        self.all: list[UsageSample] = []
        self._came = anyio.Event()

    def __call__(self, sample: UsageSample) -> None:
        self.all.append(sample)
        self._came.set()

    async def reach(self, count: int) -> None:
        with anyio.fail_after(WITHIN):
            while len(self.all) < count:
                self._came = anyio.Event()
                await self._came.wait()


async def test_a_busy_child_shows_what_it_uses_in_percent_of_one_core() -> None:
    samples = Samples()
    used: list[float] = []

    def sampled(sample: UsageSample) -> None:
        used.append(sum(child.cpu_times()[:2]))
        samples(sample)

    with tree(SPIN) as process:
        (child,) = psutil.Process(process.pid).children()
        async with UsageSampler(interval_seconds=0.4) as sampler:
            watch = sampler.watch("busy", lambda: (process.pid,), sampled)
            await samples.reach(3)
    first, *later = samples.all[:3]
    shown = 0.0
    for before, sample in zip([first, *later], later, strict=False):
        shown += sample.values[ResourceType.CPU_USAGE] / 100 * (sample.at - before.at).total_seconds()
    assert used[1] - used[0] - SLACK <= shown <= used[2] + SLACK
    assert watch.peaks[ResourceType.CPU_USAGE] >= max(each.values[ResourceType.CPU_USAGE] for each in later)


async def test_an_idle_child_shows_memory_and_next_to_no_cpu() -> None:
    samples = Samples()
    with tree(IDLE) as process:
        async with UsageSampler(interval_seconds=0.2) as sampler:
            sampler.watch("idle", lambda: (process.pid,), samples)
            await samples.reach(3)
    last = samples.all[-1]
    assert last.values[ResourceType.CPU_USAGE] < 10
    assert last.values[ResourceType.MEMORY_RSS] > 1
    assert last.values[ResourceType.MEMORY_VMS] >= last.values[ResourceType.MEMORY_RSS]
    assert last.processes == 1
    assert last.key == "idle"
    assert last.at.utcoffset() is not None


async def test_the_first_sample_does_not_wait_for_the_interval() -> None:
    samples = Samples()
    with tree(IDLE) as process:
        async with UsageSampler(interval_seconds=3600) as sampler:
            sampler.watch("short", lambda: (process.pid,), samples)
            await samples.reach(1)


async def test_a_run_of_three_seconds_has_two_samples_at_the_default_interval() -> None:
    samples = Samples()
    with tree(IDLE) as process:
        async with UsageSampler() as sampler:
            watch = sampler.watch("three", lambda: (process.pid,), samples)
            assert watch.due - watch.since <= 0.5
            await samples.reach(1)
            assert watch.sampled_at is not None
            assert watch.due - watch.sampled_at <= 2


async def test_a_process_that_starts_after_the_watch_is_found_without_waiting_for_the_interval() -> None:
    samples = Samples()
    roots: list[int] = []
    async with UsageSampler(interval_seconds=3600) as sampler:
        watch = sampler.watch("late", lambda: tuple(roots), samples)
        assert watch.latest is None
        with tree(IDLE) as process:
            roots.append(process.pid)
            await samples.reach(1)


async def test_peaks_begin_with_the_first_sample_and_only_rise() -> None:
    samples = Samples()
    with tree(GROW) as process:
        async with UsageSampler(interval_seconds=3600) as sampler:
            watch = sampler.watch("grow", lambda: (process.pid,), samples)
            await samples.reach(1)
            assert watch.peaks == dict(samples.all[0].values)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"up\n"
            watch.stop()
    assert watch.latest is samples.all[-1]
    assert len(samples.all) == 2
    assert watch.peaks[ResourceType.MEMORY_RSS] >= samples.all[0].values[ResourceType.MEMORY_RSS] + 55


async def test_stop_gives_a_run_too_short_for_any_look_its_sample() -> None:
    samples = Samples()
    with tree(IDLE) as process:
        async with UsageSampler() as sampler:
            watch = sampler.watch("blink", lambda: (process.pid,), samples)
            watch.stop()
            watch.stop()
    assert len(samples.all) == 1
    assert samples.all[0].values[ResourceType.MEMORY_RSS] > 1


async def test_a_stopped_watch_gets_no_more_samples() -> None:
    stopped, other = Samples(), Samples()
    with tree(IDLE) as process:
        async with UsageSampler(interval_seconds=0.05) as sampler:
            watch = sampler.watch("stopped", lambda: (process.pid,), stopped)
            sampler.watch("other", lambda: (), other)
            await stopped.reach(1)
            watch.stop()
            count = len(stopped.all)
            sampler.watch("again", lambda: (process.pid,), other)
            await other.reach(3)
    assert len(stopped.all) == count


async def test_a_tree_that_has_died_gives_no_sample_and_harms_no_other() -> None:
    dead, alive = Samples(), Samples()
    with tree(IDLE) as survivor:
        async with UsageSampler(interval_seconds=0.05) as sampler:
            with tree(IDLE) as victim:
                (child,) = psutil.Process(victim.pid).children()
                watch = sampler.watch("dead", lambda: (victim.pid,), dead)
                await dead.reach(1)
            with anyio.fail_after(WITHIN):
                while lives(child):  # noqa: ASYNC110 - it is no child of ours
                    await anyio.sleep(0.005)
            count = len(dead.all)
            sampler.watch("alive", lambda: (survivor.pid,), alive)
            await alive.reach(3)
            watch.stop()
    assert len(dead.all) == count
    assert watch.latest is dead.all[-1]


async def test_a_failing_listener_ends_neither_its_own_samples_nor_those_of_others() -> None:
    calls: list[str] = []
    others = Samples()

    def fail(sample: UsageSample) -> None:
        calls.append(sample.key)
        raise ValueError("a listener's fault")

    with tree(IDLE) as process, tree(IDLE) as second:
        async with UsageSampler(interval_seconds=0.05) as sampler:
            sampler.watch("failing", lambda: (process.pid,), fail)
            sampler.watch("other", lambda: (second.pid,), others)
            await others.reach(4)
    assert len(calls) >= 2


async def test_an_interval_of_zero_samples_nothing() -> None:
    samples = Samples()
    with tree(IDLE) as process:
        async with UsageSampler(interval_seconds=0) as sampler:
            watch = sampler.watch("off", lambda: (process.pid,), samples)
            watch.stop()
    assert samples.all == []


async def test_leaving_the_sampler_keeps_the_error_of_the_body_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with UsageSampler():
            raise KeyError("mine")


async def test_a_sampler_without_watches_costs_no_cpu() -> None:
    async with UsageSampler(interval_seconds=0.01):
        before = time.process_time()
        with anyio.move_on_after(0.3):
            await anyio.sleep_forever()
        assert time.process_time() - before < 0.05
