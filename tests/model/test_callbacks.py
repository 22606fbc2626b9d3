"""Callbacks: off the producer, in order, awaited where they are asynchronous, and never the work's fault."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
from deadlines import WITHIN
from model_harness import running_session, session_with_log

from vespera_exec.model.enums import EventType, ExecutionStatus, MessageLevel
from vespera_exec.model.execution import EnhancedTaskExecution
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    import pytest

    from vespera_exec.model.events import ExecutionEvent

E = EventType


def test_a_failing_callback_is_logged_counted_and_at_last_let_go(caplog: pytest.LogCaptureFixture) -> None:
    session, _ = running_session()
    called: list[int] = []

    def broken(event: ExecutionEvent) -> None:
        called.append(event.sequence)
        raise ZeroDivisionError

    subscription = session.add_event_callback(broken)
    for _ in range(12):
        session.note(MessageLevel.INFO, "x")
    assert subscription.wait_idle(10)
    assert len(called) == subscription.faults == 10
    assert session.event_callbacks == []
    assert "A callback failed on info of e1" in caplog.text
    assert "is unsubscribed" in caplog.text


def test_a_fault_in_between_is_forgiven() -> None:
    session, _ = running_session()
    heard: list[int] = []

    def sometimes(event: ExecutionEvent) -> None:
        heard.append(event.sequence)
        if len(heard) % 9:
            raise ZeroDivisionError

    session.add_event_callback(sometimes)
    for _ in range(40):
        session.note(MessageLevel.INFO, "x")
    assert session.wait_for_callbacks()
    assert len(heard) == 40


def test_a_slow_callback_does_not_slow_the_work() -> None:
    session, _ = running_session()
    release = threading.Event()
    begun: list[int] = []
    heard: list[int] = []

    def slow(event: ExecutionEvent) -> None:
        begun.append(event.sequence)
        assert release.wait(WITHIN)
        heard.append(event.sequence)

    session.add_event_callback(slow)
    for value in range(10):
        session.update_progress(value)
    assert len(begun) <= 1
    assert heard == []
    release.set()
    assert session.wait_for_callbacks()
    assert heard == sorted(heard)
    assert len(heard) == 10


def test_a_slow_callback_does_not_starve_the_others() -> None:
    release = threading.Event()
    session, _ = running_session()
    heard = threading.Event()

    def slow(_event: ExecutionEvent) -> None:
        release.wait(10)

    blocked = [session.add_event_callback(slow) for _ in range(3)]
    session.add_event_callback(lambda _event: heard.set())
    for _ in range(50):
        session.note(MessageLevel.INFO, "x")
    try:
        assert heard.wait(10)
    finally:
        for each in blocked:
            each.unsubscribe()
        release.set()
    assert session.wait_for_callbacks()


async def test_an_asynchronous_callback_is_awaited_on_its_loop() -> None:
    session, _ = running_session()
    heard: list[tuple[int, int]] = []
    done = anyio.Event()
    here = threading.get_ident()

    async def tell(event: ExecutionEvent) -> None:
        await anyio.lowlevel.checkpoint()
        heard.append((event.sequence, threading.get_ident()))
        if event.event_type is E.EXECUTION_COMPLETED:
            done.set()

    with session.add_event_callback(tell):
        await anyio.to_thread.run_sync(session.complete)
        with anyio.fail_after(WITHIN):
            await done.wait()
            assert await anyio.to_thread.run_sync(session.wait_for_callbacks)
    assert [sequence for sequence, _ in heard] == sorted(sequence for sequence, _ in heard)
    assert {thread for _, thread in heard} == {here}


def test_an_asynchronous_callback_without_a_loop_is_run_all_the_same() -> None:
    session, _ = running_session()
    heard: list[int] = []

    async def tell(event: ExecutionEvent) -> None:
        await anyio.lowlevel.checkpoint()
        heard.append(event.sequence)

    session.add_event_callback(tell)
    session.update_progress(5)
    assert session.wait_for_callbacks(20)
    assert heard == [5]


def test_a_callback_whose_loop_ends_half_way_holds_nobody_up() -> None:
    session, _ = running_session()
    entered = threading.Event()

    async def never(_event: ExecutionEvent) -> None:
        entered.set()
        await anyio.sleep_forever()

    async def subscribe() -> None:
        session.add_event_callback(never)
        session.update_progress(5)
        assert await anyio.to_thread.run_sync(entered.wait, 10)

    anyio.run(subscribe)
    assert session.wait_for_callbacks(10)


def test_a_callback_that_removes_itself_takes_no_event_from_the_next() -> None:
    session, _ = running_session()
    first: list[EventType] = []
    second: list[EventType] = []

    def once(event: ExecutionEvent) -> None:
        first.append(event.event_type)
        subscription.unsubscribe()

    subscription = session.add_event_callback(once)

    def always(event: ExecutionEvent) -> None:
        second.append(event.event_type)

    session.add_event_callback(always)
    session.note(MessageLevel.INFO, "one")
    session.note(MessageLevel.WARNING, "two")
    assert session.wait_for_callbacks()
    assert first == [E.INFO]
    assert second == [E.INFO, E.WARNING]
    assert session.event_callbacks == [always]
    assert session.remove_event_callback(always) is True
    assert session.remove_event_callback(always) is False


def test_a_task_is_listened_to_before_and_after_its_sessions() -> None:
    execution = EnhancedTaskExecution()
    heard: list[tuple[str | None, EventType]] = []
    subscription = execution.add_status_callback(lambda event: heard.append((event.execution_id, event.event_type)))
    first = execution.start_new_session("t1", "r")
    execution.complete_execution()
    second = execution.start_new_session("t1", "r")
    assert subscription.wait_idle(10)
    for session in (first, second):
        assert (session.session_id, E.EXECUTION_STARTED) in heard


def test_a_subscriber_that_sees_the_end_sees_everything_settled() -> None:
    task = Task("t1", role="r")
    seen: list[tuple[bool, int, str, int]] = []

    def look(event: ExecutionEvent) -> None:
        if event.event_type is E.EXECUTION_COMPLETED:
            execution = task.execution
            history = len(execution.execution_history)
            seen.append((execution.is_executing, history, task.status.value, execution.record.completed))

    subscription = task.execution.add_status_callback(look)
    task.ledger.listen(look)  # the earliest that anyone can hear of it
    task.start_execution()
    task.complete_execution(True, "ok")
    assert subscription.wait_idle(10)
    assert seen == [(False, 1, "done", 1)] * 2


def test_a_restart_inside_a_callback_loses_no_session() -> None:
    execution = EnhancedTaskExecution("r")
    started: list[str] = []

    def again(event: ExecutionEvent) -> None:
        if event.event_type is E.EXECUTION_FAILED and not started:
            started.append(execution.start_new_session("t1").session_id)

    subscription = execution.add_status_callback(again)
    first = execution.start_new_session("t1")
    execution.complete_execution(False, error="x")
    assert subscription.wait_idle(10)
    assert execution.current_session is not None
    assert [execution.current_session.session_id] == started
    assert [each.session_id for each in execution.session_history] == [first.session_id]
    assert execution.execution_history[0]["execution_id"] == first.session_id


def test_an_ended_session_lets_go_of_its_callbacks() -> None:
    session, _ = session_with_log()
    heard: list[EventType] = []
    session.add_event_callback(lambda event: heard.append(event.event_type))
    session.start_execution()
    session.update_status(ExecutionStatus.FAILED, "x")
    assert session.wait_for_callbacks()
    assert heard[-1] is E.ERROR
    assert session.event_callbacks == []


def test_a_callback_that_cannot_keep_up_misses_progress_but_no_status() -> None:
    session, _ = running_session()
    release = threading.Event()
    heard: list[EventType] = []

    def slow(event: ExecutionEvent) -> None:
        assert release.wait(20)
        heard.append(event.event_type)

    subscription = session.add_event_callback(slow)
    session.pause()
    for value in range(1500):
        session.update_progress(value / 20)
    session.resume()
    session.complete()
    release.set()
    assert session.wait_for_callbacks(20)
    assert subscription.dropped > 400
    assert len(heard) <= 1001
    assert heard.count(E.STATUS_CHANGE) == 4
    assert heard[:2] == [E.STATUS_CHANGE, E.EXECUTION_PAUSED]
    assert heard[-1] is E.EXECUTION_COMPLETED
