"""One: a task and its execution, alone in memory. No loop, no store, no threads."""

from __future__ import annotations

import pytest

from vespera_exec import ExecutionPhase, ExecutionStatus, InvalidProgress, Task, TaskStatus


def test_a_task_is_started_reports_and_is_completed() -> None:
    task = Task(title="Index the documents")
    assert task.status is TaskStatus.TODO

    session = task.start_execution("indexer")
    assert session.status is ExecutionStatus.PREPARING
    assert task.status is TaskStatus.DOING

    session.update_status(ExecutionStatus.RUNNING, "Working")
    session.enter_phase(ExecutionPhase.EXECUTION)
    session.update_progress(40, message="halfway through the first pass")

    summary = task.get_execution_status()["session"]
    assert summary["overall_progress"] == {"percentage": 40, "message": "halfway through the first pass"}

    task.complete_execution(success=True, output="1,204 documents")
    assert task.status is TaskStatus.DONE
    assert session.overall_progress.get_percentage() == 100


def test_a_report_that_makes_no_sense_is_refused_and_changes_nothing() -> None:
    session = Task(title="Index").start_execution()
    session.update_progress(40)
    for nonsense in (float("nan"), -1, 101, 20):
        with pytest.raises(InvalidProgress):
            session.update_progress(nonsense)
    assert session.overall_progress.get_percentage() == 40


def test_a_failure_leaves_the_task_open_until_its_retries_are_used_up() -> None:
    task = Task(title="Fetch", max_retries=2)
    for left in (TaskStatus.TODO, TaskStatus.FAILED):
        task.start_execution()
        task.complete_execution(success=False, error="the line is down")
        assert task.status is left
    assert task.execution.last_error == "the line is down"
