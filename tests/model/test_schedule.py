"""Which steps may begin, and which never will: the same whether it is asked anew or kept up to date."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vespera_exec.model.enums import StepStatus
from vespera_exec.model.plans.check import checked
from vespera_exec.model.plans.plan import ExecutionPlan, PlanStep
from vespera_exec.model.plans.schedule import Schedule, levels, ready
from vespera_exec.model.plans.steps import StepState

if TYPE_CHECKING:
    import random
    from types import FrameType

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
States = dict[str, StepState]


def plan(edges: dict[str, tuple[str, ...]]) -> ExecutionPlan:
    return ExecutionPlan(
        id="p", steps=tuple(PlanStep(id=name, role="r", depends_on=needs) for name, needs in edges.items())
    )


def state(name: str, status: StepStatus = StepStatus.PENDING, **more: Any) -> StepState:
    return StepState(execution_id="e", step_id=name, position=0, status=status, **more)


def popped(schedule: Schedule) -> list[str]:
    found: list[str] = []
    while (name := schedule.pop()) is not None:
        found.append(name)
    return found


DIAMOND = plan({"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c"), "e": ()})


def test_a_step_is_ready_when_all_that_it_needs_has_let_it_on() -> None:
    schedule = Schedule(DIAMOND, {})
    assert popped(schedule) == ["a", "e"]
    assert schedule.settled("a", lets_on=True) == []
    assert popped(schedule) == ["b", "c"]
    assert schedule.settled("c", lets_on=True) == []
    assert schedule.pop() is None
    assert schedule.settled("b", lets_on=True) == []
    assert popped(schedule) == ["d"]
    assert not schedule.is_done
    schedule.settled("d", lets_on=False)
    schedule.settled("e", lets_on=True)
    assert schedule.is_done


def test_a_failed_branch_dooms_only_what_depends_on_it() -> None:
    schedule = Schedule(DIAMOND, {})
    popped(schedule)
    schedule.settled("a", lets_on=True)
    popped(schedule)
    assert schedule.settled("b", lets_on=False) == [("d", "needs b, which failed")]
    schedule.settled("c", lets_on=True)
    assert schedule.pop() is None
    schedule.settled("e", lets_on=True)
    assert schedule.is_done


def test_what_is_doomed_names_what_it_needs_and_comes_after_it() -> None:
    chain = plan({"d": ("c",), "c": ("b", "x"), "b": ("a",), "a": (), "x": ()})
    schedule = Schedule(chain, {})
    assert schedule.settled("a", lets_on=False, status=StepStatus.CANCELLED) == [
        ("b", "needs a, which was cancelled"),
        ("c", "needs b, which was skipped"),
        ("d", "needs c, which was skipped"),
    ]
    assert popped(schedule) == ["x"]
    assert schedule.settled("x", lets_on=False) == []
    assert schedule.is_done


def test_what_was_handed_out_comes_again_when_it_is_put_back_once() -> None:
    schedule = Schedule(DIAMOND, {})
    assert popped(schedule) == ["a", "e"]
    schedule.put_back("a")
    schedule.put_back("a")
    assert popped(schedule) == ["a"]
    schedule.settled("a", lets_on=True)
    with pytest.raises(ValueError, match="step a has ended"):
        schedule.put_back("a")
    with pytest.raises(ValueError, match="step a has ended already"):
        schedule.settled("a", lets_on=True)


def test_what_ends_before_it_was_handed_out_is_never_handed_out() -> None:
    schedule = Schedule(DIAMOND, {})
    schedule.settled("e", lets_on=False, status=StepStatus.CANCELLED)
    assert popped(schedule) == ["a"]


def test_it_goes_on_from_where_the_steps_stand() -> None:
    states = {
        "a": state("a", StepStatus.COMPLETED),
        "b": state("b", StepStatus.RUNNING),
        "e": state("e", StepStatus.WAITING),
    }
    schedule = Schedule(DIAMOND, states)
    assert popped(schedule) == ["c"]
    schedule.settled("b", lets_on=True)
    schedule.settled("c", lets_on=True)
    assert popped(schedule) == ["d"]


def test_a_crash_between_a_failure_and_its_skips_leaves_nothing_waiting_for_ever() -> None:
    schedule = Schedule(DIAMOND, {"a": state("a", StepStatus.FAILED), "e": state("e", StepStatus.COMPLETED)})
    assert schedule.doomed == [
        ("b", "needs a, which failed"),
        ("c", "needs a, which failed"),
        ("d", "needs b, which was skipped"),
    ]
    assert schedule.pop() is None
    assert schedule.is_done


def test_a_step_that_failed_and_continues_lets_on() -> None:
    states = {"a": state("a", StepStatus.FAILED, continues=True), "b": state("b", StepStatus.SKIPPED, continues=True)}
    schedule = Schedule(DIAMOND, states)
    assert (popped(schedule), schedule.doomed) == (["c", "e"], [])


def test_a_step_that_backs_off_is_delayed_until_it_is_put_back() -> None:
    states = {"a": state("a", not_before=NOW + timedelta(seconds=1)), "e": state("e", not_before=NOW)}
    schedule = Schedule(DIAMOND, states, now=NOW)
    assert (popped(schedule), schedule.delayed) == (["e"], ["a"])
    assert ready(DIAMOND, states, now=NOW) == ["e"]
    assert ready(DIAMOND, states) == ["a", "e"]
    schedule.put_back("a")
    assert popped(schedule) == ["a"]


def test_levels_are_what_could_run_side_by_side() -> None:
    assert levels(DIAMOND) == [["a", "e"], ["b", "c"], ["d"]]
    with pytest.raises(ValueError, match="cycle"):
        levels(plan({"a": ("b",), "b": ("a",)}))


@st.composite
def _dags(draw: st.DrawFn) -> ExecutionPlan:
    size = draw(st.integers(1, 12))
    order = draw(st.permutations([f"s{at}" for at in range(size)]))
    edges = {
        name: tuple(draw(st.lists(st.sampled_from(order[:at]), max_size=4, unique=True))) if at else ()
        for at, name in enumerate(order)
    }
    return checked(plan({name: edges[name] for name in draw(st.permutations(order))}))


class Life:
    """A plan that is executed by chance: the states as a board would have them, beside the schedule."""

    def __init__(self, made: ExecutionPlan, dice: random.Random) -> None:
        self.plan = made
        self.dice = dice
        self.needs = {step.id: step.depends_on for step in made.steps}
        self.states: States = {}
        self.schedule = Schedule(made, {})
        self.handed_out: list[str] = []
        self.ends: dict[str, int] = {}

    def change(self, name: str, status: StepStatus, **more: Any) -> None:
        self.states[name] = state(name, status, **more)

    def hand_out(self) -> None:
        expected = ready(self.plan, self.states)
        name = self.schedule.pop()
        assert name == (expected[0] if expected else None)
        if name is not None:
            assert all(self.states[each].lets_on for each in self.needs[name])
            self.handed_out.append(name)
            self.change(name, StepStatus.RUNNING)

    def settle(self, name: str) -> None:
        status, continues = self.dice.choice(
            [
                (StepStatus.COMPLETED, False),
                (StepStatus.COMPLETED, False),
                (StepStatus.FAILED, False),
                (StepStatus.FAILED, True),
                (StepStatus.SKIPPED, True),
                (StepStatus.CANCELLED, False),
            ]
        )
        self.end(name, status, continues=continues)
        doomed = self.schedule.settled(name, self.states[name].lets_on, status)
        self.skip(doomed)

    def skip(self, doomed: list[tuple[str, str]]) -> None:
        for each, reason in doomed:
            cause = reason.removeprefix("needs ").partition(",")[0]
            assert cause in self.needs[each]
            assert self.states[cause].status.is_terminal
            assert not self.states[cause].lets_on
            self.end(each, StepStatus.SKIPPED)

    def end(self, name: str, status: StepStatus, *, continues: bool = False) -> None:
        assert name not in self.states or not self.states[name].status.is_terminal
        self.ends[name] = self.ends.get(name, 0) + 1
        self.change(name, status, continues=continues)
        if name in self.handed_out:
            self.handed_out.remove(name)

    def step(self) -> None:
        pending = [name for name in self.needs if name not in self.states or not self.states[name].status.is_terminal]
        match self.dice.randrange(8):
            case 0 if self.handed_out:
                name = self.handed_out.pop(self.dice.randrange(len(self.handed_out)))
                self.change(name, StepStatus.PENDING)
                self.schedule.put_back(name)
            case 1:
                self.settle(self.dice.choice(pending))
            case 2:
                self.begin_again()
            case 3 | 4 if self.handed_out:
                self.settle(self.dice.choice(self.handed_out))
            case _:
                self.hand_out()
        if not self.handed_out and not self.schedule.is_done:
            self.hand_out()

    def begin_again(self) -> None:
        """As after a restart, or a restore of some steps and all that depends on them."""
        if self.dice.random() < 0.5:
            self.schedule = Schedule(self.plan, self.states)
            return
        back: set[str] = set()
        for step in self.topological():
            if self.dice.random() < 0.2 or any(each in back for each in self.needs[step]):
                back.add(step)
        for name in back:
            self.states.pop(name, None)
            self.ends.pop(name, None)
            if name in self.handed_out:
                self.handed_out.remove(name)
        self.schedule.reset(self.states)
        self.skip(self.schedule.doomed)

    def topological(self) -> list[str]:
        return [name for level in levels(self.plan) for name in level]


@given(_dags(), st.randoms(use_true_random=False))
def test_schedule_is_ready_kept_up_to_date(made: ExecutionPlan, dice: random.Random) -> None:
    life = Life(made, dice)
    for _ in range(60):
        if life.schedule.is_done:
            break
        life.step()
    while not life.schedule.is_done:
        life.hand_out()
        while life.handed_out:
            life.settle(life.handed_out[0])
    assert set(life.states) == set(life.needs)
    assert all(each.status.is_terminal for each in life.states.values())
    assert set(life.ends.values()) == {1}
    assert ready(made, life.states) == []


@given(_dags(), st.randoms(use_true_random=False))
def test_a_schedule_made_anew_is_the_one_that_was_kept(made: ExecutionPlan, dice: random.Random) -> None:
    life = Life(made, dice)
    for _ in range(25):
        if life.schedule.is_done:
            break
        life.step()
    before = {name: each for name, each in life.states.items() if each.status is not StepStatus.RUNNING}
    again = Schedule(made, before)
    running = [name for name, each in life.states.items() if each.status is StepStatus.RUNNING]
    for name in running:
        life.schedule.put_back(name)
    assert popped(again) == popped(life.schedule) == ready(made, before)
    assert (again.is_done, again.doomed) == (life.schedule.is_done, [])


def _lines_a_step(made: ExecutionPlan) -> float:
    """How many lines of code are run for each step, from the schedule's making to its end: as time, without noise."""
    lines = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        schedule = Schedule(made, {})
        while (name := schedule.pop()) is not None:
            schedule.settled(name, lets_on=True)
    finally:
        sys.settrace(before)
    assert schedule.is_done
    return lines / len(made.steps)


