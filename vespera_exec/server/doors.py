"""Every door over one data directory, and how long they stay open."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from typing import TYPE_CHECKING, Literal

import anyio

from vespera_exec import __version__, paths
from vespera_exec.app.owning import still_owns
from vespera_exec.app.service import Vespera
from vespera_exec.app.tokens import default_token
from vespera_exec.errors import StoreUnavailable, VesperaError
from vespera_exec.server import logs
from vespera_exec.server.connections import serve_mcp_socket
from vespera_exec.server.http.app import build_http_app
from vespera_exec.server.listeners import serve_http
from vespera_exec.server.mcp.door import import_mcp_ahead, mcp_door

if TYPE_CHECKING:
    from pathlib import Path

    from anyio import CancelScope

    from vespera_exec.app.views import DaemonView
    from vespera_exec.server.connections import McpSocket
    from vespera_exec.server.listeners import HttpListeners
    from vespera_exec.settings import Settings

_IDLE_LOOK_SECONDS = 1.0
_log = logging.getLogger(__name__)
_End = Literal["idle", "removed", "unlocked", "replaced", "yielded"]


async def serve(settings: Settings, *, expect_mcp: bool = False) -> None:
    """Serves until SIGTERM, SIGINT or idleness. `expect_mcp`: whoever started us is about to speak it.

    Raises:
        DataDirectoryInUse: somebody else owns the directory.
        StoreUnavailable, StoreTooNew, StoreDamaged: it cannot be opened; the hint says what to do.
        StoreUnavailable: its database or its lock was removed while it was served.
        StoreError: another owner has taken the database over.
        DaemonUnavailable: a socket cannot be made.
    """
    refusal: VesperaError | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(_until_signalled, group.cancel_scope)
        if expect_mcp:
            group.start_soon(import_mcp_ahead)
        try:
            async with Vespera.open(settings=settings, purpose="daemon") as vespera:
                end = await _serve(vespera, settings)
                refusal = _told(end, settings.data_dir) or vespera.replaced
        except VesperaError as error:
            refusal = error  # raised in here it would come out as a group
        group.cancel_scope.cancel()
    if refusal is not None:
        raise refusal
    _log.info("stopped")


def _told(end: _End, data_dir: Path) -> VesperaError | None:
    """What the last line says, of an end that is a fault of somebody's."""
    match end:
        case "removed":
            return StoreUnavailable(
                f"{data_dir / paths.DATABASE} was removed while it was in use",
                hint="the next client starts afresh; what was not copied elsewhere is lost",
            )
        case "unlocked":
            return StoreUnavailable(
                f"{data_dir / paths.LOCK} was removed while it was held",
                hint="the next client starts a new daemon; that file stops nobody once its owner is gone, so leave it",
            )
        case _:
            return None


class _Doors:
    """What is open so far; there may be callers before all of it is."""

    def __init__(self, vespera: Vespera) -> None:
        self._vespera = vespera
        self.mcp: McpSocket | None = None
        self.http: HttpListeners | None = None
        self._requests = 0
        self.yielded = anyio.Event()

    @property
    def replaced(self) -> bool:
        return self._vespera.replaced is not None

    def yields_to(self, version: str) -> bool:
        """It is newer than we are, and nobody needs us; we go then."""
        if not self.yielded.is_set() and _ordered(version) > _ordered(__version__):
            if not self._vespera.is_idle or self.connections:
                _log.warning("a client is version %s, this is %s; in use, so it goes on", version, __version__)
                return False
            self.yielded.set()
        return self.yielded.is_set()

    def is_idle(self) -> bool:
        """Nothing runs, nobody is connected, and no request came since the last time this was asked."""
        before, self._requests = self._requests, self.http.requests if self.http else 0
        return self._vespera.is_idle and not self.connections and before == self._requests

    @property
    def connections(self) -> int:
        over_mcp = self.mcp.statistics().open if self.mcp else 0
        return over_mcp + (self.http.connections if self.http else 0)

    def describe(self) -> DaemonView:
        url, problem = (self.http.url, self.http.tcp_problem) if self.http else (None, None)
        return self._vespera.describe(url=url, tcp_problem=problem, connections=self.connections)


async def _serve(vespera: Vespera, settings: Settings) -> _End:
    mcp_path, http_path = paths.socket_paths(settings.data_dir, os.environ)
    doors = _Doors(vespera)
    database = settings.data_dir / paths.DATABASE
    opened = _identity(database)
    token = default_token(settings.data_dir)
    logs.mask(token)

    # mcp.sock comes last: whoever finds it finds the other doors open, too.
    async with (
        mcp_door(vespera) as mcp,
        serve_http(
            build_http_app(vespera, mcp=mcp, describe=doors.describe),
            unix_path=http_path,
            tcp=(settings.tcp_host, settings.tcp_port) if settings.tcp else None,
            token=token,
            named=vespera.access,
            body_limit=settings.body_limit_bytes,
        ) as doors.http,
        serve_mcp_socket(mcp_path, mcp.talk, yields_to=doors.yields_to) as doors.mcp,
        mcp.streams(),
    ):
        url, problem = doors.http.url, doors.http.tcp_problem
        _log.info("ready", extra={"data_dir": str(settings.data_dir), "url": url, "pid": os.getpid()})
        if problem:
            _log.warning("no TCP door: %s", problem)
        end = await _until_the_end(settings.idle_exit_seconds, doors, database, opened)
        match end:
            case "idle":
                _log.info("nothing to do for %g s; going", settings.idle_exit_seconds)
            case "removed":
                _log.error("%s was removed; going, with what it held", database)
            case "unlocked":
                _log.error("%s was removed; going, before somebody else takes it", settings.data_dir / paths.LOCK)
            case "replaced":
                _log.error("%s; going, with what runs", vespera.replaced)
            case "yielded":
                _log.info("nobody needs this version, %s; going, for a newer one", __version__)
        return end


async def _until_signalled(scope: CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            _log.info("stopping on %s", signal.Signals(number).name)
            scope.cancel()
            return


async def _until_the_end(limit: float, doors: _Doors, database: Path, opened: tuple[int, int] | None) -> _End:
    """Returns when they were idle for `limit` seconds (0: however long), yield, or the database is not `opened` now.

    A `git clean -fdx` removes it under us. We would go on writing to a file without a name, and with our
    sockets keep everybody from a daemon whose work lasts. The same holds for our lock, and when another owner
    has replaced us.
    """
    pause = min(_IDLE_LOOK_SECONDS, limit / 4) if limit else _IDLE_LOOK_SECONDS
    since = time.monotonic()
    while not limit or time.monotonic() - since < limit:
        with anyio.move_on_after(pause):
            await doors.yielded.wait()
            return "yielded"
        if _identity(database) != opened:
            return "removed"
        if not still_owns(database.parent):
            return "unlocked"
        if doors.replaced:
            return "replaced"
        if not doors.is_idle():
            since = time.monotonic()
    return "idle"


def _ordered(version: str) -> list[int]:
    """What two versions are compared by: their numbers."""
    return [int(number) for number in re.findall(r"[0-9]{1,9}", version)[:3]]


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file stands there; None when none does."""
    try:
        seen = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return seen.st_dev, seen.st_ino
