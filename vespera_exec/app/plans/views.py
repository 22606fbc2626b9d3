"""What the doors take and show of plans and their steps."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field

from vespera_exec.app.shapes import Json, Request, View


class ExecutePlan(Request):
    """A plan to be executed, as a task of its own. `plan` is checked by `app.plans.files.parse_plan`."""

    plan: dict[str, Json]
    variables: dict[str, Json] = Field(default_factory=dict)
    """In the place of the plan's own variables of these names."""
    title: str | None = None
    """The name of the plan when it is left out."""
    description: str = ""
    priority: Annotated[int, Field(ge=0, le=10)] | None = None
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    wait_ms: Annotated[int, Field(ge=0, le=25_000)] = 0
    idempotency_key: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class CheckPlan(Request):
    """A plan to be checked; nothing is started."""

    plan: dict[str, Json]
    variables: dict[str, Json] = Field(default_factory=dict)


class PlanProblem(View):
    """Something that is wrong with a plan; `step` is null where it is wrong with the whole."""

    step: str | None
    problem: str


class PlanChecked(View):
    """What a check of a plan has found. `order` holds the ids of steps that may run beside each other, by level.

    It has the first 200 of the `levels`. `widest` is the number of steps of the largest.
    """

    valid: bool
    problems: list[PlanProblem]
    steps: int
    levels: int = 0
    widest: int = 0
    order: list[list[str]]


class StepView(View):
    """Where a step stands. Its work is a task of its own (`task_id`); `session_id` is the attempt that ended it."""

    id: str
    position: int
    title: str
    role: str | None
    status: str
    percentage: float | None
    message: str
    attempt: int
    recoveries: int
    is_fallback: bool
    cached: bool
    depends_on: list[str]
    waiting_for: str | None
    not_before: datetime | None
    error: dict[str, Json] | None
    reason: str | None
    task_id: str | None
    session_id: str | None
    started_at: datetime | None
    ended_at: datetime | None


class StepPage(View):
    """Steps in the plan's order. Read on with `after` = `next_after`; null closes the list.

    `counts` are of the whole plan by status, `total` of those that fit the filter.
    """

    task_id: str
    session_id: str
    status: str
    percentage: float | None
    counts: dict[str, int]
    steps: list[StepView]
    total: int
    next_after: int | None


class CurrentStep(View):
    """A step that is going on."""

    step: str
    status: str
    percentage: float | None
    waiting_for: str | None


class PlanSummary(View):
    """A plan in a few words. `counts` by status, without those of which there are none."""

    name: str
    plan_id: str
    steps: int
    counts: dict[str, int]
    current: list[CurrentStep]
    """At most 5."""
    failed: list[str]
    """Ids of steps that failed, at most 5."""
    last_checkpoint: str | None
