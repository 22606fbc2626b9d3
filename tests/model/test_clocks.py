"""Durations: pauses excluded, frozen at the end, monotonic; and the naive estimate."""

from __future__ import annotations

import json
from datetime import UTC, timedelta

import pytest
from model_harness import START, HandClock, running_session, session_with_log

from vespera_exec.errors import InvalidInput
from vespera_exec.model.clock import Clock
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus, MessageLevel
from vespera_exec.model.ledger import Ledger
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.task import Task
from vespera_exec.model.timing import TimeTracking, remaining_seconds

S = ExecutionStatus


def seconds(value: float) -> timedelta:
    return timedelta(seconds=value)


def test_the_clock_of_a_session_freezes_at_its_end() -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    hand.pass_(5)
    session.complete()
    hand.pass_(500)
    assert session.elapsed_seconds == 5
    assert session.time_tracking.get_elapsed_time() == seconds(5)
    assert session.lifecycle.completed_at == START + seconds(5)


def test_paused_time_counts_in_no_duration() -> None:
    hand = HandClock()
    session, log = running_session(hand=hand)
    session.enter_phase(ExecutionPhase.EXECUTION)
    hand.pass_(10)
    session.pause()
    hand.pass_(100)
    assert session.elapsed_seconds == 10
    assert session.time_tracking.is_paused
    assert session.time_tracking.paused_duration == seconds(100)
    session.resume()
    hand.pass_(20)
    session.pause()
    hand.pass_(7)
    session.resume()
    hand.pass_(1)
    session.complete()
    assert session.lifecycle.active_seconds == 31
    assert session.lifecycle.paused_seconds == 107
    assert session.phase_history[-1].duration_seconds == 31
    assert log.lives["e1"] == session.lifecycle


def test_a_pause_that_ends_in_a_failure_is_no_work_either() -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    hand.pass_(3)
    session.pause()
    hand.pass_(50)
    session.fail("gone while paused")
    assert (session.lifecycle.active_seconds, session.lifecycle.paused_seconds) == (3, 50)
    assert session.elapsed_seconds == 3


def test_waiting_for_a_turn_is_measured_apart() -> None:
    hand = HandClock()
    session, _ = session_with_log(hand=hand)
    session.enqueue()
    hand.pass_(12)
    assert session.elapsed_seconds == 0
    session.start_execution()
    hand.pass_(2)
    assert (session.lifecycle.queue_seconds, session.elapsed_seconds) == (12, 2)
    assert session.lifecycle.started_at == START + seconds(12)
    assert session.lifecycle.queued_at == START


def test_a_clock_reading_never_runs_backwards_over_a_change() -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    before = 0.0
    for step in range(50):
        hand.pass_(1 / 3 + step * 1e-7)
        read = session.elapsed_seconds
        session.enter_phase(ExecutionPhase.SETUP if step % 2 else ExecutionPhase.EXECUTION)
        after = session.elapsed_seconds
        assert before <= read <= after
        before = after


def test_a_restored_session_goes_on_from_what_was_counted() -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    hand.pass_(4)
    session.enter_phase(ExecutionPhase.EXECUTION)
    hand.pass_(6)
    session.pause()
    restored = ExecutionSession.restored(session.lifecycle, session.progress, ledger=Ledger(clock=hand.clock))
    hand.pass_(1000)
    restored.resume()
    hand.pass_(5)
    restored.complete()
    assert restored.lifecycle.active_seconds == 15
    assert restored.phase_history[-1].duration_seconds == 11


def next_owner(session: ExecutionSession, hand: HandClock) -> ExecutionSession:
    """The session as another owner finds it in the store."""
    stored = json.loads(json.dumps(session.to_dict()))
    again = ExecutionSession.from_dict(stored, ledger=Ledger(clock=hand.clock))
    again.change_owner("next")
    return again


