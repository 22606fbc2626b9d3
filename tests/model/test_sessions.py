"""One session: start, phases, pause, recovery, every way to end, and the way back from a store."""

from __future__ import annotations

import copy
import json
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from model_harness import START, HandClock, running_session, session_with_log

from vespera_exec.errors import ExecutionError, InvalidInput, InvalidTransitionError
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus, ResourceType
from vespera_exec.model.ledger import Ledger, ResultRecord
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.session import ExecutionSession

if TYPE_CHECKING:
    from collections.abc import Callable

S = ExecutionStatus
P = ExecutionPhase
E = EventType
_NO_NUMBER = "invalid literal for int() with base 10: 'no such number'"


def test_a_new_session_is_idle_and_has_recorded_nothing() -> None:
    session, log = session_with_log()
    assert session.status is S.IDLE
    assert session.execution_id == session.session_id == session.run_id == "e1"
    assert (session.task_id, session.role_name, session.attempt) == ("t1", "builder", 1)
    assert (session.phase_history, session.current_phase, session.status_events) == ([], None, [])
    assert (session.error_context, session.recovery_attempts, session.max_recovery_attempts) == ({}, 0, 3)
    assert log.batches == []
    assert repr(session) == "<ExecutionSession e1 idle>"


def test_starting_keeps_the_role_unless_another_is_named() -> None:
    session, _ = session_with_log("builder")
    session.start_execution()
    assert session.role_name == "builder"
    other, log = session_with_log("builder")
    other.enqueue()
    other.start_execution("tester")
    assert other.role_name == log.lives["e1"].role_name == "tester"


def test_a_session_starts_once() -> None:
    session, log = running_session()
    started, batches = session.lifecycle.started_at, len(log.batches)
    with pytest.raises(InvalidTransitionError):
        session.start_execution()
    assert (session.lifecycle.started_at, session.status, len(log.batches)) == (started, S.RUNNING, batches)


def test_queueing_keeps_what_the_queue_needs() -> None:
    session, _ = session_with_log()
    session.enqueue(
        run_id="r0", attempt=2, parent_execution_id="e0", priority=1, not_before=START + timedelta(minutes=1), owner="o"
    )
    life = session.lifecycle
    assert (life.run_id, life.attempt, life.parent_execution_id, life.priority) == ("r0", 2, "e0", 1)
    assert (life.not_before, life.owner, life.generation) == (START + timedelta(minutes=1), "o", 1)
    assert (life.created_at, life.queued_at, life.started_at) == (START, START, None)


def test_phases_are_records_with_a_beginning_an_end_and_an_outcome() -> None:
    hand = HandClock()
    session, log = running_session(hand=hand)
    session.enter_phase(P.VALIDATION)
    hand.pass_(2)
    session.enter_phase(P.EXECUTION, "to work")
    session.enter_phase(P.EXECUTION)
    hand.pass_(3)
    session.fail("x")
    first, second = session.phase_history
    assert (first.phase, first.entered_at) == first[:2] == (P.VALIDATION, START)
    assert (first.exited_at, first.duration_seconds, first.outcome) == (START + timedelta(seconds=2), 2, "completed")
    assert (second.phase, second.duration_seconds, second.outcome) == (P.EXECUTION, 3, "failed")
    assert session.current_phase is None
    changes = [event for event in log.events if event.event_type is E.PHASE_CHANGE]
    assert [event.message for event in changes] == ["Entered phase: validation", "to work"]


def test_error_handling_after_a_phase_says_that_it_failed() -> None:
    session, _ = running_session()
    session.enter_phase(P.EXECUTION)
    session.enter_phase(P.ERROR_HANDLING)
    assert [record.outcome for record in session.phase_history] == ["failed", None]


def test_one_terminal_transition_and_no_more() -> None:
    endings: dict[S, Callable[[ExecutionSession], bool]] = {
        S.COMPLETED: lambda session: session.complete("done"),
        S.FAILED: lambda session: session.fail("x"),
        S.TIMED_OUT: lambda session: session.time_out(),
    }
    for status, end in endings.items():
        session, log = running_session()
        assert end(session) is True
        batches = len(log.batches)
        for other in endings.values():
            assert other(session) is False
        assert session.request_cancellation("late") is False
        assert session.status is status
        assert len(log.batches) == batches
        terminal = [event for event in log.events if event.new_status is not None and event.new_status.is_terminal]
        assert len(terminal) == 1


