"""The sockets of the HTTP door: one app, served to our own user on a unix socket and to token holders on TCP."""

from __future__ import annotations

import contextlib
import errno
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
import uvicorn

from vespera_exec.server import unix
from vespera_exec.server.http.guard import Guard, SocketDoor, TcpDoor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from pathlib import Path

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from vespera_exec.server.http.guard import Tokens

_GRACE_SECONDS = 2
_KEEP_ALIVE_SECONDS = 15
_BACKLOG = 512


@dataclass(slots=True)
class HttpListeners:
    """Where the door stands open. `url` is None, with the reason in `tcp_problem`, when TCP is off or refused."""

    unix_path: Path | None = None
    host: str | None = None
    port: int | None = None
    url: str | None = None
    tcp_problem: str | None = None
    requests: int = 0
    """How many there have been."""
    _servers: list[_Server] = field(default_factory=list["_Server"])

    @property
    def connections(self) -> int:
        """Open connections, idle ones too."""
        return sum(len(server.server_state.connections) for server in self._servers)


@asynccontextmanager
async def serve_http(
    app: ASGIApp,
    *,
    unix_path: Path | None = None,
    tcp: tuple[str, int] | None = None,
    token: str | None = None,
    named: Tokens | None = None,
    body_limit: int,
    websockets: bool = False,
) -> AsyncGenerator[HttpListeners]:
    """`app` behind its guard on the sockets that are named, while the block runs.

    `tcp` is (numeric address or "localhost", port; 0 takes a free one) and needs `token`; `named` knows the
    tokens that were made for others. A TCP address that cannot be had is said in `tcp_problem` and stops
    nothing. The app's lifespan runs once. At the end streams are told to close, requests get 2 s to finish,
    then they are cut. `websockets` accepts upgrades (needs the package `websockets`); without it such a
    request is an ordinary one.

    Raises:
        DaemonUnavailable: `unix_path` is served by somebody else, or cannot be made.
    """
    listeners = HttpListeners()
    app = interruptible = _Interruptible(app, listeners)
    async with contextlib.AsyncExitStack() as stack:
        plans: list[tuple[Guard, socket.socket]] = []
        if unix_path is not None:
            own = stack.enter_context(unix.listen(unix_path, backlog=_BACKLOG))
            plans.append((Guard(app, SocketDoor(), body_limit=body_limit), own.socket))
            listeners.unix_path = unix_path
        if tcp is not None:
            if token is None:
                raise ValueError("a TCP door needs a token")
            bound = _bind_tcp(*tcp)
            if isinstance(bound, str):
                listeners.tcp_problem = bound
            else:
                host, port = bound.getsockname()[:2]
                listeners.host, listeners.port = host, port
                listeners.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
                door = TcpDoor(token=token, port=port, host=host, named=named)
                plans.append((Guard(app, door, body_limit=body_limit), stack.enter_context(bound)))
        async with anyio.create_task_group() as group:
            lifespan = _Lifespan()
            await group.start(lifespan.run, app)
            try:
                async with anyio.create_task_group() as serving:
                    for guard, bound in plans:
                        server = _Server(_config(guard, body_limit=body_limit, websockets=websockets))
                        listeners._servers.append(server)  # pyright: ignore[reportPrivateUsage]
                        serving.start_soon(_serve, server, bound)
                    try:
                        yield listeners
                    finally:
                        interruptible.close()
                        # uvicorn bounds its own end; cut short it would leave sockets open.
                        with anyio.CancelScope(shield=True), anyio.move_on_after(_GRACE_SECONDS + 3):
                            for server in listeners._servers:  # pyright: ignore[reportPrivateUsage]
                                server.stop.set()
                            for server in listeners._servers:  # pyright: ignore[reportPrivateUsage]
                                await server.stopped.wait()
            finally:
                await lifespan.end()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers and its ten wake-ups a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stop = anyio.Event()
        self.stopped = anyio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def main_loop(self) -> None:
        await self.stop.wait()


async def _serve(server: _Server, bound: socket.socket) -> None:
    # Shielded: a cancelled daemon closes its connections as well, through `stop`, and within its bound.
    with anyio.CancelScope(shield=True):
        try:
            await server.serve([bound])
        finally:
            for connection in list(server.server_state.connections):
                connection.transport.abort()
            server.stopped.set()


def _config(app: ASGIApp, *, body_limit: int, websockets: bool) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        ws="auto" if websockets else "none",
        ws_max_size=body_limit,
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )


class _Interruptible:
    """Tells every request that waits for its client to go (as streams do) that it has gone, once it is closed."""

    def __init__(self, app: ASGIApp, listeners: HttpListeners) -> None:
        self._app = app
        self._closing = False
        self._listeners = listeners
        self._waiting: set[anyio.CancelScope] = set()

    def close(self) -> None:
        self._closing = True
        for scope in self._waiting:
            scope.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._listeners.requests += 1
        complete = False

        async def receive_or_closing() -> Message:
            nonlocal complete
            if complete:
                return await self._disconnect_or_closing(receive)
            message = await receive()
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_or_closing, send)

    async def _disconnect_or_closing(self, receive: Receive) -> Message:
        if not self._closing:
            with anyio.CancelScope() as scope:
                self._waiting.add(scope)
                try:
                    return await receive()
                finally:
                    self._waiting.discard(scope)
        return {"type": "http.disconnect"}


class _Lifespan:
    """The app's lifespan protocol, spoken once for all listeners."""

    def __init__(self) -> None:
        self._scope = anyio.CancelScope()
        self._ending = anyio.Event()
        self._ended = anyio.Event()

    async def run(self, app: ASGIApp, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        asked = False

        async def receive() -> Message:
            nonlocal asked
            if asked:
                await self._ending.wait()
                return {"type": "lifespan.shutdown"}
            asked = True
            return {"type": "lifespan.startup"}

        async def send(message: Message) -> None:
            match message["type"]:
                case "lifespan.startup.complete":
                    # From here on a cancelled daemon ends it in order as well, through `end`.
                    self._scope.shield = True
                    task_status.started()
                case "lifespan.startup.failed" | "lifespan.shutdown.failed":
                    raise RuntimeError(message.get("message") or message["type"])
                case _:
                    self._ended.set()

        try:
            with self._scope:
                await app({"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}}, receive, send)
        finally:
            self._ended.set()

    async def end(self) -> None:
        self._ending.set()
        with anyio.CancelScope(shield=True), anyio.move_on_after(_GRACE_SECONDS):
            await self._ended.wait()
        self._scope.cancel()


def _bind_tcp(host: str, port: int) -> socket.socket | str:
    """A listening socket, or why there is none."""
    address = "127.0.0.1" if host == "localhost" else host
    flags = socket.AI_NUMERICHOST | socket.AI_PASSIVE
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=flags)[0]
    except socket.gaierror:
        return f"{host} is not a numeric address; set VESPERA_TCP_HOST to one, such as 127.0.0.1"
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(target)
        listener.listen(_BACKLOG)
    except OSError as fault:
        listener.close()
        if fault.errno == errno.EADDRINUSE:
            return f"port {port} of {host} is taken; set VESPERA_TCP_PORT to another, or to 0 for a free one"
        return f"cannot listen on {host}:{port}: {fault.strerror or fault}"
    return listener
