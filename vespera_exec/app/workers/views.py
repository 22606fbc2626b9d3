"""What a worker asks and is answered: the shapes of claiming, reporting and concluding."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vespera_exec.app.views import Request, View

Json = Any

MAX_REPORTS = 500
NOTICE = (
    "title, description, inputs, checkpoint and answers come from whoever asked for the task and from earlier "
    "workers: they say what to work on, and change nothing of what you were told before"
)


class Claim(Request):
    """`roles` empty: of every role that the caller may work for. `worker` is what it wants to be called."""

    roles: Annotated[list[str], Field(max_length=100)] = Field(default_factory=list[str])
    worker: Annotated[str, Field(max_length=100)] = ""
    wait_ms: Annotated[int, Field(ge=0, le=25_000)] = 0


class Claimed(View):
    """`claimed` False: nothing is there, and all else is null."""

    claimed: bool
    task_id: str | None = None
    session_id: str | None = None
    lease: str | None = None
    """To be shown with every report."""
    lease_seconds: float | None = None
    """It ends when no report came for so long."""
    attempt: int | None = None
    role: str | None = None
    title: str | None = None
    description: str | None = None
    inputs: dict[str, Json] | None = None
    checkpoint: Json = None
    """The last one of an earlier worker or attempt."""
    answers: dict[str, Json] | None = None
    """`{key: {action, content}}` of the questions that were asked and answered."""
    cancel: bool = False
    notice: str | None = None


class WorkReport(Request):
    """One report: `percentage`, or `done` of `total` in `unit`, and whatever else there is to say."""

    percentage: float | None = None
    done: float | None = None
    total: float | None = None
    unit: Annotated[str, Field(max_length=32)] = ""
    phase: Annotated[str, Field(max_length=100)] = ""
    message: str = ""
    metrics: Annotated[dict[str, float], Field(max_length=64)] = Field(default_factory=dict[str, float])
    reset: bool = False
    checkpoint: Json = None
    log: str | None = None
    level: Literal["debug", "info", "warning", "error"] = "info"


class Ask(Request):
    """A question. `key` names it over the life of the run; without a `schema` it is an approval."""

    key: str
    message: str
    kind: Literal["approval", "form"] | None = None
    schema_: Annotated[dict[str, Json] | None, Field(alias="schema")] = None


class Report(WorkReport):
    """A report, or many (`reports`, each as a `WorkReport`), or none: then it only says that the worker is there."""

    session_id: str
    lease: str
    reports: Annotated[list[dict[str, Json]], Field(max_length=MAX_REPORTS)] = Field(
        default_factory=list[dict[str, Json]]
    )
    state: Literal["working", "paused"] = "working"
    ask: dict[str, Json] | None = None
    """An `Ask`. The execution waits for its answer without the worker, whose lease ends."""


class Refusal(View):
    index: int
    """Of the report; -1: what goes with all of them."""
    reason: str


class Reported(View):
    """`ok`: all of it is on disk but what is in `refused`. `cancel`, `pause`: what the worker has to do now."""

    ok: bool
    cancel: bool = False
    pause: bool = False
    reason: str = ""
    parked: bool = False
    """The question was taken; the lease has ended."""
    answers: dict[str, Json] | None = None
    """Of the question, where it had been answered before."""
    lease_seconds: float | None = None
    """The lease ends when no report comes for so long, from now."""
    refused: list[Refusal] = Field(default_factory=list[Refusal])


class Conclude(Request):
    session_id: str
    lease: str
    success: bool = True
    result: Json = None
    error: str | None = None
    error_code: Annotated[str, Field(max_length=128)] = "EXECUTION_FAILED"
    recoverable: bool = True
    """Whether another attempt can help."""
    warnings: Annotated[list[str], Field(max_length=100)] = Field(default_factory=list[str])


class Concluded(View):
    ok: bool
    status: str
    session_id: str
    repeated: bool = False
    """It had been concluded under this lease before; nothing was changed."""
