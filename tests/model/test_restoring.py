"""What a checkpoint holds is what the log says up to there, and going back to it keeps what was done."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vespera_exec.errors import InvalidInput, InvalidTransitionError
from vespera_exec.model.enums import EventType, StepStatus
from vespera_exec.model.plans.board import PlanBoard
from vespera_exec.model.plans.plan import ExecutionPlan, PlanStep
from vespera_exec.model.plans.restoring import (
    BoardReplay,
    ExecutionCheckpoint,
    ExecutionState,
    put_back,
    state_of_plan,
    state_of_task,
    states_at,
)
from vespera_exec.model.progress import Progress
from vespera_exec.model.replay import replayed
from vespera_exec.model.session import ExecutionSession

if TYPE_CHECKING:
    from vespera_exec.model.events import ExecutionEvent
    from vespera_exec.model.plans.steps import StepState

S = StepStatus
IDS = ("a", "b", "c")
PLAN = ExecutionPlan(id="p", steps=tuple(PlanStep(id=each, role="r") for each in IDS), step_checkpoints=False)
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
VARIABLES = st.dictionaries(st.sampled_from(["x", "y"]), JSON_VALUES, max_size=2)


class History:
    """A board with all that its log says."""

    def __init__(self) -> None:
        self.events: list[ExecutionEvent] = []
        self.session = ExecutionSession(task_id="t", role_name="plan")
        self.session.ledger.listen(self.events.append)
        self.session.start_execution()
        self.board = PlanBoard(self.session, PLAN)
        self.board.open()

    def at(self, sequence: int) -> tuple[dict[str, StepState], Any]:
        return states_at(PLAN, self.events, sequence, execution_id=self.session.session_id)

    def do(self, name: str, step: str, value: Any) -> None:
        board, now = self.board, self.board.step(step)
        match name:
            case "start":
                board.started(step, role="r", attempt=now.attempt + 1, task_id="child", run_id="run")
            case "progress":
                board.progress(step, value % 100)
            case "wait":
                board.waiting(step, "answer" if value % 2 else None)
            case "complete":
                board.completed(step, result_of="child")
            case "fail":
                board.failed(step, {"code": f"E{value % 2}", "message": "no"}, final=value % 3 == 0)
            case "recover":
                board.failed(step, {"code": "E"}, final=False, not_before=AT, recoveries=now.recoveries + 1)
            case "skip":
                board.skipped(step, "not wanted", continues=bool(value % 2))
            case _:
                board.cancelled(step, "stop")


STEPS = st.tuples(
    st.sampled_from(["start", "start", "progress", "wait", "complete", "fail", "recover", "skip", "cancel"]),
    st.sampled_from(IDS),
    st.integers(0, 5),
)
MOVES = STEPS | st.tuples(st.just("variables"), VARIABLES) | st.tuples(st.sampled_from(["mark", "back"]))


@given(moves=st.lists(MOVES, max_size=40))
def test_the_state_of_a_checkpoint_is_what_the_board_was_then(moves: list[Any]) -> None:
    history = History()
    marked: list[tuple[int, dict[str, StepState], Any]] = []
    for kind, *told in moves:
        if kind == "variables":
            history.board.set_variables(told[0])
        elif kind == "mark":
            record = history.board.checkpoint("call")
            marked.append((record.sequence, dict(history.board.states), history.board.state))
        elif kind == "back":
            if marked:
                _, states, state = marked[0]
                history.board.reset(put_back(states, history.board.states), state.variables, checkpoint_id="c")
        else:
            with suppress(InvalidTransitionError):
                history.do(kind, told[0], told[1])
    for sequence, states, state in marked:
        assert history.at(sequence) == (states, state)


@given(moves=st.lists(STEPS, max_size=25), more=st.lists(STEPS, max_size=10), then=VARIABLES, now=VARIABLES)
def test_after_a_restore_states_and_variables_are_those_of_the_checkpoint(
    moves: list[Any], more: list[Any], then: dict[str, Any], now: dict[str, Any]
) -> None:
    history = History()

    def go(moves: list[Any]) -> None:
        for kind, step, value in moves:
            with suppress(InvalidTransitionError):
                history.do(kind, step, value)

    go(moves)
    history.board.set_variables(then)
    place = history.board.checkpoint("call")
    before = dict(history.board.states)
    go(more)
    history.board.set_variables(now)
    reached = {step: state.attempt for step, state in history.board.states.items()}
    states, state = history.at(place.sequence)
    history.board.reset(put_back(states, history.board.states), state.variables, checkpoint_id=place.checkpoint_id)
    assert history.board.state.variables == then
    assert history.board.state.restored_from == place.checkpoint_id
    for step, found in history.board.states.items():
        kept = before[step].status is S.COMPLETED or (before[step].status is S.SKIPPED and before[step].continues)
        assert found.attempt == reached[step]
        if kept:
            assert replace(found, attempt=0, sequence=0) == replace(before[step], attempt=0, sequence=0)
        else:
            assert (found.status, found.task_id, found.percentage, found.error) == (S.PENDING, None, None, {})


def test_what_was_skipped_for_want_of_a_failed_step_is_pending_again() -> None:
    history = History()
    history.do("start", "a", 0)
    history.do("fail", "a", 0)
    history.board.skipped("b", "needs a, which failed")
    history.board.skipped("c", "not wanted", continues=True)
    found = put_back(history.board.states)
    assert [found[each].status for each in IDS] == [S.PENDING, S.PENDING, S.SKIPPED]


def test_what_stays_completed_keeps_the_number_of_its_latest_run() -> None:
    history = History()
    history.do("start", "a", 0)
    history.do("complete", "a", 0)
    then = dict(history.board.states)
    later = {"a": replace(then["a"], attempt=3)}
    assert put_back(then, later)["a"] == replace(then["a"], attempt=3)
    assert put_back(then)["a"] == then["a"]


def test_a_restore_by_a_strategy_keeps_count_and_one_by_a_person_begins_anew() -> None:
    history = History()
    then = dict(history.board.states)
    history.do("start", "a", 0)
    history.do("recover", "a", 0)
    by_strategy = put_back(then, history.board.states, keeps_recoveries=True)["a"]
    assert (by_strategy.recoveries, by_strategy.failures, by_strategy.attempt) == (1, 1, 1)
    by_person = put_back(then, history.board.states)["a"]
    assert (by_person.recoveries, by_person.failures, by_person.attempt) == (0, 0, 1)


def test_capacity_that_was_held_at_the_place_is_part_of_the_state() -> None:
    history = History()
    history.do("start", "a", 0)
    told = holding("1", "2")
    history.session.record_fact(EventType.RESOURCE_ALLOCATED, (), step_id="a", details=told)
    held = len(history.events)
    history.session.record_fact(EventType.RESOURCE_RELEASED, (), step_id="a", details=told)
    replay = BoardReplay(PLAN, history.session.session_id)
    replay.feed(history.events[:held])
    assert list(replay.allocations.values()) == told["allocations"]
    replay.feed(history.events[held:])
    assert replay.allocations == {}


def test_a_step_that_is_paused_holds_its_capacity() -> None:
    history = History()
    history.do("start", "a", 0)
    history.session.record_fact(EventType.RESOURCE_ALLOCATED, (), step_id="a", details=holding("1"))
    history.board.waiting("a", "pause", "Lunch")
    replay = BoardReplay(PLAN, history.session.session_id)
    replay.feed(history.events)
    assert list(replay.allocations) == ["1"]


def test_capacity_of_which_a_dead_owner_could_not_say_that_it_is_free_is_no_part_of_the_state() -> None:
    history = History()
    history.do("start", "a", 0)
    history.session.record_fact(EventType.RESOURCE_ALLOCATED, (), step_id="a", details=holding("1"))
    waits = len(history.events)
    history.board.waiting("a", "capacity", "under the next owner")
    history.board.waiting("a", None)
    history.session.record_fact(EventType.RESOURCE_ALLOCATED, (), step_id="a", details=holding("2"))
    again = len(history.events)
    history.board.failed("a", {"code": "BUG", "message": ""})
    replay = BoardReplay(PLAN, history.session.session_id)
    replay.feed(history.events[: waits + 1])
    assert replay.allocations == {}
    replay.feed(history.events[waits + 1 : again])
    assert list(replay.allocations) == ["2"]
    replay.feed(history.events[again:])
    assert replay.allocations == {}


def holding(*ids: str) -> dict[str, Any]:
    return {"allocations": [{"allocation_id": each, "pool": "cpu", "type": "cpu", "amount": 2} for each in ids]}


def test_events_of_another_execution_change_nothing() -> None:
    history, other = History(), History()
    other.do("start", "a", 0)
    states, state = states_at(PLAN, history.events + other.events, 99, execution_id=history.session.session_id)
    assert (states, state) == (dict(history.board.states), history.board.state)


def test_a_state_survives_json_and_shares_nothing_with_its_source() -> None:
    history = History()
    history.board.set_variables({"found": {"pages": [1, 2]}})
    history.do("start", "a", 0)
    history.do("complete", "a", 0)
    history.do("start", "b", 0)
    variables: dict[str, Any] = dict(history.board.state.variables)
    state = state_of_plan(history.board.states, variables, {"1": {"pool": "cpu"}})
    assert (state.current_task_id, state.completed_tasks) == ("b", ("a",))
    written = json.dumps(state.to_dict())
    assert ExecutionState.from_dict(json.loads(written)) == state
    copy = state.copy()
    copy.variables["found"]["pages"].append(3)
    copy.task_states["a"]["status"] = "failed"
    assert ExecutionState.from_dict(json.loads(written)) == state
    assert variables == {"found": {"pages": [1, 2]}}
    checkpoint = ExecutionCheckpoint(id="c", execution_id="e", timestamp=AT, state=state, metadata={"why": "call"})
    assert json.loads(json.dumps(checkpoint.to_dict()))["state"]["variables"] == variables


def test_a_state_of_a_newer_version_or_with_something_strange_in_it_is_refused() -> None:
    with pytest.raises(InvalidInput, match="schema version 2"):
        ExecutionState.from_dict({"schema_version": 2})
    with pytest.raises(InvalidInput):
        ExecutionState(variables={"at": AT}).to_dict()


def test_the_state_of_a_plain_execution_is_its_last_own_checkpoint_which_may_be_put_back() -> None:
    events: list[ExecutionEvent] = []
    session = ExecutionSession("e", task_id="t", role_name="r")
    session.ledger.listen(events.append)
    session.start_execution()
    session.record_checkpoint({"page": 1})
    first = session.lifecycle
    session.record_checkpoint({"page": 2})
    session.put_checkpoint_back(first.checkpoint, first.checkpoint_at, checkpoint_id="c")
    now = session.lifecycle
    assert (now.checkpoint, now.checkpoint_at, now.restored_from) == ({"page": 1}, first.checkpoint_at, "c")
    session.put_checkpoint_back(None, None, checkpoint_id="d")
    assert (session.lifecycle.checkpoint, session.lifecycle.checkpoint_at) == (None, None)
    assert replayed(events, "e") == (session.lifecycle, session.progress)
    told = state_of_task(now, Progress(execution_id="e")).task_states["t"]
    assert (told["status"], told["checkpoint"]) == ("preparing", {"page": 1})
