"""Whether a plan can be executed: every problem of it, with its step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, Final, cast

from vespera_exec.errors import InvalidInput, InvalidPlan
from vespera_exec.model.capacity import requirements
from vespera_exec.model.events import new_id
from vespera_exec.model.inputs import MAX_MESSAGE_CHARACTERS
from vespera_exec.model.jsonable import CONTROL_IN_LINE, CONTROL_IN_TEXT, clean_text, exact_json
from vespera_exec.model.plans.plan import MAX_PARALLEL, MAX_STEPS, PLAN_ROLE
from vespera_exec.model.plans.references import references

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vespera_exec.model.capacity import CapacityRequirement
    from vespera_exec.model.events import Json
    from vespera_exec.model.plans.plan import ExecutionPlan, PlanStep, StepRetries
    from vespera_exec.model.plans.references import Reference

MAX_PROBLEMS: Final = 100
"""That are told of."""
MAX_DEPENDENCIES: Final = 250_000
"""Of all steps together."""
MAX_SECONDS: Final = 365 * 86_400.0
MAX_RETRIES: Final = 100
MAX_WEIGHT: Final = 1e6
MAX_TITLE: Final = 200
MAX_DESCRIPTION: Final = 4000

ID_PATTERN: Final = "^[A-Za-z][A-Za-z0-9_-]{0,63}$"
_ID: Final = re.compile(ID_PATTERN.rstrip("$") + r"\Z")
ID_RULE: Final = "a letter, then letters, digits, _ or -, at most 64"
_SHOWN_CYCLE: Final = 20


def checked(plan: ExecutionPlan) -> ExecutionPlan:
    """The plan, ready to be executed: with an id, and with the dependencies that its references imply.

    Roles, recovery strategies and types of capacity are not looked up here.

    Raises:
        InvalidPlan: all that is wrong with it.
    """
    return _Check(plan).made()


class _Check:
    def __init__(self, plan: ExecutionPlan) -> None:
        self._plan = plan
        self._ids = {step.id for step in plan.steps}
        self._problems: list[tuple[str | None, str]] = []
        self._step: str | None = None

    def made(self) -> ExecutionPlan:
        self._whole()
        if len(self._plan.steps) > MAX_STEPS:
            raise InvalidPlan(self._problems)
        steps = tuple(self._checked_step(step) for step in self._plan.steps)
        self._step = None
        variables = self._json(self._plan.variables, "variables")
        output = self._json(self._plan.output, "output")
        self._references(output, "output")
        self._edges(steps)
        if self._problems:
            raise InvalidPlan(self._shown())
        return replace(
            self._plan,
            id=self._plan.id or new_id(),
            name=self._plan.name.strip(),
            steps=steps,
            variables=variables,
            output=output,
        )

    def _say(self, what: str) -> None:
        self._problems.append((self._step, clean_text(what)))

    def _shown(self) -> list[tuple[str | None, str]]:
        more = len(self._problems) - MAX_PROBLEMS
        return self._problems if more <= 0 else [*self._problems[:MAX_PROBLEMS], (None, f"and {more} more problems")]

    def _whole(self) -> None:
        plan = self._plan
        if not plan.steps:
            self._say("it has no steps")
        if len(plan.steps) > MAX_STEPS:
            self._say(f"it has {len(plan.steps):,} steps; at most {MAX_STEPS:,}")
        self._text(plan.id, "id", MAX_TITLE)
        self._text(plan.name, "name", MAX_TITLE)
        self._text(plan.description, "description", MAX_DESCRIPTION, control=CONTROL_IN_TEXT)
        if not _whole_number(plan.max_parallel) or not 1 <= plan.max_parallel <= MAX_PARALLEL:
            self._say(f"max_parallel is a whole number from 1 to {MAX_PARALLEL}")
        if plan.on_failure not in ("continue", "abort"):
            self._say("on_failure is continue or abort")
        self._number(plan.timeout_seconds, "timeout_seconds", 0, MAX_SECONDS)
        self._number(plan.checkpoint_interval_seconds, "checkpoint_interval_seconds", 0, MAX_SECONDS)
        for name in plan.variables:
            if not _is_id(name):
                self._say(f"variables: {str(name)[:80]!r} is no name: {ID_RULE}")
        for step_id, times in Counter(step.id for step in plan.steps).items():
            if times > 1:
                self._problems.append((step_id, f"{times} steps have this id"))

    def _checked_step(self, step: PlanStep) -> PlanStep:
        self._step = str(step.id)[:80]
        if not _is_id(step.id):
            self._say(f"{str(step.id)[:80]!r} is no id of a step: {ID_RULE}")
        self._role(step.role, "role")
        self._text(step.title, "title", MAX_TITLE)
        self._text(step.description, "description", MAX_DESCRIPTION, control=CONTROL_IN_TEXT)
        self._text(step.type, "type", 64)
        inputs = self._inputs(step.inputs, "inputs")
        implied = self._references(inputs, "inputs")
        fallback = step.fallback
        if fallback is not None:
            self._role(fallback.role, "fallback.role")
            if fallback.inputs is not None:
                fallback = replace(fallback, inputs=self._inputs(fallback.inputs, "fallback.inputs"))
                implied += self._references(fallback.inputs, "fallback.inputs")
        for each in step.depends_on:
            if each not in self._ids:
                self._say(f"depends_on: there is no step {str(each)[:80]!r}")
        self._limits(step)
        depends_on = tuple(dict.fromkeys((*step.depends_on, *implied)))
        return replace(
            step,
            title=str(step.title).strip(),
            depends_on=depends_on,
            inputs=inputs,
            fallback=fallback,
            capacity=tuple(step.capacity),
            recovery=None if step.recovery is None else tuple(step.recovery),
        )

    def _limits(self, step: PlanStep) -> None:
        self._number(step.timeout_seconds, "timeout_seconds", 0, MAX_SECONDS)
        self._number(step.wait_timeout_seconds, "wait_timeout_seconds", 0, MAX_SECONDS)
        self._number(step.weight, "weight", 0, MAX_WEIGHT)
        if step.retries is not None:
            self._retries(step.retries)
        approval = step.approval
        if not isinstance(approval, bool) and not (
            isinstance(cast("Any", approval), str) and 0 < len(approval) <= MAX_MESSAGE_CHARACTERS
        ):
            self._say(f"approval is true, or a text of 1 to {MAX_MESSAGE_CHARACTERS} characters")
        if step.on_interrupt not in (None, "fail", "resume"):
            self._say("on_interrupt is fail or resume")
        self._capacity(step.capacity)

    def _retries(self, retries: StepRetries) -> None:
        if not _whole_number(retries.max_retries) or not 0 <= retries.max_retries <= MAX_RETRIES:
            self._say(f"retries.max_retries is a whole number from 0 to {MAX_RETRIES}")
        self._number(retries.backoff_seconds, "retries.backoff_seconds", 0, MAX_SECONDS)
        self._number(retries.backoff_factor, "retries.backoff_factor", 1, 100)
        self._number(retries.backoff_max_seconds, "retries.backoff_max_seconds", 0, MAX_SECONDS)

    def _capacity(self, wanted: tuple[CapacityRequirement, ...]) -> None:
        try:
            requirements([each.to_dict() for each in wanted])
        except InvalidInput as error:
            self._say(error.message)

    def _role(self, role: str, name: str) -> None:
        self._text(role, name, 64)
        if not role:
            self._say(f"{name} is missing: who does it")
        elif role == PLAN_ROLE:
            self._say(f"{name}: a step cannot be a plan itself")

    def _inputs(self, inputs: Mapping[str, Json], name: str) -> Mapping[str, Json]:
        if not isinstance(cast("Any", inputs), Mapping):
            self._say(f"{name} is an object")
            return {}
        return self._json(inputs, name)

    def _json(self, value: Json, name: str) -> Json:
        try:
            return exact_json(value, name)
        except InvalidInput as error:
            self._say(error.message)
            return {} if isinstance(value, Mapping) else None

    def _references(self, value: Json, name: str) -> list[str]:
        """The steps that `value` refers to; those that are not there are told of."""
        try:
            found = references(value)
        except InvalidInput as error:
            self._say(f"{name}: {error.message}")
            return []
        return [each.name for each in found if self._is_known(each, name)]

    def _is_known(self, reference: Reference, name: str) -> bool:
        """Whether it refers to a step that is there."""
        if reference.kind == "variable":
            if reference.name not in self._plan.variables and not reference.optional:
                self._say(f"{name}: {reference} refers to a variable that the plan does not have")
            return False
        if reference.name not in self._ids:
            self._say(f"{name}: {reference} refers to a step that the plan does not have")
            return False
        return True

    def _edges(self, steps: Iterable[PlanStep]) -> None:
        graph = {step.id: [each for each in step.depends_on if each in self._ids] for step in steps}
        if (edges := sum(map(len, graph.values()))) > MAX_DEPENDENCIES:
            self._say(f"its steps have {edges:,} dependencies; at most {MAX_DEPENDENCIES:,}")
            return
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            cycle = [str(each) for each in error.args[1]]
            shown = cycle if len(cycle) <= _SHOWN_CYCLE else [*cycle[: _SHOWN_CYCLE - 2], "...", cycle[-1]]
            self._problems.append((cycle[0], f"it needs itself: {' -> '.join(shown)}"))

    def _text(self, value: Any, name: str, limit: int, *, control: re.Pattern[str] = CONTROL_IN_LINE) -> None:
        if not isinstance(value, str) or len(value) > limit:
            self._say(f"{name} is a text of at most {limit} characters")
        elif control.search(value):
            self._say(f"{name} has control characters")

    def _number(self, value: Any, name: str, least: float, most: float) -> None:
        if not _is_number(value) or not least <= value <= most:
            self._say(f"{name} is a number from {least:g} to {most:g}")


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and _ID.match(value) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
