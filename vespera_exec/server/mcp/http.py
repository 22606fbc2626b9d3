"""MCP over HTTP: the streamable transport at /mcp and the older SSE transport at /sse and /messages/."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.sse import SseServerTransport
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings

from vespera_exec.app.callers import current_caller
from vespera_exec.server.mcp.adapter import end_session, lowlevel

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from mcp.server.lowlevel import Server
    from mcp.server.mcpserver import MCPServer
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Host, Origin, token and the size of bodies are judged by our own guard, which stands outside and is stricter.
_NO_SECURITY = TransportSecuritySettings(enable_dns_rebinding_protection=False)
_NO_LIMIT = sys.maxsize
_SESSION = b"mcp-session-id"
_ENDING_SECONDS = 0.5


@asynccontextmanager
async def mcp_over_http(server: MCPServer[Any]) -> AsyncGenerator[ASGIApp]:
    """Serves `server` while the block runs; to be mounted behind the guard, which sets `current_caller`.

    A session belongs to the token that opened it: for anybody else it does not exist. At the end open
    sessions are closed.
    """
    low = lowlevel(server)
    # Never JSON instead of SSE: that drops progress, and goes on when the client has gone.
    manager = StreamableHTTPSessionManager(low, security_settings=_NO_SECURITY, max_request_body_size=_NO_LIMIT)
    transport = SseServerTransport("/messages/", security_settings=_NO_SECURITY, max_request_body_size=_NO_LIMIT)
    sessions = _SseSessions(low, transport)
    async with manager.run():
        try:
            yield _Transports(
                streamable=_Bound(manager.handle_request, manager),
                sse=_Bound(sessions),
                messages=_Bound(transport.handle_post_message),
            )
        finally:
            sessions.close()


@dataclass(frozen=True, slots=True)
class _Transports:
    """ASGI: by the path."""

    streamable: ASGIApp
    sse: ASGIApp
    messages: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = {"/mcp": self.streamable, "/sse": self.sse}.get(scope["path"], self.messages)
        await app(scope, receive, send)


class _Bound:
    """ASGI: tells the SDK whose request it is, so that it binds sessions to who opened them.

    A request that is cut, since its token was revoked, ends its session in `manager`: it would serve its calls on.
    """

    def __init__(self, app: ASGIApp, manager: StreamableHTTPSessionManager | None = None) -> None:
        self._app = app
        self._manager = manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = current_caller.get()
        # The subject, too: a new token of the same name has other scopes, so it is given none of the old sessions.
        shown = AccessToken(token="", client_id=caller.principal, subject=caller.token, scopes=sorted(caller.scopes))
        user = AuthenticatedUser(shown)
        try:
            await self._app({**scope, "user": user}, receive, send)
        except anyio.get_cancelled_exc_class():
            session = next((value for name, value in scope["headers"] if name == _SESSION), None)
            if self._manager is not None and session is not None:
                with anyio.CancelScope(shield=True):  # it closes streams of ours
                    await end_session(self._manager, session.decode("latin-1"), user)
            raise


class _SseSessions:
    """ASGI: one GET is one session of the older transport, until the client goes or we do."""

    def __init__(self, low: Server[Any], transport: SseServerTransport) -> None:
        self._low = low
        self._transport = transport
        self._open: set[anyio.CancelScope] = set()

    def close(self) -> None:
        for session in self._open:
            session.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        unfinished = False

        async def sending(message: Message) -> None:
            nonlocal unfinished
            unfinished = message["type"] == "http.response.start" or message.get("more_body", False)
            await send(message)

        cut = anyio.Event()
        async with anyio.create_task_group() as group:
            # Shielded: the SDK closes its streams when it hears that the client has gone, and not when it is cancelled.
            with anyio.CancelScope(shield=True) as session:
                group.start_soon(_told, cut, session)
                self._open.add(session)
                try:
                    gone = _disconnected_by(cut, receive)
                    async with self._transport.connect_sse(scope, gone, sending) as (read, write):
                        await self._low.run(read, write, self._low.create_initialization_options())
                finally:
                    self._open.discard(session)
            group.cancel_scope.cancel()
        if unfinished:
            # An orderly end of the stream; without it the HTTP server would report a fault of ours.
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _told(cut: anyio.Event, session: anyio.CancelScope) -> None:
    """Waits to be cancelled; then the session has a moment to end."""
    try:
        await anyio.sleep_forever()
    finally:
        session.deadline = anyio.current_time() + _ENDING_SECONDS
        cut.set()


def _disconnected_by(cut: anyio.Event, receive: Receive) -> Receive:
    """What comes from the client, which has gone once `cut` is set."""

    async def receive_or_cut() -> Message:
        message: Message = {"type": "http.disconnect"}
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                await cut.wait()
                group.cancel_scope.cancel()

            group.start_soon(watch)
            message = await receive()
            group.cancel_scope.cancel()
        return message

    return receive_or_cut
