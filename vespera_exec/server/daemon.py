"""The process that owns a data directory: one `Vespera` behind every door, until it is told to go or idle."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import anyio
from anyio import CancelScope

from vespera_exec import paths
from vespera_exec.app.service import Vespera
from vespera_exec.app.tokens import default_token
from vespera_exec.app.views import DaemonView
from vespera_exec.errors import VesperaError
from vespera_exec.server import logs
from vespera_exec.server.connections import Connection, McpSocket, serve_connection, serve_mcp_socket
from vespera_exec.server.http.app import build_http_app
from vespera_exec.server.listeners import HttpListeners, serve_http
from vespera_exec.server.mcp.adapter import lowlevel
from vespera_exec.server.mcp.http import mcp_over_http
from vespera_exec.server.mcp.server import build_mcp_server
from vespera_exec.settings import Settings

_IDLE_LOOK_SECONDS = 1.0
_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM, SIGINT or idleness. Exit code 0 then, 1 when it could not start."""
    parser = argparse.ArgumentParser(prog="vespera_exec.server.daemon", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        settings = Settings.load(data_dir=arguments.data_dir.resolve())
        logs.configure(settings.log_level)
        anyio.run(serve, settings)
    except VesperaError as error:
        sys.stderr.write(f"vespera-exec: {error.message} ({error.error_code}); {error.hint}\n")
        return 1
    return 0


async def serve(settings: Settings) -> None:
    """Every door over one data directory, until told to stop."""
    mcp_path, http_path = paths.socket_paths(settings.data_dir, os.environ)
    async with anyio.create_task_group() as group:
        group.start_soon(_until_signalled, group.cancel_scope)
        async with Vespera.open(settings=settings, purpose="daemon") as vespera:
            server = build_mcp_server(vespera)
            low = lowlevel(server)

            async def talk(connection: Connection) -> None:
                await serve_connection(low, connection, body_limit=settings.body_limit_bytes)

            async with (
                mcp_over_http(server) as mcp_routes,
                serve_http(
                    build_http_app(vespera, mcp_routes=mcp_routes, describe=lambda: describe()),
                    unix_path=http_path,
                    tcp=(settings.tcp_host, settings.tcp_port) if settings.tcp else None,
                    token=default_token(settings.data_dir),
                    body_limit=settings.body_limit_bytes,
                ) as doors,
                serve_mcp_socket(mcp_path, talk) as mcp_socket,
            ):

                def describe() -> DaemonView:
                    connections = mcp_socket.statistics().open + doors.connections
                    return vespera.describe(url=doors.url, tcp_problem=doors.tcp_problem, connections=connections)

                _log.info("ready", extra={"data_dir": str(settings.data_dir), "url": doors.url, "pid": os.getpid()})
                if doors.tcp_problem:
                    _log.warning("no TCP door: %s", doors.tcp_problem)
                await _until_idle(settings.idle_exit_seconds, vespera, mcp_socket, doors)
                _log.info("nothing to do for %g s; going", settings.idle_exit_seconds)
        group.cancel_scope.cancel()
    _log.info("stopped")


async def _until_signalled(scope: CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            _log.info("stopping on %s", signal.Signals(number).name)
            scope.cancel()
            return


async def _until_idle(limit: float, vespera: Vespera, mcp_socket: McpSocket, doors: HttpListeners) -> None:
    """Returns when nothing has run and nobody has been connected for `limit` seconds; never, if it is 0."""
    since = time.monotonic()
    while True:
        await anyio.sleep(min(_IDLE_LOOK_SECONDS, limit / 4) if limit else 3600)
        if not vespera.is_idle or mcp_socket.statistics().open or doors.connections:
            since = time.monotonic()
        if limit and time.monotonic() - since >= limit:
            return


if __name__ == "__main__":
    sys.exit(main())
