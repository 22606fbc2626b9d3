"""Which tools a server shows: the toolsets by name, and the tools of those that are wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vespera_exec.errors import InvalidInput
from vespera_exec.server.mcp import answers
from vespera_exec.server.mcp.asking import Board
from vespera_exec.server.mcp.tooling import ToolPlan, bound, start_of
from vespera_exec.server.mcp.toolsets import core, operations, plans, worker
from vespera_exec.server.mcp.watching import HEARTBEAT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_types import CallToolResult

    from vespera_exec.app.service import Vespera
    from vespera_exec.server.mcp.adapter import OwnTool
    from vespera_exec.server.mcp.tasks import Start
    from vespera_exec.settings import Settings

TOOLSETS: Final[dict[str, tuple[ToolPlan, ...]]] = {
    "core": core.PLANS,
    "worker": worker.PLANS,
    "operations": operations.PLANS,
    "plans": plans.PLANS,
}


def build_tools(vespera: Vespera, *, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> list[OwnTool]:
    """The tools of the toolsets that the settings name."""
    board = Board()
    return [bound(plan, vespera, heartbeat_seconds, board) for plan in _wanted(vespera.settings)]


def task_starts(vespera: Vespera) -> dict[str, Start]:
    """Of those tools the ones whose calls become MCP tasks, and how."""
    starts = {plan.name: start_of(plan, vespera) for plan in _wanted(vespera.settings)}
    return {name: start for name, start in starts.items() if start is not None}


def unknown_tool(settings: Settings) -> Callable[[str], CallToolResult]:
    """What a call of a tool that is not shown is answered with."""
    names = ", ".join(plan.name for plan in _wanted(settings))

    def answer(name: str) -> CallToolResult:
        return answers.failure(InvalidInput(f"Unknown tool: {name[:100]}", hint=f"the tools are {names}"))

    return answer


def _wanted(settings: Settings) -> list[ToolPlan]:
    return [plan for name, plans in TOOLSETS.items() if name in settings.shown_toolsets for plan in plans]
