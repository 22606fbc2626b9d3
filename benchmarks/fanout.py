"""What it costs to tell many followers: ours, against an `asyncio.Queue` for each.

Run: `python benchmarks/fanout.py [FOLLOWERS]`. Both deliver the same events, published in bursts of 32, to the
same number of followers, and take turns. Ours ends with the time from an update to its watcher, on disk first.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import tempfile
import time
import tracemalloc
from contextlib import aclosing
from pathlib import Path

import anyio
import anyio.lowlevel

from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.feed import Feed, StoredEvent
from vespera_exec.store.queries import Queries
from vespera_exec.store.store import Store

ROUNDS = 3
BURST = 32
BURSTS = 50
DELIVERY_BUDGET = 3.0
MEMORY_BUDGET = 1536
WATCH_BUDGET_MS = 1.0
BODY = b'{"x":"' + b"y" * 450 + b'"}'


def main(followers: int) -> int:
    ours: list[float] = []
    queues: list[float] = []
    for _ in range(ROUNDS):
        queues.append(anyio.run(through_queues, followers))
        ours.append(anyio.run(through_feed, followers, "run"))
    all_of_it = anyio.run(through_feed, followers, None)
    memory = anyio.run(memory_of, 2000)
    bare = anyio.run(memory_of_waiting, 2000)
    latencies = anyio.run(update_to_watcher, 1000)
    rate, floor = statistics.median(ours), statistics.median(queues)
    p50, p99 = statistics.median(latencies) * 1e3, sorted(latencies)[int(len(latencies) * 0.99)] * 1e3
    print(f"{followers} followers, bursts of {BURST}, {ROUNDS} rounds, medians")
    print(f"  asyncio.Queue each         {floor:9.0f} deliveries/s")
    print(f"  feed, of one execution     {rate:9.0f} deliveries/s   {rate / floor:.1f}x   budget >= {DELIVERY_BUDGET}x")
    print(f"  feed, of everything        {all_of_it:9.0f} deliveries/s   {all_of_it / floor:.1f}x")
    print(f"  a parked follower          {memory:9.0f} B   budget <= {MEMORY_BUDGET} B, without the task that waits")
    print(f"  a task that only waits     {bare:9.0f} B")
    print(f"  update to watcher, durable  p50 {p50:.2f} ms  p99 {p99:.2f} ms   budget p50 <= {WATCH_BUDGET_MS} ms")
    kept = rate / floor >= DELIVERY_BUDGET and memory <= MEMORY_BUDGET and p50 <= WATCH_BUDGET_MS
    print("within budget" if kept else "BUDGET EXCEEDED")
    return 0


def burst(first: int) -> list[StoredEvent]:
    return [StoredEvent(first + each, "info", "task", "run", first + each, BODY) for each in range(BURST)]


async def through_feed(followers: int, execution_id: str | None) -> float:
    """Deliveries a second to followers of one execution, or of everything."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.load({}, data_dir=Path(folder))
        async with Store.open(settings):
            pass
        async with Queries.open(settings.database) as queries:
            feed = Feed(queries, head=0)
            delivered = 0

            async def follow() -> None:
                nonlocal delivered
                count = 0
                async with aclosing(feed.bursts(execution_id=execution_id)) as bursts:
                    async for events in bursts:
                        for _ in events:
                            count += 1
                        if count == BURST * BURSTS:
                            break
                delivered += count

            began = 0.0
            async with anyio.create_task_group() as group:
                for _ in range(followers):
                    group.start_soon(follow)
                await anyio.lowlevel.checkpoint()
                began = time.perf_counter()
                for number in range(BURSTS):
                    feed.publish(burst(1 + number * BURST))
                    await anyio.lowlevel.checkpoint()
                    await anyio.lowlevel.checkpoint()
            return delivered / (time.perf_counter() - began)


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
        began = time.perf_counter()
        for number in range(BURSTS):
            for event in burst(1 + number * BURST):
                for queue in queues:
                    queue.put_nowait(event)
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
    return delivered / (time.perf_counter() - began)


async def memory_of(followers: int) -> float:
    """Bytes of one parked follower, beyond those of the task that runs it."""
    return await _memory(followers, feed=True) - await _memory(followers, feed=False)


async def memory_of_waiting(followers: int) -> float:
    return await _memory(followers, feed=False)


async def _memory(followers: int, *, feed: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.load({}, data_dir=Path(folder))
        async with Store.open(settings) as store:
            waiting = asyncio.Event()

            async def follow() -> None:
                if feed:
                    async for _ in store.feed.follow(execution_id="run"):
                        pass
                else:
                    await waiting.wait()

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
