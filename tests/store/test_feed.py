"""The feed: whoever follows hears everything once, in order, and disturbs nobody."""

from __future__ import annotations

import random
import sqlite3
from contextlib import aclosing
from typing import TYPE_CHECKING

import anyio
import pytest
from deadlines import WITHIN

from vespera_exec.errors import StoreDamaged
from vespera_exec.model.enums import EventType, ExecutionStatus, MessageLevel
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.feed import RING, Feed, StoredEvent
from vespera_exec.store.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from vespera_exec.model.session import ExecutionSession


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    return Settings.load({}, data_dir=data_dir)


def running(store: Store) -> ExecutionSession:
    session = Task(title="followed", sink=store.journal).start_execution("role")
    session.update_status(ExecutionStatus.RUNNING)
    return session


def speak(session: ExecutionSession, times: int) -> None:
    for number in range(times):
        session.note(MessageLevel.INFO, f"note {number}")


async def take(store: Store, count: int, *, after: int = 0, execution_id: str | None = None) -> list[int]:
    """The cursors of the next `count` events."""
    found: list[int] = []
    with anyio.fail_after(WITHIN):
        async with aclosing(store.feed.follow(after=after, execution_id=execution_id)) as events:
            async for event in events:
                found.append(event.cursor)
                if len(found) == count:
                    break
    return found


async def test_a_follower_hears_history_then_live_without_gap_or_repeat(settings: Settings) -> None:
    async with Store.open(settings) as store:
        session = running(store)
        speak(session, 20)
        head = await store.journal.sync()
        heard: list[int] = []
        async with anyio.create_task_group() as group:

            async def follow() -> None:
                heard.extend(await take(store, head + 50))

            group.start_soon(follow)
            for _ in range(50):
                speak(session, 1)
                await store.journal.sync()
        assert heard == list(range(1, head + 51))


@pytest.mark.promise("reconnect")
async def test_history_that_memory_has_forgotten_comes_from_the_database(settings: Settings) -> None:
    async with Store.open(settings) as store:
        session = running(store)
        speak(session, 2 * RING + 100)
        head = await store.journal.sync()
        assert await take(store, head) == list(range(1, head + 1))


async def test_a_reopened_store_remembers_everything(settings: Settings) -> None:
    async with Store.open(settings) as store:
        session = running(store)
        speak(session, 10)
        head = await store.journal.sync()
        before = await store.feed.read(task_id=session.task_id)
    async with Store.open(settings) as store:
        assert store.feed.head == head
        assert await store.feed.read(task_id=session.task_id) == before


@pytest.mark.promise("reconnect")
async def test_reconnecting_by_cursor_anywhere_loses_and_repeats_nothing(settings: Settings) -> None:
    chance = random.Random(7)
    async with Store.open(settings) as store:
        sessions = [running(store) for _ in range(3)]
        await store.journal.sync()
        heard: dict[str, list[int]] = {session.session_id: [] for session in sessions}
        total = 600

        async def follow(session: ExecutionSession) -> None:
            mine = heard[session.session_id]
            while len(mine) < total:
                wanted = min(chance.randint(1, 40), total - len(mine))
                after = mine[-1] if mine else 0
                mine.extend(await take(store, wanted, after=after, execution_id=session.session_id))

        async def write() -> None:
            for _ in range(total):
                speak(chance.choice(sessions), 1)
                for session in sessions:
                    speak(session, 1)
                if chance.random() < 0.2:
                    await store.journal.sync()
                    await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            for session in sessions:
                group.start_soon(follow, session)
            group.start_soon(write)
        await store.journal.sync()
        for session in sessions:
            stored = await store.queries.events_after(0, execution_id=session.session_id, limit=total)
            assert heard[session.session_id] == [event.cursor for event in stored]


async def test_a_task_is_heard_with_all_its_executions_by_cursor(settings: Settings) -> None:
    async with Store.open(settings) as store:
        task = Task(title="twice", sink=store.journal)
        other = running(store)
        for _ in range(2):
            session = task.start_execution("role")
            speak(other, 3)
            session.complete("done")
        await store.journal.sync()
        events = await store.feed.read(task_id=task.id)
        from_disk = await store.queries.events_after(0, task_id=task.id)
        assert events == from_disk
        assert {event.task_id for event in events} == {task.id}
        assert len({event.execution_id for event in events}) == 3
        assert [event.cursor for event in events] == sorted(event.cursor for event in events)
        assert events[-1].event().event_type is EventType.STATUS_CHANGE


