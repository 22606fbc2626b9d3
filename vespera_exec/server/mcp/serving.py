"""All that speaks MCP for one `Vespera`: whoever imports this imports the SDK."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vespera_exec.server.conversation import serve_connection
from vespera_exec.server.mcp.adapter import lowlevel
from vespera_exec.server.mcp.http import mcp_over_http
from vespera_exec.server.mcp.listening import close_streams
from vespera_exec.server.mcp.server import build_mcp_server

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from mcp.server.mcpserver import MCPServer
    from starlette.types import ASGIApp

    from vespera_exec.app.service import Vespera
    from vespera_exec.server.connections import Connection

Build = Callable[["Vespera"], AbstractAsyncContextManager["McpSide"]]


@dataclass(frozen=True, slots=True)
class McpSide:
    """One server behind both transports. `over_http` is to be mounted behind the guard."""

    over_http: ASGIApp
    _server: MCPServer[Any]
    _body_limit: int

    async def talk(self, connection: Connection) -> None:
        await serve_connection(lowlevel(self._server), connection, body_limit=self._body_limit)

    async def close_streams(self) -> None:
        await close_streams(self._server)


@asynccontextmanager
async def build(vespera: Vespera) -> AsyncGenerator[McpSide]:
    """Serves while the block runs; at its end sessions over HTTP are closed."""
    server = build_mcp_server(vespera)
    async with mcp_over_http(server) as over_http:
        yield McpSide(over_http, server, vespera.settings.body_limit_bytes)
