"""A task and its executions: one after the other, counted, retried, superseded; and the legacy record."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from datetime import timedelta
from typing import Any, Literal

import pytest
from model_harness import START, HandClock, KeptLog

from vespera_exec.errors import AlreadyExecuting, InvalidInput, InvalidProgress, InvalidTransitionError, NotExecuting
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus, TaskStatus
from vespera_exec.model.execution import EnhancedTaskExecution
from vespera_exec.model.legacy import TaskExecution
from vespera_exec.model.record import TaskRecord
from vespera_exec.model.replay import replayed
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.task import Task

S = ExecutionStatus


def _ended(task: Task, how: Literal["complete", "fail", "time out", "cancel"]) -> ExecutionSession:
    session = task.start_execution("r")
    match how:
        case "complete":
            task.complete_execution(True, "ok")
        case "fail":
            task.complete_execution(False, error="broken")
        case "time out":
            session.time_out("too long")
        case "cancel":
            session.request_cancellation("stop")
            session.end_cancelled()
    return session


# the legacy record


def test_the_legacy_record_has_its_fields_in_their_order() -> None:
    names = [field.name for field in dataclasses.fields(TaskExecution)]
    assert names == [
        "assigned_role",
        "execution_history",
        "current_execution_id",
        "retry_count",
        "max_retries",
        "last_error",
        "execution_context",
    ]
    for kind in (TaskExecution, EnhancedTaskExecution):
        made = kind("r", [{"a": 1}], "e", 2, 5, "err", {"k": "v"})
        assert [getattr(made, name) for name in names] == ["r", [{"a": 1}], "e", 2, 5, "err", {"k": "v"}]
        empty = kind()
        assert [getattr(empty, name) for name in names] == [None, [], None, 0, 3, None, {}]
    assert TaskExecution("r") == TaskExecution("r")


def test_the_legacy_signatures_are_kept() -> None:
    expected = {
        "add_execution_record": ["self", "role_name", "status", "output", "error", "metadata"],
        "can_retry": ["self"],
        "reset_retries": ["self"],
        "update_progress": ["self", "progress", "message", "phase"],
        "complete_execution": ["self", "success", "output", "error"],
        "request_cancellation": ["self", "reason"],
        "add_status_callback": ["self", "callback"],
        "get_current_status": ["self"],
        "get_performance_metrics": ["self"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(EnhancedTaskExecution, name)).parameters) == parameters
    start = list(inspect.signature(EnhancedTaskExecution.start_new_session).parameters)
    assert start[:4] == ["self", "task_id", "role_name", "enable_monitoring"]
    assert isinstance(EnhancedTaskExecution(), TaskExecution)


@pytest.mark.parametrize("kind", [TaskExecution, EnhancedTaskExecution])
def test_a_legacy_record_counts_a_failure_with_an_error_and_nothing_else(kind: type[TaskExecution]) -> None:
    execution = kind(max_retries=2)
    execution.add_execution_record("r", "failed")
    execution.add_execution_record("r", "completed", "out", None, {"m": 1})
    assert (execution.retry_count, execution.last_error, execution.can_retry()) == (0, None, True)
    execution.add_execution_record("r", "failed", error="one")
    execution.add_execution_record("r", "failed", error="two")
    assert (execution.retry_count, execution.last_error, execution.can_retry()) == (2, "two", False)
    execution.reset_retries()
    assert (execution.retry_count, execution.last_error, execution.can_retry()) == (0, None, True)
    record = execution.execution_history[1]
    assert {name: record[name] for name in ("role_name", "status", "output", "error", "metadata")} == {
        "role_name": "r",
        "status": "completed",
        "output": "out",
        "error": None,
        "metadata": {"m": 1},
    }
    assert set(record) == {"execution_id", "timestamp", "role_name", "status", "output", "error", "metadata"}


@pytest.mark.parametrize("kind", [TaskExecution, EnhancedTaskExecution])
def test_an_execution_survives_a_round_trip_and_old_records_load(kind: type[TaskExecution]) -> None:
    execution = kind("r", execution_context={"a": 1})
    execution.add_execution_record("r", "failed", error="x")
    again = kind.from_dict(json.loads(json.dumps(execution.to_dict())))
    assert again.to_dict() == execution.to_dict()
    old = kind.from_dict({"assigned_role": "r", "retry_count": 1, "last_error": None, "from_the_future": 1})
    assert (old.assigned_role, old.retry_count, old.max_retries, old.execution_history) == ("r", 1, 3, [])


def test_an_execution_that_runs_survives_a_round_trip() -> None:
    execution = EnhancedTaskExecution("r")
    session = execution.start_new_session("t1")
    session.update_progress(30)
    again = EnhancedTaskExecution.from_dict(json.loads(json.dumps(execution.to_dict())))
    assert again.record == execution.record
    assert again.current_session is not None
    assert again.current_session.progress == session.progress
    assert again.complete_execution(True, "done") is True
    assert again.get_performance_metrics()["completed"] == 1


def test_assigning_a_legacy_field_records_an_event() -> None:
    log = KeptLog()
    task = Task("t1", sink=log)
    task.execution.max_retries = 7
    assert (task.execution.max_retries, task.record.max_retries) == (7, 7)
    assert log.events[-1].event_type is EventType.TASK_UPDATED
    assert log.events[-1].details == {"fields": {"max_retries": 7}}
    batches = len(log.batches)
    task.execution.max_retries = 7
    assert len(log.batches) == batches
    assert log.tasks["t1"] == task.record


def test_the_execution_context_can_be_changed_in_place() -> None:
    log = KeptLog()
    execution = Task("t1", sink=log).execution
    execution.execution_context["a"] = 1
    execution.execution_context.update({"b": 2, "c": 3})
    assert execution.execution_context.setdefault("d", 4) == 4
    assert execution.execution_context.setdefault("a", 9) == 1
    assert execution.execution_context.pop("b") == 2
    assert execution.execution_context.pop("zzz", None) is None
    del execution.execution_context["c"]
    execution.execution_context |= {"e": [5]}
    assert log.tasks["t1"].execution_context == execution.execution_context == {"a": 1, "d": 4, "e": [5]}
    taken = copy.deepcopy(execution.execution_context)
    taken["alone"] = 1
    assert dataclasses.asdict(execution)["execution_context"] == {"a": 1, "d": 4, "e": [5]}
    assert execution.execution_context.popitem() == ("e", [5])
    execution.execution_context.clear()
    assert execution.execution_context == {}


def test_only_the_tasks_own_fields_can_be_changed() -> None:
    execution = EnhancedTaskExecution()
    for name in ("status", "sequence", "nonsense"):
        with pytest.raises(InvalidInput):
            execution.change(**{name: 1})


# sessions, one after the other


def test_a_session_keeps_the_role_that_was_assigned() -> None:
    execution = EnhancedTaskExecution("builder")
    session = execution.start_new_session("t1")
    assert (session.role_name, execution.assigned_role) == ("builder", "builder")
    assert session.cancellation_token is not None
    assert execution.current_execution_id == session.session_id
    execution.complete_execution()
    execution.start_new_session("t1", "tester")
    assert execution.assigned_role == "tester"


def test_a_second_start_is_refused_and_changes_nothing() -> None:
    log = KeptLog()
    task = Task("t1", role="r", sink=log)
    session = task.start_execution()
    record, batches = task.record, len(log.batches)
    for again in (task.start_execution, task.enqueue_execution):
        with pytest.raises(AlreadyExecuting):
            again()
    assert (task.record, len(log.batches), task.execution.current_session) == (record, batches, session)


def test_superseding_cancels_the_first_session() -> None:
    execution = EnhancedTaskExecution("r")
    first = execution.start_new_session("t1")
    second = execution.start_new_session("t1", supersede=True)
    assert (first.status, first.lifecycle.cancellation_reason) == (S.CANCELLED, "Superseded by a new execution")
    assert first.is_cancellation_requested
    assert execution.current_session is second
    second.update_status(S.COMPLETING)
    with pytest.raises(AlreadyExecuting):
        execution.start_new_session("t1", supersede=True)
    assert second.status is S.COMPLETING


def test_monitoring_is_asked_for_only_where_both_want_it() -> None:
    execution = EnhancedTaskExecution("r")
    assert execution.start_new_session("t1", None, False).monitoring_enabled is False
    execution.complete_execution()
    assert execution.start_new_session("t1").monitoring_enabled is True
    silent = EnhancedTaskExecution("r", monitoring_enabled=False)
    assert silent.start_new_session("t1").monitoring_enabled is False


def test_the_last_ten_sessions_are_kept_once_each() -> None:
    execution = EnhancedTaskExecution("r")
    ids: list[str] = []
    for _ in range(12):
        ids.append(execution.start_new_session("t1").session_id)
        execution.complete_execution()
    assert [each.session_id for each in execution.session_history] == ids[-10:]
    assert execution.get_performance_metrics()["total_executions"] == 12
    assert [each["execution_id"] for each in execution.execution_history] == ids


def test_the_history_is_bounded_and_of_one_shape() -> None:
    execution = EnhancedTaskExecution("r")
    execution.add_execution_record("r", "completed")
    for _ in range(120):
        execution.start_new_session("t1")
        execution.complete_execution(True, "out")
    assert len(execution.execution_history) == 100
    record = execution.execution_history[-1]
    assert (record["output"], record["error"], record["metadata"], record["status"]) == ("out", None, {}, "completed")
    assert record["session_summary"]["overall_progress"]["percentage"] == 100


def test_after_the_end_the_outcome_can_be_read() -> None:
    task = Task("t1")
    idle = task.get_execution_status()
    assert (idle["executing"], idle["status"], idle["session_id"], idle["session"]) == (False, "idle", None, None)
    session = _ended(task, "fail")
    status = task.get_execution_status()
    assert (status["executing"], status["status"], status["lifecycle"]) == (False, "failed", "failed")
    assert status["session_id"] == session.session_id == status["legacy_compatibility"]["execution_id"]
    assert status["session"]["error_context"]["message"] == "broken"
    assert status["legacy_compatibility"]["last_error"] == "broken"
    assert task.execution.current_execution_id is None
    assert task.record.last_execution_id == session.session_id
    running = task.start_execution()
    assert task.get_execution_status()["session_id"] == running.session_id
    assert set(task.get_execution_status()) == set(idle)


def test_without_a_session_nothing_is_claimed() -> None:
    task = Task("t1")
    assert task.complete_execution() is False
    assert task.execution.request_cancellation() is False
    assert task.status is TaskStatus.TODO
    for call in (lambda: task.update_execution_progress(5), lambda: task.execution.update_progress(5)):
        with pytest.raises(NotExecuting):
            call()
    with pytest.raises(NotExecuting):
        task.execution.fail_for_retry("x", retry_at=START)


def test_a_refused_completion_does_not_move_the_task() -> None:
    task = Task("t1", role="r")
    task.enqueue_execution()
    with pytest.raises(InvalidTransitionError):
        task.complete_execution()
    assert task.status is TaskStatus.DOING
    assert task.execution.is_executing


def test_the_error_is_the_message_of_a_failure_before_its_output() -> None:
    task = Task("t1")
    session = task.start_execution("r")
    task.complete_execution(False, "some output", "the error")
    assert session.lifecycle.status_message == "the error"
    assert session.lifecycle.outcome["output"] == "some output"
    other = task.start_execution()
    task.complete_execution(False, "only output")
    assert other.lifecycle.status_message == "only output"
    third = task.start_execution()
    task.complete_execution(False)
    assert third.lifecycle.status_message == "Execution failed"


def test_totals_count_everything_and_cancelled_ones_apart() -> None:
    hand = HandClock()
    task = Task("t1", max_retries=9, clock=hand.clock)
    nothing = task.execution.get_performance_metrics()
    assert (nothing["total_executions"], nothing["success_rate"], nothing["average_duration_seconds"]) == (
        0,
        None,
        None,
    )
    for how in ("complete", "fail", "time out", "cancel", "complete"):
        _ended(task, how)
    metrics = task.execution.get_performance_metrics()
    assert set(metrics) == set(nothing)
    assert (metrics["total_executions"], metrics["completed"], metrics["failed"]) == (5, 2, 1)
    assert (metrics["cancelled"], metrics["timed_out"]) == (1, 1)
    assert (metrics["success_rate"], metrics["success_rate_percent"]) == (0.5, 50)
    assert (metrics["retry_count"], metrics["last_error"]) == (0, None)


def test_a_success_resets_the_retries_and_a_cancel_leaves_them() -> None:
    task = Task("t1")
    _ended(task, "fail")
    assert (task.execution.retry_count, task.execution.last_error) == (1, "broken")
    _ended(task, "cancel")
    assert (task.execution.retry_count, task.execution.last_error) == (1, "broken")
    _ended(task, "fail")
    _ended(task, "complete")
    assert (task.execution.retry_count, task.execution.last_error) == (0, None)


def test_the_profile_adds_up_the_phases() -> None:
    hand = HandClock()
    execution = EnhancedTaskExecution("r", clock=hand.clock)
    for _ in range(2):
        session = execution.start_new_session("t1")
        session.enter_phase(ExecutionPhase.EXECUTION)
        hand.pass_(3)
        session.enter_phase(ExecutionPhase.CLEANUP)
        hand.pass_(1)
        execution.complete_execution()
    assert execution.performance_profile == {
        "phase_seconds": {"execution": 6, "cleanup": 2},
        "phases": {
            "execution": {"stays": 2, "mean_seconds": 3, "longest_seconds": 3},
            "cleanup": {"stays": 2, "mean_seconds": 1, "longest_seconds": 1},
        },
        "durations_seconds": [4, 4],
    }


def test_a_given_history_of_sessions_is_kept() -> None:
    done = EnhancedTaskExecution("r")
    session = done.start_new_session("t1")
    done.complete_execution()
    execution = EnhancedTaskExecution(session_history=[session])
    assert execution.session_history == [session]
    assert execution.get_current_status()["session_id"] == session.session_id
    running = ExecutionSession(task_id="t1")
    running.start_execution()
    taken = EnhancedTaskExecution(current_session=running)
    assert taken.is_executing
    with pytest.raises(InvalidInput):
        EnhancedTaskExecution(max_sessions_in_memory=0)


# tasks


def test_a_task_follows_its_execution() -> None:
    expected = {
        "complete": TaskStatus.DONE,
        "fail": TaskStatus.TODO,
        "time out": TaskStatus.TODO,
        "cancel": TaskStatus.CANCELLED,
    }
    for how, status in expected.items():
        task = Task("t1")
        _ended(task, how)  # pyright: ignore[reportArgumentType]
        assert task.status is status


@pytest.mark.parametrize("word", [TaskStatus.DONE, TaskStatus.CANCELLED, TaskStatus.FAILED])
def test_a_word_from_outside_stands_when_the_session_ends(word: TaskStatus) -> None:
    task = Task("t1", max_retries=1)
    session = task.start_execution("r")
    task.update_status(word, "by hand")
    assert task.complete_execution(False, error="x") is True
    assert (session.status, task.status) == (S.FAILED, word)


def test_a_session_that_starts_without_the_task_moves_the_task_all_the_same() -> None:
    task = Task("t1", max_retries=1)
    session = task.execution.start_new_session("t1", "r")
    assert task.status is TaskStatus.DOING
    assert session.fail("x") is True
    assert task.status is TaskStatus.FAILED


def test_a_task_whose_retries_are_used_up_has_failed() -> None:
    task = Task("t1", max_retries=2)
    _ended(task, "fail")
    assert task.status is TaskStatus.TODO
    _ended(task, "fail")
    assert (task.status, task.execution.can_retry()) == (TaskStatus.FAILED, False)
    assert task.reopen() is True
    assert (task.status, task.execution.can_retry()) == (TaskStatus.TODO, True)
    assert task.reopen() is False


def test_an_error_that_another_attempt_cannot_help_fails_the_task() -> None:
    from vespera_exec.errors import ExecutionError

    task = Task("t1")
    task.start_execution("r").fail(ExecutionError("no", recoverable=False))
    assert task.status is TaskStatus.FAILED


def test_a_cancelled_task_may_be_sent_back_to_todo() -> None:
    task = Task("t1", cancelled_status=TaskStatus.TODO)
    _ended(task, "cancel")
    assert task.status is TaskStatus.TODO


def test_a_failed_attempt_and_the_next_are_one_decision() -> None:
    log = KeptLog()
    task = Task("t1", role="r", sink=log, max_retries=2)
    first = task.enqueue_execution(priority=3)
    first.start_execution()
    batches = len(log.batches)
    second = task.execution.fail_for_retry("flaky", retry_at=START + timedelta(seconds=9), owner="me")
    assert second is not None
    assert len(log.batches) == batches + 1
    life = second.lifecycle
    assert (life.run_id, life.attempt, life.parent_execution_id) == (first.session_id, 2, first.session_id)
    assert (life.status, life.priority, life.owner) == (S.PENDING, 3, "me")
    assert life.not_before == START + timedelta(seconds=9)
    assert (task.status, task.execution.retry_count) == (TaskStatus.DOING, 1)
    assert log.types(second.session_id)[-1] is EventType.RETRY_SCHEDULED
    second.start_execution()
    assert task.execution.fail_for_retry("again", retry_at=START, timed_out=True) is None
    assert (second.status, task.status) == (S.TIMED_OUT, TaskStatus.FAILED)


def test_the_next_attempt_begins_with_the_last_checkpoint() -> None:
    log, hand = KeptLog(), HandClock()
    task = Task("t1", role="r", sink=log, clock=hand.clock)
    task.start_execution().record_checkpoint({"page": 3})
    taken = hand.now()
    hand.pass_(5)
    second = task.execution.fail_for_retry("flaky", retry_at=hand.now())
    assert second is not None
    assert (second.lifecycle.checkpoint, second.lifecycle.checkpoint_at) == ({"page": 3}, taken)
    assert log.lives[second.session_id] == second.lifecycle == replayed(log.events, second.session_id)[0]
    second.start_execution()
    third = task.execution.fail_for_retry("flaky", retry_at=hand.now())
    assert third is not None
    assert (third.lifecycle.checkpoint, third.lifecycle.checkpoint_at) == ({"page": 3}, taken)


def test_a_run_without_a_checkpoint_hands_none_on() -> None:
    log = KeptLog()
    task = Task("t1", role="r", sink=log)
    task.start_execution()
    second = task.execution.fail_for_retry("flaky", retry_at=START)
    assert second is not None
    assert (second.lifecycle.checkpoint, second.lifecycle.checkpoint_at) == (None, None)


def test_earlier_failures_take_no_attempt_from_a_later_run() -> None:
    task = Task("t1", role="r", max_retries=3)
    for _ in range(5):
        _ended(task, "fail")
    session = task.start_execution()
    for attempt in (2, 3):
        following = task.execution.fail_for_retry("flaky", retry_at=START)
        assert following is not None
        assert (following.lifecycle.attempt, following.run_id) == (attempt, session.run_id)
        following.start_execution()
    assert task.execution.fail_for_retry("flaky", retry_at=START) is None


def test_a_cancelled_attempt_is_not_tried_again() -> None:
    task = Task("t1", role="r")
    session = task.start_execution()
    session.request_cancellation("stop")
    assert task.execution.fail_for_retry("flaky", retry_at=START) is None
    assert (session.status, task.status, task.execution.retry_count) == (S.CANCELLED, TaskStatus.CANCELLED, 0)


def test_progress_stamps_the_task() -> None:
    hand = HandClock()
    task = Task("t1", role="r", clock=hand.clock)
    task.start_execution()
    hand.pass_(5)
    task.update_execution_progress(10, "on")
    assert task.updated_at == START + timedelta(seconds=5)
    with pytest.raises(InvalidProgress):
        task.update_execution_progress(5)
    assert task.created_at == START


def test_a_task_and_its_session_come_back_from_their_rows() -> None:
    log = KeptLog()
    task = Task("t1", "title", "text", role="r", sink=log, priority=1, inputs={"a": 1}, sla_seconds=9)
    session = task.start_execution()
    session.update_progress(30)
    session.request_cancellation("stop")
    row, life, progress = log.tasks["t1"], log.lives[session.session_id], log.progress[session.session_id]
    again = Task.restored(TaskRecord.from_dict(json.loads(json.dumps(row.to_dict()))), sink=log)
    restored = ExecutionSession.restored(life, progress, ledger=again.ledger)
    again.execution.adopt(restored)
    restored.end_cancelled()
    assert (again.title, again.description, again.priority, again.sla_seconds) == ("title", "text", 1, 9)
    assert again.inputs == {"a": 1}
    assert again.status is TaskStatus.CANCELLED
    assert again.execution.last_session is restored
    for stream in ("t1", session.session_id):
        assert [event.sequence for event in log.of(stream)] == list(range(1, len(log.of(stream)) + 1))
    late = Task.restored(log.tasks["t1"])
    late.execution.adopt(ExecutionSession.restored(restored.lifecycle, restored.progress, ledger=late.ledger))
    assert late.get_execution_status()["status"] == "cancelled"


def test_a_task_record_that_an_older_version_stored_still_loads() -> None:
    record = TaskRecord.from_dict({"task_id": "t", "status": "doing", "created_at": None, "unknown": 1})
    assert (record.status, record.priority, record.max_retries, record.inputs) == (TaskStatus.DOING, 5, 3, {})


def test_the_execution_of_a_task_belongs_to_that_task() -> None:
    task = Task("t1", role="r")
    with pytest.raises(InvalidInput):
        task.execution.start_new_session("another")
    assert not task.execution.is_executing
    alone = EnhancedTaskExecution("r")
    assert alone.start_new_session("named later").task_id == alone.record.task_id == "named later"


def test_inputs_are_copied_from_the_caller() -> None:
    given: dict[str, Any] = {"files": ["a"]}
    task = Task("t1", inputs=given)
    given["files"].append("b")
    assert task.inputs == {"files": ["a"]}


def test_the_task_is_doing_before_its_session_starts() -> None:
    log = KeptLog()
    task = Task("t1", role="r", sink=log)
    session = task.start_execution(enable_monitoring=False)
    assert [event.stream for event in log.batches[-1].events[:2]] == ["t1", session.session_id]
    assert session.monitoring_enabled is False
    assert "doing" in repr(task)
    assert session.session_id in repr(task.execution)
