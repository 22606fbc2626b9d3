"""Clients of the MCP tasks extension that see every byte: JSON-RPC of 2026-07-28 over HTTP, or over mcp.sock."""

from __future__ import annotations

import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import anyio
import httpx
import orjson
from deadlines import WITHIN
from mcp_doors import BEARER, Doors

from vespera_exec.server.connections import serve_mcp_socket
from vespera_exec.server.conversation import serve_connection
from vespera_exec.server.mcp.adapter import lowlevel

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager

    from vespera_exec.model.principal import Caller
    from vespera_exec.server.connections import Connection

TASKS = "io.modelcontextprotocol/tasks"
VERSION = "2026-07-28"
NAMED_BY = {"tools/call": "name", "tasks/get": "taskId", "tasks/update": "taskId", "tasks/cancel": "taskId"}
KNOWS_TASKS: dict[str, Any] = {"elicitation": {}, "extensions": {TASKS: {}}}

Way = Literal["http", "stdio"]
WAYS: tuple[Way, ...] = ("http", "stdio")


class Refused(Exception):
    """The JSON-RPC error, and the HTTP status where there was one."""

    def __init__(self, error: dict[str, Any], status: int | None = None) -> None:
        super().__init__(error)
        self.code: int = error["code"]
        self.message: str = error["message"]
        self.data: Any = error.get("data")
        self.status = status


class Peer(Protocol):
    """One client. `can`: the capabilities that it declares with each request."""

    can: dict[str, Any]

    async def request(self, method: str, **params: Any) -> dict[str, Any]:
        """The result; raises Refused."""
        ...

    def listen(self, **notifications: Any) -> AbstractAsyncContextManager[AsyncIterator[dict[str, Any]]]:
        """The notifications on a listen stream, from its acknowledgement on."""
        ...


def enveloped(params: dict[str, Any], can: dict[str, Any], version: str = VERSION) -> dict[str, Any]:
    meta = {
        "io.modelcontextprotocol/protocolVersion": version,
        "io.modelcontextprotocol/clientInfo": {"name": "peer", "version": "0"},
        "io.modelcontextprotocol/clientCapabilities": can,
    }
    return {**params, "_meta": meta}


async def execute(peer: Peer, **arguments: Any) -> dict[str, Any]:
    return await peer.request("tools/call", name="execute_task", arguments=arguments)


async def settled(peer: Peer, task_id: str, *, status: str | None = None) -> dict[str, Any]:
    """The task when it has ended, or has come to `status`."""
    with anyio.fail_after(WITHIN):
        while True:
            task = await peer.request("tasks/get", taskId=task_id)
            if task["status"] in ("completed", "failed", "cancelled", status):
                return task
            await anyio.sleep(0.01)


@asynccontextmanager
async def connected(doors: Doors, way: Way, *, caller: Caller | None = None) -> AsyncGenerator[Peer]:
    """A client that knows tasks; over stdio as a bridge would bring it, over HTTP with the tests' token.

    Over stdio it can be another `caller` than the local user.
    """
    if way == "http":
        async with httpx.AsyncClient(base_url=doors.url or "", headers=BEARER, trust_env=False, timeout=WITHIN) as http:
            yield HttpPeer(http)
        return

    async def serve(connection: Connection) -> None:
        who = replace(connection, caller=caller or connection.caller)
        await serve_connection(lowlevel(doors.server), who)

    with tempfile.TemporaryDirectory(prefix="vx-", dir="/tmp") as folder:
        async with serve_mcp_socket(Path(folder) / "mcp.sock", serve) as door, line_peer(door.path) as peer:
            yield peer


