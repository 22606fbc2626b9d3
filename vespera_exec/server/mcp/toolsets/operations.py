"""The tools of whoever looks after a server: how it is, whether its data is sound, a copy of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.app import views
from vespera_exec.app.callers import require_local
from vespera_exec.server.mcp import answers
from vespera_exec.server.mcp.tooling import Call, ToolPlan
from vespera_exec.server.mcp.toolsets.core import Nothing

if TYPE_CHECKING:
    from vespera_exec.app.views import Json


async def _describe(call: Call, asked: Nothing) -> dict[str, Json]:
    require_local(call.caller)
    return answers.of(call.vespera.describe())


async def _check(call: Call, asked: Nothing) -> dict[str, Json]:
    return answers.of(await call.vespera.doctor(call.caller))


async def _back_up(call: Call, asked: views.Backup) -> dict[str, Json]:
    return answers.of(await call.vespera.backup(call.caller, asked))


PLANS = (
    ToolPlan(
        name="get_server_status",
        title="Status of the server",
        description="What the server runs and has queued, who owned its data before, and any fault of its database.",
        takes=Nothing,
        gives=views.DaemonView,
        use=_describe,
    ),
    ToolPlan(
        name="check_database",
        title="Check the database",
        description="Read the whole database and the role files, and say what is wrong with them. Changes nothing.",
        takes=Nothing,
        gives=views.Checked,
        use=_check,
    ),
    ToolPlan(
        name="back_up_database",
        title="Back up the database",
        description="Copy the database to a new file while it is in use.",
        takes=views.Backup,
        gives=views.BackedUp,
        use=_back_up,
        described={"path": "Absolute path of the copy", "overwrite": "Replace a file that is there"},
        changes=True,
        destroys=True,
    ),
)