async def test_types_and_limit_narrow_what_is_read(settings: Settings) -> None:
    async with Store.open(settings) as store:
        session = running(store)
        speak(session, 30)
        head = await store.journal.sync()
        for read in (store.feed.read, Feed(store.queries, head=head).read):
            notes = await read(execution_id=session.session_id, types=(EventType.INFO,), limit=7)
            assert [event.event_type for event in notes] == ["info"] * 7
            more = await read(after=notes[-1].cursor, types=("info",), limit=100)
            assert len(more) == 23
            assert await read(types=()) == []


async def test_the_last_events_come_oldest_first(settings: Settings) -> None:
    async with Store.open(settings) as store:
        session = running(store)
        speak(session, 9)
        head = await store.journal.sync()
        last = await store.feed.recent(task_id=session.task_id, limit=4)
        assert [event.cursor for event in last] == list(range(head - 3, head + 1))


async def test_waiting_ends_with_an_event_of_ones_own_or_with_the_time(settings: Settings) -> None:
    async with Store.open(settings) as store:
        mine, other = running(store), running(store)
        head = await store.journal.sync()
        assert await store.feed.wait(after=0, execution_id=mine.session_id, timeout=0)
        speak(other, 5)
        await store.journal.sync()
        assert not await store.feed.wait(after=head, execution_id=mine.session_id, timeout=0.02)
        found: list[bool] = []

        async def wait() -> None:
            found.append(await store.feed.wait(after=head, task_id=mine.task_id, timeout=WITHIN))

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.lowlevel.checkpoint()
            speak(mine, 1)
        assert found == [True]
        assert store.feed.followers() == 0


async def test_each_wait_for_the_same_ends_at_its_own_time(settings: Settings) -> None:
    async with Store.open(settings) as store:
        session = running(store)
        head = await store.journal.sync()
        ended: list[tuple[str, bool]] = []
        two = anyio.Event()

        async def wait(what: str, timeout: float) -> None:
            ended.append((what, await store.feed.wait(after=head, execution_id=session.session_id, timeout=timeout)))
            if len(ended) == 2:
                two.set()

        with anyio.fail_after(WITHIN):
            async with anyio.create_task_group() as group:
                group.start_soon(wait, "patient", 2 * WITHIN)
                group.start_soon(wait, "second", 0.04)
                group.start_soon(wait, "first", 0.01)
                await two.wait()
                speak(session, 1)
        assert ended == [("first", False), ("second", False), ("patient", True)]
        assert store.feed.followers() == 0


async def test_an_event_of_no_execution_is_heard_once_by_who_hears_everything(settings: Settings) -> None:
    async with Store.open(settings) as store:
        running(store)
        head = await store.journal.sync()
        heard: list[int] = []

        async def follow() -> None:
            heard.extend(await take(store, 3, after=head))

        with anyio.fail_after(WITHIN):
            async with anyio.create_task_group() as group:
                group.start_soon(follow)
                await anyio.lowlevel.checkpoint()
                for _ in range(3):
                    Task(title="of no execution yet", sink=store.journal)
        assert heard == [head + 1, head + 2, head + 3]


async def test_an_event_is_made_for_its_first_reader_and_is_the_same_for_all(settings: Settings) -> None:
    async with Store.open(settings) as store:
        session = running(store)
        speak(session, 3)
        await store.journal.sync()
        ring = store.feed._ring  # pyright: ignore[reportPrivateUsage]
        assert not any(isinstance(held, StoredEvent) for held in ring)
        ours = await store.feed.read(execution_id=session.session_id)
        again = await store.feed.read(execution_id=session.session_id)
        assert [id(event) for event in ours] == [id(event) for event in again]
        assert [isinstance(held, StoredEvent) for held in ring] == [held[3] is not None for held in ring]
        assert ours == await store.queries.events_after(0, execution_id=session.session_id)
        held_bytes = store.feed._held_bytes  # pyright: ignore[reportPrivateUsage]
        assert held_bytes == sum(len(held[5]) for held in ring)


