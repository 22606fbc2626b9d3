"""What a session costs in memory: queued in the engine, and running with its hot tail after 10 and 2000 events.

Run: `python benchmarks/memory.py [--where]`. Real store and engine; `tracemalloc` counts what model and engine have
allocated and still hold, over 400 queued and 100 running executions. Left out is what the store holds (the ring of
the last events, one for all executions) and what the caller gives (titles, inputs; short here).
"""

from __future__ import annotations

import gc
import sys
import tempfile
import tracemalloc
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio

from vespera_exec.engine.engine import Engine, EngineOptions
from vespera_exec.engine.jobs import Job
from vespera_exec.model.enums import ExecutionPhase
from vespera_exec.model.progress import ProgressReport
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from vespera_exec.engine.work import Work, WorkResult

QUEUED: Final = 400
RUNNING: Final = 100
HOT_EVENTS: Final = 0  # as `app.tasks` keeps them
EVENTS: Final = (10, 100, 2000)
QUEUED_BUDGET_KB: Final = 4.0
RUNNING_BUDGET_KB: Final = 32.0
GROWTH_BUDGET: Final = 1.1


async def main(where: bool) -> int:
    tracemalloc.start(6)
    queued = await per_queued(where)
    running = {events: await per_running(events, where and events > 100) for events in EVENTS}
    _, full, many = (running[events] for events in EVENTS)
    print(f"a queued session           {queued:6.2f} KB                   budget <= {QUEUED_BUDGET_KB:g} KB")
    for events, size in running.items():
        print(f"running, {events:5} events      {size:6.2f} KB                   budget <= {RUNNING_BUDGET_KB:g} KB")
    print(f"growth from 100 to 2000    {many / full:6.2f}x                    budget <= {GROWTH_BUDGET:g}x")
    kept = queued <= QUEUED_BUDGET_KB and many <= RUNNING_BUDGET_KB and many / full <= GROWTH_BUDGET
    print("within budget" if kept else "BUDGET EXCEEDED")
    return 0


@asynccontextmanager
async def opened(slots: int) -> AsyncGenerator[tuple[Store, Engine]]:
    with tempfile.TemporaryDirectory() as folder:
        async with Store.open(Settings.load({"HOME": folder}, data_dir=Path(folder) / "data")) as store:
            engine = Engine(
                store.journal,
                owner="benchmark",
                scratch_root=Path(folder) / "scratch",
                open_output=store.open_output,
                options=EngineOptions(max_concurrent=slots),
            )
            async with engine.running():
                yield store, engine


def submitted(store: Store, engine: Engine, run: Callable[[Work], object]) -> None:
    task = Task(title="A task", sink=store.journal, max_events_in_memory=HOT_EVENTS)
    session = task.enqueue_execution("benchmark", owner="benchmark")

    async def body(work: Work) -> WorkResult:
        run(work)
        await anyio.sleep_forever()
        raise AssertionError("unreachable")

    engine.submit(Job(task=task, session=session, run=body))


async def per_queued(where: bool) -> float:
    """KB that the model and the engine keep for an execution that waits for its turn."""
    async with opened(slots=0) as (store, engine):
        for _ in range(10):
            submitted(store, engine, nothing)
        await settled(store)
        before = held()
        for _ in range(QUEUED):
            submitted(store, engine, nothing)
        await settled(store)
        return grown(before, QUEUED, where=where)


async def per_running(events: int, where: bool) -> float:
    """KB for one that runs in the loop, with its task and its last events, after so many reports."""
    async with opened(slots=RUNNING + 10) as (store, engine):
        begun = [anyio.Event()]

        def report(work: Work) -> None:
            work.tracking.enter_phase(ExecutionPhase.EXECUTION, "Working")
            for number in range(events):
                work.tracking.progress(ProgressReport(current=100.0 * number / events, message=f"Step {number}"))
            begun[0].set()

        async def begin(count: int) -> None:
            for _ in range(count):
                begun[0] = anyio.Event()
                submitted(store, engine, report)
                await begun[0].wait()
            await settled(store)

        await begin(10)
        before = held()
        await begin(RUNNING)
        return grown(before, RUNNING, where=where)


def nothing(_: Work) -> None:
    """Queued work that never begins."""


async def settled(store: Store) -> None:
    """All is on disk, and what the writer remembers until then is given back."""
    await store.journal.sync()
    await anyio.sleep(0.3)


def held() -> tracemalloc.Snapshot:
    gc.collect()
    return tracemalloc.take_snapshot().filter_traces(
        [tracemalloc.Filter(False, "*/store/*", all_frames=True), tracemalloc.Filter(False, "*tracemalloc*")]
    )


def grown(before: tracemalloc.Snapshot, executions: int, *, where: bool) -> float:
    """KB more than before, for each execution."""
    lines = held().compare_to(before, "lineno")
    for line in lines[:20] if where else ():
        print(f"  {line.size_diff / executions:7.0f} B  {line.traceback[0]}")
    return sum(line.size_diff for line in lines) / executions / 1024


if __name__ == "__main__":
    sys.exit(anyio.run(main, "--where" in sys.argv))
