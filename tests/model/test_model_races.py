"""Several threads at once: one of them ends the session, none of them breaks it."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest
from model_harness import KeptLog

from vespera_exec.errors import Conflict, InvalidProgress, NotExecuting
from vespera_exec.model.cancellation import CancellationToken
from vespera_exec.model.enums import EventType, ExecutionStatus, ResourceType
from vespera_exec.model.ledger import Ledger
from vespera_exec.model.replay import replayed
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable

S = ExecutionStatus
_ROUNDS = 200


def _race(*runners: Callable[[], object]) -> list[BaseException]:
    """Start all at one signal; the errors that nobody expected."""
    gate = threading.Barrier(len(runners))
    faults: list[BaseException] = []

    def run(runner: Callable[[], object]) -> None:
        gate.wait(10)
        try:
            runner()
        except (Conflict, InvalidProgress, NotExecuting):
            pass
        except BaseException as fault:  # noqa: BLE001 - whatever a thread raises is what the test is about
            faults.append(fault)

    threads = [threading.Thread(target=run, args=(runner,)) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return faults


@pytest.mark.promise("one_end")
@pytest.mark.parametrize("rounds", [_ROUNDS, pytest.param(3000, marks=pytest.mark.full)])
def test_four_threads_that_end_a_session_end_it_once(rounds: int) -> None:
    won: set[ExecutionStatus] = set()
    for _ in range(rounds):
        log = KeptLog()
        session = ExecutionSession("e1", "t1", ledger=Ledger(sink=log))
        session.start_execution()
        session.update_status(S.RUNNING)

        def cancel(session: ExecutionSession = session) -> None:
            if session.request_cancellation("stop"):
                session.end_cancelled()

        def report(session: ExecutionSession = session) -> None:
            for value in range(20):
                session.update_progress(value)

        assert _race(session.complete, lambda s=session: s.fail("x"), cancel, report) == []
        terminal = [event for event in log.events if event.new_status is not None and event.new_status.is_terminal]
        assert len(terminal) == 1
        assert session.status is terminal[0].new_status
        assert [event.sequence for event in log.events] == list(range(1, len(log.events) + 1))
        assert replayed(log.events, "e1") == (session.lifecycle, session.progress)
        assert (log.lives["e1"], log.progress["e1"]) == (session.lifecycle, session.progress)
        won.add(session.status)
    assert won <= {S.COMPLETED, S.FAILED, S.CANCELLED}


def test_two_threads_that_complete_a_task_count_it_once() -> None:
    for _ in range(_ROUNDS):
        task = Task("t1", role="r")
        task.start_execution()
        answers: list[bool] = []

        def end(task: Task = task, answers: list[bool] = answers) -> None:
            answers.append(task.complete_execution(True, "ok"))

        assert _race(end, end) == []
        assert sorted(answers) == [False, True]
        assert task.execution.get_performance_metrics()["total_executions"] == 1
        assert len(task.execution.session_history) == len(task.execution.execution_history) == 1


def test_a_start_that_races_an_end_loses_no_session() -> None:
    for _ in range(_ROUNDS):
        task = Task("t1", role="r")
        first = task.start_execution()
        assert _race(task.complete_execution, task.start_execution) == []
        execution = task.execution
        assert first.status is S.COMPLETED
        assert [each.session_id for each in execution.session_history] == [first.session_id]
        if execution.current_session is not None:
            assert execution.current_session is not first
            assert execution.current_session.status is S.PREPARING


def test_a_summary_can_be_read_while_usage_is_recorded() -> None:
    session = ExecutionSession()
    session.start_execution()
    stop = threading.Event()
    kinds = list(ResourceType)

    def sample() -> None:
        for turn in range(2000):
            session.record_resource_usage(kinds[turn % len(kinds)], float(turn))
        stop.set()

    def read() -> None:
        while not stop.is_set():
            session.get_execution_summary()
            _ = session.resource_metrics, session.peak_resource_usage, session.time_tracking

    assert _race(sample, read) == []
    assert session.peak_resource_usage[ResourceType.CUSTOM] == 1999.0


def test_the_token_and_the_session_do_not_wait_for_each_other() -> None:
    for _ in range(_ROUNDS):
        token = CancellationToken()
        session = ExecutionSession("e1", cancellation_token=token)
        session.start_execution()
        assert _race(partial(token.cancel, "a"), partial(session.request_cancellation, "b"), session.complete) == []
        assert session.status in (S.CANCELLING, S.COMPLETED)
        if session.status is S.CANCELLING:
            assert token.is_cancelled
            assert session.lifecycle.cancellation_reason in ("a", "b")


def test_every_thread_that_cancels_a_token_sees_the_same_reason() -> None:
    for _ in range(_ROUNDS):
        token = CancellationToken()
        children = [token.child() for _ in range(3)]
        seen: list[str] = []

        def cancel(reason: str, token: CancellationToken = token, seen: list[str] = seen) -> None:
            token.cancel(reason)
            seen.append(token.cancellation_reason)

        assert _race(lambda: cancel("a"), lambda: cancel("b"), token.child) == []
        assert len(set(seen)) == 1
        assert {child.cancellation_reason for child in children} == set(seen)


def test_threads_that_report_together_leave_no_gap() -> None:
    log = KeptLog()
    session = ExecutionSession("e1", ledger=Ledger(sink=log))
    session.start_execution()

    def report() -> None:
        for value in range(300):
            session.set_custom_progress("lines", value)

    assert _race(report, report, report, report) == []
    assert [event.sequence for event in log.events] == list(range(1, 1200 + 4))
    assert [event.event_type for event in log.events].count(EventType.PROGRESS_UPDATE) == 1200
