"""The MCP tasks extension (SEP-2663): a task is a run, its handle the run id, and the store its only state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, Literal

from mcp.server.extension import Extension, MethodBinding
from mcp.server.mcpserver import require_client_extension
from mcp.shared.exceptions import MCPError
from mcp_types import INTERNAL_ERROR, INVALID_PARAMS, CallToolResult, RequestParams
from pydantic import Field, ValidationError

from vespera_exec.app import views
from vespera_exec.app.callers import current_caller
from vespera_exec.errors import RunExpired
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.events import mapping
from vespera_exec.server.mcp import answers
from vespera_exec.server.mcp.adapter import check_name_header
from vespera_exec.server.mcp.resources import told

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime

    from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
    from mcp_types import CallToolRequestParams, ClientCapabilities

    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import Json
    from vespera_exec.model.principal import Caller

IDENTIFIER: Final = "io.modelcontextprotocol/tasks"
VERSION: Final = "2026-07-28"
"""The only protocol revision that the extension is defined for."""
PROGRESS: Final = "vespera-exec/progress"
"""In the `_meta` of a task: percentage, phase, cursor, task_id, session_id."""
PROTOCOL_ERROR: Final = "PROTOCOL_ERROR"
"""Failure code of work that ends in a JSON-RPC error: `jsonrpc_code` and `data` of its context are the error's."""

Status = Literal["working", "input_required", "completed", "failed", "cancelled"]
Start = Callable[["Caller", "CallToolRequestParams"], Awaitable["views.Handle | HandlerResult"]]
"""Starts the run that a call of a tool asks for, on disk when it returns; or answers the call without one."""
Finish = Callable[[views.Run], CallToolResult]
"""What is the result of the call, now that the run has ended."""

_MESSAGE_CHARACTERS = 200


class TaskParams(RequestParams):
    task_id: str = Field(max_length=200)


class UpdateTaskParams(TaskParams):
    input_responses: dict[str, Any]


class TasksExtension(Extension):
    """Makes tasks of the calls of the tools in `starts`, for clients that know the extension.

    Other clients reach the tool itself, unless it is in `requires`: then they are refused (-32021).
    """

    identifier = IDENTIFIER

    def __init__(
        self,
        vespera: Vespera,
        *,
        starts: Mapping[str, Start],
        requires: Collection[str] = (),
        finish: Finish = answers.run_result,
    ) -> None:
        self._vespera = vespera
        self._starts = starts
        self._requires = frozenset(requires)
        self._finish = finish

    def methods(self) -> Sequence[MethodBinding]:
        versions = frozenset({VERSION})
        return (
            MethodBinding("tasks/get", TaskParams, self._get, versions),
            MethodBinding("tasks/update", UpdateTaskParams, self._update, versions),
            MethodBinding("tasks/cancel", TaskParams, self._cancel, versions),
        )

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: ServerRequestContext[Any, Any], call_next: CallNext
    ) -> HandlerResult:
        start = self._starts.get(params.name)
        caller = current_caller.get()
        if start is None or not (is_declared(ctx) and "read" in caller.scopes):
            if params.name in self._requires:
                require_client_extension(ctx, IDENTIFIER)
            return await call_next(ctx)
        started = await start(caller, params)
        if not isinstance(started, views.Handle):
            return started
        with told():
            try:
                run = await self._vespera.get_run(caller, started.run_id)
            except RunExpired:
                run = None
        if run is None:
            return await call_next(ctx)  # the repeat of a call whose handle is no longer kept
        return {"resultType": "task", **self._task(served(run, ctx))}

    def detailed(self, run: views.Run) -> dict[str, Json]:
        """The `DetailedTask`: what `tasks/get` answers and `notifications/tasks` carries."""
        task = self._task(run)
        match status_of(run):
            case "input_required":
                task["inputRequests"] = {each.key: _elicitation(each) for each in run.inputs}
            case "completed":
                task["result"] = self._finish(run).model_dump(mode="json", by_alias=True, exclude_none=True)
            case "failed":
                task["error"] = _protocol_error(run.error or {})
            case _:
                pass
        return task

    def _task(self, run: views.Run) -> dict[str, Json]:
        progress = {
            "percentage": run.percentage,
            "phase": run.phase,
            "cursor": run.cursor,
            "task_id": run.task_id,
            "session_id": run.session_id,
        }
        return {
            "taskId": run.run_id,
            "status": status_of(run),
            "statusMessage": _message(run),
            "createdAt": _stamp(run.created_at),
            "lastUpdatedAt": _stamp(run.updated_at),
            "ttlMs": _milliseconds(run.created_at, run.expires_at),
            "pollIntervalMs": self._vespera.settings.mcp_poll_interval_ms,
            "_meta": {PROGRESS: progress},
        }

    async def _get(self, ctx: ServerRequestContext[Any, Any], params: TaskParams) -> HandlerResult:
        return {"resultType": "complete", **self.detailed(served(await self._run(ctx, params), ctx))}

    async def _update(self, ctx: ServerRequestContext[Any, Any], params: UpdateTaskParams) -> HandlerResult:
        run = await self._run(ctx, params)
        asked = {each.key for each in run.inputs}
        responses = {key: mapping(said) for key, said in params.input_responses.items() if key in asked}
        # Who closes a dialog has not decided: the question stays open, for this client and for every other door.
        given = {key: _answer(key, said) for key, said in responses.items() if said.get("action") != "cancel"}
        if given:
            with told():
                await self._vespera.answer_input(current_caller.get(), run.session_id, given)
        return {"resultType": "complete"}

    async def _cancel(self, ctx: ServerRequestContext[Any, Any], params: TaskParams) -> HandlerResult:
        run = await self._run(ctx, params)
        if not run.done:
            with told():
                await self._vespera.cancel(current_caller.get(), run.session_id, reason="The client cancelled the task")
        return {"resultType": "complete"}

    async def _run(self, ctx: ServerRequestContext[Any, Any], params: TaskParams) -> views.Run:
        """
        Raises:
            MCPError: the client has not declared the extension, its header names another task, or it sees no such run.
        """
        require_client_extension(ctx, IDENTIFIER)
        check_name_header(ctx, params.task_id)
        with told():
            return await self._vespera.get_run(current_caller.get(), params.task_id)


