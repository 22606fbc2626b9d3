"""A real `Vespera` behind every MCP transport, and SDK clients that come through each of them."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import anyio
import orjson
from deadlines import WITHIN
from mcp import Client
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp_types import TextContent

from roles.definition import Permissions, Role
from vespera_exec.app.callers import current_caller
from vespera_exec.app.service import Vespera
from vespera_exec.model.principal import Caller
from vespera_exec.server.http.app import build_http_app
from vespera_exec.server.listeners import serve_http
from vespera_exec.server.mcp.http import mcp_over_http
from vespera_exec.server.mcp.server import build_mcp_server
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from mcp.server.mcpserver import MCPServer
    from mcp_types import CallToolResult

Kind = Literal["memory-modern", "memory-legacy", "http-modern", "http-legacy", "sse"]
KINDS: tuple[Kind, ...] = ("memory-modern", "memory-legacy", "http-modern", "http-legacy", "sse")
IN_MEMORY: tuple[Kind, ...] = ("memory-modern", "memory-legacy")
OVER_HTTP: tuple[Kind, ...] = ("http-modern", "http-legacy", "sse")

ME = Caller(cwd="/")
TOKEN = "a-token-for-tests-only"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


def in_loop(work: Callable[..., Any], name: str, **policy: Any) -> Role:
    """A role for everybody, also over TCP."""
    anybody = Permissions(principals=("local",), scopes=("operate",))
    return Role.from_callable(
        work, name=name, in_loop=True, inputs=None, permissions=anybody, grace_seconds=0.1, **policy
    )


@dataclass
class Gate:
    """Work that goes on when the test says so: a role that reports `steps` and then waits for `open`."""

    open: anyio.Event = field(default_factory=anyio.Event)
    callers: list[Any] = field(default_factory=list[Any])

    def role(self, name: str = "gated") -> Role:
        async def work(context: Any) -> dict[str, Any]:
            steps = int(context.inputs.get("steps", 0))
            for step in range(1, steps + 1):
                context.progress(90 * step / steps, f"step {step}")
                await anyio.lowlevel.checkpoint()
            await self.open.wait()
            return {"steps": steps, "nothing": None}

        return in_loop(work, name)


@dataclass
class Doors:
    vespera: Vespera
    server: MCPServer[Any]
    url: str | None
    gate: Gate

    @asynccontextmanager
    async def client(self, kind: Kind, *, caller: Caller = ME, **options: Any) -> AsyncGenerator[Client]:
        """A client that has connected in this way, as `caller` in memory and as the token's principal over TCP.

        `options` are the SDK's for a `Client`.
        """
        mode = "legacy" if kind in ("memory-legacy", "http-legacy", "sse") else "auto"
        reset = current_caller.set(caller)
        try:
            async with AsyncExitStack() as stack:
                target: Any = self.server
                if kind == "sse":
                    target = sse_client(f"{self.url}/sse", headers=BEARER, timeout=WITHIN)
                elif kind.startswith("http"):
                    http = await stack.enter_async_context(create_mcp_http_client(headers=BEARER))
                    target = streamable_http_client(f"{self.url}/mcp", http_client=http)
                yield await stack.enter_async_context(Client(target, mode=mode, read_timeout_seconds=WITHIN, **options))
        finally:
            current_caller.reset(reset)


@asynccontextmanager
async def opened(
    folder: Path, *, http: bool = False, heartbeat_seconds: float = 10.0, **given: Any
) -> AsyncGenerator[Doors]:
    """Every door over a data directory in `folder`; with `http` on a free TCP port, too."""
    settings = Settings.load(
        {"HOME": str(folder)}, data_dir=folder / "data", roles_dir=folder / "roles", sample_seconds=0.0, **given
    )
    async with AsyncExitStack() as stack:
        vespera = await stack.enter_async_context(Vespera.open(settings=settings))
        gate = Gate()
        vespera.roles.add(gate.role())
        server = build_mcp_server(vespera, heartbeat_seconds=heartbeat_seconds)
        url = None
        if http:
            mcp = await stack.enter_async_context(mcp_over_http(server))
            listeners = await stack.enter_async_context(
                serve_http(
                    build_http_app(vespera, mcp=mcp),
                    tcp=("127.0.0.1", 0),
                    token=TOKEN,
                    named=vespera.access,
                    body_limit=settings.body_limit_bytes,
                )
            )
            url = listeners.url
        yield Doors(vespera, server, url, gate)


async def call(client: Client, tool: str, /, **arguments: Any) -> dict[str, Any]:
    """What the tool answered; its text says the same. An error only where the work that it waited for has failed."""
    result = await client.call_tool(tool, arguments)
    assert result.structured_content is not None, text_of(result)
    told = result.structured_content
    failed = bool(told.get("done")) and told.get("status") in ("failed", "timed_out")
    assert result.is_error == (failed and tool in ("execute_task", "answer_task_input")), text_of(result)
    assert text_of(result) == orjson.dumps(result.structured_content).decode()
    return result.structured_content


async def refused(client: Client, tool: str, /, **arguments: Any) -> dict[str, Any]:
    """The structured error, which the text repeats for a reader."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    assert result.structured_content is not None
    error = result.structured_content
    assert {"error", "error_code", "hint"} <= error.keys()
    assert "Traceback" not in text_of(result)
    assert text_of(result).endswith(error["hint"])
    return error


def text_of(result: CallToolResult) -> str:
    (content,) = result.content
    assert isinstance(content, TextContent)
    return content.text


async def waiting(vespera: Vespera, task_id: str, event_type: str) -> None:
    """Returns when the task's log has an event of this type."""
    cursor = 0
    with anyio.fail_after(WITHIN):
        while True:
            page = await vespera.read_events(ME, task_id, cursor=cursor, wait_ms=25_000)
            if any(event["type"] == event_type for event in page.events):
                return
            cursor = page.next_cursor


async def eventually(claim: Callable[[], bool]) -> None:
    """Returns when `claim` is true; fails after a deadline."""
    with anyio.fail_after(WITHIN):
        while True:
            if claim():
                return
            await anyio.sleep(0.005)
