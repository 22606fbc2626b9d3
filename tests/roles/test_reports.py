"""What a child writes to its progress descriptor is read whatever it is; what it means reaches the log."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roles.losses import Losses
from roles.reports import Held, Intake, Report, parse_report
from vespera_exec.engine.tracking import SessionTracking
from vespera_exec.model.enums import EventType, ExecutionPhase, MessageLevel, ProgressType
from vespera_exec.model.progress import ProgressReport
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from vespera_exec.model.session import ExecutionSession


def session() -> ExecutionSession:
    return Task(title="t").start_execution("r")


def warnings(running: ExecutionSession) -> list[str]:
    return [event.message for event in running.status_events if event.event_type is EventType.WARNING]


def test_percentage_with_a_message() -> None:
    assert parse_report(b'{"progress": 40, "message": "half"}').progress == ProgressReport(current=40, message="half")


@pytest.mark.parametrize(
    ("line", "kind", "unit"),
    [
        ('{"done": 3, "total": 10}', ProgressType.STEPS, "steps"),
        ('{"done": 3, "total": 10, "unit": "files"}', ProgressType.ITEMS, "files"),
        ('{"done": 3, "total": 10, "type": "items"}', ProgressType.ITEMS, "items"),
        ('{"bytes": 3, "total": 10}', ProgressType.BYTES, "bytes"),
        ('{"done": 3, "total": 10, "type": "custom", "unit": "dB"}', ProgressType.CUSTOM, "dB"),
    ],
)
def test_counted_units_have_their_type(line: str, kind: ProgressType, unit: str) -> None:
    report = parse_report(line.encode()).progress
    assert report is not None
    assert (report.progress_type, report.current, report.total, report.unit) == (kind, 3, 10, unit)


def test_metric_details_and_reset_are_kept() -> None:
    report = parse_report(b'{"progress": 4, "metric": "loss", "details": {"a": 1}, "reset": true}').progress
    assert report == ProgressReport(current=4, metric="loss", details={"a": 1}, reset=True)


def test_one_line_may_carry_several_things() -> None:
    report = parse_report(b'{"progress": 4, "checkpoint": null, "log": "text", "level": "warning", "result": [1]}')
    assert report.progress == ProgressReport(current=4)
    assert (report.checkpoint, report.result) == (Held(None), Held([1]))
    assert report.log == (MessageLevel.WARNING, "text", {})


def test_control_characters_do_not_get_through() -> None:
    report = parse_report(json.dumps({"message": "a\x1b[2Jb\x00", "progress": 1}).encode()).progress
    assert report is not None
    assert report.message == "a\ufffd[2Jb\ufffd"


@pytest.mark.parametrize(
    "line",
    [
        b"plain text", b"[1, 2]", b"{}", b'{"what": 1}', b'{"progress": "4"}', b'{"progress": true}', b'{"done": [1]}',
        b'{"progress": NaN}', b"\xff\xfe", b"[" * 200_000, b'{"done": 1, "type": "nonsense"}', b"null",
        b'{"message": ' + b"[" * 1000 + b"]" * 1000 + b"}", b'{"progress": 1, "metric": 3}', b'{"log": ["x"]}',
        b'{"done": 1, "unit": {}}', b'{"done": 1, "type": [1]}', b'{"log": "x", "level": 3}', b'{"result_part": [1]}',
        b'{"log": "x", "level": "loud"}', b'{"message": "\\ud800"}', b"{" * 5000,
    ],
)  # fmt: skip
def test_line_that_makes_no_sense_is_a_problem_not_an_exception(line: bytes) -> None:
    report = parse_report(line)
    assert report.problem
    assert report == Report(problem=report.problem)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda each: st.lists(each, max_size=3),
)
keys = st.sampled_from(
    ["progress", "done", "total", "bytes", "unit", "message", "details", "metric", "type", "reset", "checkpoint",
     "log", "level", "result", "result_part", "result_end", "error", "cancelled", "else"]
)  # fmt: skip


@settings(deadline=None)  # on a busy machine an example takes longer than the default allows
@given(
    st.lists(st.binary(max_size=80) | st.dictionaries(keys, json_values).map(lambda each: json.dumps(each).encode()))
)
def test_whatever_is_written_the_log_takes_it_or_counts_it(lines: list[bytes]) -> None:
    running = session()
    intake = Intake(SessionTracking(running))
    for line in lines:
        intake.line(line)
    warnings = [event for event in running.status_events if event.event_type is EventType.WARNING]
    assert len([each for each in warnings if "not understood" in each.message]) == min(1, intake.problems)


def test_reports_reach_the_session() -> None:
    running = session()
    intake = Intake(SessionTracking(running))
    intake.line(b'{"done": 1, "total": 4}')
    intake.line(b'{"progress": 7, "metric": "loss"}')
    intake.line(b'{"checkpoint": {"at": 3}}')
    assert running.phase_progress[ExecutionPhase.EXECUTION].get_percentage() == 25
    assert running.custom_progress["loss"].current == 7
    assert running.lifecycle.checkpoint == {"at": 3}


def test_refused_report_is_counted_and_told_once() -> None:
    running = session()
    intake = Intake(SessionTracking(running))
    for line in (b'{"progress": 50}', b'{"progress": 40}', b'{"progress": 400}', b"garbage"):
        intake.line(line)
    assert intake.problems == 3
    assert sum(event.event_type is EventType.WARNING for event in running.status_events) == 1


@pytest.mark.parametrize("first", [b"garbage", b'{"progress": -1}'])
def test_first_problem_is_logged_whatever_it_is(first: bytes) -> None:
    running = session()
    intake = Intake(SessionTracking(running))
    for line in (first, b"more garbage", b'{"progress": -1}'):
        intake.line(line)
    assert intake.problems == 3
    assert sum(event.event_type is EventType.WARNING for event in running.status_events) == 1


@pytest.mark.parametrize("key", ["checkpoint", "details", "result", "error"])
def test_value_nested_too_deeply_raises_nothing_and_the_next_line_is_read(key: str) -> None:
    running = session()
    intake = Intake(SessionTracking(running))
    deep = b"[" * 1000 + b"]" * 1000
    intake.line(b'{"progress": 1, "%s": {"a": %s}}' % (key.encode(), deep))
    intake.line(b'{"progress": 2}')
    intake.finish()
    assert running.phase_progress[ExecutionPhase.EXECUTION].current == 2


def test_report_after_the_end_changes_nothing_and_raises_nothing() -> None:
    running = session()
    intake = Intake(SessionTracking(running))
    running.fail("over")
    intake.line(b'{"checkpoint": 1}')
    intake.line(b'{"progress": 50}')
    assert running.lifecycle.checkpoint is None
    assert intake.problems == 2


def test_result_in_parts_is_put_together() -> None:
    intake = Intake(SessionTracking(session()))
    for part in ('{"a": [1', ", 2]}"):
        intake.line(json.dumps({"result_part": part}).encode())
    assert intake.result is None
    intake.line(b'{"result_end": {"quality_score": 0.5}}')
    assert intake.result == Held({"a": [1, 2]})
    assert intake.about == {"quality_score": 0.5}


REFUSED = [
    (b'{"checkpoint": %s}' % json.dumps("x" * 256 * 1024).encode(), "at most 262,144"),
    (b'{"checkpoint": 9223372036854775808}', "64 bits"),
    (b'{"checkpoint": {"at": -18446744073709551617}}', "64 bits"),
    (b'{"checkpoint": %s}' % (b"[" * 40 + b"]" * 40), "levels deep"),
]


@pytest.mark.parametrize(("line", "why"), REFUSED, ids=["large", "of 64 bits", "of 65 bits", "deep"])
def test_refused_checkpoint_is_told_and_the_one_before_it_stays(line: bytes, why: str) -> None:
    running = session()
    intake = Intake(SessionTracking(running))
    intake.line(b'{"checkpoint": "the first"}')
    intake.line(b"garbage")
    intake.line(line)
    assert running.lifecycle.checkpoint == "the first"
    assert [why in each for each in warnings(running)] == [False, True]


def test_what_stands_in_one_line_with_a_refused_checkpoint_is_kept() -> None:
    running = session()
    intake = Intake(SessionTracking(running))
    intake.line(b'{"checkpoint": 9223372036854775808, "log": "a line", "result": 3}')
    assert intake.result == Held(3)
    assert "a line" in [event.message for event in running.status_events]


def test_integers_come_as_they_were_written_or_not_at_all() -> None:
    assert parse_report(b'{"result": [18446744073709551615, -9223372036854775808, 1e300]}').result == Held(
        [18446744073709551615, -9223372036854775808, 1e300]
    )
    report = parse_report(b'{"result": 18446744073709551616}')
    assert (report.result, report.problem) == (None, None)
    assert "64 bits" in (report.lost or "")


def test_a_flood_of_losses_is_told_in_few_lines_and_none_is_left_out() -> None:
    running, now = session(), 0.0
    losses = Losses(SessionTracking(running), clock=lambda: now)
    for number in range(100):
        now = number / 10
        losses.add(f"loss {number}")
    losses.tell()
    losses.tell()
    assert warnings(running) == [
        "loss 0",
        "loss 50 (and 49 more since the last warning)",
        "loss 99 (and 48 more since the last warning)",
    ]