@dataclass
class HttpPeer:
    http: httpx.AsyncClient
    can: dict[str, Any] = field(default_factory=lambda: KNOWS_TASKS)
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def headers(self, method: str, params: dict[str, Any]) -> dict[str, str]:
        named = params.get(NAMED_BY.get(method, ""))
        return {
            "Accept": "application/json, text/event-stream",
            "Content-Type": "application/json",
            "MCP-Protocol-Version": VERSION,
            "Mcp-Method": method,
            **({"Mcp-Name": named} if named is not None else {}),
        }

    async def request(self, method: str, **params: Any) -> dict[str, Any]:
        return await self.post(method, params, self.headers(method, params))

    async def post(self, method: str, params: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        answer = await self.http.post("/mcp", content=self._body(method, params), headers=headers)
        data = next((line[5:] for line in answer.text.splitlines() if line.startswith("data:")), answer.text)
        message = orjson.loads(data)
        if "error" in message:
            raise Refused(message["error"], answer.status_code)
        return message["result"]

    @asynccontextmanager
    async def listen(self, **notifications: Any) -> AsyncGenerator[AsyncIterator[dict[str, Any]]]:
        params = {"notifications": notifications}
        headers = self.headers("subscriptions/listen", params)
        body = self._body("subscriptions/listen", params)
        async with self.http.stream("POST", "/mcp", content=body, headers=headers) as answer:
            yield _messages(answer)

    def _body(self, method: str, params: dict[str, Any]) -> bytes:
        return orjson.dumps(
            {"jsonrpc": "2.0", "id": next(self.numbers), "method": method, "params": enveloped(params, self.can)}
        )


async def _messages(answer: httpx.Response) -> AsyncGenerator[dict[str, Any]]:
    if not answer.headers["content-type"].startswith("text/event-stream"):
        raise Refused(orjson.loads(await answer.aread())["error"], answer.status_code)
    async for line in answer.aiter_lines():
        if line.startswith("data:"):
            yield orjson.loads(line[5:])


@asynccontextmanager
async def line_peer(path: Path) -> AsyncGenerator[LinePeer]:
    """Through the socket at `path`, introduced as a bridge does it."""
    async with await anyio.connect_unix(path) as stream, anyio.create_task_group() as group:
        await stream.send(orjson.dumps({"vespera": 1, "client": "peer", "version": "0", "cwd": "/", "env": {}}) + b"\n")
        peer = LinePeer(stream)
        group.start_soon(peer.read)
        with anyio.fail_after(WITHIN):
            await peer.greeted.wait()
        yield peer
        group.cancel_scope.cancel()


class LinePeer:
    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        self.can = KNOWS_TASKS
        self.greeted = anyio.Event()
        self._stream = stream
        self._numbers = count(1)
        self._answers: dict[int, anyio.Event] = {}
        self._answered: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, Any] = {}

    async def read(self) -> None:
        buffer = b""
        async for chunk in self._stream:
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                self._take(orjson.loads(line))

    def _take(self, message: dict[str, Any]) -> None:
        if "vespera" in message:
            self.greeted.set()
        elif "method" in message:
            of = message["params"]["_meta"]["io.modelcontextprotocol/subscriptionId"]
            if of in self._heard:
                self._heard[of].send_nowait(message)
        elif message["id"] in self._heard:
            self._heard[message["id"]].send_nowait(message)
        elif message["id"] in self._answers:
            self._answered[message["id"]] = message
            self._answers[message["id"]].set()

    async def send(self, method: str, params: dict[str, Any]) -> int:
        number = next(self._numbers)
        message = {"jsonrpc": "2.0", "id": number, "method": method, "params": enveloped(params, self.can)}
        self._answers[number] = anyio.Event()
        await self._stream.send(orjson.dumps(message) + b"\n")
        return number

    async def request(self, method: str, **params: Any) -> dict[str, Any]:
        number = await self.send(method, params)
        with anyio.fail_after(WITHIN):
            await self._answers[number].wait()
        del self._answers[number]
        message = self._answered.pop(number)
        if "error" in message:
            raise Refused(message["error"])
        return message["result"]

    @asynccontextmanager
    async def listen(self, **notifications: Any) -> AsyncGenerator[AsyncIterator[dict[str, Any]]]:
        send, receive = anyio.create_memory_object_stream[dict[str, Any]](1000)
        number = await self.send("subscriptions/listen", {"notifications": notifications})
        self._heard[number] = send
        try:
            yield _checked(receive)
        finally:
            del self._heard[number]
            cancelled = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": number}}
            with anyio.move_on_after(1, shield=True):
                await self._stream.send(orjson.dumps(cancelled) + b"\n")
            send.close()
            receive.close()


async def _checked(messages: AsyncIterator[dict[str, Any]]) -> AsyncGenerator[dict[str, Any]]:
    async for message in messages:
        if "error" in message:
            raise Refused(message["error"])
        yield message