def is_declared(ctx: ServerRequestContext[Any, Any]) -> bool:
    """The client knows the extension, and speaks the revision that it is defined for."""
    capabilities = ctx.session.client_capabilities
    extensions = capabilities.extensions if capabilities is not None else None
    return ctx.protocol_version == VERSION and IDENTIFIER in (extensions or {})


def served(run: views.Run, ctx: ServerRequestContext[Any, Any]) -> views.Run:
    """The run for this client: one that cannot ask its user is sent no questions, and waits for others to answer."""
    if not run.inputs or takes_forms(ctx.session.client_capabilities):
        return run
    return run.model_copy(update={"inputs": [], "message": f"waits for an answer: {run.inputs[0].message}"})


def takes_forms(capabilities: ClientCapabilities | None) -> bool:
    """The client can put a form to its user. An empty capability means forms, as it did before there were others."""
    elicitation = capabilities.elicitation if capabilities is not None else None
    return elicitation is not None and (elicitation.form is not None or elicitation.url is None)


def status_of(run: views.Run) -> Status:
    if not run.done:
        return "input_required" if run.inputs else "working"
    match run.status:
        case ExecutionStatus.CANCELLED:
            return "cancelled"
        case ExecutionStatus.FAILED if (run.error or {}).get("code") == PROTOCOL_ERROR:
            return "failed"
        case _:
            return "completed"  # a failure of the work is a result with isError


def _message(run: views.Run) -> str:
    """The state in one line, for a reader."""
    if run.done:
        said = str((run.error or {}).get("message") or run.message)
    elif run.inputs:
        said = run.inputs[0].message
    else:
        percentage = f"{run.percentage:.0f} %" if run.percentage is not None else ""
        said = " · ".join(part for part in (run.phase or run.status, percentage, run.message) if part)
    return " ".join(said.split())[:_MESSAGE_CHARACTERS]


def _elicitation(asked: views.InputView) -> dict[str, Json]:
    params = {"mode": "form", "message": asked.message, "requestedSchema": asked.schema_}
    return {"method": "elicitation/create", "params": params}


def _answer(key: str, given: Mapping[str, Json]) -> views.InputAnswer:
    """
    Raises:
        MCPError: it is no `ElicitResult`.
    """
    try:
        return views.InputAnswer.model_validate({name: given[name] for name in ("action", "content") if name in given})
    except ValidationError as fault:
        where = ".".join(map(str, fault.errors(include_url=False)[0]["loc"]))
        raise MCPError(INVALID_PARAMS, f"inputResponses[{key!r}] is no elicitation result: see {where}") from None


def _protocol_error(error: Mapping[str, Json]) -> dict[str, Json]:
    context = mapping(error.get("context"))
    code = context.get("jsonrpc_code")
    data = {"data": context["data"]} if "data" in context else {}
    message = str(error.get("message"))
    return {"code": code if isinstance(code, int) else INTERNAL_ERROR, "message": message, **data}


def _stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _milliseconds(created: datetime, expires: datetime | None) -> int | None:
    return max(1, int((expires - created).total_seconds() * 1000)) if expires is not None else None
