"""Server and engine in the stdio process itself: for containers, and wherever a daemon is not wanted."""

from __future__ import annotations

import math
import os
import sys

import anyio

from vespera_exec.app.service import Vespera
from vespera_exec.errors import VesperaError
from vespera_exec.model.principal import Caller, allowed_env
from vespera_exec.server import logs
from vespera_exec.server.connections import Connection, is_text
from vespera_exec.server.conversation import serve_connection
from vespera_exec.server.mcp.adapter import lowlevel
from vespera_exec.server.mcp.server import build_mcp_server
from vespera_exec.server.stdio import StdioStream
from vespera_exec.settings import Settings


def main() -> int:
    """Serve MCP on stdin and stdout until stdin closes. The work ends with it."""
    try:
        settings = Settings.load()
        logs.configure(settings.log_level)
        anyio.run(_serve, settings, StdioStream.take())
    except VesperaError as error:
        sys.stderr.write(f"vespera-exec: {error.message} ({error.error_code}); {error.hint}\n")
        return 1
    return 0


async def _serve(settings: Settings, stream: StdioStream) -> None:
    connection = Connection(caller=_caller(), client="stdio", version="", stream=stream, early=b"")
    async with stream, Vespera.open(settings=settings, purpose="in-process") as vespera:
        server = lowlevel(build_mcp_server(vespera))
        # However long the client does not read: the end of its session would be the end of its work.
        await serve_connection(server, connection, body_limit=settings.body_limit_bytes, write_seconds=math.inf)


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
