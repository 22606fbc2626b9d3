"""The unix-socket door of MCP: many clients at once, each one line of JSON after another."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.abc
import anyio.lowlevel

from vespera_exec import __version__
from vespera_exec.errors import InvalidInput, PermissionDenied, VesperaError
from vespera_exec.model.principal import Caller, allowed_env
from vespera_exec.server import unix
from vespera_exec.server.greeting import PREAMBLE_VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

log = logging.getLogger(__name__)

_PREAMBLE_SECONDS = 5.0
_PREAMBLE_BYTES = 64 * 1024
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

    def __init__(self, path: Path, preamble_seconds: float, yields_to: Callable[[str], bool]) -> None:
        self.path = path
        self._yields_to = yields_to
        self._preamble_seconds = preamble_seconds
        self._open = 0
        self._served = 0
        self._refused = 0
        self._idle_since = time.monotonic()
        self._streams: set[LocalStream] = set()

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
                group.start_soon(self._serve, LocalStream(accepted), handle)

    async def _serve(self, stream: LocalStream, handle: Callable[[Connection], Awaitable[None]]) -> None:
        async with stream:
            connection = await self._greet(stream)
            if connection is None:
                return
            self._open += 1
            self._served += 1
            self._streams.add(stream)
            try:
                await handle(connection)
            except Exception:
                # Supervisor boundary: a connection that fails is one client's loss, not the daemon's.
                log.exception("connection of %s failed", connection.client)
            finally:
                self._open -= 1
                self._streams.discard(stream)
                self._idle_since = time.monotonic()

    def _hang_up(self) -> None:
        """Before the cancel: the SDK answers what it is cancelled in, and a bridge would take that for the result."""
        for stream in self._streams:
            stream.hang_up()

    async def _yield(self, stream: LocalStream) -> None:
        self._streams.add(stream)  # so that it ends when the socket has been withdrawn, and not before
        answer = {"vespera": PREAMBLE_VERSION, "daemon": __version__, "pid": os.getpid(), "yields": True}
        await stream.send(json.dumps(answer).encode() + b"\n")
        await anyio.sleep_forever()

    async def _greet(self, stream: LocalStream) -> Connection | None:
        try:
            with anyio.fail_after(self._preamble_seconds):
                stream.check_peer()
                line, early = await _first_line(stream)
                if line is None:
                    return None  # somebody looked whether we are there
                if self._yields_to(_version(line)):
                    await self._yield(stream)
                    return None
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
    yields_to: Callable[[str], bool] | None = None,
) -> AsyncGenerator[McpSocket]:
    """Accepts clients of our own uid at `path` while the block runs, and calls `handle` for each in a task of its own.

    The socket appears with mode 0600 and already listening, in place of one that nobody serves any more. At
    the end it disappears first, then the connections are dropped without a further word, so that a bridge
    answers what is in flight with an error that says "again".

    `yields_to` is asked with the version of each client; True means that the block will be left for it. Such a
    client is told so, and waits for the end of its connection.

    Raises:
        DaemonUnavailable: somebody else serves at `path`, or it cannot be made.
    """
    door = McpSocket(path, preamble_seconds, yields_to or (lambda _: False))
    with unix.listen(path, backlog=backlog) as listener:
        # Shielded: a daemon that is cancelled says its last words first, on the connections that it has.
        serving = anyio.CancelScope(shield=True)
        async with anyio.create_task_group() as group:

            async def serve() -> None:
                with serving:
                    await door._listen(listener.socket, handle)  # pyright: ignore[reportPrivateUsage]

            group.start_soon(serve)
            try:
                yield door
            finally:
                listener.withdraw()
                door._hang_up()  # pyright: ignore[reportPrivateUsage]
                serving.cancel()


class LocalStream(anyio.abc.ByteStream):
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

    def send_now(self, data: bytes) -> int:
        """How much of it the socket took without waiting.

        Raises:
            anyio.BrokenResourceError: the peer has gone.
        """
        try:
            return self._raw.send(data)
        except BlockingIOError:
            return 0
        except OSError as fault:
            raise anyio.BrokenResourceError from fault

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

    def hang_up(self) -> None:
        """Nothing passes any more, in either direction; what still tries finds the peer gone."""
        with suppress(OSError):
            self._raw.shutdown(socket.SHUT_RDWR)

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
            f"this daemon is version {__version__} and speaks protocol {PREAMBLE_VERSION}; "
            f"you are version {str(preamble.get('version', '?'))[:100]} and speak {preamble['vespera']!r}",
            hint="end it with `vespera-exec daemon stop`; the next client starts the installed version",
        )
    cwd: Any = preamble.get("cwd")
    env = preamble.get("env")
    pairs = cast("dict[str, Any]", env).items() if isinstance(env, dict) else ()
    return Connection(
        caller=Caller(
            cwd=cwd if isinstance(cwd, str) and is_text(cwd) and os.path.isabs(cwd) else None,
            env=allowed_env({name: value for name, value in pairs if is_text(value)}),
        ),
        client=str(preamble.get("client", ""))[:100],
        version=str(preamble.get("version", ""))[:100],
        stream=stream,
        early=early,
    )


def _version(line: bytes) -> str:
    """What a client says is its version; "" where it says nothing of the kind."""
    try:
        said: Any = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    return str(cast("dict[str, Any]", said).get("version", ""))[:100] if isinstance(said, dict) else ""


def is_text(value: object) -> bool:
    """A string that can be stored: bytes that are no UTF-8 arrive as halves of surrogate pairs."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value
