"""A thousand subscribers of one run, a tenth of them dead: the others hear all, and nothing is left of any of them."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

import anyio
import pytest
from deadlines import WITHIN
from stored import opened

from vespera_exec.model.enums import ExecutionStatus, MessageLevel
from vespera_exec.model.task import Task
from vespera_exec.store.feed import RING, StoredEvent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.store.store import Store

BURST = 50
LARGE = pytest.mark.full, pytest.mark.timeout(300)


def running(store: Store) -> ExecutionSession:
    session = Task(title="followed", sink=store.journal).start_execution("role")
    session.update_status(ExecutionStatus.RUNNING)
    return session


async def speak(store: Store, session: ExecutionSession, events: int) -> list[float]:
    """So many events in bursts; the seconds that each burst took until it was on disk."""
    took: list[float] = []
    for _ in range(0, events, BURST):
        began = time.monotonic()
        for number in range(BURST):
            session.note(MessageLevel.INFO, f"note {number}")
        await store.journal.sync()
        took.append(time.monotonic() - began)
    return took


def futures() -> int:
    gc.collect()
    return sum(isinstance(each, asyncio.Future) for each in gc.get_objects())


def held_events() -> int:
    gc.collect()
    return sum(isinstance(each, StoredEvent) for each in gc.get_objects())


def p99(took: list[float]) -> float:
    return sorted(took)[int(len(took) * 0.99)]


async def hear(following: AsyncGenerator[StoredEvent], last: int) -> list[int]:
    """The cursors up to `last`."""
    cursors: list[int] = []
    async with aclosing(following) as events:
        async for event in events:
            cursors.append(event.cursor)
            if event.cursor == last:
                break
    return cursors


@pytest.mark.promise("slow_subscriber")
@pytest.mark.parametrize(
    ("alive", "dead", "events"), [(90, 10, 1000), pytest.param(900, 100, 5000, marks=LARGE)], ids=["100", "1000"]
)
async def test_the_living_hear_all_beside_the_dead_and_nothing_is_left_of_either(
    data_dir: Path, alive: int, dead: int, events: int
) -> None:
    async with opened(data_dir) as store:
        session = running(store)
        head = await store.journal.sync()
        at_rest = futures()
        heard: list[list[int]] = []
        never_reading = [store.feed.follow(after=head, execution_id=session.session_id) for _ in range(dead // 2)]

        async def live() -> None:
            heard.append(await hear(store.feed.follow(after=head, execution_id=session.session_id), head + events))

        async def die(scope: anyio.CancelScope) -> None:
            with scope:
                async for _ in store.feed.follow(after=head, task_id=session.task_id):
                    pass

        scopes = [anyio.CancelScope() for _ in range(dead - len(never_reading))]
        with anyio.fail_after(240):
            async with anyio.create_task_group() as group:
                for _ in range(alive):
                    group.start_soon(live)
                for scope in scopes:
                    group.start_soon(die, scope)
                await speak(store, session, BURST)
                for each in never_reading:
                    await anext(each)  # takes one event and reads no more
                for scope in scopes:
                    scope.cancel()
                await speak(store, session, events - BURST)
        assert heard == [list(range(head + 1, head + events + 1))] * alive
        assert store.feed.followers() == len(never_reading)
        rest = await hear(never_reading[0], head + events)
        assert rest == list(range(head + 2, head + events + 1))  # it went on from its cursor
        while never_reading:
            await never_reading.pop().aclose()
        assert store.feed.followers() == 0
        assert not store.feed._topics  # pyright: ignore[reportPrivateUsage]
        assert futures() <= at_rest
        assert held_events() <= 2 * RING


@pytest.mark.promise("slow_subscriber")
async def test_an_event_that_meets_a_cancelled_subscriber_still_reaches_the_others(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        session = running(store)
        head = await store.journal.sync()
        heard: list[list[int]] = []
        dying = anyio.CancelScope()

        async def live() -> None:
            heard.append(await hear(store.feed.follow(after=head), head + 1))

        async def die() -> None:
            with dying:
                await hear(store.feed.follow(after=head), head + 1)

        with anyio.fail_after(WITHIN):
            async with anyio.create_task_group() as group:
                group.start_soon(die)
                group.start_soon(live)
                await anyio.wait_all_tasks_blocked()
                dying.cancel()
                # In the same breath: the dead one's future is cancelled, and it has not yet taken it away.
                event = StoredEvent(head + 1, "info", session.task_id, session.session_id, 1, b"{}")
                store.feed.publish([event], head + 1)
        assert heard == [[head + 1]]
        assert store.feed.followers() == 0


@pytest.mark.promise("slow_subscriber")
@pytest.mark.full
@pytest.mark.timeout(300)
async def test_a_hundred_dead_beside_nine_hundred_living_slow_no_writer_down(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        session = running(store)
        await store.journal.sync()
        took: dict[int, list[float]] = {}
        for dead in (0, 100):
            never_reading = [store.feed.follow(after=store.journal.head) for _ in range(dead)]
            async with anyio.create_task_group() as group:
                for _ in range(900):
                    group.start_soon(hear, store.feed.follow(after=store.journal.head), -1)
                await speak(store, session, BURST)
                for each in never_reading:
                    await anext(each)
                took[dead] = await speak(store, session, 5000)
                group.cancel_scope.cancel()
            for each in never_reading:
                await each.aclose()
        assert store.feed.followers() == 0
        assert p99(took[100]) < max(0.25, 3 * p99(took[0]))
