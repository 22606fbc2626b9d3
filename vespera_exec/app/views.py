"""What a door shows and what it takes: the one set of shapes behind MCP, REST and the library."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from vespera_exec.app.plans.views import PlanSummary
from vespera_exec.app.shapes import Json, Request, View


class NewTask(Request):
    """A task to be made. `role` and `inputs` may wait until it is executed."""

    title: str = Field(description="What the task is, in one line")
    description: str = Field(default="", description="The task in full; data, never executed")
    role: str | None = Field(default=None, description="Who does it; see list_roles")
    inputs: dict[str, Json] = Field(default_factory=dict, description="Inputs of the role")
    priority: Annotated[int, Field(ge=0, le=10, description="0 to 10, higher first")] = 5
    max_retries: Annotated[int, Field(ge=0, le=100)] = 3
    sla_seconds: Annotated[float, Field(gt=0)] | None = None
    idempotency_key: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class Execute(Request):
    """Execute a known task (`task_id`), or make one and execute it (`title`, `role`)."""

    task_id: str | None = None
    title: str | None = None
    description: str = ""
    role: str | None = None
    inputs: dict[str, Json] | None = None
    priority: Annotated[int, Field(ge=0, le=10)] | None = None
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    capacity: dict[str, float] | list[dict[str, Json]] | None = None
    """What it needs of the pools, `{type: amount}` or a list of requirements; null: what its role says."""
    wait_ms: Annotated[int, Field(ge=0, le=25_000)] = 0
    idempotency_key: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class Handle(View):
    """What was started. Follow it from `cursor`; `done` speaks of the run, with all its retries."""

    task_id: str
    run_id: str
    session_id: str
    status: str
    cursor: int
    done: bool = False
    repeated: bool = False
    """The idempotency key was known: nothing new was started."""
    error: str | None = None


class TaskView(View):
    task_id: str
    title: str
    description: str
    role: str | None
    inputs: dict[str, Json]
    priority: int
    status: str
    sla_seconds: float | None
    created_at: datetime
    updated_at: datetime
    repeated: bool = False


class TaskRow(View):
    """A line of a list."""

    task_id: str
    title: str
    role: str | None
    status: str
    execution_status: str | None
    session_id: str | None
    percentage: float | None
    updated_at: datetime


class TaskPage(View):
    tasks: list[TaskRow]
    next_page: str | None
    total: int


class RoleUses(View):
    """How often a role was asked for since the server started."""

    allowed: int
    denied: int


class RoleView(View):
    name: str
    description: str
    runner: str
    inputs: dict[str, Json]
    """JSON Schema of the inputs."""
    allowed: bool
    """The caller may use it."""
    origin: Literal["builtin", "operator", "program"]
    uses: RoleUses | None = None
    """Null for who does not see everything."""


class RoleList(View):
    roles: list[RoleView]
    problems: list[str]
    """Role files that could not be read, one line each; empty for who does not see everything."""


class OverallProgress(View):
    percentage: float | None
    message: str


class Eta(View):
    """Remaining seconds, as an interval. `label` is "uncalibrated" until its coverage has been measured."""

    remaining_seconds: float
    low_seconds: float
    high_seconds: float
    label: str


class TimeView(View):
    elapsed_seconds: float
    estimated_completion: datetime | None
    eta_confidence: float | None
    eta: Eta | None = None
    queue_seconds: float = 0.0


class UsageView(View):
    current: float
    peak: float
    unit: str


class Summary(View):
    """One session: the keys that document 000 promises, and what came after."""

    session_id: str
    task_id: str
    run_id: str
    attempt: int
    role: str | None
    status: str
    lifecycle: str
    current_phase: str | None
    overall_progress: OverallProgress
    time_tracking: TimeView
    resource_usage: dict[str, UsageView] | None = None
    error_context: dict[str, Json] | None = None
    work: dict[str, Json] | None = None
    """The work's own progress: type, current, total, percentage, unit, message."""
    phases: list[dict[str, Json]] | None = None
    custom_progress: dict[str, Json] | None = None


