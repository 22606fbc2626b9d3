"""A plan as JSON, as it is kept with the run that executes it."""

from __future__ import annotations

from dataclasses import MISSING, fields
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from vespera_exec.model.capacity import CapacityRequirement
from vespera_exec.model.plans.plan import ExecutionPlan, Fallback, PlanStep, StepRetries

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.model.events import Json


def plan_to_dict(plan: ExecutionPlan) -> dict[str, Json]:
    """What `plan_from_dict` reads back as an equal plan. What has its default is left out.

    So a default never changes: that would change the plans that are kept.
    """
    return _told(plan) | {"steps": [step_to_dict(step) for step in plan.steps]}


def plan_from_dict(data: Mapping[str, Json]) -> ExecutionPlan:
    """The inverse of `plan_to_dict`; keys of a newer version are passed over."""
    given = _given(ExecutionPlan, data)
    given["steps"] = tuple(step_from_dict(each) for each in data["steps"])
    return ExecutionPlan(**given)


def step_to_dict(step: PlanStep) -> dict[str, Json]:
    told = _told(step)
    if step.retries is not None:
        told["retries"] = _told(step.retries)
    if step.fallback is not None:
        told["fallback"] = _told(step.fallback)
    if step.capacity:
        told["capacity"] = [_told(each) for each in step.capacity]
    return told


def step_from_dict(data: Mapping[str, Json]) -> PlanStep:
    """The inverse of `step_to_dict`."""
    given = _given(PlanStep, data)
    if "retries" in given:
        given["retries"] = StepRetries(**_given(StepRetries, given["retries"]))
    if "fallback" in given:
        given["fallback"] = Fallback(**_given(Fallback, given["fallback"]))
    if "capacity" in given:
        given["capacity"] = tuple(
            CapacityRequirement(**_given(CapacityRequirement, each)) for each in given["capacity"]
        )
    return PlanStep(**given)


@cache
def _defaults(kind: type[Any]) -> dict[str, Any]:
    """Each field with its default; `MISSING` where it has none."""
    found: dict[str, Any] = {}
    for each in fields(kind):
        found[each.name] = each.default_factory() if each.default_factory is not MISSING else each.default
    return found


def _told(value: object) -> dict[str, Json]:
    kind: type[Any] = type(value)
    told: dict[str, Json] = {}
    for name, default in _defaults(kind).items():
        given = getattr(value, name)
        if default is MISSING or given != default:
            told[name] = list(cast("tuple[Json, ...]", given)) if isinstance(given, tuple) else given
    return told


def _given(kind: type[Any], data: Mapping[str, Json]) -> dict[str, Any]:
    known = _defaults(kind)
    given = {name: value for name, value in data.items() if name in known}
    for name in _TUPLES & given.keys():
        if given[name] is not None:
            given[name] = tuple(given[name])
    return given


_TUPLES = frozenset({"depends_on", "recovery", "retry_on"})
