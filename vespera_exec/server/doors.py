"""Every door over one data directory, and how long they stay open."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import TYPE_CHECKING

import anyio

from vespera_exec import paths
from vespera_exec.app.service import Vespera
from vespera_exec.app.tokens import default_token
from vespera_exec.errors import VesperaError
from vespera_exec.server.connections import serve_mcp_socket
from vespera_exec.server.conversation import serve_connection
from vespera_exec.server.http.app import build_http_app
from vespera_exec.server.listeners import serve_http
from vespera_exec.server.mcp.adapter import lowlevel
from vespera_exec.server.mcp.http import mcp_over_http
from vespera_exec.server.mcp.server import build_mcp_server

if TYPE_CHECKING:
    from anyio import CancelScope

    from vespera_exec.app.views import DaemonView
    from vespera_exec.server.connections import Connection, McpSocket
    from vespera_exec.server.listeners import HttpListeners
    from vespera_exec.settings import Settings

_IDLE_LOOK_SECONDS = 1.0
_log = logging.getLogger(__name__)


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM, SIGINT or idleness.

    Raises:
        DataDirectoryInUse: somebody else owns the directory.
        StoreUnavailable, StoreTooNew, StoreDamaged: it cannot be opened; the hint says what to do.
        DaemonUnavailable: a socket cannot be made.
    """
    refusal: VesperaError | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(_until_signalled, group.cancel_scope)
        try:
            async with Vespera.open(settings=settings, purpose="daemon") as vespera:
                await _serve(vespera, settings)
        except VesperaError as error:
            refusal = error  # raised in here it would come out as a group
        group.cancel_scope.cancel()
    if refusal is not None:
        raise refusal
    _log.info("stopped")


class _Doors:
    """What is open so far; there may be callers before all of it is."""

    def __init__(self, vespera: Vespera) -> None:
        self._vespera = vespera
        self.mcp: McpSocket | None = None
        self.http: HttpListeners | None = None

    @property
    def connections(self) -> int:
        over_mcp = self.mcp.statistics().open if self.mcp else 0
        return over_mcp + (self.http.connections if self.http else 0)

    def describe(self) -> DaemonView:
        url, problem = (self.http.url, self.http.tcp_problem) if self.http else (None, None)
        return self._vespera.describe(url=url, tcp_problem=problem, connections=self.connections)


async def _serve(vespera: Vespera, settings: Settings) -> None:
    mcp_path, http_path = paths.socket_paths(settings.data_dir, os.environ)
    server = build_mcp_server(vespera)
    low = lowlevel(server)
    doors = _Doors(vespera)

    async def talk(connection: Connection) -> None:
        await serve_connection(low, connection, body_limit=settings.body_limit_bytes)

    # mcp.sock comes last: whoever finds it finds the other doors open, too.
    async with (
        mcp_over_http(server) as mcp_routes,
        serve_http(
            build_http_app(vespera, mcp_routes=mcp_routes, describe=doors.describe),
            unix_path=http_path,
            tcp=(settings.tcp_host, settings.tcp_port) if settings.tcp else None,
            token=default_token(settings.data_dir),
            body_limit=settings.body_limit_bytes,
        ) as doors.http,
        serve_mcp_socket(mcp_path, talk) as doors.mcp,
    ):
        url, problem = doors.http.url, doors.http.tcp_problem
        _log.info("ready", extra={"data_dir": str(settings.data_dir), "url": url, "pid": os.getpid()})
        if problem:
            _log.warning("no TCP door: %s", problem)
        await _until_idle(settings.idle_exit_seconds, vespera, doors)
        _log.info("nothing to do for %g s; going", settings.idle_exit_seconds)


async def _until_signalled(scope: CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            _log.info("stopping on %s", signal.Signals(number).name)
            scope.cancel()
            return


async def _until_idle(limit: float, vespera: Vespera, doors: _Doors) -> None:
    """Returns when nothing has run and nobody has been connected for `limit` seconds; never, if it is 0."""
    if not limit:
        await anyio.sleep_forever()
    since = time.monotonic()
    while time.monotonic() - since < limit:
        await anyio.sleep(min(_IDLE_LOOK_SECONDS, limit / 4))
        if not vespera.is_idle or doors.connections:
            since = time.monotonic()
