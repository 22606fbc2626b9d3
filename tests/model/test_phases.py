"""Phases: entered, left, remembered, and how long each took."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from model_harness import START, HandClock, running_session, session_with_log

from vespera_exec.errors import InvalidTransitionError
from vespera_exec.model.enums import EventType, ExecutionPhase
from vespera_exec.model.replay import replayed

P = ExecutionPhase


def test_the_history_of_the_manager_is_that_of_the_session() -> None:
    session, _ = running_session()
    assert (session.phases.current, session.phases.history) == (None, [])
    assert session.phases.enter(P.SETUP) is True
    session.enter_phase(P.EXECUTION)
    assert session.phases.current is session.current_phase is P.EXECUTION
    assert [stay.phase for stay in session.phases.history] == [P.SETUP, P.EXECUTION]
    assert session.phases.history == session.phase_history


def test_entering_the_phase_that_runs_changes_nothing() -> None:
    session, log = running_session()
    session.phases.enter(P.SETUP)
    before = log.events
    assert session.phases.enter(P.SETUP, "again") is False
    assert log.events == before


def test_a_phase_that_is_left_ends_without_another() -> None:
    hand = HandClock()
    session, log = running_session(hand=hand)
    session.phases.enter(P.EXECUTION)
    hand.pass_(3)
    assert session.phases.exit("enough", outcome="failed") is True
    assert session.phases.current is None
    (stay,) = session.phases.history
    assert (stay.exited_at, stay.duration_seconds, stay.outcome) == (START + timedelta(seconds=3), 3, "failed")
    last = log.events[-1]
    assert (last.event_type, last.phase, last.message) == (EventType.PHASE_CHANGE, None, "enough")
    assert replayed(log.events, "e1") == (session.lifecycle, session.progress)
    assert session.phases.exit() is False
    assert log.events[-1] is last


def test_the_time_between_an_exit_and_the_next_entry_belongs_to_no_phase() -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    session.phases.enter(P.SETUP)
    hand.pass_(2)
    session.phases.exit()
    hand.pass_(50)
    session.phases.enter(P.EXECUTION)
    hand.pass_(3)
    session.complete()
    assert session.phases.seconds == {P.SETUP: 2, P.EXECUTION: 3}
    assert session.elapsed_seconds == 55


def test_a_phase_left_as_completed_stands_at_100_and_one_left_as_failed_does_not() -> None:
    session, _ = running_session()
    session.phases.enter(P.SETUP)
    session.phases.exit()
    session.phases.enter(P.EXECUTION)
    session.update_progress(40, phase=P.EXECUTION)
    session.phases.exit(outcome="failed")
    shown = {phase: state.current for phase, state in session.phase_progress.items()}
    assert shown == {P.SETUP: 100, P.EXECUTION: 40}


def test_the_seconds_of_a_phase_are_those_of_all_its_stays_and_of_the_one_that_lasts() -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    for seconds in (2, 3):
        session.phases.enter(P.EXECUTION)
        hand.pass_(seconds)
        session.phases.enter(P.RECOVERY)
        hand.pass_(1)
    session.phases.enter(P.EXECUTION)
    hand.pass_(4)
    assert session.phases.seconds == {P.EXECUTION: 9, P.RECOVERY: 2}
    session.pause()
    hand.pass_(100)
    assert session.phases.seconds[P.EXECUTION] == 9


def test_after_the_end_no_phase_is_entered_or_left() -> None:
    session, log = running_session()
    session.phases.enter(P.EXECUTION)
    session.complete()
    before = log.events
    with pytest.raises(InvalidTransitionError):
        session.phases.enter(P.CLEANUP)
    with pytest.raises(InvalidTransitionError):
        session.phases.exit()
    assert log.events == before
    assert session.phases.current is None


def test_many_threads_enter_and_leave_and_every_stay_is_closed_once() -> None:
    session, log = session_with_log()
    session.start_execution()
    begin = threading.Barrier(4)

    def work(phase: ExecutionPhase) -> None:
        begin.wait(5)
        for _ in range(100):
            session.phases.enter(phase)
            session.phases.exit()

    threads = [threading.Thread(target=work, args=[phase]) for phase in (P.SETUP, P.EXECUTION, P.CLEANUP, P.RECOVERY)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(10)
    history = session.phases.history
    entered = [event for event in log.events if event.event_type is EventType.PHASE_CHANGE and event.phase is not None]
    assert len(history) == len(entered)
    assert all(stay.exited_at is not None for stay in history)
    assert replayed(log.events, "e1") == (session.lifecycle, session.progress)
