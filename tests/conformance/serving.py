"""The conformance server, open: a real `Vespera` on a folder, one MCP server over it, our HTTP door before it."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any

import anyio
import uvicorn
from mcp.server.mcpserver import MCPServer

from tests.conformance import calls, contents, jobs, rounds
from vespera_exec.app.service import Vespera
from vespera_exec.server.http.app import build_http_app
from vespera_exec.server.http.guard import Guard, TcpDoor
from vespera_exec.server.mcp.http import mcp_over_http
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from pathlib import Path

    from starlette.types import ASGIApp, Receive, Scope, Send

_TOKEN = "the-suite-sends-none"


@contextlib.asynccontextmanager
async def served(folder: Path, port: int = 0) -> AsyncGenerator[str]:
    """The URL of the MCP endpoint, on loopback, while the block runs. The data directory is made in `folder`."""
    settings = Settings.load({"HOME": str(folder)}, data_dir=folder / "data", roles_dir=folder / "roles")
    with socket.create_server(("127.0.0.1", port)) as bound:
        async with Vespera.open(settings=settings) as vespera, mcp_over_http(conformance_server(vespera)) as mcp:
            own = bound.getsockname()[1]
            door = TcpDoor(token=_TOKEN, port=own)
            app = _Tokened(Guard(build_http_app(vespera, mcp=mcp), door, body_limit=settings.body_limit_bytes))
            async with _listening(app, bound):
                yield f"http://127.0.0.1:{own}/mcp"


def conformance_server(vespera: Vespera) -> MCPServer[Any]:
    """Every fixture of the suite: jobs as roles of `vespera`, the rest as tools, prompts and resources of the SDK."""
    server: MCPServer[Any] = MCPServer(
        name="conformance",
        version=vespera.version,
        tools=[*calls.schema_tools(), *jobs.tools(vespera)],
        extensions=[jobs.tasks_extension(vespera)],
        log_level="WARNING",
    )
    calls.offer(server)
    contents.offer(server)
    rounds.offer(server)
    return server


class _Tokened:
    """ASGI: the suite's client can send no token, so every request is given it here; the guard does the rest."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*scope["headers"], (b"authorization", b"Bearer " + _TOKEN.encode())]
        await self._app({**scope, "headers": headers}, receive, send)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


@contextlib.asynccontextmanager
async def _listening(app: ASGIApp, bound: socket.socket) -> AsyncGenerator[None]:
    server = _Uvicorn(
        uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    )
    async with anyio.create_task_group() as group:
        group.start_soon(server.serve, [bound])
        try:
            yield
        finally:
            server.should_exit = True