async def test_a_nudge_ends_the_waits_for_the_same_and_no_others(settings: Settings) -> None:
    async with Store.open(settings) as store:
        session = running(store)
        head = await store.journal.sync()
        store.feed.nudge(task_id=session.task_id)  # nobody waits
        ended: dict[str, bool] = {}
        first = anyio.Event()

        async def wait(what: str, execution_id: str | None) -> None:
            ended[what] = await store.feed.wait(
                after=head, task_id=session.task_id, execution_id=execution_id, timeout=WITHIN
            )
            first.set()

        async with anyio.create_task_group() as group:
            group.start_soon(wait, "of the task", None)
            group.start_soon(wait, "of the execution", session.session_id)
            await anyio.lowlevel.checkpoint()
            store.feed.nudge(task_id=session.task_id)
            with anyio.fail_after(WITHIN):
                await first.wait()
            await anyio.lowlevel.checkpoint()
            assert ended == {"of the task": False}
            store.feed.nudge(task_id=session.task_id, execution_id=session.session_id)
        assert ended == {"of the task": False, "of the execution": False}
        assert store.feed.followers() == 0


async def test_a_wait_finds_history_that_only_the_database_has(settings: Settings) -> None:
    async with Store.open(settings) as store:
        session = running(store)
        await store.journal.sync()
    async with Store.open(settings) as store:
        assert await store.feed.wait(after=0, execution_id=session.session_id, timeout=WITHIN)


async def test_an_event_that_comes_while_the_database_is_read_is_heard(settings: Settings) -> None:
    async with Store.open(settings) as store:
        other = running(store)
        head = await store.journal.sync()
        feed = Feed(store.queries, head=head)
        heard: list[int] = []
        with anyio.fail_after(WITHIN):
            async with anyio.create_task_group() as group:

                async def follow() -> None:
                    async with aclosing(feed.follow(execution_id="mine")) as events:
                        async for event in events:
                            heard.append(event.cursor)
                            break

                group.start_soon(follow)
                await anyio.lowlevel.checkpoint()  # it reads, and finds nothing, for all there is are the other's
                feed.publish([StoredEvent(head + 1, "info", other.task_id, "mine", 1, b"{}")], head + 1)
        assert heard == [head + 1]


async def test_another_execution_wakes_nobody_but_its_own_followers(settings: Settings) -> None:
    async with Store.open(settings) as store:
        mine, other = running(store), running(store)
        head = await store.journal.sync()
        woken: list[int] = []
        async with anyio.create_task_group() as group:

            async def follow() -> None:
                async for event in store.feed.follow(after=head, execution_id=mine.session_id):
                    woken.append(event.cursor)
                    group.cancel_scope.cancel()

            group.start_soon(follow)
            await anyio.lowlevel.checkpoint()
            topic = store.feed._topics[mine.session_id]  # pyright: ignore[reportPrivateUsage]
            before = topic.last
            speak(other, 100)
            await store.journal.sync()
            assert topic.last == before
            assert len(topic.parked) == 1
            speak(mine, 1)
        assert woken == [head + 101]


async def test_two_hundred_followers_some_dead_some_slow_all_hear_everything(settings: Settings) -> None:
    async with Store.open(settings) as store:
        session = running(store)
        head = await store.journal.sync()
        bursts, size = 20, 32
        heard: list[list[int]] = []
        dead = [store.feed.follow(after=head) for _ in range(20)]

        async def follow(number: int) -> None:
            filtered = session.session_id if number % 2 else None
            cursors: list[int] = []
            async with aclosing(store.feed.follow(after=head, execution_id=filtered)) as events:
                async for event in events:
                    cursors.append(event.cursor)
                    if number % 10 == 0:
                        await anyio.lowlevel.checkpoint()
                    if len(cursors) == bursts * size:
                        break
            heard.append(cursors)

        with anyio.fail_after(WITHIN):
            async with anyio.create_task_group() as group:
                for number in range(180):
                    group.start_soon(follow, number)
                speak(session, 1)
                await store.journal.sync()
                for each in dead:
                    await anext(each)  # they take one event and never come back
                speak(session, bursts * size - 1)
        assert heard == [list(range(head + 1, head + 1 + bursts * size))] * 180
        for each in dead:
            await each.aclose()
        assert store.feed.followers() == 0


