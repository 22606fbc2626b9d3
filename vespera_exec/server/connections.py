"""The unix-socket door of MCP: many clients at once, each one line of JSON after another."""

from __future__ import annotations

import contextvars
import json
import logging
import os
import socket
import stat
import struct
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import anyio
import anyio.abc
import anyio.lowlevel
from mcp.shared.message import SessionMessage
from mcp_types import (
    INTERNAL_ERROR,
    INVALID_REQUEST,
    PARSE_ERROR,
    ErrorData,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCResponse,
    jsonrpc_message_adapter,
)
from pydantic import ValidationError

from vespera_exec import __version__
from vespera_exec.app.callers import current_caller
from vespera_exec.errors import DaemonUnavailable, InvalidInput, PermissionDenied, VesperaError
from vespera_exec.model.principal import Caller, allowed_env
from vespera_exec.server.bridge import PREAMBLE_VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path
    from types import TracebackType

    from mcp.server.lowlevel import Server

log = logging.getLogger(__name__)

BODY_LIMIT_BYTES = 4 * 1024 * 1024

_PREAMBLE_SECONDS = 5.0
_PREAMBLE_BYTES = 64 * 1024
_WRITE_SECONDS = 30.0
_READ_BYTES = 256 * 1024
_HIGH_WATER_BYTES = 1024 * 1024
_ACCEPT_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Connection:
    """A client that has introduced itself. `client` and `version` are what it says of itself."""

    caller: Caller
    client: str
    version: str
    stream: anyio.abc.ByteStream
    early: bytes  # what it sent behind its preamble


@dataclass(frozen=True, slots=True)
class SocketStatistics:
    """`open`: connections being served now; `served`: since the start; `refused`: those without a valid preamble.

    `idle_since`: monotonic seconds since when none is open; None while one is.
    """

    open: int
    served: int
    refused: int
    idle_since: float | None


class McpSocket:
    """The listening door. Made by `serve_mcp_socket`."""

    def __init__(self, path: Path, preamble_seconds: float) -> None:
        self.path = path
        self._preamble_seconds = preamble_seconds
        self._open = 0
        self._served = 0
        self._refused = 0
        self._idle_since = time.monotonic()

    def statistics(self) -> SocketStatistics:
        return SocketStatistics(
            open=self._open,
            served=self._served,
            refused=self._refused,
            idle_since=None if self._open else self._idle_since,
        )

    async def _listen(self, listener: socket.socket, handle: Callable[[Connection], Awaitable[None]]) -> None:
        async with anyio.create_task_group() as group:
            while True:
                await anyio.wait_readable(listener)
                try:
                    accepted, _ = listener.accept()
                except BlockingIOError:
                    continue
                except OSError as fault:
                    # Out of descriptors, or the peer went away: the clients that are there keep their service.
                    log.warning("cannot accept a client: %s", fault)
                    await anyio.sleep(_ACCEPT_PAUSE_SECONDS)
                    continue
                group.start_soon(self._serve, _LocalStream(accepted), handle)

    async def _serve(self, stream: _LocalStream, handle: Callable[[Connection], Awaitable[None]]) -> None:
        async with stream:
            connection = await self._greet(stream)
            if connection is None:
                return
            self._open += 1
            self._served += 1
            try:
                await handle(connection)
            except Exception:
                # Supervisor boundary: a connection that fails is one client's loss, not the daemon's.
                log.exception("connection of %s failed", connection.client)
            finally:
                self._open -= 1
                self._idle_since = time.monotonic()

    async def _greet(self, stream: _LocalStream) -> Connection | None:
        try:
            with anyio.fail_after(self._preamble_seconds):
                stream.check_peer()
                line, early = await _first_line(stream)
                if line is None:
                    return None  # somebody looked whether we are there
                connection = _introduced(line, early, stream)
                answer = {"vespera": PREAMBLE_VERSION, "daemon": __version__, "pid": os.getpid()}
                await stream.send(json.dumps(answer).encode() + b"\n")
        except VesperaError as refusal:
            self._refused += 1
            answer = {"vespera": PREAMBLE_VERSION, "error": refusal.to_dict()}
            with suppress(anyio.BrokenResourceError), anyio.move_on_after(self._preamble_seconds):
                await stream.send(json.dumps(answer).encode() + b"\n")
            return None
        except (TimeoutError, anyio.BrokenResourceError):
            self._refused += 1
            return None
        return connection


