"""Every pair of statuses: what is allowed, what it announces, and that a refusal changes nothing."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from model_harness import HandClock, KeptLog, session_with_log

from vespera_exec.errors import InvalidTransitionError
from vespera_exec.model.enums import EventType as E
from vespera_exec.model.enums import ExecutionStatus as S
from vespera_exec.model.enums import TaskStatus as T
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from vespera_exec.model.session import ExecutionSession

# The table of the requirements, written out once more: (from, to) -> milestones after the status_change.
_FAILED, _TIMED_OUT = (E.EXECUTION_FAILED, E.ERROR), (E.EXECUTION_TIMEOUT,)
_RECOVER = (E.RECOVERY_INITIATED, E.ERROR)
TABLE: dict[tuple[S, S], tuple[E, ...]] = {
    (S.IDLE, S.PENDING): (E.EXECUTION_CREATED, E.EXECUTION_QUEUED),
    (S.IDLE, S.PREPARING): (E.EXECUTION_CREATED, E.EXECUTION_STARTED),
    (S.PENDING, S.PREPARING): (E.EXECUTION_STARTED,),
    (S.PENDING, S.CANCELLED): (E.EXECUTION_CANCELLED,),
    (S.PENDING, S.TIMED_OUT): _TIMED_OUT,
    (S.PENDING, S.FAILED): _FAILED,
    (S.PREPARING, S.VALIDATING): (),
    (S.PREPARING, S.RUNNING): (),
    (S.PREPARING, S.COMPLETING): (),
    (S.PREPARING, S.PAUSED): (E.EXECUTION_PAUSED,),
    (S.PREPARING, S.CANCELLING): (E.INFO,),
    (S.PREPARING, S.RECOVERING): _RECOVER,
    (S.PREPARING, S.FAILED): _FAILED,
    (S.PREPARING, S.TIMED_OUT): _TIMED_OUT,
    (S.VALIDATING, S.PREPARING): (),
    (S.VALIDATING, S.RUNNING): (),
    (S.VALIDATING, S.COMPLETING): (),
    (S.VALIDATING, S.PAUSED): (E.EXECUTION_PAUSED,),
    (S.VALIDATING, S.CANCELLING): (E.INFO,),
    (S.VALIDATING, S.RECOVERING): _RECOVER,
    (S.VALIDATING, S.FAILED): _FAILED,
    (S.VALIDATING, S.TIMED_OUT): _TIMED_OUT,
    (S.RUNNING, S.COMPLETING): (),
    (S.RUNNING, S.COMPLETED): (E.EXECUTION_COMPLETED,),
    (S.RUNNING, S.PAUSED): (E.EXECUTION_PAUSED,),
    (S.RUNNING, S.CANCELLING): (E.INFO,),
    (S.RUNNING, S.RECOVERING): _RECOVER,
    (S.RUNNING, S.FAILED): _FAILED,
    (S.RUNNING, S.TIMED_OUT): _TIMED_OUT,
    (S.PAUSED, S.RUNNING): (E.EXECUTION_RESUMED,),
    (S.PAUSED, S.RECOVERING): (E.RECOVERY_INITIATED,),
    (S.PAUSED, S.CANCELLING): (E.INFO,),
    (S.PAUSED, S.FAILED): _FAILED,
    (S.PAUSED, S.TIMED_OUT): _TIMED_OUT,
    (S.RECOVERING, S.PREPARING): (E.INFO,),
    (S.RECOVERING, S.VALIDATING): (E.INFO,),
    (S.RECOVERING, S.RUNNING): (E.INFO,),
    (S.RECOVERING, S.FAILED): _FAILED,
    (S.RECOVERING, S.CANCELLING): (E.INFO,),
    (S.RECOVERING, S.TIMED_OUT): _TIMED_OUT,
    (S.COMPLETING, S.COMPLETED): (E.EXECUTION_COMPLETED,),
    (S.COMPLETING, S.FAILED): _FAILED,
    (S.COMPLETING, S.TIMED_OUT): _TIMED_OUT,
    (S.CANCELLING, S.CANCELLED): (E.EXECUTION_CANCELLED,),
}

_ROUTES: dict[S, tuple[S, ...]] = {
    S.IDLE: (),
    S.PENDING: (S.PENDING,),
    S.PREPARING: (S.PREPARING,),
    S.VALIDATING: (S.PREPARING, S.VALIDATING),
    S.RUNNING: (S.PREPARING, S.RUNNING),
    S.PAUSED: (S.PREPARING, S.RUNNING, S.PAUSED),
    S.RECOVERING: (S.PREPARING, S.RUNNING, S.RECOVERING),
    S.COMPLETING: (S.PREPARING, S.COMPLETING),
    S.CANCELLING: (S.PREPARING, S.CANCELLING),
    S.COMPLETED: (S.PREPARING, S.RUNNING, S.COMPLETED),
    S.FAILED: (S.PREPARING, S.FAILED),
    S.CANCELLED: (S.PREPARING, S.CANCELLING, S.CANCELLED),
    S.TIMED_OUT: (S.PREPARING, S.TIMED_OUT),
}


def _in_status(status: S) -> tuple[ExecutionSession, KeptLog]:
    session, log = session_with_log()
    for each in _ROUTES[status]:
        session.update_status(each, "on the way")
    assert session.status is status
    return session, log


def test_there_are_thirteen_statuses_and_the_routes_reach_all_of_them() -> None:
    assert len(S) == 13
    assert set(_ROUTES) == set(S)


@pytest.mark.parametrize(("old", "new"), list(TABLE), ids=lambda each: each.value)
def test_an_allowed_change_records_itself_and_its_milestones_in_one_decision(old: S, new: S) -> None:
    session, log = _in_status(old)
    before = len(log.batches)
    assert session.update_status(new, "because") is True
    assert session.status is new
    (batch,) = log.batches[before:]
    assert tuple(event.event_type for event in batch.events) == (E.STATUS_CHANGE, *TABLE[old, new])
    change = batch.events[0]
    assert (change.old_status, change.new_status, change.message) == (old, new, "because")
    assert [event.sequence for event in log.of("e1")] == list(range(1, len(log.of("e1")) + 1))


@pytest.mark.promise("one_end")
@pytest.mark.parametrize(
    ("old", "new"),
    [pair for pair in itertools.product(S, S) if pair not in TABLE and pair[0] is not pair[1]],
    ids=lambda each: each.value,
)
def test_a_change_that_the_table_does_not_list_is_refused_and_changes_nothing(old: S, new: S) -> None:
    session, log = _in_status(old)
    life, progress, batches = session.lifecycle, session.progress, len(log.batches)
    with pytest.raises(InvalidTransitionError) as refused:
        session.update_status(new, "please")
    assert set(refused.value.allowed) == {each.value for each in S if (old, each) in TABLE}
    assert (session.lifecycle, session.progress) == (life, progress)
    assert len(log.batches) == batches


@pytest.mark.parametrize("status", S, ids=lambda each: each.value)
def test_a_change_to_the_same_status_is_no_event(status: S) -> None:
    session, log = _in_status(status)
    batches = len(log.batches)
    assert session.update_status(status, "again") is False
    assert len(log.batches) == batches


@pytest.mark.parametrize("origin", [S.PREPARING, S.VALIDATING, S.RUNNING], ids=lambda each: each.value)
def test_paused_work_goes_back_only_to_where_it_was_paused(origin: S) -> None:
    session, _ = _in_status(origin)
    session.pause("lunch")
    for other in {S.PREPARING, S.VALIDATING, S.RUNNING} - {origin}:
        with pytest.raises(InvalidTransitionError):
            session.update_status(other)
    assert session.lifecycle.paused_from is origin
    session.resume()
    assert session.status is origin
    assert session.lifecycle.paused_from is None


@pytest.mark.parametrize("status", S, ids=lambda each: each.value)
def test_the_views_of_a_status_agree(status: S) -> None:
    assert status.is_terminal == (status.value in ("completed", "failed", "cancelled", "timed_out"))
    assert status.is_active == (not status.is_terminal and status is not S.IDLE)
    expected = {
        "idle": "pending",
        "pending": "pending",
        "paused": "paused",
        "completed": "completed",
        "failed": "failed",
        "timed_out": "failed",
        "cancelled": "cancelled",
    }
    assert status.lifecycle == expected.get(status.value, "running")


_TASK_TABLE = {
    (T.TODO, T.DOING),
    (T.TODO, T.CANCELLED),
    (T.TODO, T.DONE),
    (T.DOING, T.DONE),
    (T.DOING, T.TODO),
    (T.DOING, T.FAILED),
    (T.DOING, T.CANCELLED),
    (T.FAILED, T.TODO),
    (T.CANCELLED, T.TODO),
    (T.DONE, T.TODO),
}
_TASK_ROUTES: dict[T, tuple[T, ...]] = {
    T.TODO: (),
    T.DOING: (T.DOING,),
    T.DONE: (T.DONE,),
    T.FAILED: (T.DOING, T.FAILED),
    T.CANCELLED: (T.CANCELLED,),
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(T, T)), ids=lambda each: each.value)
def test_a_task_changes_its_status_only_as_its_table_allows(old: T, new: T) -> None:
    log = KeptLog()
    task = Task("t1", "title", sink=log, clock=HandClock().clock)
    for each in _TASK_ROUTES[old]:
        task.update_status(each)
    batches = len(log.batches)
    if old is new:
        assert task.update_status(new) is False
        assert len(log.batches) == batches
    elif (old, new) in _TASK_TABLE:
        assert task.update_status(new, "asked for") is True
        assert task.status is new
        (event,) = log.batches[-1].events
        assert event.details == {"scope": "task", "old": old.value, "new": new.value}
        assert (event.execution_id, event.stream, event.message) == (None, "t1", "asked for")
    else:
        with pytest.raises(InvalidTransitionError):
            task.update_status(new)
        assert task.status is old
        assert len(log.batches) == batches
