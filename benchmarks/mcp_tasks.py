"""The MCP tasks extension over raw HTTP, durable, against a tool that does nothing; and how late news are.

    python benchmarks/mcp_tasks.py [--calls 300] [--events 30]

Budgets: create p50 <= 5 ms, tasks/get p50 <= 2 ms, each <= 1.5x a tool of the same server that does nothing;
from an event of the work to its news at the client p50 <= 10 ms, on every transport.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import orjson
from mcp import Client
from mcp.client.sse import sse_client
from mcp_types import CallToolResult, TextContent, ToolAnnotations

from roles.definition import Permissions, Role
from vespera_exec.app.service import Vespera
from vespera_exec.server.connections import Connection, serve_mcp_socket
from vespera_exec.server.conversation import serve_connection
from vespera_exec.server.http.app import build_http_app
from vespera_exec.server.listeners import serve_http
from vespera_exec.server.mcp.adapter import OwnServer, lowlevel, own_tool
from vespera_exec.server.mcp.http import mcp_over_http
from vespera_exec.server.mcp.listening import Listening
from vespera_exec.server.mcp.tasks import TasksExtension
from vespera_exec.server.mcp.tools import build_tools, task_starts, unknown_tool
from vespera_exec.settings import Settings

TOKEN = "for-this-benchmark-only"
VERSION = "2026-07-28"
EVERY_SECONDS = 0.3
META: dict[str, Any] = {
    "io.modelcontextprotocol/protocolVersion": VERSION,
    "io.modelcontextprotocol/clientInfo": {"name": "bench", "version": "0"},
    "io.modelcontextprotocol/clientCapabilities": {"extensions": {"io.modelcontextprotocol/tasks": {}}},
}
NAMED_BY = {"tools/call": "name", "tasks/get": "taskId"}
FOLLOW = "stream_task_execution_events"
STAMP = re.compile(r'"(?:timestamp|lastUpdatedAt)":"([^"]+)"')
News = Callable[[], Awaitable[str]]
"""The next message of a transport, as text."""
Ask = Callable[..., Awaitable[dict[str, Any]]]
"""One call of the tool that pages through events."""
ENDED = '"status":"completed"'


# the server, a process of its own


async def serve(folder: Path) -> None:
    gc.freeze()  # as the daemon
    settings = Settings.load({"HOME": str(folder)}, data_dir=folder / "data", sample_seconds=0.0, max_concurrent=2)
    async with Vespera.open(settings=settings) as vespera:
        add_roles(vespera)
        server = offered(vespera)

        async def talk(connection: Connection) -> None:
            await serve_connection(lowlevel(server), connection)

        async with (
            mcp_over_http(server) as mcp,
            serve_http(
                build_http_app(vespera, mcp=mcp),
                tcp=("127.0.0.1", 0),
                token=TOKEN,
                body_limit=settings.body_limit_bytes,
            ) as http,
            serve_mcp_socket(folder / "mcp.sock", talk),
        ):
            sys.stdout.write(f"{http.url}\n")
            sys.stdout.flush()
            await anyio.to_thread.run_sync(sys.stdin.buffer.read)


def add_roles(vespera: Vespera) -> None:
    anybody = Permissions(principals=("local",), scopes=("operate",))

    async def hold(context: Any) -> None:
        await anyio.sleep_forever()

    async def brief(context: Any) -> int:
        return 1

    async def report(context: Any) -> None:
        for step in range(int(context.inputs["events"])):
            await anyio.sleep(EVERY_SECONDS)
            context.progress(step / 10, f"step {step}")

    for work in (hold, brief, report):
        vespera.roles.add(Role.from_callable(work, in_loop=True, inputs=None, permissions=anybody, grace_seconds=0.1))


def offered(vespera: Vespera) -> OwnServer:
    """The product's tools and extension, and a tool that does nothing."""

    async def nothing(arguments: dict[str, Any], context: Any) -> CallToolResult:
        return CallToolResult(content=[TextContent(type="text", text="nothing")])

    plain: dict[str, Any] = {"type": "object", "properties": {}}
    tool = own_tool(
        nothing,
        name="nothing",
        title="Nothing",
        description="Does nothing",
        arguments=plain,
        output=plain,
        annotations=ToolAnnotations(),
    )
    tasks = TasksExtension(vespera, starts=task_starts(vespera))
    return OwnServer(
        name="bench",
        tools=[*build_tools(vespera), tool],
        unknown_tool=unknown_tool(vespera.settings),
        extensions=[tasks],
        middleware=[Listening(vespera, tasks)],
    )


