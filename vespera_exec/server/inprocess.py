"""Server and engine in the stdio process itself: for containers, and wherever a daemon is not wanted."""

from __future__ import annotations

import os
import sys

import anyio

from vespera_exec.app.callers import current_caller
from vespera_exec.app.service import Vespera
from vespera_exec.errors import VesperaError
from vespera_exec.model.principal import Caller, allowed_env
from vespera_exec.server import logs
from vespera_exec.server.connections import is_text
from vespera_exec.server.mcp.server import build_mcp_server
from vespera_exec.settings import Settings


def main() -> int:
    """Serve MCP on stdin and stdout until stdin closes. The work ends with it."""
    try:
        settings = Settings.load()
        logs.configure(settings.log_level)
        anyio.run(_serve, settings)
    except VesperaError as error:
        sys.stderr.write(f"vespera-exec: {error.message} ({error.error_code}); {error.hint}\n")
        return 1
    return 0


async def _serve(settings: Settings) -> None:
    current_caller.set(_caller())
    async with Vespera.open(settings=settings, purpose="in-process") as vespera:
        await build_mcp_server(vespera).run_stdio_async()


def _caller() -> Caller:
    """Who we run for, without what cannot be stored: a folder or a variable whose bytes are no UTF-8."""
    try:
        cwd = os.getcwd()
    except OSError:
        cwd = None  # the client stands in a folder that is gone
    return Caller(
        cwd=cwd if is_text(cwd) else None,
        env=allowed_env({name: value for name, value in os.environ.items() if is_text(value)}),
    )