@pytest.mark.parametrize("last_words", ["progress", "note", "checkpoint"])
def test_work_whose_owner_died_counts_up_to_its_last_event(last_words: str) -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    session.enter_phase(ExecutionPhase.EXECUTION)
    hand.pass_(40)
    match last_words:
        case "progress":
            session.update_progress(10)
        case "note":
            session.note(MessageLevel.INFO, "here")
        case _:
            session.record_checkpoint({"page": 1})
    hand.pass_(1000)
    again = next_owner(session, hand)
    again.fail("its owner died")
    assert again.lifecycle.active_seconds == 40
    assert again.phase_history[-1].duration_seconds == 40


def test_the_time_without_an_owner_is_in_no_clock_however_often_owners_die() -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    for _ in range(3):
        hand.pass_(5)
        session.update_progress(session.progress.reached + 1)
        hand.pass_(1000)
        session = next_owner(session, hand)
    session.pause()
    hand.pass_(7)
    session.note(MessageLevel.INFO, "still paused")
    hand.pass_(1000)
    session = next_owner(session, hand)
    session.resume()
    session.complete()
    assert (session.lifecycle.active_seconds, session.lifecycle.paused_seconds) == (15, 7)


def test_an_owner_that_died_at_once_after_another_left_no_time_behind() -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    hand.pass_(5)
    session.update_progress(1)
    for _ in range(3):
        hand.pass_(1000)
        session = next_owner(session, hand)
    assert session.elapsed_seconds == 5


def test_a_wall_clock_that_went_back_takes_nothing_and_adds_nothing() -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    hand.pass_(10)
    session.enter_phase(ExecutionPhase.EXECUTION)
    hand.pass_(60)
    session.update_progress(5)
    at_the_reading, at_the_report = START + seconds(10), START + seconds(70)
    for now, counted in [
        (at_the_reading - seconds(30), 10),
        (at_the_reading + seconds(20), 30),
        (at_the_report, 70),
        (at_the_report + seconds(500), 70),
    ]:
        clock = Clock(now=lambda now=now: now, monotonic=lambda: 3.0)
        again = ExecutionSession.restored(session.lifecycle, session.progress, ledger=Ledger(clock=clock))
        assert again.elapsed_seconds == counted


def test_stamps_are_aware_and_utc() -> None:
    session, log = running_session()
    session.update_progress(5)
    assert session.time_tracking.started_at is not None
    assert session.time_tracking.started_at.tzinfo is UTC
    assert session.overall_progress.updated_at.tzinfo is UTC
    assert all(event.timestamp.tzinfo is UTC for event in log.events)


def test_a_clock_that_is_driven_counts_each_pause() -> None:
    hand = HandClock()
    tracking = TimeTracking(clock=hand.clock)
    assert tracking.get_elapsed_time() == seconds(0)
    tracking.start()
    with pytest.raises(InvalidInput):
        tracking.start()
    for _ in range(2):
        hand.pass_(30)
        tracking.pause()
        tracking.pause()
        hand.pass_(20)
        assert tracking.is_paused
        tracking.resume()
        tracking.resume()
    hand.pass_(10)
    tracking.finish()
    hand.pass_(99)
    tracking.finish()
    assert tracking.elapsed_time == seconds(70)
    assert tracking.paused_duration == seconds(40)
    assert tracking.completed_at == START + seconds(110)


def test_a_clock_that_finishes_while_paused_counts_the_pause_as_pause() -> None:
    hand = HandClock()
    tracking = TimeTracking(clock=hand.clock)
    tracking.finish()
    assert tracking.completed_at is None
    tracking.start()
    hand.pass_(3)
    tracking.pause()
    hand.pass_(4)
    tracking.finish()
    assert (tracking.elapsed_time, tracking.paused_duration) == (seconds(3), seconds(4))


