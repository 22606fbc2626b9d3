"""MCP over HTTP: the streamable transport at /mcp and the older SSE transport at /sse and /messages/."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.sse import SseServerTransport
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from starlette.routing import BaseRoute, Mount, Route

from vespera_exec.app.callers import current_caller
from vespera_exec.server.mcp.adapter import lowlevel

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from mcp.server.lowlevel import Server
    from mcp.server.mcpserver import MCPServer
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Host, Origin, token and the size of bodies are judged by our own guard, which stands outside and is stricter.
_NO_SECURITY = TransportSecuritySettings(enable_dns_rebinding_protection=False)
_NO_LIMIT = sys.maxsize


@asynccontextmanager
async def mcp_over_http(server: MCPServer[Any]) -> AsyncGenerator[list[BaseRoute]]:
    """Routes that serve `server` while the block runs; to be mounted behind the guard, which sets `current_caller`.

    A session belongs to the principal that opened it: for anybody else it does not exist. At the end open
    sessions are closed.
    """
    low = lowlevel(server)
    # Never JSON instead of SSE: that drops progress, and goes on when the client has gone.
    manager = StreamableHTTPSessionManager(low, security_settings=_NO_SECURITY, max_request_body_size=_NO_LIMIT)
    transport = SseServerTransport("/messages/", security_settings=_NO_SECURITY, max_request_body_size=_NO_LIMIT)
    sessions = _SseSessions(low, transport)
    async with manager.run():
        try:
            yield [
                Route("/mcp", endpoint=_Bound(manager.handle_request)),
                Route("/sse", endpoint=_Bound(sessions), methods=["GET"]),
                Mount("/messages/", app=_Bound(transport.handle_post_message)),
            ]
        finally:
            sessions.close()


class _Bound:
    """ASGI: tells the SDK whose request it is, so that it binds sessions to who opened them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = current_caller.get()
        user = AuthenticatedUser(AccessToken(token="", client_id=caller.principal, scopes=sorted(caller.scopes)))
        await self._app({**scope, "user": user}, receive, send)


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

        with anyio.CancelScope() as session:
            self._open.add(session)
            try:
                async with self._transport.connect_sse(scope, receive, sending) as (read, write):
                    await self._low.run(read, write, self._low.create_initialization_options())
            finally:
                self._open.discard(session)
        if unfinished:
            # An orderly end of the stream; without it the HTTP server would report a fault of ours.
            await send({"type": "http.response.body", "body": b"", "more_body": False})
