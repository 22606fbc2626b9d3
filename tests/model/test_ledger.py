"""The order of facts: whole decisions, undone whole, and sequences without a gap."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from model_harness import START, HandClock, KeptLog, running_session, undone

from vespera_exec.errors import StoreUnavailable
from vespera_exec.model.enums import EventType, ExecutionStatus, MessageLevel
from vespera_exec.model.ledger import Batch, Cell, Ledger, Part, ResultRecord
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from vespera_exec.model.events import ExecutionEvent

S = ExecutionStatus


def test_several_changes_are_one_decision() -> None:
    session, log = running_session()
    before = len(log.batches)
    with session.ledger:
        session.update_progress(10)
        session.update_progress(20)
        session.pause()
        assert len(log.batches) == before
    (batch,) = log.batches[before:]
    assert len(batch.events) == 4
    assert sorted(type(row).__name__ for row in batch.rows) == ["Lifecycle", "Progress"]
    assert session.lifecycle in batch.rows
    assert session.progress in batch.rows


def test_all_facts_of_a_decision_have_the_time_of_the_first_and_the_next_has_its_own() -> None:
    hand = HandClock()
    log = KeptLog()
    ledger = Ledger(sink=log, clock=hand.clock)

    def record() -> None:
        ledger.record(EventType.INFO, task_id="t1")

    with ledger:
        record()
        hand.pass_(3)
        record()
    with undone(ledger):
        record()
    hand.pass_(4)
    with ledger:
        record()
    assert [event.timestamp for event in log.events] == [START, START, START + timedelta(seconds=7)]


def test_an_exception_undoes_the_whole_decision() -> None:
    session, log = running_session()
    life, progress, batches = session.lifecycle, session.progress, len(log.batches)
    called: list[str] = []
    ledger = session.ledger
    with undone(ledger):
        session.update_progress(10)
        session.pause()
        ledger.keep(ResultRecord(execution_id="e1", body=b""))
        ledger.settling(lambda: called.append("settling"))
        ledger.afterwards(lambda: called.append("afterwards"))
    assert (session.lifecycle, session.progress, len(log.batches), called) == (life, progress, batches, [])
    session.update_progress(5)
    assert [event.sequence for event in log.events] == list(range(1, len(log.events) + 1))
    assert all(not isinstance(row, ResultRecord) for row in log.batches[-1].rows)


def test_a_nested_decision_that_fails_leaves_the_outer_one_whole() -> None:
    session, log = running_session()
    called: list[str] = []
    with session.ledger as ledger:
        session.update_progress(10)
        ledger.afterwards(lambda: called.append("outer"))
        with undone(session.ledger):
            session.update_progress(50)
            session.pause()
            ledger.afterwards(lambda: called.append("inner"))
        session.note(MessageLevel.INFO, "on")
    assert (session.progress.percentage, session.status, called) == (10, S.RUNNING, ["outer"])
    assert [event.event_type for event in log.batches[-1].events] == [EventType.PROGRESS_UPDATE, EventType.INFO]
    assert [event.sequence for event in log.events] == list(range(1, len(log.events) + 1))


def test_the_clock_of_an_undone_pause_runs_on() -> None:
    session, _ = running_session()
    with undone(session.ledger):
        session.pause()
    assert not session.time_tracking.is_paused
    assert session.time_tracking._since is not None  # pyright: ignore[reportPrivateUsage]


def test_an_undone_start_leaves_the_task_free() -> None:
    log = KeptLog()
    task = Task("t1", role="r", sink=log)
    record, batches = task.record, len(log.batches)
    with undone(task.ledger):
        task.start_execution()
    assert (task.record, len(log.batches)) == (record, batches)
    assert not task.execution.is_executing
    session = task.start_execution()
    with undone(task.ledger):
        session.fail("x")
        assert task.execution.last_session is session
    assert task.execution.current_session is session
    assert (task.execution.execution_history, task.execution.session_history) == ([], [])
    assert session.status is S.PREPARING
    assert task.complete_execution() is True


class _Count:
    """A folded value that counts events, and cannot fold an alert."""

    def __init__(self, seen: int = 0) -> None:
        self.seen = seen

    def evolve(self, event: ExecutionEvent) -> _Count:
        if event.event_type is EventType.SYSTEM_ALERT:
            raise ValueError("not this one")
        return _Count(self.seen + 1)


class _Anything(_Count):
    def evolve(self, event: ExecutionEvent) -> _Anything:
        return _Anything(self.seen + 1)


def test_a_fact_that_one_part_cannot_fold_is_in_none_though_the_decision_goes_on() -> None:
    log = KeptLog()
    ledger = Ledger(sink=log)
    first, second = Part(_Anything()), Part(_Count())
    with ledger:
        ledger.record(EventType.INFO, (first, second), task_id="t1")
        with suppress(ValueError):
            ledger.record(EventType.SYSTEM_ALERT, (first, second), task_id="t1")
        ledger.record(EventType.INFO, (first, second), task_id="t1")
    assert (first.value.seen, second.value.seen) == (2, 2)
    assert [(event.event_type, event.sequence) for event in log.events] == [(EventType.INFO, 1), (EventType.INFO, 2)]


def test_nothing_is_kept_or_changed_outside_a_decision() -> None:
    ledger, cell = Ledger(), Cell("before")
    for call in (
        lambda: ledger.record(EventType.INFO, task_id="t1"),
        lambda: ledger.put(cell, "after"),
        lambda: ledger.keep(ResultRecord(execution_id="e1", body=b"")),
        lambda: ledger.settling(lambda: None),
        lambda: ledger.afterwards(lambda: None),
    ):
        with pytest.raises(RuntimeError, match="decision"):
            call()
    assert cell.value == "before"


class _Refusing:
    """A sink that takes nothing while `full`."""

    def __init__(self) -> None:
        self.full = False
        self.batches: list[Batch] = []

    def append(self, batch: Batch) -> None:
        if self.full:
            raise StoreUnavailable("the disk is full")
        self.batches.append(batch)


def test_what_the_sink_refuses_has_not_happened() -> None:
    sink = _Refusing()
    session = ExecutionSession("e1", ledger=Ledger(sink=sink))
    heard: list[EventType] = []
    session.start_execution()
    session.ledger.listen(lambda event: heard.append(event.event_type))
    sink.full = True
    life = session.lifecycle
    with pytest.raises(StoreUnavailable):
        session.pause()
    assert (session.lifecycle, heard) == (life, [])
    sink.full = False
    session.pause()
    assert [event.sequence for batch in sink.batches for event in batch.events] == [1, 2, 3, 4, 5]
    assert heard == [EventType.STATUS_CHANGE, EventType.EXECUTION_PAUSED]


def test_a_decision_settles_before_it_is_heard_and_calls_out_when_the_lock_is_free() -> None:
    log = KeptLog()
    ledger = Ledger(sink=log)
    order: list[str] = []
    ledger.listen(lambda event: order.append("heard"))
    with ledger:
        ledger.record(EventType.INFO, task_id="t")
        ledger.afterwards(lambda: order.append("afterwards"))
        ledger.settling(lambda: order.append(f"settled {len(log.batches)}"))
    assert order == ["settled 1", "heard", "afterwards"]


def test_what_is_put_off_may_decide_again() -> None:
    session, log = running_session()
    with session.ledger as ledger:
        session.update_progress(1)
        ledger.afterwards(lambda: session.update_progress(2))
    assert session.progress.percentage == 2
    assert len(log.batches[-1].events) == len(log.batches[-2].events) == 1


def test_a_fact_outside_a_decision_or_by_a_listener_is_a_fault() -> None:
    ledger = Ledger()
    with pytest.raises(RuntimeError):
        ledger.record(EventType.INFO, task_id="t")

    def meddling(_event: ExecutionEvent) -> None:
        ledger.record(EventType.INFO, task_id="t")

    undo = ledger.listen(meddling)
    with pytest.raises(RuntimeError), ledger:
        ledger.record(EventType.INFO, task_id="t")
    undo()
    undo()
    with ledger:
        assert ledger.record(EventType.INFO, task_id="t").sequence == 2


def test_each_stream_is_counted_apart_and_goes_on_where_it_was() -> None:
    ledger = Ledger()
    ledger.resume_at("t", 7)
    ledger.resume_at("t", 3)
    with ledger:
        assert ledger.record(EventType.INFO, task_id="t").sequence == 8
        assert ledger.record(EventType.INFO, task_id="t", execution_id="e").sequence == 1
    assert (ledger.sequence("t"), ledger.sequence("e"), ledger.sequence("other")) == (8, 1, 0)
    ledger.forget("t")
    assert ledger.sequence("t") == 0


def test_a_value_that_is_not_stored_comes_back_too() -> None:
    log = KeptLog()
    ledger, cell = Ledger(sink=log), Cell(1)
    with undone(ledger):
        ledger.put(cell, 2)
    assert cell.value == 1
    with ledger:
        ledger.put(cell, 3)
    assert (cell.value, log.batches) == (3, [])


def test_a_row_alone_is_a_decision_too() -> None:
    log = KeptLog()
    task = Task("t1", sink=log)
    with task.ledger:
        task.remember_key("local", "create", "k1")
    assert [type(row).__name__ for row in log.batches[-1].rows] == ["IdempotencyRecord"]
    assert log.batches[-1].events == ()