@asynccontextmanager
async def serve_mcp_socket(
    path: Path,
    handle: Callable[[Connection], Awaitable[None]],
    *,
    backlog: int = 128,
    preamble_seconds: float = _PREAMBLE_SECONDS,
) -> AsyncGenerator[McpSocket]:
    """Accepts clients of our own uid at `path` while the block runs, and calls `handle` for each in a task of its own.

    The socket appears with mode 0600 and already listening, in place of one that nobody serves any more. At
    the end it disappears first, then the connections are dropped without a further word, so that a bridge
    answers what is in flight with an error that says "again".

    Raises:
        DaemonUnavailable: somebody else serves at `path`, or it cannot be made.
    """
    listener = _bind(path, backlog)
    made = os.lstat(path)
    door = McpSocket(path, preamble_seconds)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(door._listen, listener, handle)  # pyright: ignore[reportPrivateUsage]
            try:
                yield door
            finally:
                _remove(path, made)
                group.cancel_scope.cancel()
    finally:
        listener.close()


async def serve_connection(
    server: Server[Any],
    connection: Connection,
    *,
    body_limit: int = BODY_LIMIT_BYTES,
    write_seconds: float = _WRITE_SECONDS,
) -> None:
    """Serves one MCP session; returns when the client has closed, or does not read for `write_seconds`.

    Handlers find the client in `current_caller`. A line that is too long, no JSON or no JSON-RPC is answered
    with an error, and the session goes on.
    """
    outbox = _Outbox(connection.stream, write_seconds)
    inbox = _Inbox(connection, outbox, body_limit)
    async with anyio.create_task_group() as group:
        group.start_soon(outbox.pump, group.cancel_scope)
        await server.run(inbox, outbox, server.create_initialization_options())
        await outbox.aclose()


class _LocalStream(anyio.abc.ByteStream):
    """A connected unix socket.

    anyio's own UNIXSocketStream raises InvalidStateError in the loop when data arrives in the turn in which
    its reader is cancelled; `wait_readable` does not.
    """

    def __init__(self, raw: socket.socket) -> None:
        self._raw = raw
        raw.setblocking(False)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        waited = False
        while True:
            try:
                data = self._raw.recv(max_bytes)
            except BlockingIOError:
                await anyio.wait_readable(self._raw)
                waited = True
            except OSError as fault:
                raise anyio.BrokenResourceError from fault
            else:
                if not data:
                    raise anyio.EndOfStream
                if not waited:  # a peer that always has more must not keep the loop to itself
                    await anyio.lowlevel.cancel_shielded_checkpoint()
                return data

    async def send(self, item: bytes) -> None:
        view = memoryview(item)
        while view:
            try:
                view = view[self._raw.send(view) :]
            except BlockingIOError:
                await anyio.wait_writable(self._raw)
            except OSError as fault:
                raise anyio.BrokenResourceError from fault

    async def send_eof(self) -> None:
        with suppress(OSError):
            self._raw.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        if self._raw.fileno() >= 0:
            anyio.notify_closing(self._raw)
            self._raw.close()

    def check_peer(self) -> None:
        """Raises PermissionDenied for a peer of another user."""
        option = getattr(socket, "SO_PEERCRED", None)
        if option is None:
            return  # the folder's mode alone keeps others out here
        _, uid, _ = struct.unpack("3i", self._raw.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))
        if uid != os.getuid():
            raise PermissionDenied("this socket serves the user who started the daemon", hint="start your own daemon")


