"""Events as bytes: the one JSON shape, whatever they carry."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vespera_exec.model.capacity import CapacityUse
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus, MessageLevel, ProgressType
from vespera_exec.model.events import ExecutionEvent
from vespera_exec.model.inputs import Answer, Question
from vespera_exec.model.leases import Lease
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.progress import Progress, ProgressState
from vespera_exec.model.stays import PhaseRecord
from vespera_exec.store.encoding import encode_event, encode_lifecycle, encode_progress, micros, moment_of, with_cursor

MOMENTS = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


@given(
    st.builds(
        ExecutionEvent,
        event_type=st.sampled_from(EventType),
        timestamp=MOMENTS,
        task_id=st.text(max_size=9),
        execution_id=st.none() | st.text(max_size=9),
        sequence=st.integers(1, 10**9),
        old_status=st.none() | st.sampled_from(ExecutionStatus),
        new_status=st.none() | st.sampled_from(ExecutionStatus),
        message=st.text(max_size=30),
        phase=st.none() | st.sampled_from(ExecutionPhase),
        level=st.none() | st.sampled_from(MessageLevel),
        progress_data=st.none() | st.dictionaries(st.text(max_size=4), st.integers(0, 100), max_size=3),
        details=st.dictionaries(st.text(max_size=4), st.integers(-(2**63), 2**63 - 1) | st.text(), max_size=3),
    )
)
def test_the_stored_body_is_the_stream_message_without_its_cursor(event: ExecutionEvent) -> None:
    message = event.to_stream_message()
    stored = orjson.loads(encode_event(event))
    assert {**stored, "cursor": None} == message
    assert orjson.loads(with_cursor(encode_event(event), 7)) == {**stored, "cursor": 7}


@pytest.mark.parametrize("strange", [object(), {1, 2}, "\ud800", 2**70, float("nan"), {1: 2}, b"\xff"])
def test_what_json_cannot_hold_is_replaced_and_never_refused(strange: object) -> None:
    event = ExecutionEvent(event_type=EventType.INFO, task_id="t", sequence=1, details={"strange": strange, "a": 1})
    stored = orjson.loads(encode_event(event))
    assert stored["details"]["a"] == 1
    assert stored["task_id"] == "t"


PERCENTAGES = {"current": st.floats(0, 100)}
COUNTS = {
    "progress_type": st.sampled_from([kind for kind in ProgressType if kind is not ProgressType.PERCENTAGE]),
    "current": st.floats(0, 1e12),
    "total": st.none() | st.floats(0, 1e12),
}
WORDS = {
    "unit": st.text(max_size=4),
    "message": st.text(max_size=9),
    "details": st.dictionaries(st.text(max_size=4), st.none() | st.integers(0, 9) | st.text(max_size=4), max_size=2),
    "updated_at": MOMENTS,
}
STATES = st.builds(ProgressState, **PERCENTAGES, **WORDS) | st.builds(ProgressState, **COUNTS, **WORDS)
PARTS = {
    "execution_id": st.text(min_size=1, max_size=9),
    "overall": STATES,
    "phases": st.dictionaries(st.sampled_from(ExecutionPhase), STATES, max_size=2),
    "custom": st.dictionaries(st.text(max_size=4), STATES, max_size=2),
    "reached": st.floats(0, 100),
    "completed": st.booleans(),
    "sequence": st.integers(0, 10**9),
    "updated_at": MOMENTS,
}


@given(st.builds(Progress, **PARTS))
def test_progress_comes_back_whole_though_its_defaults_are_not_stored(progress: Progress) -> None:
    assert Progress.from_dict(orjson.loads(encode_progress(progress))) == progress


def test_every_field_of_progress_is_among_those_that_come_back() -> None:
    assert {each.name for each in fields(Progress)} == set(PARTS)
    assert {each.name for each in fields(ProgressState)} == {*COUNTS, *WORDS}


def test_strange_details_do_not_keep_progress_from_being_stored() -> None:
    strange = ProgressState(current=5, message="\ud800", details={"strange": object()})
    stored = Progress.from_dict(orjson.loads(encode_progress(Progress(execution_id="e", overall=strange))))
    assert replace(stored.overall, message="", details={}) == replace(strange, message="", details={})


AT = datetime(2026, 3, 1, 12, 0, 0, 5, tzinfo=UTC)
LIFE: dict[str, Any] = {
    "execution_id": "e",
    "task_id": "t",
    "run_id": "r",
    "attempt": 2,
    "parent_execution_id": "p",
    "role_name": "build",
    "status": ExecutionStatus.PAUSED,
    "status_message": "Waiting",
    "paused_from": ExecutionStatus.RUNNING,
    "priority": 0,
    "owner": "o",
    "generation": 3,
    "active_seconds": 1.5,
    "paused_seconds": 2.5,
    "queue_seconds": 3.5,
    "current_phase": ExecutionPhase.EXECUTION,
    "phase_entered_active": 0.5,
    "phases": (
        PhaseRecord(ExecutionPhase.SETUP, AT, AT, 0.25, "completed"),
        PhaseRecord(ExecutionPhase.EXECUTION, AT + timedelta(seconds=1)),
    ),
    "cancellation_reason": "",
    "recovery_attempts": 1,
    "checkpoint": {"done": [1, None]},
    "restored_from": "c",
    "claims": 4,
    "lease": Lease(worker="w", principal="p", fence=4, seconds=30.0, digest="d"),
    "inputs": (
        Question(key="k", asked_at=AT, answer=Answer(action="accept", content={"yes": True}, at=AT)),
        Question(key="other"),
    ),
    "capacity": (
        CapacityUse(allocation_id="a", pool="p", type="slots", amount=1.0, started_at=AT, ended_at=AT, cost=0.5),
    ),
    "outcome": {"error": {"code": "X"}, "big": 2**70},
    "sequence": 9,
    **dict.fromkeys(
        ("not_before", "created_at", "queued_at", "started_at", "paused_at", "resumed_at", "completed_at"), AT
    ),
    **dict.fromkeys(("clock_read_at", "checkpoint_at"), AT.replace(microsecond=0)),
}


def test_a_lifecycle_comes_back_whole_though_its_defaults_are_not_stored() -> None:
    assert {each.name for each in fields(Lifecycle)} == set(LIFE)
    told = {name: value for name, value in LIFE.items() if name != "outcome"}
    kept: list[dict[str, Any]] = [told, *({"execution_id": "e", name: told[name]} for name in told)]
    for life in (Lifecycle(**each) for each in kept):
        stored = encode_lifecycle(life)
        assert Lifecycle.from_dict(orjson.loads(stored)) == life
        assert Lifecycle.from_dict(life.to_dict()) == life  # as versions before stored it
        assert len(stored) <= len(orjson.dumps(life.to_dict()))
    assert orjson.loads(encode_lifecycle(Lifecycle(execution_id="e"))) == {"execution_id": "e"}


def test_a_strange_outcome_does_not_keep_a_lifecycle_from_being_stored() -> None:
    stored = Lifecycle.from_dict(orjson.loads(encode_lifecycle(Lifecycle(**LIFE))))
    assert stored == replace(Lifecycle(**LIFE), outcome={"error": {"code": "X"}, "big": str(2**70)})


@given(MOMENTS)
def test_a_stamp_comes_back_to_the_microsecond(moment: datetime) -> None:
    stamp = micros(moment)
    assert stamp is not None
    assert moment_of(stamp) == moment
    assert micros(moment.replace(tzinfo=None)) == stamp
    assert micros(moment + timedelta(microseconds=1)) == stamp + 1


def test_no_moment_is_no_stamp() -> None:
    assert micros(None) is None
