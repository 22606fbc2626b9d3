"""Plans on a real store, from the request to the end, and what is left of them: steps, memory, status, restart.

    python benchmarks/plan_runs.py [STEPS]

Each part is a process of its own, so that its memory is its own. The floor of a step is a task of the same callable,
executed alone: as many, 16 callers at a time, each waiting for the end. Time is told as CPU, since the disk is shared;
"in the way" is the longest that the loop could not turn to anybody else.
"""

from __future__ import annotations

import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio

from roles.definition import Role
from vespera_exec.app.plan_views import ExecutePlan
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from roles.context import Context
    from vespera_exec.app.views import Handle

ROUNDS: Final = 3
CALLERS: Final = 16
WIDE: Final = 1000
ASKED: Final = 200
"""Times that a status is asked for."""
ME: Final = Caller(cwd="/", env={"PATH": "/usr/bin:/bin"})


async def nothing(_: Context) -> str:
    return "done"


async def wait(_: Context) -> str:
    await anyio.sleep(1)
    return "done"


async def stay(_: Context) -> str:
    await anyio.sleep_forever()
    return "never"


ROLES: Final = [Role.from_callable(each, in_loop=True, inputs=None) for each in (nothing, wait, stay)]


class Delays:
    """Looks at the loop every few milliseconds: the longest that it was late."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        while True:
            before = time.perf_counter()
            await anyio.sleep(0.002)
            self.longest = max(self.longest, time.perf_counter() - before - 0.002)

    def taken(self) -> float:
        """In milliseconds, since the last look."""
        longest, self.longest = self.longest, 0.0
        return longest * 1e3


@asynccontextmanager
async def opened(folder: str, *, slots: int = CALLERS) -> AsyncGenerator[Vespera]:
    settings = Settings.load(
        {"HOME": folder}, data_dir=Path(folder) / "data", roles_dir=Path(folder) / "roles", max_concurrent=slots
    )
    async with Vespera.open(settings=settings, roles=ROLES) as vespera:
        yield vespera


@asynccontextmanager
async def watched() -> AsyncGenerator[Delays]:
    delays = Delays()
    async with anyio.create_task_group() as group:
        group.start_soon(delays.watch)
        await anyio.sleep(0.01)
        yield delays
        group.cancel_scope.cancel()


def plan_of(size: int, role: str = "nothing", **more: Any) -> dict[str, Any]:
    """A hundred chains beside each other."""
    steps = [
        {"id": f"s{at}", "role": role, **({"depends_on": [f"s{at - 100}"]} if at >= 100 else {})} for at in range(size)
    ]
    return {"name": "Benchmark", "max_parallel": CALLERS, "steps": steps, **more}


async def started(vespera: Vespera, plan: dict[str, Any]) -> Handle:
    return await vespera.plans.execute(ME, ExecutePlan(plan=plan))


async def ended(vespera: Vespera, handle: Handle) -> None:
    while not (status := await vespera.get_status(ME, handle.task_id)).done:
        await anyio.sleep(0.05)
    if status.status != "completed":
        raise AssertionError(f"the plan has {status.status}")


async def steps(size: int) -> dict[str, float]:
    """A plan of trivial steps, then as many tasks."""
    with tempfile.TemporaryDirectory() as folder:
        async with opened(folder) as vespera, watched() as delays:
            await tasks(vespera, 200)  # whatever is done the first time only
            gc.collect()
            before, stored = peak_mb(), bytes_in(folder)
            began, cpu = time.perf_counter(), time.process_time()
            handle = await started(vespera, plan_of(size))
            opening, opening_blocks = time.perf_counter() - began, delays.taken()
            await ended(vespera, handle)
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            grown, blocks = peak_mb() - before, delays.taken()
            bytes_of_plan = bytes_in(folder) - stored
            alone_began, alone_cpu = time.perf_counter(), time.process_time()
            await tasks(vespera, size)
            alone_wall, alone_cpu = time.perf_counter() - alone_began, time.process_time() - alone_cpu
    return {
        "opening_ms": opening * 1e3,
        "opening_blocks_ms": opening_blocks,
        "blocks_ms": blocks,
        "steps_per_second": size / wall,
        "cpu_ms": cpu / size * 1e3,
        "task_cpu_ms": alone_cpu / size * 1e3,
        "tasks_per_second": size / alone_wall,
        "grown_mb": grown,
        "bytes": bytes_of_plan / size,
    }


async def tasks(vespera: Vespera, count: int) -> None:
    """Of the same callable, `CALLERS` at a time."""
    numbers = iter(range(count))

    async def call() -> None:
        for number in numbers:
            ended = await vespera.execute_task(ME, Execute(title=f"Task {number}", role="nothing", wait_ms=25_000))
            assert ended.done

    async with anyio.create_task_group() as group:
        for _ in range(CALLERS):
            group.start_soon(call)


async def wide(size: int) -> dict[str, float]:
    """Steps that all wait for a second, at once."""
    plan = {"name": "Wide", "max_parallel": size, "steps": [{"id": f"s{at}", "role": "wait"} for at in range(size)]}
    with tempfile.TemporaryDirectory() as folder:
        async with opened(folder, slots=size) as vespera, watched() as delays:
            gc.collect()
            before, began, cpu = peak_mb(), time.perf_counter(), time.process_time()
            handle = await started(vespera, plan)
            while vespera.describe().running < size:
                await anyio.sleep(0.005)
            begun = time.perf_counter() - began
            await ended(vespera, handle)
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            grown, blocks = peak_mb() - before, delays.taken()
    return {"begun_s": begun, "ended_s": wall, "cpu_s": cpu, "grown_mb": grown, "blocks_ms": blocks}


async def after(size: int) -> dict[str, float]:
    """A plan of which half the steps have ended: its status, its checkpoint, its next owner."""
    half = plan_of(size)
    for step in half["steps"][size // 2 :]:
        step["role"] = "stay"
    with tempfile.TemporaryDirectory() as folder:
        async with opened(folder) as vespera:
            single = await vespera.execute_task(ME, Execute(title="Task", role="stay"))
            handle = await started(vespera, half)
            while (await vespera.list_steps(ME, handle.task_id, limit=1)).counts.get("completed", 0) < size // 2:
                await anyio.sleep(0.05)
            found = {
                "status_ms": await asked(vespera, handle.task_id),
                "task_status_ms": await asked(vespera, single.task_id),
            }
        began = time.perf_counter()
        async with opened(folder) as vespera:
            found["restart_s"] = time.perf_counter() - began
            while not (await vespera.list_steps(ME, handle.task_id, limit=1)).counts.get("running"):
                await anyio.sleep(0.005)
            found["going_on_s"] = time.perf_counter() - began
            (last,) = (await vespera.checkpoints.list(ME, handle.task_id, limit=1)).checkpoints
            async with watched() as delays:
                began = time.perf_counter()
                await vespera.checkpoints.restore(ME, last.checkpoint_id)
                found["restore_s"] = time.perf_counter() - began
                found["restore_blocks_ms"] = delays.taken()
            await vespera.cancel(ME, handle.task_id, wait_ms=20_000)
    return found


async def asked(vespera: Vespera, task_id: str) -> float:
    """Milliseconds of a status, the median."""
    took: list[float] = []
    for _ in range(ASKED):
        began = time.perf_counter()
        await vespera.get_status(ME, task_id)
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e3


def bytes_in(folder: str) -> int:
    return sum(each.stat().st_size for each in (Path(folder) / "data").rglob("*") if each.is_file())


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


PARTS: Final = {"steps": steps, "wide": wide, "after": after}


def measured(part: str, size: int) -> dict[str, float]:
    """The medians of some rounds, each in a process of its own."""
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        told = subprocess.run(
            [sys.executable, __file__, part, str(size)], check=True, capture_output=True, text=True
        ).stdout
        rounds.append(json.loads(told))
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(json.dumps(anyio.run(PARTS[sys.argv[1]], int(sys.argv[2]))))
    else:
        raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
