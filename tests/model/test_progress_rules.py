"""What is accepted as progress, and what is shown of it."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
from model_harness import running_session, session_with_log

from vespera_exec.errors import InvalidProgress
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus, ProgressType
from vespera_exec.model.ledger import Ledger
from vespera_exec.model.progress import CustomMetric, Progress, ProgressReport, ProgressState
from vespera_exec.model.session import ExecutionSession


def test_a_report_by_place_says_what_it_looks_like() -> None:
    session, _ = running_session()
    session.report(ProgressReport(50, "half way"))
    assert (session.progress.percentage, session.progress.overall.message) == (50, "half way")


def test_negative_progress_is_refused() -> None:
    session, _ = running_session()
    for value, total in ((-20, None), (-2, 4), (2, -4)):
        with pytest.raises(InvalidProgress, match="negative"):
            session.update_progress(value, total)
    assert session.progress.percentage == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_progress_that_is_no_finite_number_is_refused(value: float) -> None:
    session, log = running_session()
    batches = len(log.batches)
    for call in (lambda: session.update_progress(value), lambda: session.update_progress(1, value)):
        with pytest.raises(InvalidProgress):
            call()
    with pytest.raises(InvalidProgress):
        ProgressState(current=value)
    assert len(log.batches) == batches


def test_nothing_of_nothing_cannot_be_said_and_is_not_complete() -> None:
    state = ProgressState(ProgressType.STEPS, 0, 0)
    assert state.get_percentage() is None
    assert not state.is_complete()
    with pytest.raises(InvalidProgress, match="takes no total"):
        ProgressState(ProgressType.PERCENTAGE, 5, 0)


def test_nothing_of_nothing_stands_at_100_when_it_is_completed() -> None:
    session, _ = running_session()
    session.update_progress(0, 0)
    assert session.progress.percentage is None
    session.complete()
    assert session.progress.percentage == 100


def test_a_percentage_is_not_divided_by_an_earlier_total() -> None:
    session, _ = running_session()
    session.update_progress(50, 200)
    assert session.progress.percentage == 25
    session.update_progress(60)
    assert session.progress.percentage == 60
    assert session.overall_progress.total is None


def test_the_event_shows_the_state_after_the_report() -> None:
    session, log = running_session()
    session.update_progress(50, 200, "hello")
    session.update_progress(100, 200)
    event = log.events[-1]
    assert event.event_type is EventType.PROGRESS_UPDATE
    assert event.progress_data == {
        "current": 100.0,
        "total": 200.0,
        "percentage": 50.0,
        "message": "hello",
        "type": "steps",
    }


def test_the_message_of_the_user_is_the_message_of_the_event() -> None:
    session, log = running_session()
    session.update_progress(11, message="reading")
    assert log.events[-1].message == "reading"
    session.update_progress(12)
    assert log.events[-1].message == "Progress: 12%"
    session.update_progress(1, 4, phase=ExecutionPhase.EXECUTION)
    assert log.events[-1].message == "Progress: 1/4"
    session.report(ProgressReport(progress_type=ProgressType.ITEMS, current=7, unit="files"), ExecutionPhase.CLEANUP)
    assert log.events[-1].message == "Progress: 7 files"


def test_progress_does_not_run_backwards_without_a_reset() -> None:
    session, log = running_session()
    session.update_progress(80)
    batches = len(log.batches)
    with pytest.raises(InvalidProgress, match="went back"):
        session.update_progress(20)
    assert (session.progress.percentage, len(log.batches)) == (80, batches)
    session.report(ProgressReport(current=20, reset=True))
    assert session.progress.percentage == 20
    session.update_progress(30)
    assert session.progress.percentage == 30


def test_another_scale_is_no_way_back() -> None:
    session, _ = running_session()
    session.update_progress(80)
    with pytest.raises(InvalidProgress, match="went back from 80 to 50"):
        session.update_progress(5, 10)
    session.report(ProgressReport(progress_type=ProgressType.ITEMS, current=3))
    assert session.progress.percentage is None
    with pytest.raises(InvalidProgress, match="went back from 80 to 79"):
        session.update_progress(79)
    session.update_progress(81)
    assert session.progress.percentage == 81


def test_progress_after_the_end_is_refused() -> None:
    session, log = running_session()
    session.complete()
    batches = len(log.batches)
    with pytest.raises(InvalidProgress, match="has ended"):
        session.update_progress(99)
    assert (session.progress.percentage, len(log.batches)) == (100, batches)


@pytest.mark.parametrize("stray", ["a message", True, [1]])
def test_a_message_in_the_place_of_a_number_is_refused_and_breaks_nothing(stray: Any) -> None:
    session, log = running_session()
    batches = len(log.batches)
    with pytest.raises(InvalidProgress, match="must be a number"):
        session.update_progress(10, stray)
    with pytest.raises(InvalidProgress, match="must be a number"):
        session.update_progress(stray)
    assert len(log.batches) == batches
    assert session.get_execution_summary()["overall_progress"] == {"percentage": 0.0, "message": ""}


def test_a_message_that_is_no_text_is_refused() -> None:
    session, _ = running_session()
    with pytest.raises(InvalidProgress, match="must be text"):
        session.update_progress(10, message=cast("str", 5))


def test_a_percentage_above_100_is_refused() -> None:
    session, _ = running_session()
    with pytest.raises(InvalidProgress, match="at most 100"):
        session.update_progress(150)


@pytest.mark.parametrize(
    ("kind", "unit"),
    [
        (ProgressType.STEPS, "steps"),
        (ProgressType.BYTES, "B"),
        (ProgressType.ITEMS, "files"),
        (ProgressType.TIME_BASED, "s"),
        (ProgressType.CUSTOM, "epochs"),
    ],
)
def test_every_type_can_be_reported_with_unit_and_details(kind: ProgressType, unit: str) -> None:
    session, _ = running_session()
    report = ProgressReport(progress_type=kind, current=1, total=4, unit=unit, message="on", details={"name": "a.py"})
    session.report(report)
    state = session.overall_progress
    assert (state.progress_type, state.unit, state.message, dict(state.details)) == (kind, unit, "on", {"name": "a.py"})
    assert session.progress.percentage == 25


def test_without_a_total_the_count_is_shown_and_no_percentage() -> None:
    session, _ = running_session()
    session.report(ProgressReport(progress_type=ProgressType.ITEMS, current=7, unit="files"))
    assert session.progress.percentage is None
    assert session.overall_progress.current == 7
    assert not session.overall_progress.is_complete()


def test_the_progress_of_a_phase_lifts_the_overall_progress() -> None:
    session, _ = running_session()
    session.enter_phase(ExecutionPhase.EXECUTION)
    session.update_progress(50, phase=ExecutionPhase.EXECUTION, message="half")
    assert session.progress.percentage == 60
    assert session.phase_progress[ExecutionPhase.EXECUTION].get_percentage() == 50
    assert session.overall_progress.message == "half"
    session.milestone(95, "nearly")
    assert session.progress.percentage == 95
    session.update_progress(60, phase=ExecutionPhase.EXECUTION)
    assert session.progress.percentage == 95


def test_a_phase_without_a_share_only_changes_the_message() -> None:
    session, _ = running_session()
    session.update_progress(30)
    session.update_progress(99, message="tidying", phase=ExecutionPhase.ERROR_HANDLING)
    assert session.progress.percentage == 30
    assert session.overall_progress.message == "tidying"


def test_a_lower_milestone_changes_the_message_only() -> None:
    session, _ = running_session()
    session.milestone(30)
    session.milestone(10, "setup")
    assert (session.progress.percentage, session.overall_progress.message) == (30, "setup")


def test_nothing_shows_100_before_the_completion() -> None:
    session, log = running_session()
    session.update_progress(100)
    assert session.progress.percentage == 99
    session.update_progress(10, 10)
    assert session.progress.percentage == 99
    assert all((event.progress_data or {"percentage": 0})["percentage"] <= 99 for event in log.events)
    session.fail("broken")
    assert session.progress.percentage == 99


def test_a_message_alone_keeps_the_value() -> None:
    session, _ = running_session()
    session.update_progress(3, 4, "three")
    session.report(ProgressReport(message="still three"))
    assert (session.overall_progress.current, session.overall_progress.message) == (3, "still three")
    session.report(ProgressReport(message="first words", progress_type=ProgressType.ITEMS), ExecutionPhase.SETUP)
    assert session.phase_progress[ExecutionPhase.SETUP].progress_type is ProgressType.ITEMS


def test_custom_metrics_stand_beside_the_progress_and_may_fall() -> None:
    session, log = running_session()
    session.update_progress(40)
    session.set_custom_progress("loss", 2.5)
    session.set_custom_progress("loss", 0.5, unit="nats")
    assert session.custom_progress["loss"].current == 0.5
    assert session.progress.percentage == 40
    assert log.events[-1].message == "loss: 0.5"
    assert session.get_execution_summary()["custom_progress"]["loss"]["unit"] == "nats"


def test_a_registered_metric_is_computed_with_each_report_and_its_fault_is_only_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(_progress: Progress, _elapsed: float) -> float:
        raise ZeroDivisionError

    def doubled(progress: Progress, _elapsed: float) -> float | None:
        return None if progress.sequence < 6 else progress.reached * 2

    def state(_progress: Progress, _elapsed: float) -> ProgressState:
        return ProgressState(ProgressType.BYTES, 4, 8)

    metrics: dict[str, CustomMetric] = {"double": doubled, "broken": broken, "state": state}
    session = ExecutionSession(ledger=Ledger(), custom_metrics=metrics)
    session.start_execution()
    session.update_status(ExecutionStatus.RUNNING)
    session.update_progress(10)
    assert "double" not in session.custom_progress
    assert session.custom_progress["state"].get_percentage() == 50
    session.update_progress(20)
    session.update_progress(30)
    assert session.custom_progress["double"].current == 40
    assert "broken failed" in caplog.text


def test_leaving_a_phase_completes_its_progress_and_entering_it_again_begins_anew() -> None:
    session, log = running_session()
    session.enter_phase(ExecutionPhase.VALIDATION)
    session.enter_phase(ExecutionPhase.EXECUTION)
    session.update_progress(70, phase=ExecutionPhase.EXECUTION)
    session.enter_phase(ExecutionPhase.RECOVERY)
    assert session.phase_progress[ExecutionPhase.VALIDATION].get_percentage() == 100
    assert session.phase_progress[ExecutionPhase.EXECUTION].get_percentage() == 70
    session.enter_phase(ExecutionPhase.EXECUTION)
    session.update_progress(20, phase=ExecutionPhase.EXECUTION)
    assert session.phase_progress[ExecutionPhase.EXECUTION].get_percentage() == 20
    assert session.progress.percentage == 72
    outcomes = [record.outcome for record in session.phase_history]
    assert outcomes == ["completed", "interrupted", "completed", None]
    assert log.progress["e1"] == session.progress


def test_a_state_and_all_progress_survive_a_round_trip() -> None:
    session, _ = running_session()
    session.enter_phase(ExecutionPhase.EXECUTION)
    session.report(
        ProgressReport(progress_type=ProgressType.BYTES, current=5, total=9, unit="B", details={"a": [1]}),
        ExecutionPhase.EXECUTION,
    )
    session.set_custom_progress("speed", 3, 4)
    assert Progress.from_dict(session.progress.to_dict()) == session.progress


def test_progress_that_an_older_version_stored_still_loads() -> None:
    loaded = Progress.from_dict({"execution_id": "e", "overall": {"current": 40.0}, "sequence": 7})
    assert (loaded.percentage, loaded.reached, loaded.completed, loaded.sequence) == (40.0, 40.0, False, 7)
    assert ProgressState.from_dict({}).progress_type is ProgressType.PERCENTAGE


def test_an_untouched_session_stands_at_zero() -> None:
    session, _ = session_with_log()
    assert session.progress.percentage == 0
    assert session.overall_progress.progress_type is ProgressType.PERCENTAGE


def test_an_execution_has_at_most_64_custom_metrics() -> None:
    session, log = running_session()
    for number in range(64):
        session.set_custom_progress(f"metric {number}", number)
    batches = len(log.batches)
    with pytest.raises(InvalidProgress, match="at most 64"):
        session.set_custom_progress("one more", 1)
    assert len(log.batches) == batches
    session.set_custom_progress("metric 63", 5)
    assert session.progress.custom["metric 63"].current == 5
    assert len(session.progress.custom) == 64


def test_computed_metrics_count_among_the_64() -> None:
    session = ExecutionSession("s", "t", custom_metrics={"computed": lambda _progress, _elapsed: 1.0})
    session.start_execution()
    for number in range(63):
        session.set_custom_progress(f"metric {number}", number)
    with pytest.raises(InvalidProgress, match="at most 64"):
        session.set_custom_progress("one more", 1)


def test_a_metric_has_a_name_of_at_most_100_characters() -> None:
    session, _ = running_session()
    session.set_custom_progress("x" * 100, 1)
    for name in ("x" * 101, "", cast("Any", 7)):
        with pytest.raises(InvalidProgress, match="metric's name"):
            session.set_custom_progress(name, 1)
    assert list(session.progress.custom) == ["x" * 100]