class Legacy(View):
    assigned_role: str | None
    execution_id: str | None
    retry_count: int
    last_error: str | None


class InputView(View):
    """A question that a role has asked and nobody has answered."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    key: str
    kind: str
    message: str
    schema_: dict[str, Json] = Field(alias="schema")
    """JSON Schema of the content of an answer: a flat object."""
    asked_at: datetime


class Status(View):
    """Where a task stands: its running session, or the last one that ended."""

    executing: bool
    task_found: bool = True
    status: str
    lifecycle: str
    session_id: str | None
    task_id: str
    title: str
    task_status: str
    done: bool
    cursor: int
    session: Summary | None
    legacy_compatibility: Legacy
    recent_events: list[dict[str, Json]] | None = None
    inputs: list[InputView] | None = None
    """The questions that wait for an answer; null when there are none. Those of a plan's step are `<step>/<key>`."""
    plan: PlanSummary | None = None
    """Where its session executes a plan."""
    waiting_for: str | None = None
    """The capacity that it waits for, and who holds it."""


class ProgressInfo(View):
    """The 200 body of document 004. Without a plan there is one step.

    With one, `current_step` counts those that have begun, `current_step_name` is the first that goes on.
    """

    current_step: int
    total_steps: int
    percentage: float
    current_step_name: str | None = None


class EventPage(View):
    """Events after the cursor that was given, in order. Read on from `next_cursor`; `done` closes the run."""

    events: list[dict[str, Json]]
    next_cursor: int
    done: bool
    status: str | None = None
    removed_before: int | None = None
    """Runs that ended long ago have been removed: of what lies below this cursor, events are missing."""


class OutputPage(View):
    """A piece of what the work wrote. `dropped_bytes` were cut out of its middle by the size limit."""

    text: str
    offset: int
    next_offset: int
    total_bytes: int
    dropped_bytes: int
    eof: bool


class Result(View):
    """What a run returned. `result` is null until it is done, or when it returned nothing."""

    task_id: str
    run_id: str
    session_id: str
    status: str
    done: bool
    result: Json = None
    result_truncated: bool = False
    error: dict[str, Json] | None = None
    output: OutputPage | None = None


class InputAnswer(Request):
    """The answer to one question of a role. Nobody accepts by saying nothing: there is no default."""

    action: Literal["accept", "decline"]
    content: dict[str, Json] | None = None


class GiveAnswers(Request):
    """Answers by the keys of their questions (`answers`), or one: to the question `key`, else to the only open one.

    Values in `content` are an acceptance also without `action`.
    """

    answers: Annotated[dict[str, InputAnswer], Field(max_length=100)] | None = None
    key: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    action: Literal["accept", "decline"] | None = None
    content: dict[str, Json] | None = None


class OpenInput(View):
    """A question that waits for somebody, and who asks it."""

    task_id: str
    run_id: str
    session_id: str
    title: str
    role: str | None
    input: InputView
    parent_task_id: str | None = None
    """Of the plan that it is a step of: there the question has the key `<step>/<key>`."""
    step: str | None = None


class OpenInputs(View):
    """What waits for somebody, oldest first; `total` counts also what is not shown."""

    inputs: list[OpenInput]
    total: int


class Answered(View):
    """The answer to answers. `success` says that at least one was taken, and is on disk.

    `ignored` names those that were no open question's, `open` what is still to be answered.
    """

    success: bool
    message: str
    status: str
    session_id: str | None = None
    accepted: list[str]
    ignored: list[str]
    open: list[str]
    reason: str | None = None