def test_completing_a_paused_session_resumes_it_in_the_same_decision() -> None:
    session, log = running_session()
    session.pause()
    session.complete("done", outcome={"n": 1}, result=ResultRecord(execution_id="e1", body=b"{}"))
    batch = log.batches[-1]
    changes = [event.new_status for event in batch.events if event.event_type is E.STATUS_CHANGE]
    assert changes == [S.RUNNING, S.COMPLETING, S.COMPLETED]
    assert ResultRecord(execution_id="e1", body=b"{}") in batch.rows
    assert session.lifecycle.outcome == {"n": 1}


def test_a_refused_completion_leaves_nothing_behind() -> None:
    session, log = session_with_log()
    session.enqueue()
    life, batches = session.lifecycle, len(log.batches)
    with pytest.raises(InvalidTransitionError):
        session.complete()
    assert (session.lifecycle, len(log.batches)) == (life, batches)


def test_a_failure_keeps_what_happened_and_where() -> None:
    session, _ = running_session()
    session.enter_phase(P.EXECUTION)
    try:
        int("no such number")
    except ValueError as error:
        session.fail(error)
    context = session.error_context
    assert (context["type"], context["message"], context["phase"]) == ("ValueError", _NO_NUMBER, "execution")
    assert (context["code"], context["recoverable"]) == ("EXECUTION_FAILED", True)
    assert _NO_NUMBER in context["traceback"]
    assert session.get_execution_summary()["error_context"] == context
    assert session.lifecycle.status_message == _NO_NUMBER


def test_a_failure_of_the_work_keeps_its_own_code_and_context() -> None:
    session, _ = running_session()
    session.fail(ExecutionError("disk", code="DISK_FULL", recoverable=False, context={"left": {1}}))
    assert session.error_context == {
        "code": "DISK_FULL",
        "type": "ExecutionError",
        "message": "disk",
        "phase": None,
        "recoverable": False,
        "context": {"left": [1]},
    }


def test_an_exception_without_words_or_with_a_strange_code_still_has_a_record() -> None:
    session, _ = running_session()
    session.fail(SystemExit(3))
    assert (session.error_context["code"], session.error_context["message"]) == ("EXECUTION_FAILED", "3")
    other, _ = running_session()
    other.fail(KeyError())
    assert other.error_context["message"] == "KeyError"


@pytest.mark.parametrize(("status", "code"), [(S.FAILED, "EXECUTION_FAILED"), (S.TIMED_OUT, "TIMEOUT")])
def test_a_failure_by_update_status_has_an_error_context_too(status: S, code: str) -> None:
    session, _ = running_session()
    session.update_status(status, "why")
    assert (session.error_context["code"], session.error_context["message"]) == (code, "why")


def test_a_timeout_is_not_a_cancellation() -> None:
    session, log = running_session()
    session.time_out("too long")
    assert session.status is S.TIMED_OUT
    assert log.types("e1")[-2:] == [E.STATUS_CHANGE, E.EXECUTION_TIMEOUT]
    assert session.error_context["code"] == "TIMEOUT"
    assert not session.is_cancellation_requested


_LATE_ENDS: dict[str, Callable[[ExecutionSession], bool]] = {
    "finished_anyway": lambda session: session.complete(outcome={"n": 1}),
    "cleanup_error": lambda session: session.fail("cleanup broke"),
    "t": lambda session: session.time_out(outcome={"t": 1}),
}


@pytest.mark.parametrize("key", list(_LATE_ENDS))
def test_a_requested_cancel_wins_over_a_late_end(key: str) -> None:
    finish = _LATE_ENDS[key]
    session, _ = running_session()
    assert session.request_cancellation("stop") is True
    assert finish(session) is True
    assert session.status is S.CANCELLED
    assert key in session.lifecycle.outcome
    assert session.lifecycle.cancellation_reason == "stop"
    assert session.error_context == {}


def test_a_second_request_to_cancel_is_no_event_and_keeps_the_first_reason() -> None:
    session, log = running_session()
    assert session.request_cancellation("first") is True
    batches = len(log.batches)
    assert session.request_cancellation("second") is True
    assert len(log.batches) == batches
    assert session.lifecycle.cancellation_reason == "first"
    assert log.events[-1].message == "Cancellation requested: first"


