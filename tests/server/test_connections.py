"""The unix-socket door serves many MCP clients at once, and none of them can hurt it or each other."""

from __future__ import annotations

import json
import os
import socket
import stat
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from deadlines import WITHIN
from mcp.server.mcpserver import MCPServer
from mcp_types import CallToolResult

from vespera_exec import __version__
from vespera_exec.app.callers import current_caller
from vespera_exec.errors import DaemonUnavailable
from vespera_exec.model.principal import Caller
from vespera_exec.server.connections import Connection, McpSocket, serve_mcp_socket
from vespera_exec.server.conversation import serve_connection
from vespera_exec.server.greeting import preamble

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

BODY_LIMIT = 64 * 1024

ENVELOPE = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "0"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


class Client:
    def __init__(self, stream: anyio.abc.UNIXSocketStream) -> None:
        self.stream = stream
        self._lines = BufferedByteReceiveStream(stream)
        self._next = 0

    async def send(self, data: bytes) -> None:
        with anyio.fail_after(WITHIN):
            await self.stream.send(data)

    async def read(self) -> Any:
        with anyio.fail_after(WITHIN):
            return json.loads(await self._lines.receive_until(b"\n", 2**24))

    async def ends(self) -> bool:
        """Nothing more comes, not even half a line."""
        with anyio.fail_after(WITHIN):
            try:
                return await self._lines.receive() == b""
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return True

    async def ask(self, method: str, params: dict[str, Any] | None = None) -> Any:
        self._next += 1
        await self.send(line({"jsonrpc": "2.0", "id": self._next, "method": method, "params": params or {}}))
        answer = await self.read()
        assert answer["id"] == self._next, answer
        return answer

    async def greet(self, cwd: str = "/somewhere", environ: dict[str, str] | None = None) -> Any:
        await self.send(preamble(cwd, environ or {}, client="test"))
        return await self.read()

    async def shake_hands(self) -> None:
        hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}}
        await self.ask("initialize", hello)
        await self.send(line({"jsonrpc": "2.0", "method": "notifications/initialized"}))

    async def call(self, tool: str, **arguments: Any) -> Any:
        return (await self.ask("tools/call", {"name": tool, "arguments": arguments}))["result"]


class Door:
    """A served socket with a real MCP server behind it."""

    def __init__(self, path: Path, mcp_socket: McpSocket, started: anyio.Event) -> None:
        self.path = path
        self.socket = mcp_socket
        self.started = started  # by tool `hang`

    @asynccontextmanager
    async def raw(self) -> AsyncGenerator[Client]:
        async with await anyio.connect_unix(self.path) as stream:
            yield Client(stream)

    @asynccontextmanager
    async def session(self, cwd: str = "/somewhere", environ: dict[str, str] | None = None) -> AsyncGenerator[Client]:
        async with self.raw() as client:
            await client.greet(cwd, environ)
            await client.shake_hands()
            yield client


def line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


async def until(holds: Any) -> None:
    with anyio.fail_after(WITHIN):
        while not holds():
            await anyio.lowlevel.checkpoint()


@asynccontextmanager
async def open_door(
    folder: Path, *, write_seconds: float = 30.0, preamble_seconds: float = 5.0
) -> AsyncGenerator[Door]:
    server = MCPServer("test")
    started = anyio.Event()

    @server.tool()
    async def whoami() -> str:
        caller = current_caller.get()
        return json.dumps([caller.principal, caller.over_tcp, caller.cwd, dict(caller.env)])

    @server.tool()
    async def hang() -> str:
        started.set()
        await anyio.sleep_forever()
        return ""

    @server.tool()
    async def big(size: int) -> str:
        return "x" * size

    @server.tool()
    async def surrogate() -> CallToolResult:
        return CallToolResult(content=[], structured_content={"half a pair": "\ud800"})

    assert all((whoami, hang, big, surrogate))

    async def handle(connection: Connection) -> None:
        if connection.caller.cwd == "/breaks":
            raise RuntimeError("a fault of ours")
        lowlevel = server._lowlevel_server  # pyright: ignore[reportPrivateUsage]
        await serve_connection(lowlevel, connection, body_limit=BODY_LIMIT, write_seconds=write_seconds)

    path = folder / "mcp.sock"
    async with serve_mcp_socket(path, handle, preamble_seconds=preamble_seconds) as mcp_socket:
        yield Door(path, mcp_socket, started)


