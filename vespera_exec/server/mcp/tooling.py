"""What every tool is made of: its plan, the call of it, and how its answers and errors go out."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mcp_types import ToolAnnotations

from vespera_exec.app.callers import current_caller
from vespera_exec.errors import ExecutionNotFound, TaskNotFound, VesperaError
from vespera_exec.server.mcp import answers, schemas
from vespera_exec.server.mcp.adapter import OwnTool, own_tool
from vespera_exec.server.mcp.watching import Watch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mcp.server.mcpserver import Context
    from mcp_types import CallToolResult

    from vespera_exec.app import views
    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import Json
    from vespera_exec.model.principal import Caller

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool: whose it is, and how to keep the client up to date while it is open."""

    vespera: Vespera
    caller: Caller
    watch: Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    """A tool before it is bound. `use` takes the call and the checked arguments; `not_found` it promises then."""

    name: str
    title: str
    description: str
    takes: type[views.Request]
    gives: type[views.View]
    use: Callable[[Call, Any], Awaitable[dict[str, Json]]]
    described: dict[str, str] = field(default_factory=dict[str, str])
    untyped: tuple[str, ...] = ()
    not_found: dict[str, Json] = field(default_factory=dict[str, "Json"])
    changes: bool = False
    destroys: bool = False
    repeatable: bool = True
    opens_world: bool = False


def bound(plan: ToolPlan, vespera: Vespera, heartbeat_seconds: float) -> OwnTool:
    """The tool, over one `Vespera`. Whoever calls it is found in `current_caller`."""

    async def answer(arguments: dict[str, Any], context: Context[Any, Any]) -> CallToolResult:
        async def report(progress: float, message: str) -> None:
            await context.report_progress(progress, message=message)

        caller = current_caller.get()
        watch = Watch(vespera=vespera, caller=caller, report=report, heartbeat_seconds=heartbeat_seconds)
        try:
            taken = schemas.check(plan.takes, arguments)
            return answers.success(await plan.use(Call(vespera, caller, watch), taken))
        except (TaskNotFound, ExecutionNotFound) as error:
            return answers.failure(error, plan.not_found)
        except VesperaError as error:
            return answers.failure(error)
        except Exception:
            # Supervisor boundary: a fault of ours costs this call only, and its text stays in our log.
            number = uuid.uuid4().hex[:12]
            log.exception("tool %s failed (%s)", plan.name, number)
            fault = VesperaError(f"Internal error {number}", hint="the server's log says more under this number")
            return answers.failure(fault, {"error_code": "INTERNAL_ERROR"})

    return own_tool(
        answer,
        name=plan.name,
        title=plan.title,
        description=plan.description,
        arguments=schemas.input_schema(plan.takes, plan.described),
        output=schemas.output_schema(plan.gives, untyped=plan.untyped),
        annotations=ToolAnnotations(
            read_only_hint=not plan.changes,
            destructive_hint=plan.destroys,
            idempotent_hint=plan.repeatable,
            open_world_hint=plan.opens_world,
        ),
    )
