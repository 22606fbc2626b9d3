"""A plan is refused whole, with every problem named; what is accepted comes back from its JSON as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vespera_exec.errors import InvalidInput, InvalidPlan
from vespera_exec.model.capacity import CapacityRequirement
from vespera_exec.model.inputs import MAX_MESSAGE_CHARACTERS
from vespera_exec.model.plans.as_json import plan_from_dict, plan_to_dict, step_from_dict, step_to_dict
from vespera_exec.model.plans.check import MAX_DEPENDENCIES, MAX_PROBLEMS, checked
from vespera_exec.model.plans.plan import (
    MAX_PARALLEL,
    MAX_STEPS,
    PLAN_ROLE,
    ExecutionPlan,
    Fallback,
    PlanStep,
    StepRetries,
)


def plan(*steps: PlanStep, **more: Any) -> ExecutionPlan:
    return ExecutionPlan(id="p", steps=steps, **more)


def step(name: str, *needs: str, **more: Any) -> PlanStep:
    return PlanStep(id=name, role=more.pop("role", "build"), depends_on=needs, **more)


def problems(made: ExecutionPlan) -> list[tuple[str | None, str]]:
    with pytest.raises(InvalidPlan) as caught:
        checked(made)
    assert isinstance(caught.value, InvalidInput)
    assert caught.value.error_code == "INVALID_PLAN"
    return list(caught.value.problems)


def problem(made: ExecutionPlan) -> str:
    ((where, what),) = problems(made)
    return what if where is None else f"{where}: {what}"


def test_references_become_dependencies() -> None:
    made = checked(
        plan(
            step("a"),
            step("b"),
            step("c"),
            step(
                "d",
                "c",
                inputs={"x": {"y": ["${steps.a.output.n}", "${steps.a.status} ${variables.v}"]}},
                fallback=Fallback(role="other", inputs={"z": "${steps.b.error.code?}"}),
            ),
            variables={"v": 1},
        )
    )
    assert made.steps[3].depends_on == ("c", "a", "b")
    assert checked(made) == made


def test_plan_without_an_id_gets_one() -> None:
    first, second = (checked(replace(plan(step("a")), id="")) for _ in range(2))
    assert first.id != second.id
    assert checked(plan(step("a"))).id == "p"


def test_what_was_given_may_change_afterwards_and_the_plan_does_not() -> None:
    inputs: dict[str, Any] = {"x": [1]}
    variables: dict[str, Any] = {"v": {"n": 1}}
    made = checked(plan(step("a", inputs=inputs), variables=variables))
    inputs["x"].append(2)
    variables["v"]["n"] = 2
    assert made.steps[0].inputs == {"x": [1]}
    assert made.variables == {"v": {"n": 1}}


def test_cycle_is_named() -> None:
    assert problem(plan(step("a", "c"), step("b", "a"), step("c", "b"), step("d"))) in {
        "a: it needs itself: a -> b -> c -> a",
        "b: it needs itself: b -> c -> a -> b",
        "c: it needs itself: c -> a -> b -> c",
    }
    assert problem(plan(step("a", "a"))) == "a: it needs itself: a -> a"
    assert problem(plan(step("a", inputs={"x": "${steps.b.output}"}), step("b", "a"))).endswith(
        ("a -> b -> a", "b -> a -> b")
    )


def test_cycle_through_ten_thousand_steps_is_found_and_shown_short() -> None:
    ring = tuple(step(f"s{at}", f"s{at - 1 if at else 9999}") for at in range(10_000))
    shown = problem(plan(*ring))
    assert " -> ... -> " in shown
    assert len(shown) < 300


def test_every_problem_is_told_with_its_step() -> None:
    found = problems(
        plan(
            step("a", "ghost", timeout_seconds=-1.0),
            step("b", inputs={"x": "${steps.nobody.output}"}),
            step("b", role=""),
            step("3c"),
            step("d", inputs={"x": "${HOME}"}),
            step("e", inputs={"x": "${variables.repoo}"}),
            step("f", inputs={"x": object()}),
            step("g", fallback=Fallback(role="x", inputs={"y": "${steps.nobody.output}"})),
            output={"all": "${steps.missing.output}"},
            max_parallel=0,
            variables={"repo": 1, "1x": 2},
        )
    )
    assert [where for where, _ in found] == [None, None, "b", "a", "a", "b", "b", "3c", "d", "e", "f", "g", None]
    told = "\n".join(what for _, what in found)
    for part in (
        "max_parallel is a whole number from 1 to 1000",
        "variables: '1x' is no name",
        "2 steps have this id",
        "depends_on: there is no step 'ghost'",
        "timeout_seconds is a number from 0",
        "inputs: ${steps.nobody.output} refers to a step that the plan does not have",
        "role is missing",
        "'3c' is no id of a step",
        "'${HOME}' is no reference",
        "${variables.repoo} refers to a variable that the plan does not have",
        "inputs is not JSON: object",
        "fallback.inputs: ${steps.nobody.output}",
        "output: ${steps.missing.output}",
    ):
        assert part in told


def test_the_message_shows_the_first_problems_and_counts_the_rest() -> None:
    with pytest.raises(InvalidPlan) as caught:
        checked(plan(*(step(f"s{at}", "ghost") for at in range(150))))
    assert caught.value.message.startswith("step s0: depends_on: there is no step 'ghost'; step s1:")
    assert len(caught.value.problems) == MAX_PROBLEMS + 1
    assert caught.value.problems[-1] == (None, "and 50 more problems")
    assert caught.value.to_dict()["problems"][0] == {"step": "s0", "problem": "depends_on: there is no step 'ghost'"}


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"weight": -1.0}, "weight is a number from 0"),
        ({"weight": float("nan")}, "weight is a number"),
        ({"wait_timeout_seconds": float("inf")}, "wait_timeout_seconds is a number"),
        ({"timeout_seconds": True}, "timeout_seconds is a number"),
        ({"role": PLAN_ROLE}, "a step cannot be a plan itself"),
        ({"fallback": Fallback(role=PLAN_ROLE)}, "fallback.role: a step cannot be a plan itself"),
        ({"retries": StepRetries(max_retries=-1)}, "retries.max_retries is a whole number from 0"),
        ({"retries": StepRetries(backoff_factor=0.5)}, "retries.backoff_factor is a number from 1"),
        ({"approval": ""}, "approval is true, or a text"),
        ({"approval": "x" * (MAX_MESSAGE_CHARACTERS + 1)}, "approval is true, or a text"),
        ({"on_interrupt": "retry"}, "on_interrupt is fail or resume"),
        ({"capacity": (CapacityRequirement(type="cpu", amount=0),)}, "capacity cpu: the amount is a number"),
        ({"capacity": (CapacityRequirement(type="cpu", amount=1, priority=11),)}, "capacity cpu: priority is 0 to 10"),
        ({"capacity": (CapacityRequirement(type="", amount=1),)}, "the type of a requirement of capacity is"),
        ({"title": "x" * 201}, "title is a text of at most 200"),
        ({"title": "two\nlines"}, "title has control characters"),
        ({"description": "\x1b[2J"}, "description has control characters"),
        ({"type": "\x07"}, "type has control characters"),
        ({"inputs": [1]}, "inputs is an object"),
        ({"inputs": {"x": 2**70}}, "does not fit into 64 bits"),
        ({"inputs": {"x": "${variables.x}" * 1001}}, "more than 1000 references"),
    ],
)
def test_limits_of_a_step(more: dict[str, Any], part: str) -> None:
    assert part in problem(plan(step("a", **more)))


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"max_parallel": MAX_PARALLEL + 1}, "max_parallel"),
        ({"max_parallel": 1.5}, "max_parallel"),
        ({"on_failure": "stop"}, "on_failure is continue or abort"),
        ({"timeout_seconds": -0.1}, "timeout_seconds"),
        ({"checkpoint_interval_seconds": float("nan")}, "checkpoint_interval_seconds"),
        ({"name": "x" * 201}, "name is a text"),
        ({"name": "\x1b]0;x\x07"}, "name has control characters"),
        ({"description": "\x00"}, "description has control characters"),
        ({"output": {1, 2}}, "output is not JSON"),
    ],
)
def test_limits_of_the_whole(more: dict[str, Any], part: str) -> None:
    assert part in problem(plan(step("a"), **more))


def test_a_plan_has_at_least_one_step_and_at_most_so_many() -> None:
    assert problem(plan()) == "it has no steps"
    assert problem(plan(*(step(f"s{at}") for at in range(MAX_STEPS + 1)))) == "it has 20,001 steps; at most 20,000"
    crowd = [f"s{at}" for at in range(600)]
    dense = plan(*(step(name) for name in crowd), *(step(f"t{at}", *crowd) for at in range(600)))
    assert problem(dense) == f"its steps have 360,000 dependencies; at most {MAX_DEPENDENCIES:,}"


def test_an_optional_reference_may_name_a_variable_that_is_not_there() -> None:
    made = checked(plan(step("a", inputs={"x": "${variables.maybe?}"})))
    assert made.steps[0].depends_on == ()


_text = st.text(max_size=8)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=6,
)
_objects = st.dictionaries(_text, _json, max_size=3)
_seconds = st.floats(0, 1e6)
_steps = st.builds(
    PlanStep,
    id=_text,
    role=_text,
    title=_text,
    description=_text,
    type=_text,
    depends_on=st.lists(_text, max_size=3).map(tuple),
    inputs=_objects,
    timeout_seconds=_seconds,
    wait_timeout_seconds=_seconds,
    retries=st.none()
    | st.builds(
        StepRetries,
        max_retries=st.integers(0, 9),
        retry_on=st.lists(_text, max_size=2).map(tuple),
        backoff_seconds=_seconds,
    ),
    fallback=st.none() | st.builds(Fallback, role=_text, inputs=st.none() | _objects),
    approval=st.booleans() | _text,
    capacity=st.lists(
        st.builds(
            CapacityRequirement,
            type=_text,
            amount=_seconds,
            duration_ms=st.none() | _seconds,
            priority=st.integers(0, 10),
            constraints=_objects,
        ),
        max_size=2,
    ).map(tuple),
    continue_on_failure=st.booleans(),
    recovery=st.none() | st.lists(_text, max_size=2).map(tuple),
    on_interrupt=st.sampled_from((None, "fail", "resume")),
    weight=_seconds,
    cache=st.booleans(),
)
_plans = st.builds(
    ExecutionPlan,
    id=_text,
    steps=st.lists(_steps, min_size=1, max_size=3).map(tuple),
    name=_text,
    description=_text,
    variables=_objects,
    output=_json,
    max_parallel=st.integers(1, 1000),
    on_failure=st.sampled_from(("continue", "abort")),
    timeout_seconds=_seconds,
    checkpoint_interval_seconds=_seconds,
    step_checkpoints=st.booleans(),
)


@given(_plans)
def test_a_plan_comes_back_from_its_json_as_it_was(made: ExecutionPlan) -> None:
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(made)))) == made


@given(_steps)
def test_a_step_comes_back_from_its_json_as_it_was(made: PlanStep) -> None:
    again = step_from_dict(json.loads(json.dumps(step_to_dict(made))))
    assert again == made
    assert type(again.approval) is type(made.approval)


def test_what_has_its_default_is_left_out() -> None:
    assert plan_to_dict(plan(step("a"), step("b", "a"))) == {
        "id": "p",
        "steps": [{"id": "a", "role": "build"}, {"id": "b", "role": "build", "depends_on": ["a"]}],
    }


@given(_plans)
def test_the_check_never_fails_with_another_error(made: ExecutionPlan) -> None:
    try:
        accepted = checked(made)
    except InvalidPlan as refused:
        found = refused.problems
    else:
        found = ((None, "none"),)
        assert plan_from_dict(plan_to_dict(accepted)) == accepted
    assert found
