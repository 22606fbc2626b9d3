"""A burst of progress reports becomes few events; what the log ends with is what was reported last."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import pytest
from deadlines import WITHIN
from hypothesis import example, given, settings
from hypothesis import strategies as st
from role_harness import bench

from roles.registry import RoleRegistry
from roles.reports import Held, Intake
from roles.runners import process
from vespera_exec.engine.tracking import SessionTracking
from vespera_exec.model.enums import EventType, ExecutionPhase
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from pathlib import Path

    from vespera_exec.model.session import ExecutionSession

NEVER = 3600.0


def intake_of(interval: float = 0.05) -> tuple[Intake, ExecutionSession]:
    session = Task(title="t").start_execution("r")
    return Intake(SessionTracking(session), interval=interval), session


def said(intake: Intake, *reports: dict[str, Any]) -> None:
    for report in reports:
        intake.line(json.dumps(report).encode())


def kinds(session: ExecutionSession) -> list[EventType]:
    told = (EventType.PROGRESS_UPDATE, EventType.INFO, EventType.CHECKPOINT_CREATED)
    return [event.event_type for event in session.status_events if event.event_type in told]


def values(session: ExecutionSession) -> list[float]:
    return [
        event.details["phase_progress"]["current"]
        for event in session.status_events
        if "phase_progress" in event.details
    ]


def test_burst_becomes_few_events_and_the_last_value_is_exact() -> None:
    intake, session = intake_of()
    began = time.monotonic()
    said(intake, *({"done": number, "total": 10_000} for number in range(1, 10_001)))
    intake.finish()
    took = time.monotonic() - began
    assert session.phase_progress[ExecutionPhase.EXECUTION].current == 10_000
    assert len(values(session)) <= took / intake.interval + 3
    assert intake.problems == 0


def test_lone_report_is_recorded_at_once_and_so_is_that_of_a_metric() -> None:
    intake, session = intake_of(NEVER)
    said(intake, {"progress": 1}, {"metric": "loss", "progress": 9})
    assert values(session) == [1]
    assert session.custom_progress["loss"].current == 9


async def test_value_held_back_is_recorded_without_another_line() -> None:
    intake, session = intake_of()
    heard = threading.Event()
    session.add_event_callback(lambda event: heard.set() if values(session)[-1:] == [3] else None)
    with intake.flushing():
        said(intake, {"progress": 1}, {"progress": 2}, {"progress": 3})
        assert values(session) == [1]
        assert await anyio.to_thread.run_sync(heard.wait, WITHIN)
        assert values(session) == [1, 3]


async def test_end_of_the_child_records_what_is_held_back() -> None:
    intake, session = intake_of(NEVER)
    with intake.flushing():
        said(intake, {"progress": 1}, {"progress": 2})
    assert values(session) == [1, 2]


@pytest.mark.parametrize("line", [{"log": "x"}, {"checkpoint": 1}, {"result": 1}, {"error": {"message": "x"}}])
def test_progress_is_recorded_before_what_follows_it(line: dict[str, Any]) -> None:
    intake, session = intake_of(NEVER)
    said(intake, {"progress": 1}, {"progress": 2}, {"progress": 3}, line)
    assert values(session) == [1, 3]
    assert kinds(session)[:2] == [EventType.PROGRESS_UPDATE] * 2


def test_reset_and_another_type_let_the_waiting_value_out_first() -> None:
    for following in ({"progress": 2, "reset": True}, {"done": 1, "total": 9}):
        intake, session = intake_of(NEVER)
        said(intake, {"progress": 1}, {"progress": 50}, following)
        intake.finish()
        assert values(session) == [1, 50, following.get("progress", 1)]


def test_flood_of_resets_and_of_changing_types_is_coalesced_too() -> None:
    intake, session = intake_of(NEVER)
    said(intake, *({"progress": number % 100, "reset": True} for number in range(1000)))
    intake.finish()
    assert len(values(session)) <= 3
    assert values(session)[-1] == 99
    intake, session = intake_of(NEVER)
    said(intake, *(each for done in range(90) for each in ({"progress": done}, {"done": done, "total": 90})))
    intake.finish()
    assert len(values(session)) <= 3
    assert values(session)[-1] == 89


def test_refusals_of_a_burst_are_counted() -> None:
    intake, _ = intake_of(NEVER)
    said(intake, *({"progress": value} for value in (1, 50, 40, 400, -1, 60)))
    assert intake.problems == 3


def test_report_that_waits_for_an_execution_that_ends_is_a_problem() -> None:
    intake, session = intake_of(NEVER)
    said(intake, {"progress": 1}, {"progress": 2})
    session.fail("over")
    intake.finish()
    assert (values(session), intake.problems) == ([1], 1)


numbers = st.integers(-1, 6)
reports = st.fixed_dictionaries(
    {},
    optional={
        "progress": numbers, "done": numbers, "total": st.sampled_from([5, 6]), "message": st.sampled_from(["a", "b"]),
        "metric": st.sampled_from(["loss", "size"]), "reset": st.booleans(), "type": st.sampled_from(["items"]),
    },
)  # fmt: skip


@example([{"progress": 5}, {"progress": 3, "reset": True}, {"progress": 4}])
@example([{"done": 5, "total": 5}, {"done": 1, "total": 6}, {"done": 2, "total": 5}])
@example([{"progress": 5}, {"message": "a"}, {"progress": 6}])
@given(st.lists(reports, max_size=12))
@settings(deadline=None)
def test_log_ends_where_it_would_have_ended_had_every_report_been_recorded(sequence: list[dict[str, Any]]) -> None:
    ends: list[Any] = []
    for interval in (0, NEVER):
        intake, session = intake_of(interval)
        said(intake, *sequence)
        said(intake, {"result": 1})
        assert intake.result == Held(1)
        states = {**session.phase_progress, **session.custom_progress}
        shown = {
            name: (each.progress_type, each.current, each.total, each.unit, each.message)
            for name, each in states.items()
        }
        ends.append((shown, intake.problems))
    assert ends[0] == ends[1]


async def test_process_that_floods_makes_few_events(tmp_path: Path) -> None:
    script = (
        "import os; fd = int(os.environ['VESPERA_PROGRESS_FD'])\n"
        'for n in range(1, 10001): os.write(fd, b\'{"done": %d, "total": 10000}\\n\' % n)'
    )
    began = time.monotonic()
    async with bench(tmp_path, {"argv": [sys.executable, "-c", script]}) as made:
        result = await process.run(RoleRegistry().get("command"), made.work)
    took = time.monotonic() - began
    assert result.success, result.error
    assert made.percentages[-1] == 100
    assert len(made.percentages) <= took / 0.05 + 3
