"""The tools that every agent sees: hand work over, follow it, stop it, fetch what it returned."""

from __future__ import annotations

from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Annotated, TypeVar

import orjson
from pydantic import Field

from vespera_exec.app import views
from vespera_exec.app.plans.views import ExecutePlan, PlanProblem
from vespera_exec.app.replies import by_key
from vespera_exec.errors import RunExpired
from vespera_exec.server.mcp import answers
from vespera_exec.server.mcp.apps.card import TOOL_META
from vespera_exec.server.mcp.tooling import Call, ToolPlan
from vespera_exec.server.mcp.watching import SeenPage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import Json
    from vespera_exec.model.principal import Caller

MAX_WAIT_MS = 25_000
_CANCEL_WAIT_MS = 6000
_MAX_EVENTS = 500
_PAGE_EVENTS = 100
_MAX_OUTPUT = 20_000
_PROMISED_METRICS = ("success_rate", "average_duration_seconds", "last_error")

TaskId = Annotated[str, Field(min_length=1, max_length=200, description="Task or session id, or a unique prefix")]
WaitMs = Annotated[int, Field(ge=0, le=MAX_WAIT_MS, description="Wait up to this long, in milliseconds")]
Cursor = Annotated[int, Field(ge=0, le=2**63 - 1)]
_Started = TypeVar("_Started", views.Execute, ExecutePlan)


class OneTask(views.Request):
    task_id: TaskId


class AskStatus(OneTask):
    detail: Annotated[bool, Field(description="Adds phases, usage, recent events, forms of questions")] = False


class ReadEvents(OneTask):
    cursor: Annotated[Cursor, Field(description="Events after this; 0 or next_cursor")] = 0
    wait_ms: WaitMs = 0
    max_events: Annotated[int, Field(ge=1, le=_MAX_EVENTS)] = 50
    follow: Annotated[bool, Field(description="Keep collecting until done, max_events or wait_ms")] = False


class Cancel(OneTask):
    reason: str = "User requested"
    wait_ms: Annotated[int, Field(ge=0, le=MAX_WAIT_MS, description="Wait for its end up to this long")] = (
        _CANCEL_WAIT_MS
    )


class Pause(OneTask):
    reason: str = "User requested"
    wait_ms: WaitMs = 5000


class Resume(OneTask):
    reason: str = "User requested"


class GiveAnswers(OneTask, views.GiveAnswers):
    wait_ms: Annotated[int, Field(ge=0, le=MAX_WAIT_MS, description="Then wait for the end up to this long")] = 0


class AskResult(OneTask):
    output_offset: (
        Annotated[Cursor, Field(description="Read the output from here on; its tail when left out")] | None
    ) = None
    output_limit: Annotated[int, Field(ge=0, le=_MAX_OUTPUT, description="Bytes of output; 0 for none")] = 4000


class ListTasks(views.Request):
    status: Annotated[str, Field(description="todo, doing, done, failed or cancelled")] | None = None
    role: str | None = None
    text: Annotated[str, Field(description="Words of the title")] | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    page: Annotated[str, Field(description="next_page of the page before")] | None = None


class Nothing(views.Request):
    pass


async def _create_task(call: Call, new: views.NewTask) -> dict[str, Json]:
    return answers.of(await call.vespera.create_task(call.caller, new))


class _Outcome(views.View):
    """What a wait has seen: how the run ended, or the questions that it waits for."""

    cursor: int = 0
    done: bool = False
    error: str | None = None
    error_code: str | None = None
    result: views.Json = None
    result_truncated: bool = False
    result_bytes: int | None = None
    inputs: list[views.InputView] | None = None
    more_inputs: int | None = None
    input_error: str | None = None
    """Why the user's answer to a question was not taken."""


class SeenStatus(views.Status):
    more_inputs: int | None = None


class Executed(_Outcome):
    task_id: str
    run_id: str
    session_id: str
    status: str
    repeated: bool = False


class ExecutedPlan(Executed):
    problems: list[PlanProblem] | None = None
    """Why the plan was refused."""


class Answered(_Outcome, views.Answered):
    task_id: str
    run_id: str | None = None


async def _execute_task(call: Call, request: views.Execute) -> dict[str, Json]:
    return await _executed(call, request, _start)


