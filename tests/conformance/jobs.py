"""The jobs: roles that the engine runs, a tool for each, and the extension that makes tasks of their calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
from mcp_types import CallToolResult, ElicitResult, InputRequiredResult, ToolAnnotations

from roles.definition import Permissions, Role
from tests.conformance.rounds import form
from vespera_exec.app.callers import current_caller
from vespera_exec.app.views import Execute
from vespera_exec.errors import ExecutionError
from vespera_exec.server.mcp import answers
from vespera_exec.server.mcp.adapter import own_tool
from vespera_exec.server.mcp.tasks import TasksExtension

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mcp.server.context import HandlerResult
    from mcp.server.mcpserver import Context
    from mcp_types import CallToolRequestParams

    from roles.context import Context as Work
    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import Handle
    from vespera_exec.model.principal import Caller
    from vespera_exec.server.mcp.adapter import OwnTool

_WAIT_MS = 25_000
_STEP_SECONDS = 0.05
_CONFIRMED: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "confirm": {"type": "boolean"}},
    "required": ["confirm"],
}
_ANYTHING: dict[str, Any] = {"type": "object"}


async def slow_compute(context: Work) -> dict[str, Any]:
    seconds = float(context.inputs.get("seconds", 0))
    ends_at = anyio.current_time() + seconds
    while (left := ends_at - anyio.current_time()) > 0:
        await context.pause_point()
        context.progress(100 * (1 - left / seconds), f"{left:.1f} s left")
        await anyio.sleep(min(_STEP_SECONDS, left))
    return {"seconds": seconds, "label": context.inputs.get("label")}


async def failing_job(context: Work) -> None:
    raise ExecutionError("This job always fails", code="ALWAYS_FAILS")


async def protocol_error_job(context: Work) -> None:
    raise ExecutionError("This job ends in an error of the protocol", code="PROTOCOL_ERROR")


async def confirm_delete(context: Work) -> str:
    name = context.inputs.get("filename")
    answer = context.ask("delete", f"Delete {name}?", schema=_CONFIRMED)
    deleted = answer.accepted and (answer.content or {})["confirm"]
    return f"{name} is {'deleted' if deleted else 'still there'}"


async def multi_input(context: Work) -> list[str]:
    given = context.ask_all({"first": ("The first?", _CONFIRMED), "second": ("The second?", _CONFIRMED)})
    return [f"{key}: {answer.action}" for key, answer in given.items()]


async def test_tool_with_task(context: Work) -> str:
    return f"Hello, {context.inputs['name']}!"


JOBS: tuple[Callable[[Work], Awaitable[Any]], ...] = (
    slow_compute,
    failing_job,
    protocol_error_job,
    confirm_delete,
    multi_input,
    test_tool_with_task,
)


def tasks_extension(vespera: Vespera) -> TasksExtension:
    """Makes tasks of the calls of the jobs, which it adds to the roles of `vespera`."""
    anybody = Permissions(principals=("local",), scopes=("operate",))
    for work in JOBS:
        role = Role.from_callable(work, in_loop=True, inputs=None, permissions=anybody, grace_seconds=_STEP_SECONDS)
        vespera.roles.add(role)

    async def start(caller: Caller, params: CallToolRequestParams) -> Handle:
        request = Execute(title=params.name, role=params.name, inputs=params.arguments or {})
        return await vespera.execute_task(caller, request)

    async def start_with_a_name(caller: Caller, params: CallToolRequestParams) -> Handle | HandlerResult:
        """The call has its rounds first; what they have gathered is the input of the job."""
        given = (params.input_responses or {}).get("user_name")
        if not isinstance(given, ElicitResult) or given.action != "accept":
            return InputRequiredResult(input_requests={"user_name": form("What is your name?", name="string")})
        return await vespera.execute_task(
            caller, Execute(title=params.name, role=params.name, inputs=dict(given.content or {}))
        )

    starts = dict.fromkeys([work.__name__ for work in JOBS], start)
    return TasksExtension(
        vespera,
        starts=starts | {"test_tool_with_task": start_with_a_name},
        requires={"failing_job", "test_tool_with_task"},
    )


def tools(vespera: Vespera) -> list[OwnTool]:
    """For clients without the extension: each job is run while its call waits."""
    return [_waiting(vespera, work.__name__) for work in JOBS]


def _waiting(vespera: Vespera, name: str) -> OwnTool:
    async def answer(arguments: dict[str, Any], context: Context[Any, Any]) -> CallToolResult:
        caller = current_caller.get()
        handle = await vespera.execute_task(caller, Execute(title=name, role=name, inputs=arguments, wait_ms=_WAIT_MS))
        return answers.run_result(await vespera.get_run(caller, handle.run_id))

    return own_tool(
        answer,
        name=name,
        title=name,
        description=f"Runs the job {name}.",
        arguments=_ANYTHING,
        output=_ANYTHING,
        annotations=ToolAnnotations(),
    )