def test_cancelling_what_waits_ends_it_at_once_and_what_completes_is_too_late() -> None:
    waiting, log = session_with_log()
    assert waiting.request_cancellation("early") is False
    waiting.enqueue()
    assert waiting.request_cancellation("not now") is True
    assert (waiting.status, waiting.lifecycle.cancellation_reason) == (S.CANCELLED, "not now")
    assert log.types("e1")[-2:] == [E.STATUS_CHANGE, E.EXECUTION_CANCELLED]
    completing, _ = running_session()
    completing.update_status(S.COMPLETING)
    assert completing.request_cancellation("late") is False
    assert completing.status is S.COMPLETING


def test_recovery_is_counted_and_bounded() -> None:
    session, log = running_session()
    for attempt in (1, 2, 3):
        session.recover("fault", details={"owner": "dead"})
        assert session.recovery_attempts == attempt
        session.update_status(S.RUNNING)
    batches = len(log.batches)
    with pytest.raises(InvalidTransitionError):
        session.recover("fault")
    assert len(log.batches) == batches
    assert log.types("e1").count(E.RECOVERY_INITIATED) == 3
    assert any(event.details.get("owner") == "dead" for event in log.events)


def test_resuming_what_is_not_paused_is_refused() -> None:
    session, _ = running_session()
    with pytest.raises(InvalidTransitionError):
        session.resume()


def test_usage_keeps_the_last_samples_and_the_peaks() -> None:
    session = ExecutionSession(max_samples=3)
    session.start_execution()
    for value in (5.0, 9.0, 1.0, 2.0):
        session.record_resource_usage(ResourceType.CPU_USAGE, value)
    with pytest.raises(InvalidInput):
        session.record_resource_usage(ResourceType.CPU_USAGE, float("nan"))
    assert [value for _, value in session.resource_metrics[ResourceType.CPU_USAGE]] == [9.0, 1.0, 2.0]
    assert session.peak_resource_usage == {ResourceType.CPU_USAGE: 9.0}
    shown = session.get_execution_summary()["resource_usage"]
    assert shown == {"cpu_usage": {"current": 2.0, "peak": 9.0, "unit": "percent of one core"}}
    session.update_status(S.RUNNING)
    session.complete()
    assert session.lifecycle.outcome["peaks"] == {"cpu_usage": 9.0}


def test_the_summary_has_the_promised_keys_and_is_json() -> None:
    session, _ = running_session()
    session.update_progress(10, message="on")
    summary = session.get_execution_summary()
    assert json.loads(json.dumps(summary)) == summary
    assert {
        "session_id",
        "task_id",
        "status",
        "current_phase",
        "overall_progress",
        "time_tracking",
        "resource_usage",
        "error_context",
    } <= set(summary)
    assert summary["overall_progress"] == {"percentage": 10.0, "message": "on"}
    assert set(summary["time_tracking"]) == {"elapsed_seconds", "estimated_completion", "eta_confidence"}
    assert summary["error_context"] is None


def test_a_session_comes_back_from_its_dictionary_and_goes_on() -> None:
    session, log = running_session()
    session.enter_phase(P.EXECUTION)
    session.record_checkpoint({"page": 3})
    session.update_progress(40)
    stored = json.loads(json.dumps(session.to_dict()))
    again = ExecutionSession.from_dict(stored, ledger=Ledger(sink=log))
    assert (again.lifecycle, again.progress) == (session.lifecycle, session.progress)
    last = log.events[-1].sequence
    again.update_progress(50)
    assert log.events[-1].sequence == last + 1
    assert again.complete() is True


def test_a_restored_session_that_has_ended_hears_nothing_more() -> None:
    session, _ = running_session()
    session.complete()
    ledger = Ledger()
    again = ExecutionSession.restored(session.lifecycle, session.progress, ledger=ledger)
    other = ExecutionSession("e2", "t1", ledger=ledger)
    other.start_execution()
    assert again.status is S.COMPLETED
    assert again.status_events == []
    assert again.complete() is False


def test_a_life_that_an_older_version_stored_still_loads() -> None:
    life = Lifecycle.from_dict({"execution_id": "e", "status": "running", "phases": None, "unknown": 1})
    assert (life.status, life.attempt, life.phases, life.priority) == (S.RUNNING, 1, (), 5)
    with_phase = Lifecycle.from_dict(
        {"execution_id": "e", "phases": [{"phase": "setup", "entered_at": START.isoformat()}]}
    )
    assert with_phase.phases[0].outcome is None


def test_the_values_of_a_session_can_be_copied() -> None:
    session, _ = running_session()
    session.update_progress(10)
    assert copy.deepcopy(session.lifecycle) == session.lifecycle
    assert copy.deepcopy(session.progress) == session.progress
    assert copy.deepcopy(session.status_events) == session.status_events
