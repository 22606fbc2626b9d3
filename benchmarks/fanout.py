"""What it costs to tell many followers: ours, against an `asyncio.Queue` for each.

Run: `python benchmarks/fanout.py [FOLLOWERS]`. All deliver the same events, published in bursts of 32, to the
same number of followers, and take turns. Ours is followed in two ways: `bursts`, and `read` with `wait`, by which
the doors page. All is the work of one thread, so seconds are those of its CPU. It ends with the time from an
update to its watcher, on disk first.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.feed import Feed, StoredEvent
from vespera_exec.store.queries import Queries
from vespera_exec.store.store import Store

if TYPE_CHECKING:
    from vespera_exec.store.decisions import Fact

ROUNDS = 5
BURST = 32
BURSTS = 50
DELIVERY_BUDGET = 3.0
MEMORY_BUDGET = 1536
WATCH_BUDGET_MS = 1.0
BODY = b'{"x":"' + b"y" * 450 + b'"}'


def main(followers: int) -> int:
    ours: list[float] = []
    paged: list[float] = []
    everything: list[float] = []
    queues: list[float] = []
    for _ in range(ROUNDS):
        queues.append(anyio.run(through_queues, followers))
        ours.append(anyio.run(through_feed, followers, in_bursts, "run"))
        paged.append(anyio.run(through_feed, followers, in_pages, "run"))
        everything.append(anyio.run(through_feed, followers, in_bursts, None))
    bare = anyio.run(memory_of, 2000, None)
    memory = [anyio.run(memory_of, 2000, way) - bare for way in (in_bursts, in_pages)]
    latencies = anyio.run(update_to_watcher, 1000)
    floor = statistics.median(queues)
    rates = [statistics.median(each) / floor for each in (ours, paged)]
    p50, p99 = statistics.median(latencies) * 1e3, sorted(latencies)[int(len(latencies) * 0.99)] * 1e3
    print(f"{followers} followers, bursts of {BURST}, {ROUNDS} rounds, medians")
    print(f"  asyncio.Queue each            {floor:9.0f} deliveries/s")
    for way, ratio in zip(("bursts", "read and wait"), rates, strict=True):
        rate = f"{ratio * floor:9.0f} deliveries/s  {ratio:.1f}x"
        print(f"  of one execution, {way:13}{rate}  budget >= {DELIVERY_BUDGET}x")
    of_all = statistics.median(everything)
    print(f"  of everything, bursts         {of_all:9.0f} deliveries/s  {of_all / floor:.1f}x")
    print(f"  a task that only waits        {bare:9.0f} B")
    for way, held in zip(("bursts", "wait"), memory, strict=True):
        print(f"  parked beside it in {way:10}{held:9.0f} B   budget <= {MEMORY_BUDGET} B")
    print(f"  update to watcher, durable  p50 {p50:.2f} ms  p99 {p99:.2f} ms   budget p50 <= {WATCH_BUDGET_MS} ms")
    kept = min(rates) >= DELIVERY_BUDGET and max(memory) <= MEMORY_BUDGET and p50 <= WATCH_BUDGET_MS
    print("within budget" if kept else "BUDGET EXCEEDED")
    return 0


def burst(first: int) -> list[StoredEvent]:
    return [StoredEvent(first + each, "info", "task", "run", first + each, BODY) for each in range(BURST)]


def facts(first: int) -> list[Fact]:
    """As the journal publishes them."""
    return [("run", "info", "task", "run", first + each, BODY, 0, 0, 0) for each in range(BURST)]


async def in_bursts(feed: Feed, execution_id: str | None, until: int) -> int:
    """How many events it heard up to the cursor `until`."""
    count = 0
    async with aclosing(feed.bursts(execution_id=execution_id)) as bursts:
        async for events in bursts:
            for _ in events:
                count += 1
            if events[-1].cursor >= until:
                break
    return count


async def in_pages(feed: Feed, execution_id: str | None, until: int) -> int:
    """As `in_bursts`, the way the doors go."""
    count = cursor = 0
    while cursor < until:
        if not (events := await feed.read(after=cursor, execution_id=execution_id, limit=200)):
            await feed.wait(after=cursor, execution_id=execution_id, timeout=15)
            continue
        for _ in events:
            count += 1
        cursor = events[-1].cursor
    return count


Way = Callable[[Feed, "str | None", int], Awaitable[int]]


async def through_feed(followers: int, way: Way, execution_id: str | None) -> float:
    """Deliveries a second of CPU to followers of one execution, or of everything."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.load({}, data_dir=Path(folder))
        async with Store.open(settings):
            pass
        async with Queries.open(settings.database) as queries:
            feed = Feed(queries, head=0)
            delivered = 0

            async def follow() -> None:
                nonlocal delivered
                heard = await way(feed, execution_id, BURST * BURSTS)
                delivered += heard

            began = 0.0
            async with anyio.create_task_group() as group:
                for _ in range(followers):
                    group.start_soon(follow)
                await anyio.lowlevel.checkpoint()
                began = time.thread_time()
                for number in range(BURSTS):
                    feed.publish(facts(1 + number * BURST), (number + 1) * BURST)
                    await anyio.lowlevel.checkpoint()
                    await anyio.lowlevel.checkpoint()
            return delivered / (time.thread_time() - began)