async def test_memory_is_bounded_by_bytes_and_everything_is_still_heard(settings: Settings) -> None:
    async with Store.open(settings) as store:
        mine, other = running(store), running(store)
        head = await store.journal.sync()
        feed = Feed(store.queries, head=head, ring_bytes=100_000)
        mine.note(MessageLevel.INFO, "x" * 10_000)
        for number in range(30):
            other.note(MessageLevel.INFO, "x" * 20_000)
            mine.note(MessageLevel.INFO, f"note {number}")
        await store.journal.sync()
        heard: list[int] = []

        async def follow() -> None:
            async with aclosing(feed.follow(after=head, execution_id=mine.session_id)) as followed:
                async for event in followed:
                    heard.append(event.cursor)
                    if len(heard) == 31:
                        break

        with anyio.fail_after(WITHIN):
            async with anyio.create_task_group() as group:
                group.start_soon(follow)
                await anyio.lowlevel.checkpoint()
                for event in await store.queries.events_after(head):
                    feed.publish([event], event.cursor)
                    held = {*feed._ring, *feed._topics[mine.session_id].tail}  # pyright: ignore[reportPrivateUsage]
                    assert sum(len(each[5]) for each in held) <= 100_000
        assert heard == [head + 1, *range(head + 3, head + 62, 2)]
        assert [event.cursor for event in await feed.read(after=head)] == list(range(head + 1, head + 62))


async def test_an_event_larger_than_the_memory_is_heard_out_of_the_database(settings: Settings) -> None:
    async with Store.open(settings) as store:
        session = running(store)
        head = await store.journal.sync()
        feed = Feed(store.queries, head=head, ring_bytes=1000)
        speak(session, 1)
        session.note(MessageLevel.INFO, "x" * 5000)
        await store.journal.sync()
        feed.publish(await store.queries.events_after(head), head + 2)
        assert [event.cursor for event in await feed.read(after=head)] == [head + 1, head + 2]
        assert not feed._ring  # pyright: ignore[reportPrivateUsage]


async def test_a_cancelled_follower_leaves_nothing_behind(settings: Settings) -> None:
    async with Store.open(settings) as store:
        session = running(store)
        head = await store.journal.sync()
        async with anyio.create_task_group() as group:

            async def follow() -> None:
                async for _ in store.feed.follow(after=head, task_id=session.task_id):
                    pytest.fail("nothing was said")

            group.start_soon(follow)
            await anyio.lowlevel.checkpoint()
            assert store.feed.followers() == 1
            group.cancel_scope.cancel()
        await anyio.lowlevel.checkpoint()
        assert store.feed.followers() == 0
        assert not store.feed._topics  # pyright: ignore[reportPrivateUsage]


async def test_a_flipped_bit_in_an_event_is_found_and_named(settings: Settings) -> None:
    async with Store.open(settings) as store:
        session = running(store)
        speak(session, 3)
        head = await store.journal.sync()
    connection = sqlite3.connect(settings.database)
    (body,) = connection.execute("SELECT body FROM events WHERE cursor = ?", (head - 1,)).fetchone()
    flipped = bytearray(body)
    flipped[len(flipped) // 2] ^= 1
    connection.execute("UPDATE events SET body = ? WHERE cursor = ?", (bytes(flipped), head - 1))
    connection.commit()
    connection.close()
    async with Store.open(settings) as store:
        assert len(await store.feed.read(limit=head - 2)) == head - 2
        with pytest.raises(StoreDamaged, match=f"event {head - 1} "):
            await store.feed.read()


async def test_the_body_is_the_message(settings: Settings) -> None:
    async with Store.open(settings) as store:
        running(store)
        await store.journal.sync()
        (event, *_) = await store.feed.read()
        assert isinstance(event, StoredEvent)
        assert event.event().to_stream_message() == event.message()
        assert event.message()["cursor"] == event.cursor == 1
