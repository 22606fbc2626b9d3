"""Tokens: linked, first reason wins, deadlines without threads, and the session that follows its token."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from deadlines import WITHIN
from model_harness import HandClock, running_session, undone

from vespera_exec.errors import CancellationException, InvalidInput
from vespera_exec.model.cancellation import CancellationToken
from vespera_exec.model.clock import Clock
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.execution import EnhancedTaskExecution
from vespera_exec.model.ledger import Ledger
from vespera_exec.model.session import ExecutionSession

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

S = ExecutionStatus


def test_the_first_reason_wins() -> None:
    token = CancellationToken("id")
    token.throw_if_cancelled()
    assert (token.token_id, token.is_cancelled, token.cancellation_reason) == ("id", False, "")
    assert token.cancel("one") is True
    assert token.cancel("two") is False
    assert (token.is_cancelled, token.cancellation_reason, token.timed_out) == (True, "one", False)
    assert token.cancelled_at is not None
    with pytest.raises(CancellationException, match="one") as raised:
        token.throw_if_cancelled()
    assert raised.value.reason == "one"
    assert "cancelled: 'one'" in repr(token)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy, copy.copy])
def test_a_token_cannot_be_copied_since_nobody_would_cancel_the_copy(copied: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="cannot be copied"):
        copied(CancellationToken())


def test_a_clock_that_waits_for_another_thread_holds_up_no_other_token() -> None:
    others: list[bool] = []

    def now() -> datetime:
        other = threading.Thread(target=lambda: others.append(CancellationToken().cancel()), daemon=True)
        other.start()
        other.join(WITHIN / 10)
        assert not other.is_alive()
        return hand.now()

    hand = HandClock()
    assert CancellationToken(clock=Clock(now=now, monotonic=hand.clock.monotonic)).cancel()
    assert others == [True]


def test_an_id_is_never_empty() -> None:
    token = CancellationToken("")
    assert len(token.token_id) == 36
    assert token.token_id == token.with_timeout(9).token_id


def test_the_state_of_a_token_cannot_be_written() -> None:
    token = CancellationToken()
    with pytest.raises(AttributeError):
        token.is_cancelled = True  # pyright: ignore[reportAttributeAccessIssue]


def test_a_token_is_hashable_and_equal_to_itself_only() -> None:
    first, second = CancellationToken("same"), CancellationToken("same")
    assert first != second
    assert {first, second, first} == {first, second}
    assert first.to_dict() == {
        "token_id": "same",
        "is_cancelled": False,
        "cancellation_reason": "",
        "cancelled_at": None,
        "timeout_seconds": None,
    }


def test_a_token_with_a_timeout_is_the_same_request_both_ways() -> None:
    for cancel_original in (True, False):
        token = CancellationToken()
        limited = token.with_timeout(60)
        assert limited.token_id == token.token_id
        (token if cancel_original else limited).cancel("stop")
        assert (token.cancellation_reason, limited.cancellation_reason) == ("stop", "stop")


def test_a_child_follows_its_parent_and_not_the_other_way() -> None:
    parent = CancellationToken()
    child, sibling = parent.child(), parent.child()
    child.cancel("alone")
    assert (parent.is_cancelled, sibling.is_cancelled) == (False, False)
    parent.cancel("all")
    assert (child.cancellation_reason, sibling.cancellation_reason) == ("alone", "all")
    assert parent.child().cancellation_reason == "all"


def test_a_deadline_is_judged_when_any_linked_token_is_read() -> None:
    hand = HandClock()
    token = CancellationToken(clock=hand.clock)
    child = token.child()
    limited = token.with_timeout(5)
    late = child.child()
    assert (limited.timeout_seconds, token.timeout_seconds) == (5, None)
    assert token.deadline == child.deadline == late.deadline == limited.deadline == hand.seconds + 5
    hand.pass_(4.9)
    assert not any(each.is_cancelled for each in (token, child, late, limited))
    hand.pass_(0.2)
    assert late.is_cancelled
    assert late.cancellation_reason == "Timeout after 5 seconds"
    assert token.timed_out
    assert limited.timed_out


def test_the_earliest_deadline_counts() -> None:
    hand = HandClock()
    token = CancellationToken(clock=hand.clock)
    token.with_timeout(3)
    longer = token.with_timeout(30)
    hand.pass_(4)
    assert longer.cancellation_reason == ""
    assert longer.is_cancelled
    assert longer.cancellation_reason == "Timeout after 3 seconds"


def test_no_time_is_over_at_once_and_negative_time_is_refused() -> None:
    token = CancellationToken()
    assert token.with_timeout(0).is_cancelled
    assert token.timed_out
    for value in (-1, float("nan")):
        with pytest.raises(InvalidInput):
            CancellationToken().with_timeout(value)


def test_a_hundred_timeouts_add_no_thread() -> None:
    before = threading.active_count()
    tokens = [CancellationToken().with_timeout(3600) for _ in range(100)]
    assert threading.active_count() == before
    assert not any(token.is_cancelled for token in tokens)


def test_listeners_hear_once_also_when_one_of_them_fails(caplog: pytest.LogCaptureFixture) -> None:
    token = CancellationToken()
    heard: list[str] = []

    def broken(_token: CancellationToken) -> None:
        raise ZeroDivisionError

    token.on_cancel(broken)
    undo = token.on_cancel(lambda _: heard.append("undone"))
    token.on_cancel(lambda each: heard.append(each.cancellation_reason))
    undo()
    undo()
    token.cancel("x")
    token.cancel("y")
    token.on_cancel(lambda _: heard.append("late"))()
    assert heard == ["x", "late"]
    assert "A listener of the cancellation token" in caplog.text


def test_cancelling_the_token_cancels_its_session() -> None:
    session, _ = running_session()
    session.cancellation_token = token = CancellationToken()
    token.cancel("by hand")
    assert (session.status, session.lifecycle.cancellation_reason) == (S.CANCELLING, "by hand")
    assert session.is_cancellation_requested


@pytest.mark.parametrize("how", ["request", "update_status"])
def test_cancelling_the_session_cancels_its_token(how: str) -> None:
    session, _ = running_session()
    session.cancellation_token = token = CancellationToken()
    if how == "request":
        session.request_cancellation("please")
    else:
        session.update_status(S.CANCELLING, "please")
    assert token.cancellation_reason == "please"


def test_the_token_hears_nothing_of_a_request_that_is_undone() -> None:
    session, log = running_session()
    session.cancellation_token = token = CancellationToken()
    batches = len(log.batches)
    with undone(session.ledger):
        session.request_cancellation("please")
    assert (token.is_cancelled, session.status, len(log.batches)) == (False, S.RUNNING, batches)


def test_a_deadline_ends_the_session_as_timed_out_when_it_is_read() -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    token = CancellationToken(clock=hand.clock)
    session.cancellation_token = token.with_timeout(5)
    hand.pass_(6)
    assert session.lifecycle.status is S.RUNNING
    assert session.get_execution_summary()["status"] == "timed_out"
    assert session.status is S.TIMED_OUT
    assert session.error_context["message"] == "Timeout after 5 seconds"


def test_a_timeout_on_the_sessions_own_token_is_seen_without_the_limited_one() -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    session.cancellation_token = CancellationToken(clock=hand.clock)
    session.cancellation_token.with_timeout(5)
    hand.pass_(6)
    assert session.status is S.TIMED_OUT


@pytest.mark.parametrize("status", [S.COMPLETING, S.CANCELLING])
def test_a_deadline_that_passes_while_it_ends_changes_nothing(status: S) -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    session.update_status(status)
    session.cancellation_token = CancellationToken(clock=hand.clock).with_timeout(5)
    hand.pass_(6)
    assert session.status is status


def test_a_token_that_was_cancelled_before_the_start_stops_the_session_when_it_starts() -> None:
    token = CancellationToken()
    token.cancel("never mind")
    session = ExecutionSession(cancellation_token=token)
    assert session.status is S.IDLE
    session.start_execution()
    assert session.status is S.CANCELLING
    waiting = ExecutionSession(cancellation_token=token)
    waiting.enqueue()
    assert waiting.status is S.CANCELLED


def test_a_deadline_before_the_start_is_heard_at_the_start() -> None:
    hand = HandClock()
    token = CancellationToken(clock=hand.clock).with_timeout(1)
    hand.pass_(2)
    session = ExecutionSession(cancellation_token=token, ledger=Ledger(clock=hand.clock))
    assert session.status is S.IDLE
    session.start_execution()
    assert session.status is S.TIMED_OUT


def test_another_token_takes_the_place_of_the_first() -> None:
    session, _ = running_session()
    first, second = CancellationToken(), CancellationToken()
    session.cancellation_token = first
    session.cancellation_token = second
    first.cancel("old")
    assert session.status is S.RUNNING
    assert session.cancellation_token is second
    session.cancellation_token = None
    second.cancel("old too")
    assert session.status is S.RUNNING


@pytest.mark.parametrize("made_before", [True, False])
def test_the_global_token_reaches_the_session_that_runs_and_those_to_come(made_before: bool) -> None:
    execution = EnhancedTaskExecution("r")
    if made_before:
        assert not execution.global_cancellation_token.is_cancelled
    session = execution.start_new_session("t1")
    execution.global_cancellation_token.cancel("shutdown")
    assert (session.status, session.lifecycle.cancellation_reason) == (S.CANCELLING, "shutdown")
    session.end_cancelled()
    assert execution.start_new_session("t1").status is S.CANCELLING


def test_the_deadline_of_a_global_token_made_later_counts_for_the_running_session() -> None:
    hand = HandClock()
    execution = EnhancedTaskExecution("r", clock=hand.clock)
    session = execution.start_new_session("t1")
    execution.global_cancellation_token.with_timeout(5)
    hand.pass_(6)
    assert session.status is S.TIMED_OUT


def test_a_given_global_token_is_used_and_keeps_no_ended_session_alive() -> None:
    token = CancellationToken()
    execution = EnhancedTaskExecution("r", global_cancellation_token=token, max_sessions_in_memory=1)
    assert execution.global_cancellation_token is token
    first = weakref.ref(execution.start_new_session("t1"))
    execution.complete_execution()
    execution.start_new_session("t1")
    execution.complete_execution()
    gc.collect()
    assert first() is None


def test_a_token_that_follows_already_is_adopted_once() -> None:
    parent = CancellationToken()
    child = parent.child()
    parent.adopt(child)
    parent.adopt(parent)
    limited = CancellationToken().with_timeout(60)
    parent.adopt(limited)
    parent.cancel("all")
    assert (child.cancellation_reason, limited.cancellation_reason) == ("all", "all")
    free = CancellationToken()
    parent.adopt(free)
    assert free.cancellation_reason == "all"


def test_a_cancelled_session_costs_no_retry_and_is_no_failure() -> None:
    execution = EnhancedTaskExecution("r")
    session = execution.start_new_session("t1")
    execution.request_cancellation("stop")
    session.end_cancelled()
    assert session.status is S.CANCELLED
    assert (execution.retry_count, execution.last_error) == (0, None)
    assert execution.get_performance_metrics()["cancelled"] == 1
    assert execution.get_performance_metrics()["failed"] == 0


def test_a_listener_that_was_added_twice_is_forgotten_once() -> None:
    token, heard = CancellationToken(), list[str]()

    def listener(each: CancellationToken) -> None:
        heard.append(each.cancellation_reason)

    token.on_cancel(listener)
    undo = token.on_cancel(listener)
    undo()
    token.cancel("enough")
    assert heard == ["enough"]
