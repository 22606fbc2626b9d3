"""The MCP side of a daemon: neither imported nor built before a client wants it."""

from __future__ import annotations

import gc
import logging
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.to_thread
import orjson

import vespera_exec
from vespera_exec.errors import DaemonUnavailable
from vespera_exec.server.http.problems import problem_of
from vespera_exec.server.incoming import has_too_many_values

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.types import Receive, Scope, Send

    from vespera_exec.app.service import Vespera
    from vespera_exec.server.connections import Connection
    from vespera_exec.server.mcp.serving import Build, McpSide

_INTERNAL_ERROR = -32603
_WRITE_SECONDS = 30.0
_PACKAGE = Path(vespera_exec.__file__)
_BEGUN_WITH = _PACKAGE.stat()
_SERVING = "vespera_exec.server.mcp.serving"
log = logging.getLogger(__name__)


def import_mcp() -> Build:
    """What builds it. The first time this takes half a second of CPU and 25 MB; the SDK is most of both.

    Raises:
        DaemonUnavailable: another version was installed meanwhile; one process must not have parts of both.
        ImportError: and whatever else an import may raise.
    """
    if _SERVING not in sys.modules and not _is_as_it_was():
        what = "another version was installed since this daemon started"
        raise DaemonUnavailable(what, hint="`vespera-exec daemon stop`; the next client starts the installed version")
    collecting = gc.isenabled()
    gc.disable()  # imports make no garbage worth looking for
    try:
        from vespera_exec.server.mcp.wire import build_wire_models_late

        build_wire_models_late()
        from vespera_exec.server.mcp.serving import build
    finally:
        if collecting:
            gc.enable()
    return build


def _is_as_it_was() -> bool:
    """Our code on disk is what this process began with."""
    try:
        now = _PACKAGE.stat()
    except OSError:
        return False
    return (now.st_ino, now.st_mtime_ns) == (_BEGUN_WITH.st_ino, _BEGUN_WITH.st_mtime_ns)


async def import_mcp_ahead() -> None:
    """Imports it beside whatever else goes on, for the first client to find it there."""
    try:
        await anyio.to_thread.run_sync(import_mcp, abandon_on_cancel=True)
    except Exception:
        # Supervisor boundary: whoever needs it tries again, and is told then.
        log.exception("MCP could not be imported ahead")


@asynccontextmanager
async def mcp_door(vespera: Vespera) -> AsyncGenerator[McpDoor]:
    """To be opened before the sockets that lead to it, and closed after them: then its sessions end."""
    async with anyio.create_task_group() as group:
        door = McpDoor(vespera)
        group.start_soon(door.keep)
        try:
            yield door
        finally:
            door.close()


class _Opening:
    """One attempt. Once it is `over`, it has led to a `side`, has failed by `fault`, or was given up."""

    def __init__(self) -> None:
        self.wanted = anyio.Event()
        self.over = anyio.Event()
        self.side: McpSide | None = None
        self.fault: Exception | None = None


class McpDoor:
    """Serves MCP over the socket (`talk`) and over HTTP, as an ASGI app. Made by `mcp_door`.

    The first client opens it, and whoever comes meanwhile waits for the same opening; other doors answer on. One
    that fails is logged, told to those who waited for it, and tried again for the next.
    """

    def __init__(self, vespera: Vespera) -> None:
        self._vespera = vespera
        self._opening = _Opening()
        self._attempts = anyio.CancelScope()
        self._closed = anyio.Event()

    async def talk(self, connection: Connection) -> None:
        """Serves one session; returns when it has ended. While there is no MCP, its requests are answered with why."""
        self._opening.wanted.set()
        try:
            side, early = await self._side_for(connection)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, TimeoutError):
            return  # the client has gone, or does not read
        await side.talk(replace(connection, early=early))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            side = await self._opened()
        except DaemonUnavailable as refusal:
            await problem_of(refusal)(scope, receive, send)
        else:
            await side.over_http(scope, receive, send)

    @asynccontextmanager
    async def streams(self) -> AsyncGenerator[None]:
        """At the end of the block listen streams end in order, and a door that is not open stays so."""
        try:
            yield
        finally:
            if (side := self._opening.side) is not None:
                await side.close_streams()
            else:
                self._attempts.cancel()

    def close(self) -> None:
        self._attempts.cancel()
        self._closed.set()

    async def keep(self) -> None:
        """Opens when a client wants it, and holds open what was opened until `close`."""
        try:
            with self._attempts:
                while not self._closed.is_set():
                    opening = self._opening
                    await opening.wanted.wait()
                    try:
                        await self._hold_open(opening)
                    except Exception as fault:
                        # Supervisor boundary: who speaks something else goes on.
                        log.exception("MCP cannot be served")
                        opening.fault = fault
                        self._opening = _Opening()
                        opening.over.set()
        finally:
            self._opening.over.set()

    async def _hold_open(self, opening: _Opening) -> None:
        build = await anyio.to_thread.run_sync(import_mcp, abandon_on_cancel=True)
        async with build(self._vespera) as side:
            if self._vespera.is_idle:
                gc.freeze()  # as after the daemon's own imports; while nothing runs, there is nothing else to keep
            opening.side = side
            opening.over.set()
            # Shielded: who is served already is served until the sockets have closed.
            with anyio.CancelScope(shield=True):
                await self._closed.wait()

    async def _opened(self) -> McpSide:
        """
        Raises:
            DaemonUnavailable: it cannot be opened, or the daemon stops.
        """
        opening = self._opening
        opening.wanted.set()
        await opening.over.wait()
        if opening.side is not None:
            return opening.side
        match opening.fault:
            case None:
                raise DaemonUnavailable("the daemon is stopping", hint="the next client starts another")
            case DaemonUnavailable(message=message, hint=hint):
                raise DaemonUnavailable(message, hint=hint)
            case fault:
                what = f"MCP cannot be served: {type(fault).__name__}: {fault}"
                raise DaemonUnavailable(what, hint="the daemon's log says more; the next request tries again")

    async def _side_for(self, connection: Connection) -> tuple[McpSide, bytes]:
        """Once its client has said something, which comes with it."""
        limit = self._vespera.settings.body_limit_bytes
        unread = connection.early
        while True:
            while b"\n" not in unread and len(unread) <= limit:
                unread += await connection.stream.receive()
            try:
                return await self._opened(), unread
            except DaemonUnavailable as refusal:
                lines, _, unread = unread.rpartition(b"\n")
                if len(unread) > limit:
                    raise anyio.EndOfStream from None
                with anyio.fail_after(_WRITE_SECONDS):
                    await connection.stream.send(_refused(lines, refusal))


def _refused(lines: bytes, refusal: DaemonUnavailable) -> bytes:
    """The answers to the requests among `lines`."""
    told = {
        "code": _INTERNAL_ERROR,
        "message": refusal.message,
        "data": {"error_code": refusal.error_code, "hint": refusal.hint, "retriable": True},
    }
    answers: list[bytes] = []
    for line in lines.split(b"\n"):
        number = _request_id(line)
        if number is not None:
            answers.append(orjson.dumps({"jsonrpc": "2.0", "id": number, "error": told}) + b"\n")
    return b"".join(answers)


def _request_id(line: bytes) -> int | str | None:
    if has_too_many_values(line):
        return None
    try:
        message: object = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return cast("dict[str, Any]", message).get("id") if isinstance(message, dict) and "method" in message else None