async def test_a_client_is_greeted_served_and_known_to_handlers(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door, door.raw() as client:
        answer = await client.greet("/here", {"PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "hidden"})
        assert answer == {"vespera": 1, "daemon": __version__, "pid": os.getpid()}
        await client.shake_hands()
        listed = (await client.ask("tools/list"))["result"]["tools"]
        assert {tool["name"] for tool in listed} == {"whoami", "hang", "big", "surrogate"}
        seen = json.loads((await client.call("whoami"))["content"][0]["text"])
        assert seen == ["local", False, "/here", {"PATH": "/bin"}]
    assert current_caller.get().principal != "local"


async def test_a_client_that_lies_about_its_environment_gets_no_more_than_the_allowed(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door, door.raw() as client:
        env = {"LD_PRELOAD": "/evil.so", "PATH": "/bin", "HOME": 7, "LANG": "\udcff", "TZ": "a\0b"}
        await client.send(line({"vespera": 1, "cwd": "relative", "env": env}))
        await client.read()
        await client.shake_hands()
        seen = json.loads((await client.call("whoami"))["content"][0]["text"])
        assert seen == ["local", False, None, {"PATH": "/bin"}]


async def test_clients_at_the_same_time_are_told_apart(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door, door.session("/one") as one, door.session("/two") as two:
        for _ in range(3):
            for client, cwd in ((one, "/one"), (two, "/two")):
                assert json.loads((await client.call("whoami"))["content"][0]["text"])[2] == cwd
        assert (door.socket.statistics().open, door.socket.statistics().idle_since) == (2, None)


async def test_a_client_of_the_revision_without_handshake_is_served(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door, door.raw() as client:
        await client.greet("/modern")
        answer = await client.ask("tools/call", {"name": "whoami", "arguments": {}, "_meta": ENVELOPE})
        assert json.loads(answer["result"]["content"][0]["text"])[2] == "/modern"


async def test_lines_sent_together_with_the_preamble_are_not_lost(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door, door.raw() as client:
        request = {"jsonrpc": "2.0", "id": 9, "method": "tools/list", "params": {"_meta": ENVELOPE}}
        await client.send(preamble("/", {}, client="test") + line(request))
        assert (await client.read())["vespera"] == 1
        assert (await client.read())["id"] == 9


@pytest.mark.promise("malformed")
@pytest.mark.parametrize(
    ("garbage", "code", "number"),
    [
        (b"{not json\n", -32700, None),
        (b"\xff\xfe\n", -32700, None),
        (b'{"jsonrpc":"2.0","id":5,"method":"x","params":{"a":' + b"[" * 20000 + b"]" * 20000 + b"}}\n", -32700, 5),
        (b'{"method":"x","params":{"a":"\\ud83d"},"jsonrpc":"2.0","id":"7a"}\n', -32700, "7a"),
        (b"[]\n", -32600, None),
        (b'{"jsonrpc":"2.0","id":5,"method":"x","params":[1]}\n', -32600, 5),
        (b'{"jsonrpc":"2.0","id":5}\n', -32600, None),
        (b'{"jsonrpc":"1.0","id":{},"method":"x"}\n', -32600, None),
        (b'"' + b"x" * BODY_LIMIT + b'"\n', -32600, None),
        (b'"' + b"x" * (5 * BODY_LIMIT) + b'"\n', -32600, None),
    ],
    ids=[
        "no-json",
        "no-utf8",
        "deep",
        "surrogate",
        "batch",
        "bad-params",
        "bad-answer",
        "bad-id",
        "too-long",
        "much-too-long",
    ],
)
async def test_garbage_is_answered_once_and_the_session_goes_on(
    runtime_dir: Path, garbage: bytes, code: int, number: int | str | None
) -> None:
    async with open_door(runtime_dir) as door, door.session() as client:
        await client.send(garbage)
        answer = await client.read()
        assert (answer["id"], answer["error"]["code"]) == (number, code)
        await client.call("whoami")


@pytest.mark.promise("limits")
async def test_a_line_of_exactly_the_limit_and_lines_in_pieces_are_read(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door, door.session() as client:
        request = b'{"jsonrpc":"2.0","id":"long","method":"ping","params":{"_":"%s"}}'
        whole = request % (b"x" * (BODY_LIMIT - len(request) + 2))
        assert len(whole) == BODY_LIMIT
        for piece in (whole[:1], whole[1:40000], whole[40000:], b"\n\n  \n"):
            await client.send(piece)
            await anyio.wait_all_tasks_blocked()
        assert (await client.read()) == {"jsonrpc": "2.0", "id": "long", "result": {}}


async def test_an_answer_that_cannot_be_sent_costs_that_answer_only(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door, door.session() as client:
        answer = await client.ask("tools/call", {"name": "surrogate", "arguments": {}})
        assert answer["error"] == {"code": -32603, "message": "the answer is not valid Unicode and cannot be sent"}
        await client.call("whoami")


@pytest.mark.parametrize(
    ("first", "complaint"),
    [
        (b'{"jsonrpc":"2.0","id":1,"method":"tools/list"}\n', "no preamble"),
        (b"GET / HTTP/1.1\r\n", "no preamble"),
        (b"[" * 50000 + b"\n", "no preamble"),
        (b'{"vespera": 2}\n', "speaks protocol 1; you are version ? and speak 2"),
        (b"x" * 70000, "at most 65536 bytes"),
    ],
    ids=["json-rpc", "http", "deep", "version", "endless"],
)
async def test_who_does_not_introduce_itself_is_told_so_and_dropped(
    runtime_dir: Path, first: bytes, complaint: str
) -> None:
    async with open_door(runtime_dir) as door:
        async with door.raw() as client:
            await client.send(first)
            refusal = (await client.read())["error"]
            assert refusal["error_code"] == "INVALID_INPUT"
            assert complaint in refusal["error"]
            assert await client.ends()
        assert (door.socket.statistics().refused, door.socket.statistics().served) == (1, 0)


async def test_who_says_nothing_is_dropped_at_the_deadline(runtime_dir: Path) -> None:
    async with open_door(runtime_dir, preamble_seconds=0.05) as door, door.raw() as client:
        assert await client.ends()
        assert door.socket.statistics().refused == 1


async def test_looking_whether_somebody_serves_leaves_no_trace(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door:
        async with door.raw():
            pass
        async with door.session():
            seen = door.socket.statistics()
            assert (seen.open, seen.served, seen.refused) == (1, 1, 0)


async def test_the_door_knows_since_when_nobody_is_there(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door:
        before = door.socket.statistics().idle_since
        async with door.session():
            assert door.socket.statistics().idle_since is None
        await until(lambda: door.socket.statistics().open == 0)
        after = door.socket.statistics().idle_since
        assert before is not None
        assert after is not None
        assert after > before


async def test_a_fault_in_one_connection_leaves_the_others_alone(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door, door.session() as well, door.raw() as broken:
        await broken.greet("/breaks")
        assert await broken.ends()
        await well.call("whoami")
        async with door.session() as later:
            await later.call("whoami")


async def test_a_client_that_never_reads_blocks_nobody_and_is_dropped(runtime_dir: Path) -> None:
    async with open_door(runtime_dir, write_seconds=1.0) as door, door.session() as well:
        async with door.session() as deaf:
            for number in range(8):
                request = {"name": "big", "arguments": {"size": 1_000_000}}
                await deaf.send(line({"jsonrpc": "2.0", "id": number + 100, "method": "tools/call", "params": request}))
            await well.call("whoami")
            await until(lambda: door.socket.statistics().open == 1)
        await well.call("whoami")


class Flood(anyio.abc.ByteStream):
    """A peer that sends garbage without end and takes nothing."""

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        return b"!\n" * 1000

    async def send(self, item: bytes) -> None:
        await anyio.sleep_forever()

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...


async def test_garbage_without_end_from_a_client_that_never_reads_is_not_even_read() -> None:
    flood = Connection(caller=Caller(), client="flood", version="", stream=Flood(), early=b"")
    lowlevel = MCPServer("test")._lowlevel_server  # pyright: ignore[reportPrivateUsage]
    async with anyio.create_task_group() as group:
        group.start_soon(serve_connection, lowlevel, flood)
        with anyio.fail_after(WITHIN):
            await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()


async def test_large_answers_arrive_whole_and_in_order_of_completion(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door, door.session() as client:
        result = await client.call("big", size=3_000_000)
        assert result["content"][0]["text"] == "x" * 3_000_000


async def test_the_end_of_a_clients_input_ends_its_requests_and_the_connection(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door, door.session() as client:
        await client.send(line({"jsonrpc": "2.0", "id": 5, "method": "tools/call", "params": {"name": "hang"}}))
        await door.started.wait()
        await client.stream.send_eof()
        assert (await client.read())["error"]["message"] == "Connection closed"
        assert await client.ends()
        await until(lambda: door.socket.statistics().open == 0)


async def test_a_stopping_door_disappears_and_drops_what_is_in_flight_without_a_word(runtime_dir: Path) -> None:
    opened = open_door(runtime_dir)
    door = await opened.__aenter__()
    async with door.session() as client:
        await client.send(line({"jsonrpc": "2.0", "id": 5, "method": "tools/call", "params": {"name": "hang"}}))
        await door.started.wait()
        await opened.__aexit__(None, None, None)
        assert not door.path.exists()
        assert await client.ends()
    assert os.listdir(runtime_dir) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can play another user")
async def test_another_user_who_reaches_the_socket_is_refused(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door:
        os.chmod(runtime_dir, 0o711)
        os.chmod(door.path, 0o666)
        with socket.socket(socket.AF_UNIX) as raw:
            os.seteuid(12345)
            try:
                raw.connect(str(door.path))
            finally:
                os.seteuid(0)
            client = Client(await anyio.abc.UNIXSocketStream.from_socket(raw))
            assert (await client.read())["error"]["error_code"] == "PERMISSION_DENIED"
            await client.stream.aclose()


async def test_the_socket_is_ours_alone_whatever_the_umask(runtime_dir: Path) -> None:
    before = os.umask(0)
    try:
        async with open_door(runtime_dir) as door:
            assert stat.S_IMODE(door.path.stat().st_mode) == 0o600
            assert os.listdir(runtime_dir) == [door.path.name]
    finally:
        os.umask(before)


async def test_a_socket_that_nobody_serves_any_more_is_replaced(runtime_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(runtime_dir / "mcp.sock"))
    async with open_door(runtime_dir) as door, door.session() as client:
        await client.call("whoami")


async def test_a_socket_that_is_served_is_left_to_its_owner(runtime_dir: Path) -> None:
    async with open_door(runtime_dir) as door:
        with pytest.raises(DaemonUnavailable, match="another process serves"):
            async with open_door(runtime_dir):
                pass
        async with door.session() as client:
            await client.call("whoami")


async def test_a_file_that_is_no_socket_is_never_removed(runtime_dir: Path) -> None:
    (runtime_dir / "mcp.sock").write_text("precious")
    with pytest.raises(DaemonUnavailable, match="not a socket"):
        async with open_door(runtime_dir):
            pass
    assert (runtime_dir / "mcp.sock").read_text() == "precious"


async def test_a_path_that_cannot_be_bound_is_named(runtime_dir: Path) -> None:
    with pytest.raises(DaemonUnavailable, match="cannot listen"):
        async with open_door(runtime_dir / ("x" * 100)):
            pass


async def test_the_end_of_one_door_leaves_its_successors_socket(runtime_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as successor:
        async with open_door(runtime_dir) as door:
            door.path.unlink()
            successor.bind(str(door.path))
        assert door.path.exists()
