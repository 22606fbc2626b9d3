"""The tools of whoever runs plans: steps, checkpoints, what failed for good, and the capacity that steps share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from vespera_exec.app import views
from vespera_exec.app.capacity import views as capacity_views
from vespera_exec.app.checkpoints import views as checkpoint_views
from vespera_exec.app.dead_letters import views as dead_letter_views
from vespera_exec.app.plans import views as plan_views
from vespera_exec.server.mcp import answers
from vespera_exec.server.mcp.tooling import Call, ToolPlan
from vespera_exec.server.mcp.toolsets.core import MAX_WAIT_MS, Nothing, OneTask

if TYPE_CHECKING:
    from vespera_exec.app.views import Json

StepId = Annotated[str, Field(min_length=1, max_length=64, description="Id of the step in its plan")]


class _AskSteps(OneTask):
    status: Annotated[str, Field(description="Only those, such as failed or waiting")] | None = None
    after: Annotated[int, Field(ge=-1, le=2**31, description="next_after of the page before")] = -1
    limit: Annotated[int, Field(ge=1, le=500)] = 50


class _ControlStep(OneTask):
    step: StepId
    action: Literal["cancel", "pause", "resume"]
    reason: str = "User requested"


class _NewCheckpoint(OneTask):
    metadata: Annotated[dict[str, views.Json], Field(description="Kept with it")] = Field(
        default_factory=dict[str, views.Json]
    )


class _AskCheckpoints(OneTask):
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    before: Annotated[str, Field(max_length=200, description="next_before of the page before")] | None = None


class _Restore(views.Request):
    checkpoint_id: Annotated[str, Field(min_length=1, max_length=200, description="Of list_checkpoints")] | None = None
    task_id: Annotated[str, Field(min_length=1, max_length=200, description="Instead: its last checkpoint")] | None = (
        None
    )
    wait_ms: Annotated[int, Field(ge=0, le=MAX_WAIT_MS, description="Wait up to this long for the end")] = 0


class _AskDeadLetters(views.Request):
    role: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    page: Annotated[str, Field(max_length=1000, description="next_page of the page before")] | None = None


class _Controlled(views.View):
    """The answer to a cancel, a pause or a resume of a step."""

    success: bool
    message: str
    status: str | None = None
    session_id: str | None = None
    already: bool = False
    already_requested: bool = False
    pending: bool = False
    reason: str | None = None
    rung: str | None = None


async def _steps(call: Call, asked: _AskSteps) -> dict[str, Json]:
    page = await call.vespera.list_steps(
        call.caller, asked.task_id, status=asked.status, after=asked.after, limit=asked.limit
    )
    return answers.steps(page)


async def _control(call: Call, asked: _ControlStep) -> dict[str, Json]:
    plans = call.vespera.plans
    match asked.action:
        case "cancel":
            act = plans.cancel_step
        case "pause":
            act = plans.pause_step
        case "resume":
            act = plans.resume_step
    return answers.of(await act(asked.task_id, asked.step, call.caller, reason=asked.reason))


async def _create_checkpoint(call: Call, asked: _NewCheckpoint) -> dict[str, Json]:
    made = await call.vespera.checkpoints.create(call.caller, asked.task_id, metadata=asked.metadata)
    return answers.of(made)


async def _list_checkpoints(call: Call, asked: _AskCheckpoints) -> dict[str, Json]:
    listed = await call.vespera.checkpoints.list(call.caller, asked.task_id, limit=asked.limit, before=asked.before)
    return answers.of(listed)


async def _restore(call: Call, asked: _Restore) -> dict[str, Json]:
    restored = await call.vespera.checkpoints.restore(
        call.caller, asked.checkpoint_id, any_id=asked.task_id, wait_ms=asked.wait_ms
    )
    return answers.of(restored)


async def _list_dead_letters(call: Call, asked: _AskDeadLetters) -> dict[str, Json]:
    listed = await call.vespera.dead_letters.list(call.caller, role=asked.role, limit=asked.limit, page=asked.page)
    return answers.of(listed)


async def _requeue(call: Call, asked: dead_letter_views.DecideDeadLetters) -> dict[str, Json]:
    requeued = await call.vespera.dead_letters.requeue(
        call.caller, asked.task_ids, all=asked.all, role=asked.role, limit=asked.limit
    )
    return answers.of(requeued)


async def _capacity(call: Call, asked: Nothing) -> dict[str, Json]:
    return answers.of(call.vespera.capacity.view(call.caller))


PLANS = (
    ToolPlan(
        name="get_plan_steps",
        title="Steps of a plan",
        description=(
            "Where each step of a plan stands, in the plan's order: status, progress, error, the task that does it "
            "(its output and events are read there). Read on with after = next_after."
        ),
        takes=_AskSteps,
        gives=plan_views.StepPage,
        use=_steps,
        not_found={"error": "Task not found"},
    ),
    ToolPlan(
        name="control_plan_step",
        title="Control a step",
        description=(
            "Cancel, pause or resume one step of a plan that is executed; the others go on as their dependencies let "
            "them. `success` false says why not in `reason`."
        ),
        takes=_ControlStep,
        gives=_Controlled,
        use=_control,
        not_found={"success": False, "error": "Task not found"},
        changes=True,
        destroys=True,
    ),
    ToolPlan(
        name="create_checkpoint",
        title="Make a checkpoint",
        description="Mark where a running task or plan stands now, to go back to. Plans make one after each step.",
        takes=_NewCheckpoint,
        gives=checkpoint_views.CheckpointView,
        use=_create_checkpoint,
        not_found={"error": "Task not found"},
        changes=True,
        repeatable=False,
    ),
    ToolPlan(
        name="list_checkpoints",
        title="List checkpoints",
        description="The checkpoints of a task or plan, the newest first.",
        takes=_AskCheckpoints,
        gives=checkpoint_views.CheckpointList,
        use=_list_checkpoints,
        not_found={"error": "Task not found"},
    ),
    ToolPlan(
        name="restore_checkpoint",
        title="Go back to a checkpoint",
        description=(
            "Go back to a checkpoint: in place where it still runs (steps after it are stopped and done again), else "
            "by a new run that keeps what was completed there. Follow it from `cursor`."
        ),
        takes=_Restore,
        gives=checkpoint_views.Restored,
        use=_restore,
        not_found={"error": "Task not found"},
        changes=True,
        destroys=True,
        repeatable=False,
        opens_world=True,
    ),
    ToolPlan(
        name="list_dead_letters",
        title="List what failed for good",
        description="Tasks and plans that have failed and are not tried again, the last first, with their error.",
        takes=_AskDeadLetters,
        gives=dead_letter_views.DeadLetterPage,
        use=_list_dead_letters,
    ),
    ToolPlan(
        name="requeue_dead_letters",
        title="Try again",
        description="Execute tasks that failed for good once more; plans keep the steps that were completed.",
        takes=dead_letter_views.DecideDeadLetters,
        gives=dead_letter_views.Requeued,
        use=_requeue,
        described={"task_ids": "Of list_dead_letters", "all": "Instead: all of them", "role": "With all: of this role"},
        changes=True,
        repeatable=False,
        opens_world=True,
    ),
    ToolPlan(
        name="get_capacity",
        title="Capacity",
        description="What the capacity pools have free, who holds the rest, and what waits for some.",
        takes=Nothing,
        gives=capacity_views.CapacityView,
        use=_capacity,
    ),
)