class _Inbox:
    """The read side as the SDK wants it: iterates over messages, with the context in which to handle them."""

    def __init__(self, connection: Connection, outbox: _Outbox, body_limit: int) -> None:
        self._stream = connection.stream
        self._outbox = outbox
        self._body_limit = body_limit
        self._lines: list[bytes] = []  # last first
        self._partial = bytearray()
        self._skipping = False
        self.last_context = contextvars.copy_context()
        self.last_context.run(current_caller.set, connection.caller)
        self._feed(connection.early)

    async def receive(self) -> SessionMessage | Exception:
        while True:
            await self._outbox.room()
            while self._lines:
                line = self._lines.pop()
                if len(line) > self._body_limit:
                    self._outbox.put(_error_line(None, INVALID_REQUEST, self._too_long))
                elif line and not line.isspace():
                    try:
                        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
                    except ValidationError as fault:
                        self._outbox.put(_complaint(line, fault))
            try:
                self._feed(await self._stream.receive(_READ_BYTES))
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                raise anyio.EndOfStream from None

    def _feed(self, chunk: bytes) -> None:
        lines = chunk.split(b"\n")
        rest = lines.pop()
        if lines:
            if self._skipping:
                self._skipping = False
                del lines[0]
            elif self._partial:
                lines[0] = bytes(self._partial) + lines[0]
                self._partial.clear()
            lines.reverse()
            self._lines = lines
        if not self._skipping:
            self._partial += rest
            if len(self._partial) > self._body_limit:
                self._partial.clear()
                self._skipping = True
                self._outbox.put(_error_line(None, INVALID_REQUEST, self._too_long))

    @property
    def _too_long(self) -> str:
        return f"a message may have at most {self._body_limit} bytes"

    async def aclose(self) -> None:
        """Nothing: the stream belongs to whoever accepted it."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> bool | None:
        return None


class _Outbox:
    """The write side as the SDK wants it: what is sent in one turn of the loop goes out in one write.

    `send` waits while more than 1 MiB is unsent, and so does the read side: a client that does not read
    stops itself and nobody else.
    """

    def __init__(self, stream: anyio.abc.ByteStream, write_seconds: float) -> None:
        self._stream = stream
        self._write_seconds = write_seconds
        self._unsent: list[bytes] = []
        self._size = 0
        self._closed = False
        self._filled = anyio.Event()
        self._drained = anyio.Event()

    async def send(self, item: SessionMessage) -> None:
        if self._closed:
            raise anyio.ClosedResourceError
        self.put(_encoded(item.message))
        await self.room()

    async def room(self) -> None:
        """Returns when less than 1 MiB is unsent."""
        while self._size > _HIGH_WATER_BYTES and not self._closed:
            await self._drained.wait()

    def put(self, line: bytes) -> None:
        """Queues one line without its end, whatever is queued already."""
        self._unsent.append(line)
        self._size += len(line) + 1
        self._filled.set()

    async def aclose(self) -> None:
        """No more messages; what is queued still goes out."""
        self._closed = True
        self._filled.set()

    async def pump(self, scope: anyio.CancelScope) -> None:
        """Writes until closed and empty. Cancels `scope` when the client has gone or does not read."""
        try:
            while True:
                await self._filled.wait()
                self._filled = anyio.Event()
                lines, self._unsent = self._unsent, []
                if lines:
                    lines.append(b"")
                    await self._write(b"\n".join(lines))
                elif self._closed:
                    return
                if self._closed:
                    self._filled.set()
        except (TimeoutError, anyio.BrokenResourceError, anyio.ClosedResourceError):
            scope.cancel()
        finally:
            self._closed = True
            self._drained.set()

    async def _write(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _READ_BYTES):
            part = bytes(view[start : start + _READ_BYTES]) if len(view) > _READ_BYTES else data
            with anyio.fail_after(self._write_seconds):
                await self._stream.send(part)
        self._size -= len(data)
        self._drained.set()
        self._drained = anyio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> bool | None:
        await self.aclose()
        return None


def _encoded(message: JSONRPCMessage) -> bytes:
    try:
        return message.model_dump_json(by_alias=True, exclude_unset=True).encode()
    except ValueError as fault:
        # Half a surrogate pair in somebody's output must cost this answer, not the connection.
        log.warning("an answer could not be encoded: %s", fault)
        number = message.id if isinstance(message, JSONRPCResponse | JSONRPCError) else None
        return _error_line(number, INTERNAL_ERROR, "the answer is not valid Unicode and cannot be sent")


def _complaint(line: bytes, fault: ValidationError) -> bytes:
    if fault.errors(include_url=False, include_input=False, include_context=False)[0]["type"] == "json_invalid":
        return _error_line(None, PARSE_ERROR, "not valid JSON, or nested too deeply")
    message: Any = json.loads(line)  # it has been parsed once, so it is shallow
    number: Any = None
    if isinstance(message, dict):
        known = cast("dict[str, Any]", message)
        # Only a request's id: a malformed answer carries an id of ours, which the client may be using, too.
        number = known.get("id") if "method" in known else None
    if not isinstance(number, int | str) or isinstance(number, bool):
        number = None
    return _error_line(number, INVALID_REQUEST, "not a JSON-RPC 2.0 message")


def _error_line(number: int | str | None, code: int, message: str) -> bytes:
    error = JSONRPCError(jsonrpc="2.0", id=number, error=ErrorData(code=code, message=message))
    return error.model_dump_json(by_alias=True, exclude_unset=True).encode()


def _bind(path: Path, backlog: int) -> socket.socket:
    """A listening socket, moved into place when ready: nobody meets one that refuses, or is open to others."""
    if _is_served(path):
        raise DaemonUnavailable(f"another process serves {path}", hint="stop it, or use another data directory")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        listener.setblocking(False)
        with suppress(FileNotFoundError):
            draft.unlink()
        listener.bind(os.fspath(draft))
        draft.chmod(0o600)
        listener.listen(backlog)
        draft.replace(path)
    except OSError as fault:
        listener.close()
        raise DaemonUnavailable(f"cannot listen at {path}: {fault.strerror or fault}") from fault
    return listener


def _remove(path: Path, made: os.stat_result) -> None:
    """Unless somebody has put a socket of its own there since."""
    with suppress(FileNotFoundError):
        if os.path.samestat(path.lstat(), made):
            path.unlink()


def _is_served(path: Path) -> bool:
    try:
        seen = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(seen.st_mode):
        raise DaemonUnavailable(f"{path} is not a socket", hint="remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # it does not answer, but somebody holds it
        return True


async def _first_line(stream: anyio.abc.ByteStream) -> tuple[bytes | None, bytes]:
    """The first line and what came with it; None for the line when the peer closed without one."""
    received = bytearray()
    while b"\n" not in received:
        if len(received) > _PREAMBLE_BYTES:
            raise InvalidInput(f"a preamble may have at most {_PREAMBLE_BYTES} bytes")
        try:
            received += await stream.receive(_PREAMBLE_BYTES)
        except anyio.EndOfStream:
            return None, b""
    line, _, early = bytes(received).partition(b"\n")
    return line, early


def _introduced(line: bytes, early: bytes, stream: anyio.abc.ByteStream) -> Connection:
    try:
        said: Any = json.loads(line)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or "vespera" not in said:
        raise InvalidInput("the first line is no preamble", hint="connect through `vespera-exec`")
    preamble = cast("dict[str, Any]", said)
    if preamble["vespera"] != PREAMBLE_VERSION:
        raise InvalidInput(
            f"this daemon ({__version__}) speaks preamble version {PREAMBLE_VERSION}, not {preamble['vespera']!r}",
            hint="restart the daemon with the installed version: `vespera-exec daemon restart`",
        )
    cwd: Any = preamble.get("cwd")
    env = preamble.get("env")
    pairs = cast("dict[str, Any]", env).items() if isinstance(env, dict) else ()
    return Connection(
        caller=Caller(
            cwd=cwd if isinstance(cwd, str) and _is_text(cwd) and os.path.isabs(cwd) else None,
            env=allowed_env({name: value for name, value in pairs if _is_text(value)}),
        ),
        client=str(preamble.get("client", ""))[:100],
        version=str(preamble.get("version", ""))[:100],
        stream=stream,
        early=early,
    )


def _is_text(value: object) -> bool:
    """A string that can be stored: bytes that are no UTF-8 arrive as halves of surrogate pairs."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value