async def through_queues(followers: int) -> float:
    queues = [asyncio.Queue[StoredEvent]() for _ in range(followers)]
    delivered = 0

    async def follow(queue: asyncio.Queue[StoredEvent]) -> None:
        nonlocal delivered
        count = 0
        while count < BURST * BURSTS:
            await queue.get()
            count += 1
        delivered += count

    began = 0.0
    async with anyio.create_task_group() as group:
        for queue in queues:
            group.start_soon(follow, queue)
        await anyio.lowlevel.checkpoint()
        began = time.thread_time()
        for number in range(BURSTS):
            for event in burst(1 + number * BURST):
                for queue in queues:
                    queue.put_nowait(event)
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
    return delivered / (time.thread_time() - began)


async def memory_of(followers: int, way: Way | None) -> float:
    """Bytes of one parked follower, with the task that runs it; None: of a task that only waits."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.load({}, data_dir=Path(folder))
        async with Store.open(settings) as store:
            waiting = asyncio.Event()

            async def follow() -> None:
                if way is None:
                    await waiting.wait()
                else:
                    await way(store.feed, "run", 1)

            before = after = 0
            async with anyio.create_task_group() as group:
                gc.collect()
                tracemalloc.start()
                before = tracemalloc.get_traced_memory()[0]
                for _ in range(followers):
                    group.start_soon(follow)
                await anyio.sleep(0.05)
                gc.collect()
                after = tracemalloc.get_traced_memory()[0]
                tracemalloc.stop()
                group.cancel_scope.cancel()
            return (after - before) / followers


async def update_to_watcher(updates: int) -> list[float]:
    """Seconds from a progress report to the follower that hears it."""
    latencies: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        async with Store.open(Settings.load({}, data_dir=Path(folder))) as store:
            session = Task(sink=store.journal).start_execution("role")
            session.update_status(ExecutionStatus.RUNNING)
            head = await store.journal.sync()
            asked = 0.0

            async def watch() -> None:
                async for _ in store.feed.follow(after=head, execution_id=session.session_id):
                    latencies.append(time.perf_counter() - asked)
                    if len(latencies) == updates:
                        return

            async with anyio.create_task_group() as group:
                group.start_soon(watch)
                await anyio.lowlevel.checkpoint()
                for number in range(updates):
                    asked = time.perf_counter()
                    session.update_progress(90 * number / updates)
                    await store.journal.sync()
                    await anyio.lowlevel.checkpoint()
    return latencies


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
