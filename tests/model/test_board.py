"""The board of a plan: what may follow what, what an undone decision leaves, and that the log says the same."""

from __future__ import annotations

import math
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_harness import START, HandClock, KeptLog, undone

from vespera_exec.errors import InvalidInput, InvalidProgress, InvalidTransitionError, NotFound
from vespera_exec.model.enums import EventType, ExecutionStatus, MessageLevel, StepStatus
from vespera_exec.model.events import ExecutionEvent
from vespera_exec.model.ledger import Batch, CheckpointRecord, Ledger
from vespera_exec.model.plans.board import MAX_MESSAGE, PlanBoard
from vespera_exec.model.plans.check import checked
from vespera_exec.model.plans.plan import PLAN_ROLE, ExecutionPlan, PlanStep
from vespera_exec.model.plans.steps import PlanState, StepState
from vespera_exec.model.session import ExecutionSession

if TYPE_CHECKING:
    from collections.abc import Callable

S = StepStatus
FAULT = {"code": "E_NET", "message": "no route", "traceback": "x" * 9000}


class Rows(KeptLog):
    """Keeps the last row of each step, too, and every checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, StepState] = {}
        self.plans: dict[str, PlanState] = {}
        self.checkpoints: list[CheckpointRecord] = []

    def append(self, batch: Batch) -> None:
        super().append(batch)
        for row in batch.rows:
            match row:
                case StepState():
                    self.steps[row.step_id] = row
                case PlanState():
                    self.plans[row.execution_id] = row
                case CheckpointRecord():
                    self.checkpoints.append(row)
                case _:
                    pass


def plan_of(*weights: float, step_checkpoints: bool = False) -> ExecutionPlan:
    steps = (PlanStep(id=f"s{at}", role="r", weight=weight) for at, weight in enumerate(weights))
    return checked(ExecutionPlan(id="p", name="P", steps=tuple(steps), step_checkpoints=step_checkpoints))


def board_of(*weights: float, step_checkpoints: bool = False, hand: HandClock | None = None) -> tuple[PlanBoard, Rows]:
    log, hand = Rows(), hand or HandClock()
    session = ExecutionSession("e1", "t1", PLAN_ROLE, ledger=Ledger(sink=log, clock=hand.clock))
    session.start_execution()
    board = PlanBoard(session, plan_of(*weights, step_checkpoints=step_checkpoints))
    board.open(variables={"v": 1})
    return board, log


def counted(board: PlanBoard) -> dict[StepStatus, int]:
    return {status: many for status, many in board.counts.items() if many}


def folded(log: Rows) -> tuple[dict[str, StepState], PlanState]:
    """Where the steps and the variables stand by the events alone, in JSON and back."""
    state = PlanState(execution_id="e1")
    steps = {name: StepState(execution_id="e1", step_id=name, position=row.position) for name, row in log.steps.items()}
    for each in log.of("e1"):
        event = ExecutionEvent.from_stream_message(each.to_stream_message())
        state = state.evolve(event)
        if event.step_id is not None:
            steps[event.step_id] = steps[event.step_id].evolve(event)
    return steps, state


def test_opening_tells_of_the_plan_and_leaves_a_row_for_every_step() -> None:
    board, log = board_of(1, 1, 1)
    assert board.state == log.plans["e1"]
    assert (board.state.plan_id, board.state.name, board.state.steps, board.state.variables) == ("p", "P", 3, {"v": 1})
    assert [(row.step_id, row.position, row.status) for row in log.steps.values()] == [
        (f"s{at}", at, S.PENDING) for at in range(3)
    ]
    assert counted(board) == {S.PENDING: 3}
    assert set(board.counts) == set(S)
    assert board.percentage == 0.0


def test_a_step_goes_from_its_start_to_its_end() -> None:
    hand = HandClock()
    board, log = board_of(1, 1, hand=hand)
    board.started("s0", role="r", attempt=1, task_id="t2", run_id="r2", message="Building")
    assert (board.step("s0").status, board.step("s0").started_at, board.step("s0").percentage) == (
        S.RUNNING,
        START,
        0.0,
    )
    board.progress("s0", 50, "half")
    assert board.percentage == 25.0
    board.waiting("s0", "answer", "Go on?")
    assert (board.step("s0").status, board.step("s0").waiting_for) == (S.WAITING, "answer")
    board.waiting("s0", None)
    assert (board.step("s0").status, board.step("s0").waiting_for) == (S.RUNNING, None)
    hand.pass_(5)
    board.completed("s0", session_id="x9", result_of="x9", message="Built")
    done = board.step("s0")
    assert (done.status, done.session_id, done.result_of, done.message) == (S.COMPLETED, "x9", "x9", "Built")
    assert done.ended_at == START + timedelta(seconds=5)
    assert counted(board) == {S.COMPLETED: 1, S.PENDING: 1}
    assert board.percentage == 50.0
    assert log.steps["s0"] == done
    assert [event.event_type for event in log.of("e1") if event.step_id == "s0"] == [
        EventType.STEP_STARTED,
        EventType.STEP_PROGRESS,
        EventType.STEP_WAITING,
        EventType.STEP_WAITING,
        EventType.STEP_COMPLETED,
    ]


def test_a_failure_that_is_not_final_is_tried_again() -> None:
    board, log = board_of(1)
    board.started("s0", role="r", attempt=1)
    board.progress("s0", 80)
    later = START + timedelta(seconds=30)
    board.failed("s0", FAULT, final=False, not_before=later, recoveries=1)
    back = board.step("s0")
    assert (back.status, back.not_before, back.waiting_for, back.recoveries) == (S.PENDING, later, "backoff", 1)
    assert back.error == {"code": "E_NET", "message": "no route"}
    assert board.percentage == 0.0
    board.started("s0", role="other", attempt=2, is_fallback=True)
    assert (board.step("s0").attempt, board.step("s0").is_fallback, board.step("s0").not_before) == (2, True, None)
    board.failed("s0", FAULT, continues=True)
    assert (board.step("s0").status, board.step("s0").lets_on) == (S.FAILED, True)
    levels = [event.level for event in log.of("e1") if event.event_type is EventType.STEP_FAILED]
    assert levels == [MessageLevel.WARNING, MessageLevel.ERROR]
    assert board.percentage == 100.0


def test_whatever_ends_a_step_it_counts_in_full() -> None:
    board, _ = board_of(1, 2, 3, 4)
    board.skipped("s0", "needs x, which failed")
    assert (board.percentage, board.step("s0").reason) == (10.0, "needs x, which failed")
    board.cancelled("s1", "no longer wanted")
    board.failed("s2", {"code": "REFERENCE_MISSING", "message": "not there"})
    assert board.percentage == pytest.approx(60)
    board.completed("s3", cached=True, result_of="e0")
    assert board.percentage == 100.0
    assert counted(board) == {S.SKIPPED: 1, S.CANCELLED: 1, S.FAILED: 1, S.COMPLETED: 1}
    assert board.step("s3").cached


def test_steps_without_weight_are_left_out_unless_all_are() -> None:
    board, _ = board_of(0, 3, 1)
    board.completed("s0", cached=True)
    assert board.percentage == 0.0
    board.completed("s2", cached=True)
    assert board.percentage == pytest.approx(25)
    board, _ = board_of(0, 0)
    board.completed("s0", cached=True)
    assert board.percentage == 50.0


def test_strange_weights_give_a_percentage_all_the_same() -> None:
    board, _ = board_of(1e-300, 1e6, 1e6, 1e-6)
    for at, expected in ((1, 50), (0, 50), (2, 100)):
        board.completed(f"s{at}", cached=True)
        assert board.percentage == pytest.approx(expected)
    assert board.percentage < 100
    board.completed("s3", cached=True)
    assert board.percentage == 100.0


_ILLEGAL: list[tuple[str, Callable[[PlanBoard], object]]] = [
    ("completed", lambda board: board.started("s0", role="r", attempt=2)),
    ("completed", lambda board: board.completed("s0")),
    ("completed", lambda board: board.completed("s0", cached=True)),
    ("completed", lambda board: board.progress("s0", 100.0)),
    ("completed", lambda board: board.waiting("s0", None)),
    ("completed", lambda board: board.waiting("s0", "slot")),
    ("completed", lambda board: board.failed("s0", FAULT)),
    ("completed", lambda board: board.failed("s0", FAULT, final=False)),
    ("completed", lambda board: board.skipped("s0", "late")),
    ("completed", lambda board: board.cancelled("s0", "late")),
    ("running", lambda board: board.started("s1", role="r", attempt=2)),
    ("pending", lambda board: board.completed("s2")),
    ("pending", lambda board: board.progress("s2", 1)),
    ("pending", lambda board: board.waiting("s2", "slot")),
]


@pytest.mark.parametrize(("status", "change"), _ILLEGAL)
def test_what_does_not_fit_is_refused_and_changes_nothing(status: str, change: Callable[[PlanBoard], object]) -> None:
    board, log = board_of(1, 1, 1, step_checkpoints=True)
    board.started("s0", role="r", attempt=1)
    board.completed("s0")
    board.started("s1", role="r", attempt=1)
    before = (dict(board.states), board.counts, board.percentage, len(log.events), len(log.checkpoints))
    with pytest.raises(InvalidTransitionError, match=f"Cannot go from {status} "):
        change(board)
    assert (dict(board.states), board.counts, board.percentage, len(log.events), len(log.checkpoints)) == before


def test_unknown_steps_wrong_numbers_and_ended_executions_are_refused() -> None:
    board, log = board_of(1)
    with pytest.raises(NotFound, match="no step 'ghost'"):
        board.started("ghost", role="r", attempt=1)
    board.started("s0", role="r", attempt=1)
    for wrong in (math.nan, math.inf, -1, 100.5):
        with pytest.raises(InvalidProgress):
            board.progress("s0", wrong)
    with pytest.raises(InvalidInput):
        board.set_variables({"x": object()})
    board.session.fail("over")
    count = len(log.events)
    with pytest.raises(InvalidTransitionError):
        board.completed("s0")
    assert (board.step("s0").status, len(log.events)) == (S.RUNNING, count)


def test_the_same_again_is_no_event() -> None:
    board, log = board_of(1)
    board.started("s0", role="r", attempt=1)
    board.progress("s0", 10, "ten")
    board.waiting("s0", "slot", "full")
    count = len(log.events)
    board.progress("s0", 10, "full")
    board.waiting("s0", "slot", "full")
    board.set_variables({"v": 1})
    assert len(log.events) == count
    board.waiting("s0", "slot", "fuller")
    board.waiting("s0", None, "on")
    board.waiting("s0", None, "and on")
    assert len(log.events) == count + 2


def test_long_texts_are_cut() -> None:
    board, _ = board_of(1, 1)
    board.failed("s0", {"code": "E", "message": "x" * 50_000})
    board.skipped("s1", "y" * 50_000)
    assert len(board.step("s0").error["message"]) == len(board.step("s1").reason) == MAX_MESSAGE


def test_an_undone_decision_leaves_the_board_as_it_was() -> None:
    board, log = board_of(1, 1, 1, step_checkpoints=True)
    board.started("s0", role="r", attempt=1)
    board.progress("s0", 40)
    before = (dict(board.states), board.state, board.counts, board.percentage)
    with undone(board.session.ledger):
        board.completed("s0")
        board.skipped("s1", "no")
        board.started("s2", role="r", attempt=1)
        board.set_variables({"w": 2})
        assert counted(board) == {S.COMPLETED: 1, S.SKIPPED: 1, S.RUNNING: 1}
    assert (dict(board.states), board.state, board.counts, board.percentage) == before
    assert log.checkpoints == []
    board.completed("s0")
    assert counted(board) == {S.COMPLETED: 1, S.PENDING: 2}
    assert [event.sequence for event in log.of("e1")] == list(range(1, len(log.of("e1")) + 1))


def test_a_refused_change_within_a_decision_undoes_only_itself() -> None:
    board, _ = board_of(1, 1)
    with board.session.ledger:
        board.started("s0", role="r", attempt=1)
        with pytest.raises(InvalidTransitionError):
            board.completed("s1")
        board.completed("s0")
    assert counted(board) == {S.COMPLETED: 1, S.PENDING: 1}


def test_a_step_that_was_done_or_has_failed_leaves_a_checkpoint_in_the_same_decision() -> None:
    board, log = board_of(1, 1, 1, 1, step_checkpoints=True)
    board.started("s0", role="r", attempt=1)
    board.completed("s0")
    board.started("s1", role="r", attempt=1)
    board.failed("s1", FAULT, final=False)
    board.failed("s1", FAULT)
    board.skipped("s2", "no")
    board.cancelled("s3", "no")
    assert [(each.kind, each.metadata) for each in log.checkpoints] == [
        ("step", {"step": "s0", "completed_steps": 1}),
        ("step", {"step": "s1", "completed_steps": 1}),
    ]
    first = log.checkpoints[0]
    batch = next(each for each in log.batches if any(event.sequence == first.sequence for event in each.events))
    assert [event.event_type for event in batch.events] == [EventType.STEP_COMPLETED, EventType.CHECKPOINT_CREATED]
    assert batch.events[-1].step_id == "s0"
    assert batch.events[-1].details == {"checkpoint_id": first.checkpoint_id, "kind": "step", **first.metadata}


def test_a_checkpoint_marks_its_own_place_in_the_log() -> None:
    board, log = board_of(1)
    record = board.checkpoint("call", metadata={"why": "before the risky part"})
    event = log.of("e1")[-1]
    assert (record.sequence, record.created_at, record.execution_id) == (event.sequence, event.timestamp, "e1")
    assert (record.kind, record.metadata["why"], log.checkpoints) == ("call", "before the risky part", [record])
    assert (event.event_type, event.details["checkpoint_id"]) == (EventType.CHECKPOINT_CREATED, record.checkpoint_id)
    assert "state" not in event.details
    assert board.session.lifecycle.checkpoint is None


def test_what_stands_as_it_stood_there_is_not_reset() -> None:
    board, log = board_of(1, 1)
    board.started("s0", role="r", attempt=1)
    board.completed("s0", result_of="x")
    elsewhere = {step: replace(state, execution_id="e0", sequence=99) for step, state in board.states.items()}
    count = len(log.of("e1"))
    board.reset(elsewhere, board.state.variables, checkpoint_id="c1")
    assert [event.event_type for event in log.of("e1")[count:]] == [EventType.VARIABLES_CHANGED]


def test_reset_goes_back_and_steps_that_are_not_named_begin_anew() -> None:
    board, log = board_of(1, 1, 1)
    board.started("s0", role="r", attempt=1)
    board.completed("s0", result_of="x")
    then, variables = dict(board.states), board.state.variables
    board.started("s1", role="r", attempt=1)
    board.failed("s1", FAULT)
    board.set_variables({"v": 2})
    count = len(log.of("e1"))
    board.reset({name: then[name] for name in ("s0", "s1")}, variables, checkpoint_id="c1")
    assert [event.event_type for event in log.of("e1")[count:]] == [EventType.VARIABLES_CHANGED, EventType.STEP_RESET]
    assert {name: each.status for name, each in board.states.items()} == {
        "s0": S.COMPLETED,
        "s1": S.PENDING,
        "s2": S.PENDING,
    }
    assert (board.step("s0"), board.step("s1").error, board.step("s1").attempt) == (then["s0"], {}, 0)
    assert (board.state.variables, board.state.restores, board.state.restored_from) == ({"v": 1}, 1, "c1")
    assert counted(board) == {S.COMPLETED: 1, S.PENDING: 2}
    board.started("s1", role="r", attempt=1)
    board.completed("s1")
    board.reset({}, {}, checkpoint_id="c2")
    assert counted(board) == {S.PENDING: 3}
    assert board.percentage == 0.0


def test_a_new_session_begins_where_an_ended_one_stood() -> None:
    ended, _ = board_of(1, 3)
    ended.started("s0", role="r", attempt=1)
    ended.completed("s0", result_of="x")
    log = Rows()
    session = ExecutionSession("e2", "t1", PLAN_ROLE, ledger=Ledger(sink=log))
    session.enqueue()
    board = PlanBoard(session, ended.plan)
    board.open(states=ended.states, variables={"v": 9}, restored_from="c1")
    again = board.step("s0")
    assert (again.status, again.execution_id, again.result_of, again.position) == (S.COMPLETED, "e2", "x", 0)
    assert (board.percentage, counted(board)) == (25.0, {S.COMPLETED: 1, S.PENDING: 1})
    assert (board.state.restored_from, board.state.variables) == ("c1", {"v": 9})
    assert log.steps == dict(board.states)
    assert len(log.batches[-1].events) == 2


def test_a_restored_board_stands_as_the_rows_say_and_goes_on_counting() -> None:
    board, log = board_of(1, 1, 2)
    board.started("s0", role="r", attempt=1)
    board.completed("s0")
    board.started("s2", role="r", attempt=1)
    board.progress("s2", 50)
    rows = [row for row in log.steps.values() if row.step_id != "s1"]
    later = Rows()
    session = ExecutionSession.restored(log.lives["e1"], log.progress["e1"], ledger=Ledger(sink=later))
    again = PlanBoard.restored(session, board.plan, rows, log.plans["e1"])
    assert later.events == []
    assert dict(again.states) == dict(board.states)
    assert (again.counts, again.percentage, again.state) == (board.counts, board.percentage, board.state)
    again.completed("s2")
    assert [event.sequence for event in later.events] == [log.of("e1")[-1].sequence + 1]
    assert again.percentage == 75.0


def test_readers_in_other_threads_never_see_a_step_too_many() -> None:
    board, _ = board_of(*[1.0] * 200)
    wrong: list[object] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            if sum(board.counts.values()) != 200 or not 0 <= board.percentage <= 100:
                wrong.append(board.counts)

    def work(part: int) -> None:
        for at in range(part, 200, 2):
            board.started(f"s{at}", role="r", attempt=1)
            board.completed(f"s{at}")

    readers = [threading.Thread(target=read) for _ in range(2)]
    workers = [threading.Thread(target=work, args=(part,)) for part in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for each in (*readers, *workers):
            each.start()
        for each in workers:
            each.join(10)
        stop.set()
        for each in readers:
            each.join(10)
    finally:
        sys.setswitchinterval(before)
    assert (wrong, counted(board), board.percentage) == ([], {S.COMPLETED: 200}, 100.0)


_steps = st.sampled_from(["s0", "s1", "s2", "s3"])


def _undone(board: PlanBoard, step: str) -> None:
    with undone(board.session.ledger):
        board.cancelled(step, "undone")
        board.set_variables({})


_CALLS: dict[str, Callable[[PlanBoard, str, float, dict[str, StepState]], None]] = {
    "started": lambda board, step, number, then: board.started(step, role="r", attempt=board.step(step).attempt + 1),
    "progress": lambda board, step, number, then: board.progress(step, number, "on"),
    "waiting": lambda board, step, number, then: board.waiting(step, "slot"),
    "going": lambda board, step, number, then: board.waiting(step, None),
    "completed": lambda board, step, number, then: board.completed(step, session_id="x"),
    "cached": lambda board, step, number, then: board.completed(step, cached=True, result_of="y"),
    "failed": lambda board, step, number, then: board.failed(step, FAULT, continues=number > 50),
    "again": lambda board, step, number, then: board.failed(
        step, FAULT, final=False, not_before=START if number > 50 else None, recoveries=1
    ),
    "skipped": lambda board, step, number, then: board.skipped(step, "no", continues=number > 50),
    "cancelled": lambda board, step, number, then: board.cancelled(step, "no"),
    "variables": lambda board, step, number, then: board.set_variables({"n": number}),
    "reset": lambda board, step, number, then: board.reset(then, {"n": number}, checkpoint_id="c"),
    "undone": lambda board, step, number, then: _undone(board, step),
}
_calls = st.lists(st.tuples(st.sampled_from(sorted(_CALLS)), _steps, st.floats(0, 100)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=4, max_size=4), _calls, st.booleans())
def test_the_log_the_rows_and_the_board_say_the_same(
    weights: list[float], calls: list[tuple[str, str, float]], step_checkpoints: bool
) -> None:
    board, log = board_of(*weights, step_checkpoints=step_checkpoints)
    kept: dict[str, StepState] = {}
    for what, step, number in calls:
        try:
            _CALLS[what](board, step, number, kept)
        except InvalidTransitionError:
            continue
        if number > 90:
            kept = dict(board.states)
    live: dict[str, Any] = dict(board.states)
    assert folded(log) == (live, board.state)
    assert log.steps == live
    assert log.plans["e1"] == board.state
    assert {name: StepState.from_dict(each.to_dict()) for name, each in live.items()} == live
    again = PlanBoard.restored(board.session, board.plan, log.steps.values(), board.state)
    assert (again.counts, again.percentage) == (board.counts, board.percentage)
    assert 0.0 <= board.percentage <= 100.0
    assert board.session.status is ExecutionStatus.PREPARING
    total = math.fsum(weights)
    if total > 1:
        mean = math.fsum(
            weight * (100 if each.status.is_terminal else each.percentage or 0)
            for weight, each in zip(weights, live.values(), strict=True)
        )
        assert board.percentage == pytest.approx(mean / total, abs=1e-5)