def test_stamps_that_are_set_by_hand_count_the_same() -> None:
    hand = HandClock()
    tracking = TimeTracking(started_at=START, clock=hand.clock)
    hand.pass_(100)
    tracking.paused_duration = seconds(20)
    assert tracking.elapsed_time == seconds(80)
    tracking.resumed_at = START + seconds(40)
    tracking.paused_at = START + seconds(70)
    assert tracking.is_paused
    assert tracking.elapsed_time == seconds(50)
    tracking.completed_at = START + seconds(90)
    assert tracking.elapsed_time == seconds(50)
    tracking.resumed_at = START + seconds(80)
    assert tracking.elapsed_time == seconds(70)


def test_the_positions_of_the_fields_are_those_of_document_000() -> None:
    tracking = TimeTracking(START, None, None, seconds(9))
    assert tracking.estimated_duration == seconds(9)


def test_an_estimate_says_when_at_this_rate() -> None:
    hand = HandClock()
    tracking = TimeTracking(clock=hand.clock)
    tracking.start()
    assert tracking.calculate_eta(50) is None
    hand.pass_(30)
    assert tracking.calculate_eta(25) == START + seconds(120)
    assert tracking.estimated_duration == seconds(120)
    assert tracking.estimated_completion == START + seconds(120)
    assert tracking.eta_calculated_at == START + seconds(30)
    assert tracking.confidence_level == 0.0


@pytest.mark.parametrize("percentage", [None, 0, -1, 101])
def test_where_nothing_can_be_said_there_is_no_estimate(percentage: float | None) -> None:
    hand = HandClock()
    tracking = TimeTracking(clock=hand.clock)
    tracking.start()
    hand.pass_(30)
    assert tracking.calculate_eta(percentage) is None


def test_nothing_is_predicted_beyond_the_horizon() -> None:
    assert remaining_seconds(2.0, 1 / 1e12) is None
    hand = HandClock()
    session, _ = running_session(hand=hand)
    hand.pass_(2)
    session.update_progress(1, 1e12)
    assert session.get_execution_summary()["time_tracking"]["estimated_completion"] is None


def test_an_estimate_is_drawn_towards_what_earlier_runs_took() -> None:
    alone = remaining_seconds(10, 0.1)
    led = remaining_seconds(10, 0.1, 40)
    assert alone == pytest.approx(90)
    assert led == pytest.approx(0.1 * 90 + 0.9 * 30)


def test_the_baseline_is_the_true_median_of_the_last_ten() -> None:
    tracking = TimeTracking()
    for duration in (1, 3):
        tracking.update_historical_data(seconds(duration))
    assert tracking.performance_baseline == seconds(2)
    for duration in range(20):
        tracking.update_historical_data(seconds(duration))
    assert tracking.historical_durations == [seconds(each) for each in range(10, 20)]
    assert tracking.performance_baseline == seconds(14.5)


def test_the_estimate_of_a_session_is_made_when_it_is_read() -> None:
    hand = HandClock()
    session, _ = running_session(hand=hand)
    session.enter_phase(ExecutionPhase.EXECUTION)
    hand.pass_(10)
    session.update_progress(50, phase=ExecutionPhase.EXECUTION)

    def shown() -> str | None:
        return session.get_execution_summary()["time_tracking"]["estimated_completion"]

    assert shown() == (START + seconds(20)).isoformat()
    hand.pass_(10)
    assert shown() == (START + seconds(40)).isoformat()
    session.pause()
    assert shown() is None
    session.resume()
    session.complete()
    assert shown() is None


def test_only_completed_runs_teach_the_estimate_and_only_their_time_at_work() -> None:
    hand = HandClock()
    task = Task("t1", clock=hand.clock, max_retries=9)
    for end in ("complete", "fail", "cancel"):
        session = task.start_execution("r")
        session.update_status(S.RUNNING)
        hand.pass_(10)
        session.pause()
        hand.pass_(90)
        session.resume()
        match end:
            case "complete":
                session.complete()
            case "fail":
                session.fail("x")
            case _:
                session.request_cancellation()
                session.end_cancelled()
    assert task.execution.performance_profile["durations_seconds"] == [10]
    following = task.start_execution("r")
    assert following.time_tracking.performance_baseline == seconds(10)