# clients that do as little as they can


class Http:
    """One kept connection. `later` reads the frames of a stream."""

    def __init__(self, stream: anyio.abc.ByteStream, host: str) -> None:
        self._stream = stream
        self._host = host
        self._buffer = b""

    async def send(self, method: str, params: dict[str, Any]) -> None:
        body = message(1, method, params)
        named = params.get(NAMED_BY.get(method, ""))
        head = (
            f"POST /mcp HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer {TOKEN}\r\n"
            "Accept: application/json, text/event-stream\r\nContent-Type: application/json\r\n"
            f"MCP-Protocol-Version: {VERSION}\r\nMcp-Method: {method}\r\n"
            + (f"Mcp-Name: {named}\r\n" if named else "")
            + f"Content-Length: {len(body)}\r\n\r\n"
        )
        await self._stream.send(head.encode() + body)

    async def request(self, method: str, **params: Any) -> dict[str, Any]:
        await self.send(method, params)
        head = await self._until(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if not lengths:
            body = b""
            while b'"result"' not in body:
                body = await self.later()
            await self._until(b"0\r\n\r\n")
            return orjson.loads(body[body.index(b"{") :])["result"]
        size = int(lengths[0].split(b":")[1])
        while len(self._buffer) < size:
            self._buffer += await self._stream.receive()
        body, self._buffer = self._buffer[:size], self._buffer[size:]
        return orjson.loads(body)["result"]

    async def later(self) -> bytes:
        """The next frame that carries data."""
        while True:
            frame = await self._until(b"\r\n\r\n")
            if b"data:" in frame:
                return frame[frame.index(b"data:") + 5 :]

    async def _until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            self._buffer += await self._stream.receive()
        found, _, self._buffer = self._buffer.partition(end)
        return found


class Lines:
    """mcp.sock, as a bridge uses it."""

    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        self._stream = stream
        self._buffer = b""
        self._numbers = count(1)

    async def request(self, method: str, **params: Any) -> dict[str, Any]:
        await self.send(method, params)
        return orjson.loads(await self.later())["result"]

    async def send(self, method: str, params: dict[str, Any]) -> None:
        await self._stream.send(message(next(self._numbers), method, params) + b"\n")

    async def later(self) -> bytes:
        while b"\n" not in self._buffer:
            self._buffer += await self._stream.receive()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def message(number: int, method: str, params: dict[str, Any]) -> bytes:
    return orjson.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": {**params, "_meta": META}})


@asynccontextmanager
async def over_http(url: str) -> AsyncGenerator[Http]:
    host = url.removeprefix("http://")
    name, _, port = host.partition(":")
    async with await anyio.connect_tcp(name, int(port)) as stream:
        yield Http(stream, host)


@asynccontextmanager
async def over_lines(path: Path) -> AsyncGenerator[Lines]:
    async with await anyio.connect_unix(path) as stream:
        client = Lines(stream)
        await stream.send(
            orjson.dumps({"vespera": 1, "client": "bench", "version": "0", "cwd": "/", "env": {}}) + b"\n"
        )
        await client.later()
        yield client


# what is measured


async def calls(url: str, folder: Path, number: int) -> None:
    with closing(sqlite3.connect(folder / "bare.db", isolation_level=None)) as bare:
        bare.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE t (body BLOB)")
        await compared(url, bare, number)


async def compared(url: str, bare: sqlite3.Connection, number: int) -> None:
    async def commit() -> None:
        bare.execute("INSERT INTO t VALUES (zeroblob(4000))")

    async with over_http(url) as http:
        ended = await made(http, "brief")
        while (await http.request("tasks/get", taskId=ended))["status"] == "working":
            pass
        running = await made(http, "hold")
        cases: dict[str, Callable[[], Awaitable[object]]] = {
            "commit": commit,
            "nothing": lambda: http.request("tools/call", name="nothing", arguments={}),
            "get, working": lambda: http.request("tasks/get", taskId=running),
            "get, ended": lambda: http.request("tasks/get", taskId=ended),
        }
        at_once = {"create, runs at once": lambda: create(http, "brief")}
        times = await timed(at_once, number // 3, pause=0.03)  # the run before it has ended by then
        await made(http, "hold")  # both slots are taken: what is created from here on waits
        times |= await timed({**cases, "create": lambda: create(http, "hold")}, number)
    floor = statistics.median(times["nothing"])
    bare_ms = statistics.median(times["commit"]) * 1e3
    print(f"a tool that does nothing: p50 {floor * 1e3:.2f} ms; a bare commit: p50 {bare_ms:.2f} ms")
    for name, budget in (("create", 5), ("create, runs at once", 5), ("get, working", 2), ("get, ended", 2)):
        taken = statistics.median(times[name])
        print(f"{name}: p50 {taken * 1e3:.2f} ms (budget {budget}), {taken / floor:.2f}x nothing (budget 1.5)")


async def timed(
    cases: Mapping[str, Callable[[], Awaitable[object]]], number: int, *, pause: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each call, in turns, each after so many seconds of `pause`; the first 20 turns warm up."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(number + 20):
        for name, case in cases.items():
            await anyio.sleep(pause)
            began = time.perf_counter()
            await case()
            if turn >= 20:
                times[name].append(time.perf_counter() - began)
    return times


async def create(client: Http | Lines, role: str, **inputs: Any) -> dict[str, Any]:
    arguments = {"title": role, "role": role, "inputs": inputs}
    return await client.request("tools/call", name="execute_task", arguments=arguments)


async def made(client: Http | Lines, role: str, **inputs: Any) -> str:
    return (await create(client, role, **inputs))["taskId"]


async def lags(url: str, folder: Path, events: int) -> None:
    async with AsyncExitStack() as stack:
        http, listening = [await stack.enter_async_context(over_http(url)) for _ in range(2)]
        lines, hearing = [await stack.enter_async_context(over_lines(folder / "mcp.sock")) for _ in range(2)]
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        old = await stack.enter_async_context(Client(sse_client(f"{url}/sse", headers=bearer), mode="legacy"))

        async def by_sse(**arguments: Any) -> dict[str, Any]:
            return (await old.call_tool(FOLLOW, arguments)).structured_content or {}

        task = await create(http, "report", events=events)
        for client in (listening, hearing):
            await client.send("subscriptions/listen", {"notifications": {"taskIds": [task["taskId"]]}})
        own = task["_meta"]["vespera-exec/progress"]
        ways = {
            "notifications/tasks, HTTP": told(listening),
            "notifications/tasks, stdio": told(hearing),
            f"{FOLLOW}, HTTP": asked(by_tool(http), own),
            f"{FOLLOW}, stdio": asked(by_tool(lines), own),
            f"{FOLLOW}, SSE": asked(by_sse, own),
        }
        late: dict[str, list[float]] = {name: [] for name in ways}
        async with anyio.create_task_group() as group:
            for name, news in ways.items():
                group.start_soon(collect, news, late[name])
    for name, seen in late.items():
        p95 = statistics.quantiles(seen, n=20)[-1]
        print(f"{name}: {len(seen)} reports, late by p50 {statistics.median(seen):.1f} (budget 10), p95 {p95:.1f} ms")


def told(client: Http | Lines) -> News:
    async def news() -> str:
        return (await client.later()).decode()

    return news


def asked(ask: Ask, own: dict[str, Any]) -> News:
    """Page after page of the task, each waited for."""
    cursor = own["cursor"]

    async def news() -> str:
        nonlocal cursor
        page = await ask(task_id=own["task_id"], cursor=cursor, wait_ms=5000)
        cursor = page["next_cursor"]
        return orjson.dumps(page["events"]).decode() + (ENDED if page["done"] else "")

    return news


def by_tool(client: Http | Lines) -> Ask:
    async def ask(**arguments: Any) -> dict[str, Any]:
        return (await client.request("tools/call", name=FOLLOW, arguments=arguments))["structuredContent"]

    return ask


async def collect(news: News, late: list[float]) -> None:
    """Milliseconds from the stamp of each report to now."""
    while ENDED not in (text := await news()):
        now = datetime.now(UTC)
        if "step " in text and (stamps := STAMP.findall(text)):
            late.append((now - datetime.fromisoformat(stamps[-1])).total_seconds() * 1e3)


async def measure(url: str, folder: Path, arguments: argparse.Namespace) -> None:
    await lags(url, folder, arguments.events)
    await calls(url, folder, arguments.calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--events", type=int, default=30)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        anyio.run(serve, arguments.serve)
        return
    with tempfile.TemporaryDirectory(prefix="vx-") as folder:
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "VESPERA_LOG_LEVEL": "error"},
        )
        assert server.stdout is not None
        try:
            anyio.run(measure, server.stdout.readline().strip(), Path(folder), arguments)
        finally:
            server.communicate("")


if __name__ == "__main__":
    main()
