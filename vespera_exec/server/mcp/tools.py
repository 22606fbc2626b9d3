"""Which tools a server shows: the toolsets by name, and the tools of those that are wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vespera_exec.errors import InvalidInput
from vespera_exec.server.mcp import answers
from vespera_exec.server.mcp.tooling import ToolPlan, bound
from vespera_exec.server.mcp.toolsets import core
from vespera_exec.server.mcp.watching import HEARTBEAT_SECONDS

if TYPE_CHECKING:
    from mcp_types import CallToolResult

    from vespera_exec.app.service import Vespera
    from vespera_exec.server.mcp.adapter import OwnTool

TOOLSETS: Final[dict[str, tuple[ToolPlan, ...]]] = {"core": core.PLANS}


def build_tools(vespera: Vespera, *, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> list[OwnTool]:
    return [bound(plan, vespera, heartbeat_seconds) for plans in TOOLSETS.values() for plan in plans]


def unknown_tool(name: str) -> CallToolResult:
    names = ", ".join(plan.name for plans in TOOLSETS.values() for plan in plans)
    return answers.failure(InvalidInput(f"Unknown tool: {name[:100]}", hint=f"the tools are {names}"))
