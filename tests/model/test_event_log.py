"""Events: what each line says, in which order, how many are kept, and how they come back."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

import pytest
from model_harness import KeptLog, running_session, session_with_log, types_of

from vespera_exec.errors import InvalidInput, InvalidTransitionError
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus, MessageLevel
from vespera_exec.model.events import ExecutionEvent, new_id
from vespera_exec.model.execution import EnhancedTaskExecution
from vespera_exec.model.jsonable import clean_text, exact_json, jsonable, parsed_json, whole_json
from vespera_exec.model.ledger import Ledger
from vespera_exec.model.replay import replayed, replayed_task
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.task import Task

S = ExecutionStatus
E = EventType


def test_at_most_the_last_thousand_events_are_held() -> None:
    session, log = running_session()
    for _ in range(1200):
        session.note(MessageLevel.INFO, "line")
    assert len(session.status_events) == 1000
    assert session.status_events[-1].sequence == len(log.of("e1")) == 1200 + 4
    few = ExecutionSession(max_events=2)
    few.start_execution()
    assert types_of(few) == [E.EXECUTION_CREATED, E.EXECUTION_STARTED]


def test_a_task_without_event_streaming_holds_no_events_and_calls_nobody_back() -> None:
    heard: list[ExecutionEvent] = []
    execution = EnhancedTaskExecution(enable_event_streaming=False)
    subscription = execution.add_status_callback(heard.append)
    session = execution.start_new_session("t1", "r")
    assert subscription.wait_idle(5)
    assert (session.status_events, heard) == ([], [])
    limited = EnhancedTaskExecution(max_events_in_memory=2).start_new_session("t1", "r")
    assert len(limited.status_events) == 2
    with pytest.raises(InvalidInput):
        EnhancedTaskExecution(max_events_in_memory=-1)


def test_an_event_names_its_task_its_execution_and_its_place() -> None:
    _, log = running_session()
    for place, event in enumerate(log.events, start=1):
        assert (event.task_id, event.execution_id, event.sequence) == ("t1", "e1", place)
        assert (event.id, event.type, event.session_id) == (event.event_id, event.event_type, "e1")
    assert len({event.event_id for event in log.events}) == len(log.events)


def test_starting_is_a_change_of_status_like_any_other() -> None:
    session, log = session_with_log()
    session.start_execution()
    change, created, started = log.events
    assert (change.event_type, change.old_status, change.new_status) == (E.STATUS_CHANGE, S.IDLE, S.PREPARING)
    assert (created.event_type, started.event_type) == (E.EXECUTION_CREATED, E.EXECUTION_STARTED)
    assert (started.message, started.new_status) == ("Execution session started", None)


def test_annotations_never_claim_a_status() -> None:
    session, log = running_session()
    session.emit_status_event("info", "hello", {"a": 1})
    session.emit_status_event("warning", "hm", message="shadow", event_type="too", b=2)
    first, second = log.events[-2:]
    assert (first.old_status, first.new_status, first.details) == (None, None, {"a": 1})
    assert second.details == {"message": "shadow", "event_type": "too", "b": 2}
    assert (second.event_type, second.message) == (E.WARNING, "hm")


@pytest.mark.parametrize("kind", ["status_change", "phase_change", "progress_update", "owner_changed", "nonsense"])
def test_a_type_that_changes_state_cannot_be_emitted_by_hand(kind: str) -> None:
    session, log = running_session()
    batches = len(log.batches)
    with pytest.raises(InvalidInput):
        session.emit_status_event(kind, "trick")
    assert len(log.batches) == batches


def test_a_failure_also_records_an_error() -> None:
    session, log = running_session()
    session.fail("broken")
    assert log.types("e1")[-3:] == [E.STATUS_CHANGE, E.EXECUTION_FAILED, E.ERROR]
    assert (log.events[-1].level, log.events[-1].message) == (MessageLevel.ERROR, "broken")


@pytest.mark.parametrize(
    ("level", "kind"),
    [
        (MessageLevel.DEBUG, E.INFO),
        (MessageLevel.INFO, E.INFO),
        (MessageLevel.WARNING, E.WARNING),
        (MessageLevel.ERROR, E.ERROR),
    ],
)
def test_a_note_keeps_its_level(level: MessageLevel, kind: EventType) -> None:
    session, log = running_session()
    session.note(level, "text", {"line": 1})
    event = log.events[-1]
    assert (event.event_type, event.level, event.details) == (kind, level, {"line": 1})


def test_the_log_of_an_ended_execution_is_closed() -> None:
    session, log = running_session()
    session.complete()
    batches = len(log.batches)
    for late in (
        lambda: session.note(MessageLevel.INFO, "late"),
        lambda: session.emit_status_event("info", "late"),
        lambda: session.record_checkpoint({}),
        lambda: session.enter_phase(ExecutionPhase.CLEANUP),
        lambda: session.change_owner("late"),
    ):
        with pytest.raises(InvalidTransitionError):
            late()
    assert len(log.batches) == batches


def test_an_event_is_a_copy_and_changes_no_more() -> None:
    session, log = running_session()
    details: dict[str, Any] = {"files": ["a"]}
    session.note(MessageLevel.INFO, "x", details)
    details["files"].append("b")
    assert log.events[-1].details == {"files": ["a"]}
    with pytest.raises(AttributeError):
        log.events[-1].message = "y"  # pyright: ignore[reportAttributeAccessIssue]


class _Strange(Enum):
    ONE = 1


def test_details_of_any_kind_become_json() -> None:
    session, log = running_session()
    stamp = datetime(2026, 1, 2, tzinfo=UTC)
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    session.emit_status_event(
        "info",
        "odd \ud800 text",
        {
            "when": stamp,
            "took": timedelta(seconds=2),
            "set": {1},
            "enum": _Strange.ONE,
            "raw": b"\xff",
            "nan": float("nan"),
            "huge": 2**80,
            "object": object,
            "key": {1: "one", _Strange.ONE: 1},
            "lone": "\udfff",
            "deep": deep,
        },
    )
    event = log.events[-1]
    text = json.dumps(event.to_stream_message(), allow_nan=False)
    text.encode()
    assert event.message == "odd ? text"
    assert event.details["when"] == stamp.isoformat()
    assert (event.details["took"], event.details["set"], event.details["enum"]) == (2.0, [1], 1)
    assert (event.details["nan"], event.details["huge"]) == (None, str(2**80))
    assert ExecutionEvent.from_stream_message(json.loads(text)) == event


def test_exact_json_refuses_what_would_come_back_otherwise() -> None:
    assert exact_json({"a": [1, 2.5, None, True, (3,)]}, "it") == {"a": [1, 2.5, None, True, [3]]}
    for strange in ({1: 2}, float("inf"), {1, 2}, b"x", object(), datetime.now(UTC)):
        with pytest.raises(InvalidInput, match="it is not JSON"):
            exact_json(strange, "it")
    assert clean_text("größe") == "größe"
    assert jsonable(None) is None


def test_a_checkpoint_must_be_json() -> None:
    session, log = running_session()
    batches = len(log.batches)
    with pytest.raises(InvalidInput, match="checkpoint"):
        session.record_checkpoint({"at": object()})
    assert len(log.batches) == batches
    session.record_checkpoint({"page": 4}, "kept")
    assert session.lifecycle.checkpoint == {"page": 4}
    assert session.lifecycle.checkpoint_at == log.events[-1].timestamp


def test_a_checkpoint_takes_at_most_256_kib() -> None:
    session, _ = running_session()
    largest = "x" * (256 * 1024 - 2)
    session.record_checkpoint(largest)
    with pytest.raises(InvalidInput, match="at most 262,144"):
        session.record_checkpoint(largest + "x")
    assert session.lifecycle.checkpoint == largest


def _nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


def test_inputs_that_are_too_deep_are_refused_and_never_cut() -> None:
    task = Task("t1", inputs=_nested(32))
    assert task.inputs == _nested(32)
    with pytest.raises(InvalidInput, match=r"the inputs: .* 32 levels"):
        Task("t2", inputs=_nested(33))
    before = task.record
    with pytest.raises(InvalidInput, match="32 levels"):
        task.execution.change(inputs=_nested(33))
    assert task.record == before
    with pytest.raises(InvalidInput, match=r"it: .* 32 levels"):
        exact_json(_nested(33), "it")
    assert exact_json(_nested(32), "it") == _nested(32)


def test_the_stream_message_has_the_promised_keys() -> None:
    session, log = running_session()
    session.update_progress(5)
    message = log.events[-1].to_stream_message()
    promised = {"event_id", "timestamp", "type", "status", "message", "phase", "progress", "details"}
    assert promised | {"task_id", "execution_id", "sequence", "cursor"} <= set(message)
    assert message["status"] == {"old": None, "new": None}
    assert set(message["progress"]) == {"current", "total", "percentage", "message"}


def test_an_event_made_by_hand_takes_the_type_as_text() -> None:
    event = ExecutionEvent(event_type="info")  # pyright: ignore[reportArgumentType] - as document 000 writes it
    assert event.event_type is E.INFO
    assert event.to_stream_message()["type"] == "info"
    assert event == ExecutionEvent.from_stream_message(event.to_stream_message())
    assert (event.description, event.data) == ("", {})
    with pytest.raises(ValueError, match="nonsense"):
        ExecutionEvent(event_type="nonsense")  # pyright: ignore[reportArgumentType]


def test_ids_are_random_uuids() -> None:
    import uuid

    ids = [new_id() for _ in range(500)]
    assert len(set(ids)) == 500
    assert {(uuid.UUID(each).version, uuid.UUID(each).variant) for each in ids} == {(4, uuid.RFC_4122)}
    assert all(str(uuid.UUID(each)) == each for each in ids)


def test_the_log_replays_to_the_live_state_and_the_snapshots() -> None:
    log = KeptLog()
    task = Task("t1", "title", role="r", sink=log, inputs={"a": 1})
    session = task.enqueue_execution(priority=2, owner="me")
    session.start_execution()
    session.change_owner("you")
    session.enter_phase(ExecutionPhase.EXECUTION)
    session.update_progress(20, phase=ExecutionPhase.EXECUTION, message="on")
    session.record_checkpoint([1])
    session.pause()
    session.resume()
    task.complete_execution(False, error="no")
    assert replayed(log.events, session.session_id) == (session.lifecycle, session.progress)
    assert replayed_task(log.events, "t1") == task.record
    assert log.lives[session.session_id] == session.lifecycle
    assert log.progress[session.session_id] == session.progress
    assert log.tasks["t1"] == task.record


def test_a_log_replays_from_its_json() -> None:
    session, log = running_session()
    session.update_progress(1, 3, "one", ExecutionPhase.SETUP)
    session.recover("fault")
    session.time_out("too long")
    told = [json.loads(json.dumps(event.to_stream_message())) for event in log.events]
    assert replayed([ExecutionEvent.from_stream_message(each) for each in told], "e1") == (
        session.lifecycle,
        session.progress,
    )


def test_the_last_sequence_is_known_to_the_snapshots_also_after_an_annotation() -> None:
    session, log = running_session()
    for act in (
        lambda: session.note(MessageLevel.INFO, "x"),
        lambda: session.update_progress(5),
        lambda: session.emit_status_event("system_alert", "x"),
        lambda: session.pause(),
    ):
        act()
        stored = max(log.lives["e1"].sequence, log.progress["e1"].sequence)
        assert stored == log.events[-1].sequence
    restored = ExecutionSession.restored(log.lives["e1"], log.progress["e1"], ledger=Ledger(sink=log))
    restored.change_owner("next")
    assert log.events[-1].sequence == log.events[-2].sequence + 1
    assert (restored.lifecycle.owner, restored.lifecycle.generation) == ("next", 2)


def test_a_report_stores_the_hot_row_only() -> None:
    session, log = running_session()
    session.update_progress(5)
    assert [type(row).__name__ for row in log.batches[-1].rows] == ["Progress"]
    session.pause()
    assert {type(row).__name__ for row in log.batches[-1].rows} == {"Lifecycle", "Progress"}


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**400, 10**5000], ids=["65", "-64", "long", "longer"])
def test_an_integer_of_more_than_64_bits_is_refused_where_it_must_come_back(number: int) -> None:
    for kept in (exact_json, whole_json):
        with pytest.raises(InvalidInput, match="64 bits"):
            kept({"n": number}, "it")
    if number < 10**300:
        with pytest.raises(ValueError, match="64 bits"):
            parsed_json(f'{{"n": [{number}]}}')
    assert isinstance(jsonable(number), str)


def test_a_long_integer_far_down_is_refused_too() -> None:
    with pytest.raises(ValueError, match=r"64 bits|too deeply"):
        parsed_json("[" * 1000 + "18446744073709551616" + "]" * 1000)


def test_integers_of_up_to_64_bits_are_parsed_as_they_stand() -> None:
    text = '[18446744073709551615, -9223372036854775808, 0.12345678901234567890, "18446744073709551616"]'
    assert parsed_json(text) == [2**64 - 1, -(2**63), 0.12345678901234568, "18446744073709551616"]
