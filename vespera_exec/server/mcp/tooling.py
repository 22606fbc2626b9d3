"""What every tool is made of: its plan, the call of it, and how its answers and errors go out."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mcp_types import ToolAnnotations

from vespera_exec.app.callers import current_caller
from vespera_exec.errors import ExecutionNotFound, TaskNotFound, VesperaError
from vespera_exec.server.mcp import answers, schemas
from vespera_exec.server.mcp.adapter import OwnTool, own_tool
from vespera_exec.server.mcp.asking import NextRound, host_of
from vespera_exec.server.mcp.watching import Watch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mcp.server.mcpserver import Context
    from mcp_types import CallToolRequestParams, CallToolResult, InputRequiredResult

    from vespera_exec.app import views
    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import Json
    from vespera_exec.model.principal import Caller
    from vespera_exec.server.mcp.asking import Board, Host
    from vespera_exec.server.mcp.tasks import Start

log = logging.getLogger(__name__)


class Call:
    """One call of a tool: whose it is, how to keep the client up to date while it is open, how to ask its user."""

    def __init__(
        self, vespera: Vespera, caller: Caller, context: Context[Any, Any], board: Board, heartbeat_seconds: float
    ) -> None:
        self.vespera = vespera
        self.caller = caller
        self._context = context
        self._board = board
        self._heartbeat_seconds = heartbeat_seconds

    # Made when they are first used: most calls neither wait nor ask.

    @cached_property
    def host(self) -> Host:
        return host_of(self._context, self._board)

    @cached_property
    def watch(self) -> Watch:
        async def report(progress: float, message: str) -> None:
            await self._context.report_progress(progress, message=message)

        return Watch(
            vespera=self.vespera,
            caller=self.caller,
            report=report,
            host=self.host,
            heartbeat_seconds=self._heartbeat_seconds,
        )

    async def take_replies(self) -> None:
        """Record what the user said between two rounds of the call.

        Raises:
            InvalidInput: it does not say of which call.
        """
        if self._context.request_state is not None or self._context.input_responses:
            await self.host.take_replies(self.vespera, self.caller)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    """A tool before it is bound. `use` takes the call and the checked arguments; `not_found` it promises then.

    `meta` is its `_meta` in `tools/list`.
    """

    name: str
    title: str
    description: str
    takes: type[views.Request]
    gives: type[views.View]
    use: Callable[[Call, Any], Awaitable[dict[str, Json]]]
    described: dict[str, str] = field(default_factory=dict[str, str])
    untyped: tuple[str, ...] = ()
    nullable: tuple[str, ...] = ()
    """Keys of its answer that are sent also when they are null; the others are left out then."""
    not_found: dict[str, Json] = field(default_factory=dict[str, "Json"])
    changes: bool = False
    destroys: bool = False
    repeatable: bool = True
    opens_world: bool = False
    meta: dict[str, Json] | None = None
    stands_for_the_work: bool = False
    """Its answer is an error where the work that it waited for has failed: as a task's result is (SEP-2663)."""
    starts: Callable[[Vespera, Caller, Any], Awaitable[views.Handle]] | None = None
    """Where its call may become an MCP task: starts the run, without waiting for it."""


def bound(plan: ToolPlan, vespera: Vespera, heartbeat_seconds: float, board: Board) -> OwnTool:
    """The tool, over one `Vespera`. Whoever calls it is found in `current_caller`."""

    async def answer(arguments: dict[str, Any], context: Context[Any, Any]) -> CallToolResult | InputRequiredResult:
        call = Call(vespera, current_caller.get(), context, board, heartbeat_seconds)
        try:
            taken = schemas.check(plan.takes, arguments)
            await call.take_replies()
            answer = await plan.use(call, taken)
            return answers.success(answer, is_error=plan.stands_for_the_work and answers.has_failed(answer))
        except NextRound as round:
            return round.result
        # Supervisor boundary: a fault of ours costs this call only.
        except Exception as error:  # noqa: BLE001
            return refusal(plan, error)

    return own_tool(
        answer,
        name=plan.name,
        title=plan.title,
        description=plan.description,
        arguments=schemas.input_schema(plan.takes, plan.described),
        output=schemas.output_schema(plan.gives, untyped=plan.untyped, nullable=plan.nullable),
        annotations=ToolAnnotations(
            read_only_hint=not plan.changes,
            destructive_hint=plan.destroys,
            idempotent_hint=plan.repeatable,
            open_world_hint=plan.opens_world,
        ),
        meta=plan.meta,
    )


def start_of(plan: ToolPlan, vespera: Vespera) -> Start | None:
    """How a call of the tool becomes a task, where it can; wrong arguments are answered as the tool answers them."""
    starts = plan.starts
    if starts is None:
        return None

    async def start(caller: Caller, params: CallToolRequestParams) -> views.Handle | CallToolResult:
        try:
            return await starts(vespera, caller, schemas.check(plan.takes, params.arguments or {}))
        # Supervisor boundary, as of the tool itself.
        except Exception as error:  # noqa: BLE001
            return refusal(plan, error)

    return start


def refusal(plan: ToolPlan, error: Exception) -> CallToolResult:
    """The answer to a call that has failed. The text of a fault of ours stays in our log."""
    match error:
        case TaskNotFound() | ExecutionNotFound():
            return answers.failure(error, plan.not_found)
        case VesperaError():
            return answers.failure(error)
        case _:
            number = uuid.uuid4().hex[:12]
            log.error("tool %s failed (%s)", plan.name, number, exc_info=error)
            fault = VesperaError(f"Internal error {number}", hint="the server's log says more under this number")
            return answers.failure(fault, {"error_code": "INTERNAL_ERROR"})