@pytest.mark.parametrize("shape", ["chain", "fan", "layers"])
def test_a_step_costs_the_same_however_large_the_plan(shape: str) -> None:
    def made(size: int) -> ExecutionPlan:
        if shape == "chain":
            return plan({f"s{at}": (f"s{at - 1}",) if at else () for at in range(size)})
        if shape == "layers":
            return plan(
                {
                    f"s{at}": tuple(f"s{each}" for each in range(at - at % 5 - 5, at - at % 5) if each >= 0)
                    for at in range(size)
                }
            )
        middle = {f"s{at}": ("first",) for at in range(size - 2)}
        return plan({"first": (), **middle, "last": tuple(middle)})

    assert _lines_a_step(made(4000)) < 1.2 * _lines_a_step(made(200))


def test_dooming_a_whole_plan_takes_no_time() -> None:
    made = plan({f"s{at}": (f"s{at - 1}",) if at else () for at in range(20_000)})
    began = time.thread_time()
    doomed = Schedule(made, {}).settled("s0", lets_on=False)
    assert len(doomed) == 19_999
    assert time.thread_time() - began < 5


def test_a_state_that_is_replaced_changes_nothing_until_it_is_told() -> None:
    states = {"a": state("a")}
    schedule = Schedule(DIAMOND, states)
    states["a"] = replace(states["a"], status=StepStatus.COMPLETED)
    assert popped(schedule) == ["a", "e"]
    schedule.reset(states)
    assert popped(schedule) == ["b", "c", "e"]
