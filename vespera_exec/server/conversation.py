"""One MCP session over a byte stream: lines of JSON as the pair of message streams that the SDK's server wants."""

from __future__ import annotations

import contextvars
import json
import logging
from typing import TYPE_CHECKING, Any, Self, cast

import anyio
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

from vespera_exec.app.callers import current_caller
from vespera_exec.server.connections import LocalStream
from vespera_exec.server.incoming import MOST_VALUES, has_too_many_values, request_id

if TYPE_CHECKING:
    from types import TracebackType

    from anyio.abc import ByteStream
    from mcp.server.lowlevel import Server

    from vespera_exec.server.connections import Connection

BODY_LIMIT_BYTES = 4 * 1024 * 1024

_WRITE_SECONDS = 30.0
_READ_BYTES = 256 * 1024
_HIGH_WATER_BYTES = 1024 * 1024
_TOO_MANY = f"a message may hold at most {MOST_VALUES} JSON values"
_log = logging.getLogger(__name__)


async def serve_connection(
    server: Server[Any],
    connection: Connection,
    *,
    body_limit: int = BODY_LIMIT_BYTES,
    write_seconds: float = _WRITE_SECONDS,
) -> None:
    """Serves one MCP session; returns when the client has closed, or does not read for `write_seconds`.

    Handlers find the client in `current_caller`. A line that is too long, holds too many values, is no
    JSON or no JSON-RPC is answered with an error, and the session goes on.
    """
    outbox = _Outbox(connection.stream, write_seconds)
    inbox = _Inbox(connection, outbox, body_limit)
    async with anyio.create_task_group() as group:
        group.start_soon(outbox.pump, group.cancel_scope)
        await server.run(inbox, outbox, server.create_initialization_options())
        await outbox.aclose()


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
                elif has_too_many_values(line):
                    self._outbox.put(_error_line(request_id(line), INVALID_REQUEST, _TOO_MANY))
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

    def __init__(self, stream: ByteStream, write_seconds: float) -> None:
        self._stream = stream
        self._local = stream if isinstance(stream, LocalStream) else None
        self._write_seconds = write_seconds
        self._unsent: list[bytes] = []
        self._size = 0
        self._closed = False
        self._filled = anyio.Event()
        self._drained = anyio.Event()

    async def send(self, item: SessionMessage) -> None:
        if self._closed:
            raise anyio.ClosedResourceError
        line = _encoded(item.message)
        if self._local is not None and not self._size:
            # Nothing waits before it: most answers go out here, without a turn of the pump.
            line += b"\n"
            taken = self._local.send_now(line)
            if taken == len(line):
                return
            line = line[taken:-1]
        self.put(line)
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
        _log.warning("an answer could not be encoded: %s", fault)
        number = message.id if isinstance(message, JSONRPCResponse | JSONRPCError) else None
        return _error_line(number, INTERNAL_ERROR, "the answer is not valid Unicode and cannot be sent")


def _complaint(line: bytes, fault: ValidationError) -> bytes:
    if fault.errors(include_url=False, include_input=False, include_context=False)[0]["type"] == "json_invalid":
        return _error_line(request_id(line), PARSE_ERROR, "not valid JSON, nested too deeply, or half a surrogate pair")
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