class Run(View):
    """A run as a whole, by its last attempt. `done`: its end is on disk, and nothing of it changes any more."""

    run_id: str
    task_id: str
    session_id: str
    role: str | None
    status: str
    lifecycle: str
    message: str
    percentage: float | None
    phase: str | None
    cursor: int
    """All events up to here are in what this says."""
    created_at: datetime
    """Of the first attempt."""
    updated_at: datetime
    """Of the last event."""
    ended_at: datetime | None
    done: bool
    inputs: list[InputView]
    """The questions that wait for an answer."""
    result: Json = None
    result_truncated: bool = False
    error: dict[str, Json] | None = None
    expires_at: datetime | None = None
    """From then on it is not found by its id; null: as long as it is kept."""


class Cancelled(View):
    """The answer to a cancel. `success` says that the request was accepted."""

    success: bool
    message: str
    status: str | None = None
    session_id: str | None = None
    already_requested: bool = False
    reason: str | None = None
    rung: str | None = None
    """Where it was waited for: which rung of the ladder ended the work."""


class Paused(View):
    """The answer to a pause. `success` says that it is paused, or with `pending` that it will be."""

    success: bool
    message: str
    status: str
    session_id: str | None = None
    already: bool = False
    pending: bool = False
    """It goes on until its work reaches a place where it can stop."""
    reason: str | None = None


class Resumed(View):
    """The answer to a resume. `already` says that it was not paused."""

    success: bool
    message: str
    status: str
    session_id: str | None = None
    already: bool = False
    reason: str | None = None


class RunMetrics(View):
    """Of one run, so far or in all; null where nothing is known. Of a plan its steps are what is counted."""

    total_duration: float | None
    """Milliseconds, as `effective_duration`, which is the part of them at work."""
    effective_duration: float | None
    total_cost: float | None
    resource_efficiency: float | None
    quality_score: float | None
    success_rate: float | None
    throughput: float | None
    """Completed, per second."""
    error_rate: float | None


class Metrics(View):
    """Over all executions of a task. Rates count completed against completed, failed and timed out."""

    task_id: str
    total_executions: int
    completed: int
    failed: int
    cancelled: int
    timed_out: int
    success_rate: float | None
    success_rate_percent: float | None
    average_duration_seconds: float | None
    min_duration_seconds: float | None
    max_duration_seconds: float | None
    p50_duration_seconds: float | None
    p95_duration_seconds: float | None
    p99_duration_seconds: float | None
    retry_count: int
    last_error: str | None
    phase_seconds: dict[str, float] | None = None
    execution: RunMetrics | None = None
    """The `ExecutionMetrics` of the run that is meant; null where there was none."""


class WorkRow(View):
    """An execution that has begun. `kept`: it stands still, and is as it was under the next daemon."""

    task_id: str
    session_id: str
    title: str
    status: str
    kept: bool


class OwnerView(View):
    """A process that owned the data directory. `ended` is "clean", "dead" or, while it lives, null."""

    generation: int
    owner: str
    pid: int
    purpose: str
    version: str
    since: str
    until: str | None
    ended: str | None


class CheckView(View):
    """One thing that `doctor` looked at. `level` is ok, warning or error; `hint` says what to do."""

    name: str
    level: str
    what: str
    hint: str = ""


class Checked(View):
    checks: list[CheckView]


class Backup(Request):
    """`path` is absolute; a file that is there is replaced only with `overwrite`."""

    path: str
    overwrite: bool = False


class BackedUp(View):
    path: str
    size_bytes: int


class DaemonView(View):
    version: str
    pid: int
    started_at: datetime
    data_dir: str
    url: str | None
    """Base of the TCP door; null when it is off or its port was taken."""
    tcp_problem: str | None
    running: int
    queued: int
    head: int
    connections: int
    store_fault: str | None
    damage: str | None
    """What the daily check of the database found; null when that was nothing, or it has not been made yet."""
    work: list[WorkRow]
    """What has begun, at most 20 of it: what the end of the daemon would interrupt comes first."""
    owners: list[OwnerView]
    """The last owners of the data directory, this one first."""
