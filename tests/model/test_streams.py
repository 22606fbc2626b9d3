"""The stream of one execution in memory: history, then live, to the end; and what a slow reader is told."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from deadlines import WITHIN
from model_harness import running_session, undone

from vespera_exec.errors import InvalidInput
from vespera_exec.model.enums import EventType, ExecutionStatus, MessageLevel
from vespera_exec.model.ledger import Ledger
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from vespera_exec.model.events import ExecutionEvent
    from vespera_exec.model.stream import EventFollower


async def rest(follower: EventFollower) -> list[int]:
    """The sequences of all that comes, to the end."""
    with anyio.fail_after(WITHIN):
        return [event.sequence async for event in follower]


async def parked(session: ExecutionSession, followers: int = 1) -> None:
    """Returns once so many wait."""
    with anyio.fail_after(WITHIN):
        while session.stream.waiting < followers:
            await anyio.lowlevel.checkpoint()


def speak(session: ExecutionSession, times: int) -> None:
    for number in range(times):
        session.note(MessageLevel.INFO, f"note {number}")


async def test_an_ended_session_is_replayed_and_the_stream_ends_after_the_last_event() -> None:
    session, log = running_session()
    speak(session, 3)
    session.complete("done")
    with anyio.fail_after(WITHIN):
        heard = [event async for event in session.stream]
    assert heard == log.events == session.status_events
    assert heard[-1].event_type is EventType.EXECUTION_COMPLETED


async def test_a_follower_goes_on_after_its_cursor() -> None:
    session, log = running_session()
    speak(session, 5)
    session.fail("x")
    last = log.events[-1].sequence
    assert await rest(session.stream.follow(after=4)) == list(range(5, last + 1))
    assert await rest(session.stream.follow(after=last)) == []
    assert await rest(session.stream.follow(after=last + 100)) == []
    assert [event.sequence for event in session.stream.get_events(after=last - 1)] == [last]
    with pytest.raises(InvalidInput):
        session.stream.follow(after=-1)


async def test_history_then_live_without_gap_or_repeat_while_threads_drive_the_session() -> None:
    session, log = running_session()
    speak(session, 20)
    heard: list[list[int]] = [[], []]

    async def follow(which: int) -> None:
        heard[which] = await rest(session.stream.follow())

    def drive() -> None:
        threads = [threading.Thread(target=speak, args=[session, 150]) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(20)
        session.complete()

    async with anyio.create_task_group() as group:
        group.start_soon(follow, 0)
        group.start_soon(follow, 1)
        group.start_soon(anyio.to_thread.run_sync, drive)
    everything = list(range(1, log.events[-1].sequence + 1))
    assert heard == [everything, everything]


async def test_a_follower_that_waits_is_woken_by_another_thread() -> None:
    asyncio.get_running_loop().set_debug(True)  # refuses calls from other threads that would not wake it
    session, _ = running_session()
    follower = session.stream.follow(after=session.progress.sequence)
    heard: list[ExecutionEvent] = []

    async def hear() -> None:
        heard.append(await anext(follower))

    thread = threading.Thread(target=speak, args=[session, 1])
    with anyio.fail_after(WITHIN):
        async with anyio.create_task_group() as group:
            group.start_soon(hear)
            await parked(session)
            thread.start()
    thread.join(5)
    assert [event.message for event in heard] == ["note 0"]
    assert session.stream.waiting == 0


async def test_a_slow_follower_goes_on_with_what_memory_holds_and_is_told_what_it_missed() -> None:
    session = ExecutionSession("e1", max_events=10)
    session.start_execution()
    follower = session.stream.follow()
    first = await anext(follower)
    speak(session, 100)
    assert (first.sequence, follower.dropped) == (1, 0)
    oldest = session.status_events[0].sequence
    after_the_gap = await anext(follower)
    assert after_the_gap.sequence == oldest
    assert follower.dropped == oldest - 2
    session.complete()
    last = session.status_events[-1].sequence
    given = 2 + len(await rest(follower))
    assert given + follower.dropped == last
    assert len(session.stream.get_events()) == 10


async def test_where_nothing_is_kept_a_follower_is_told_so_and_still_ends() -> None:
    session = ExecutionSession("e1", max_events=0)
    follower = session.stream.follow()
    heard: list[int] = []

    async def follow() -> None:
        heard.extend(await rest(follower))

    async with anyio.create_task_group() as group:
        group.start_soon(follow)
        await parked(session)
        session.start_execution()
        session.complete()
    assert heard == []
    assert follower.dropped == session.progress.sequence > 0


async def test_a_restored_session_says_that_it_does_not_hold_its_past() -> None:
    session, _ = running_session()
    before = session.progress.sequence
    again = ExecutionSession.restored(session.lifecycle, session.progress, ledger=Ledger())
    again.change_owner("next")
    again.complete()
    follower = again.stream.follow()
    assert await rest(follower) == list(range(before + 1, again.progress.sequence + 1))
    assert follower.dropped == before
    ended = ExecutionSession.restored(again.lifecycle, again.progress).stream.follow()
    assert await rest(ended) == []
    assert ended.dropped == again.progress.sequence


async def test_a_follower_may_be_left_and_taken_up_again() -> None:
    session, log = running_session()
    follower = session.stream.follow()
    heard: list[int] = []
    with anyio.move_on_after(0.02):
        heard.extend([event.sequence async for event in follower])
    assert session.stream.waiting == 0
    reached = follower.sequence
    assert reached == log.events[-1].sequence
    session.complete()
    assert await rest(follower) == list(range(reached + 1, log.events[-1].sequence + 1))


async def test_a_decision_is_heard_whole_or_not_at_all() -> None:
    session, log = running_session()
    with undone(session.ledger):
        session.note(MessageLevel.INFO, "never")
        session.fail("never")
    with session.ledger:
        session.note(MessageLevel.INFO, "with the end")
        session.complete()
    with anyio.fail_after(WITHIN):
        heard = [event async for event in session.stream]
    assert heard == log.events
    assert "never" not in {event.message for event in heard}


async def test_nobody_sees_into_a_decision_that_another_thread_has_not_closed() -> None:
    session, log = running_session()
    head = session.progress.sequence
    recorded, reading = threading.Event(), threading.Event()

    def decide() -> None:
        with undone(session.ledger):
            session.note(MessageLevel.INFO, "never")
            recorded.set()
            reading.wait(5)

    thread = threading.Thread(target=decide)
    thread.start()
    assert recorded.wait(5)
    follower = session.stream.follow(after=head)
    reading.set()
    with anyio.move_on_after(0.02):
        await anext(follower)
    thread.join(5)
    session.complete()
    assert await rest(follower) == list(range(head + 1, log.events[-1].sequence + 1))


async def test_the_streams_of_two_sessions_of_one_task_are_apart() -> None:
    task = Task("t1")
    first = task.start_execution("r")
    first.fail("x")
    second = task.start_execution("r")
    second.complete()
    for session in (first, second):
        with anyio.fail_after(WITHIN):
            heard = [event async for event in session.stream]
        assert {event.execution_id for event in heard} == {session.session_id}
        assert [event.sequence for event in heard] == list(range(1, len(heard) + 1))


async def test_a_follower_in_a_loop_that_is_closed_disturbs_nobody() -> None:
    session, log = running_session()
    head = session.progress.sequence

    reading = session.stream.follow(after=head).__anext__()

    async def begin() -> None:
        reading.send(None)  # up to where it waits, and no further: its loop goes

    await anyio.to_thread.run_sync(asyncio.run, begin())
    assert session.stream.waiting == 1
    session.update_status(ExecutionStatus.COMPLETING)
    assert log.events[-1].new_status is ExecutionStatus.COMPLETING
    assert session.stream.waiting == 0
    reading.close()


async def test_callbacks_and_followers_hear_the_same() -> None:
    session, _ = running_session()
    called: list[int] = []
    after = session.progress.sequence
    session.stream.subscribe(lambda event: called.append(event.sequence))
    assert len(session.event_callbacks) == 1
    speak(session, 5)
    session.complete()
    assert session.wait_for_callbacks()
    assert called == await rest(session.stream.follow(after=after))


async def test_a_replay_leaves_the_loop_its_turn() -> None:
    session, _ = running_session()
    speak(session, 500)
    session.complete()
    turns = 0

    async with anyio.create_task_group() as group:

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await anyio.lowlevel.checkpoint()

        group.start_soon(others)
        await rest(session.stream.follow())
        group.cancel_scope.cancel()
    assert turns >= 500 // 64