async def _execute_plan(call: Call, request: ExecutePlan) -> dict[str, Json]:
    return await _executed(call, request, _start_plan)


async def _start(vespera: Vespera, caller: Caller, request: views.Execute) -> views.Handle:
    return await vespera.execute_task(caller, request.model_copy(update={"wait_ms": 0}))


async def _start_plan(vespera: Vespera, caller: Caller, request: ExecutePlan) -> views.Handle:
    return await vespera.plans.execute(caller, request.model_copy(update={"wait_ms": 0}))


async def _executed(
    call: Call, request: _Started, start: Callable[[Vespera, Caller, _Started], Awaitable[views.Handle]]
) -> dict[str, Json]:
    """What was started, and what became of it within `wait_ms`; or in the next round of a call that waits for it."""
    if (before := call.host.round) is not None:
        return await _followed(
            call, before.task_id, before.run_id, cursor=before.cursor, wait_ms=min(before.left_ms, MAX_WAIT_MS)
        )
    handle = await start(call.vespera, call.caller, request)
    answer = answers.of(handle)
    if request.wait_ms or handle.done:
        with suppress(RunExpired):
            answer |= await _followed(
                call, handle.task_id, handle.run_id, cursor=handle.cursor, wait_ms=request.wait_ms
            )
    return answer


async def _answer(call: Call, given: GiveAnswers) -> dict[str, Json]:
    before = await call.vespera.get_status(call.caller, given.task_id)
    answered = await call.vespera.answer_input(call.caller, given.task_id, by_key(given, before.inputs))
    answer = answers.of(answered) | {"task_id": before.task_id}
    if before.session is None:
        return answer
    if call.host.way == "rounds":
        call.host.way = None  # the next round would give this answer again
    with suppress(RunExpired):
        run_id = before.session.run_id
        answer |= await _followed(call, before.task_id, run_id, cursor=before.cursor, wait_ms=given.wait_ms)
    return answer


async def _followed(call: Call, task_id: str, run_id: str, *, cursor: int, wait_ms: int) -> dict[str, Json]:
    """What became of a run that is followed from `cursor` until its end, a question, or for `wait_ms`."""
    async for _ in call.watch.pages(task_id, cursor=cursor, wait_ms=wait_ms, max_events=_PAGE_EVENTS):
        pass
    answer = answers.of_run(await call.vespera.get_run(call.caller, run_id)) | {"cursor": cursor}
    if call.host.refused is not None:
        answer["input_error"] = call.host.refused
    return answer


async def _list_tasks(call: Call, asked: ListTasks) -> dict[str, Json]:
    page = await call.vespera.list_tasks(
        call.caller, status=asked.status, role=asked.role, text=asked.text, limit=asked.limit, page=asked.page
    )
    return answers.of(page)


async def _list_roles(call: Call, asked: Nothing) -> dict[str, Json]:
    return answers.of(call.vespera.list_roles(call.caller))


async def _get_status(call: Call, asked: AskStatus) -> dict[str, Json]:
    status = await call.vespera.get_status(call.caller, asked.task_id, detail=asked.detail)
    return answers.status(status, detail=asked.detail)


async def _read_events(call: Call, asked: ReadEvents) -> dict[str, Json]:
    collected = _Collected(asked.max_events)
    page = None
    wait_ms = min(call.host.round.left_ms, MAX_WAIT_MS) if call.host.round is not None else asked.wait_ms
    pages = call.watch.pages(
        asked.task_id, cursor=asked.cursor, wait_ms=wait_ms, max_events=min(asked.max_events, _PAGE_EVENTS)
    )
    async with aclosing(pages):
        async for page in pages:
            if not collected.add(page) or (collected.events and not asked.follow):
                break
    assert page is not None
    seen = answers.of(collected.page(page))
    return seen | answers.questions(page.inputs) if page.inputs else seen


async def _cancel(call: Call, asked: Cancel) -> dict[str, Json]:
    cancelled = await call.vespera.cancel(call.caller, asked.task_id, reason=asked.reason, wait_ms=asked.wait_ms)
    return answers.of(cancelled)


