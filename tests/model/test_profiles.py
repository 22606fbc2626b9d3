"""The profile of a task: where the time of its executions went."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING

from model_harness import HandClock

from vespera_exec.model.enums import ExecutionPhase
from vespera_exec.model.ledger import Ledger
from vespera_exec.model.profile import PerformanceProfiler
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from vespera_exec.model.lifecycle import Lifecycle

P = ExecutionPhase


def ended(*stays: tuple[ExecutionPhase, float], how: str = "complete") -> Lifecycle:
    hand = HandClock()
    session = ExecutionSession(ledger=Ledger(clock=hand.clock))
    session.start_execution()
    for phase, seconds in stays:
        session.enter_phase(phase)
        hand.pass_(seconds)
    if how == "complete":
        session.complete()
    else:
        session.fail("broken")
    return session.lifecycle


def test_nothing_that_has_ended_is_an_empty_profile() -> None:
    profiler = PerformanceProfiler()
    assert profiler.profile() == {"phase_seconds": {}, "phases": {}, "durations_seconds": []}
    assert profiler.baseline is None


def test_a_phase_that_came_twice_in_one_execution_counts_two_stays() -> None:
    life = ended((P.EXECUTION, 6), (P.RECOVERY, 1), (P.EXECUTION, 2))
    profile = PerformanceProfiler().after(life).profile()
    assert profile["phase_seconds"] == {"execution": 8, "recovery": 1}
    assert profile["phases"]["execution"] == {"stays": 2, "mean_seconds": 4, "longest_seconds": 6}
    assert json.loads(json.dumps(profile)) == profile


def test_a_failed_execution_spends_time_in_phases_and_says_nothing_of_the_duration() -> None:
    profiler = PerformanceProfiler().after(ended((P.EXECUTION, 5))).after(ended((P.EXECUTION, 1), how="fail"))
    assert profiler.profile()["phase_seconds"] == {"execution": 6}
    assert profiler.durations == (5,)
    assert profiler.baseline == timedelta(seconds=5)


def test_only_the_last_ten_durations_are_kept() -> None:
    profiler = PerformanceProfiler()
    for seconds in range(1, 13):
        profiler = profiler.after(ended((P.EXECUTION, seconds)))
    assert profiler.durations == tuple(range(3, 13))
    assert profiler.profile()["phases"]["execution"]["stays"] == 12


def test_a_running_session_is_in_the_profile_of_its_task_when_it_has_ended() -> None:
    hand = HandClock()
    task = Task("t1", clock=hand.clock)
    session = task.start_execution("r")
    session.enter_phase(P.EXECUTION)
    hand.pass_(7)
    assert task.execution.performance_profile == PerformanceProfiler().profile()
    session.complete()
    assert task.execution.performance_profile == PerformanceProfiler().after(session.lifecycle).profile()
    assert task.execution.performance_profile["durations_seconds"] == [7]