async def _pause(call: Call, asked: Pause) -> dict[str, Json]:
    paused = await call.vespera.pause(call.caller, asked.task_id, reason=asked.reason, wait_ms=asked.wait_ms)
    return answers.of(paused)


async def _resume(call: Call, asked: Resume) -> dict[str, Json]:
    return answers.of(await call.vespera.resume(call.caller, asked.task_id, reason=asked.reason))


async def _get_result(call: Call, asked: AskResult) -> dict[str, Json]:
    result = await call.vespera.get_result(
        call.caller, asked.task_id, output_offset=asked.output_offset, output_limit=asked.output_limit
    )
    return answers.result(result)


async def _get_metrics(call: Call, asked: OneTask) -> dict[str, Json]:
    metrics = await call.vespera.get_metrics(call.caller, asked.task_id)
    answer = answers.of(metrics, keep=_PROMISED_METRICS)
    if metrics.execution is not None:
        answer["execution"] = metrics.execution.model_dump(mode="json")
    return answer


class _Collected:
    """Events of several pages, as many as an answer may hold."""

    def __init__(self, max_events: int) -> None:
        self.events: list[dict[str, Json]] = []
        self._left = max_events
        self._room = answers.PAGE_CHARACTERS
        self._whole = True

    def add(self, page: views.EventPage) -> bool:
        """False when there is no room for more."""
        for event in page.events:
            self._room -= len(orjson.dumps(event))
            # The first always fits, or the reader would never get past it.
            if not self._left or (self._room < 0 and self.events):
                self._whole = False
                return False
            self._left -= 1
            self.events.append(event)
        return self._left > 0

    def page(self, last: SeenPage) -> SeenPage:
        """What was collected, as one page that ends where the collection ends."""
        cursor = last.next_cursor if self._whole else self.events[-1]["cursor"]
        return last.model_copy(update={"events": self.events, "next_cursor": cursor, "done": last.done and self._whole})


_KEY = "A repeat with the same key answers with the first one's ids"
_PLAN = """\
{steps: [{id, role, inputs?, depends_on?: [ids], timeout_seconds?, retries?: n, fallback?: role, approval?: question, \
continue_on_failure?}], name?, variables?, max_parallel?, output?}. ${steps.ID.output.name} and ${variables.NAME} in \
inputs and output are replaced. Example: {steps: [{id: a, role: survey}, {id: b, role: command, inputs: {argv: [echo, \
'${steps.a.output.files} files']}}]}"""

PLANS = (
    ToolPlan(
        name="execute_task",
        title="Execute a task",
        description=(
            "Start long work: of a known task (task_id), or of a new one (title, role, inputs). It goes on when this "
            "chat ends. With wait_ms short work is done in the answer, with its `result`. Else follow it with "
            "stream_task_execution_events from `cursor`; when done, get_task_result. An answer with `inputs` waits for "
            "your user: see answer_task_input."
        ),
        takes=views.Execute,
        gives=Executed,
        untyped=("result",),
        use=_execute_task,
        starts=_start,
        stands_for_the_work=True,
        meta=TOOL_META,
        described={
            "task_id": "A task that exists; or give title and role",
            "title": "What the new task is, in one line",
            "description": "The task in full",
            "role": "Who does it; see list_roles",
            "inputs": "Inputs of the role, as list_roles describes them",
            "priority": "Higher first",
            "wait_ms": "Wait up to this long for the end",
            "idempotency_key": _KEY,
        },
        changes=True,
        destroys=True,
        repeatable=False,
        opens_world=True,
    ),
    ToolPlan(
        name="execute_plan",
        title="Execute a plan",
        description=(
            "Start steps that need each other, as one task: followed, stopped and fetched like any. A question of a "
            "step has the key STEP/KEY. A plan that is refused starts nothing: see `problems`."
        ),
        takes=ExecutePlan,
        gives=ExecutedPlan,
        use=_execute_plan,
        starts=_start_plan,
        stands_for_the_work=True,
        untyped=("result",),
        meta=TOOL_META,
        described={
            "plan": _PLAN,
            "variables": "Override the plan's",
            "title": "Else the plan's name",
            "wait_ms": "Wait up to this long for the end",
            "idempotency_key": _KEY,
        },
        changes=True,
        destroys=True,
        repeatable=False,
        opens_world=True,
    ),
    ToolPlan(
        name="get_task_execution_status",
        title="Status of a task",
        description=(
            "One look at a task: phase, progress, ETA, error; of the run that is going on, else of the last. "
            "To wait for news use stream_task_execution_events instead of asking again and again."
        ),
        takes=AskStatus,
        gives=SeenStatus,
        use=_get_status,
        nullable=("session_id", "session"),
        meta=TOOL_META,
        not_found={"executing": False, "task_found": False, "error": "Task not found"},
    ),
    ToolPlan(
        name="stream_task_execution_events",
        title="Follow a task",
        description=(
            "Events of a task in order, without gap. With wait_ms it waits for news; with follow it collects until "
            "the run is done. Call again with cursor = next_cursor until `done`, then get_task_result."
        ),
        takes=ReadEvents,
        gives=SeenPage,
        use=_read_events,
        not_found={"error": "Task not found"},
    ),
    ToolPlan(
        name="get_task_result",
        title="Result of a task",
        description=(
            "What the last run returned, its error, and the tail of what it wrote. Read longer output in pages: "
            "output_offset = output.next_offset. Before the end it shows the output so far."
        ),
        takes=AskResult,
        gives=views.Result,
        use=_get_result,
        untyped=("error", "result"),
    ),
    ToolPlan(
        name="cancel_task_execution",
        title="Cancel a task",
        description=(
            "Stop what a task runs, with all its processes, within 5 seconds. `success` false says in `reason` why "
            "there was nothing to stop."
        ),
        takes=Cancel,
        gives=views.Cancelled,
        use=_cancel,
        not_found={"success": False, "error": "Task not found"},
        changes=True,
        destroys=True,
    ),
    ToolPlan(
        name="pause_task_execution",
        title="Pause a task",
        description=(
            "Stop what a task runs where it stands; its clock and timeout stop, too. `pending`: it will stop at its "
            "next pause point. `success` false says why not in `reason`."
        ),
        takes=Pause,
        gives=views.Paused,
        use=_pause,
        not_found={"success": False, "error": "Task not found"},
        changes=True,
    ),
    ToolPlan(
        name="resume_task_execution",
        title="Resume a task",
        description="Let a paused task go on, or take back a pause that is `pending`.",
        takes=Resume,
        gives=views.Resumed,
        use=_resume,
        not_found={"success": False, "error": "Task not found"},
        changes=True,
        opens_world=True,
    ),
    ToolPlan(
        name="answer_task_input",
        title="Answer a question",
        description=(
            "Give your user's answer to what a task asks (`inputs`), never one of your own: by key in `answers`, or "
            "just action and content where one question is open. Content fits the question's schema. `open` names "
            "what is still asked."
        ),
        takes=GiveAnswers,
        gives=Answered,
        use=_answer,
        stands_for_the_work=True,
        untyped=("result",),
        not_found={"success": False, "error": "Task not found"},
        described={"answers": "{key: {action, content}}", "key": "Of the question", "content": "Values by field"},
        changes=True,
        opens_world=True,
    ),
    ToolPlan(
        name="list_roles",
        title="List roles",
        description="Who can do work here: each role with the JSON Schema of its inputs, and whether you may use it.",
        takes=Nothing,
        gives=views.RoleList,
        use=_list_roles,
    ),
    ToolPlan(
        name="list_tasks",
        title="List tasks",
        description="Tasks of this data directory, newest change first; also those of earlier chats.",
        takes=ListTasks,
        gives=views.TaskPage,
        use=_list_tasks,
    ),
    ToolPlan(
        name="create_task",
        title="Create a task",
        description="Note a task without starting it. execute_task starts it later by its task_id.",
        takes=views.NewTask,
        gives=views.TaskView,
        use=_create_task,
        described={"idempotency_key": _KEY},
        changes=True,
        repeatable=False,
    ),
    ToolPlan(
        name="get_task_performance_metrics",
        title="Metrics of a task",
        description="Over all runs of a task: how many ended how, success rate, durations, time in each phase; "
        "`execution`: of one run, durations in ms.",
        takes=OneTask,
        gives=views.Metrics,
        use=_get_metrics,
        nullable=_PROMISED_METRICS,
        not_found={"error": "Task not found"},
    ),
)
