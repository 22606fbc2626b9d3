"""Every HTTP door over a data directory, with tokens for more than one principal."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from deadlines import WITHIN
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp_doors import TOKEN, Gate

from vespera_exec.app.service import Vespera
from vespera_exec.app.token_views import NewToken
from vespera_exec.model.principal import Caller
from vespera_exec.server.http.app import build_http_app
from vespera_exec.server.listeners import serve_http
from vespera_exec.server.mcp.http import mcp_over_http
from vespera_exec.server.mcp.server import build_mcp_server
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from starlette.applications import Starlette

LOCAL = Caller(cwd="/")


@dataclass
class Place:
    """`local` comes by the socket, `user` by TCP with the token of the data directory."""

    vespera: Vespera
    gate: Gate
    app: Starlette
    url: str
    local: httpx.AsyncClient
    user: httpx.AsyncClient
    stack: AsyncExitStack

    async def made(self, name: str, **more: Any) -> str:
        """A new token of that name."""
        made = await self.vespera.access.create(LOCAL, NewToken.model_validate({"name": name, **more}))
        return made.token

    async def by(self, token: str) -> httpx.AsyncClient:
        """Who has `token`."""
        client = httpx.AsyncClient(base_url=self.url, headers=bearer(token), trust_env=False, timeout=WITHIN)
        return await self.stack.enter_async_context(client)

    async def bob(self, name: str = "bob", **more: Any) -> httpx.AsyncClient:
        """Who has a new token of that name."""
        return await self.by(await self.made(name, **more))

    @asynccontextmanager
    async def agent(self, token: str, *, mode: Any = "auto", **options: Any) -> AsyncGenerator[Client]:
        """An MCP client with `token`."""
        async with create_mcp_http_client(headers=bearer(token)) as http:
            target = streamable_http_client(f"{self.url}/mcp", http_client=http)
            async with Client(target, mode=mode, read_timeout_seconds=WITHIN, **options) as client:
                yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@asynccontextmanager
async def opened(folder: Path, sock: Path, **given: Any) -> AsyncGenerator[Place]:
    """May be opened again over the same folder."""
    settings = Settings.load(
        {"HOME": str(folder)}, data_dir=folder / "data", roles_dir=folder / "roles", sample_seconds=0.0, **given
    )
    gate = Gate()
    async with AsyncExitStack() as stack:
        vespera = await stack.enter_async_context(Vespera.open(settings=settings))
        vespera.roles.add(gate.role())
        mcp = await stack.enter_async_context(mcp_over_http(build_mcp_server(vespera)))
        app = build_http_app(vespera, mcp=mcp)
        doors = serve_http(
            app,
            unix_path=sock,
            tcp=("127.0.0.1", 0),
            token=TOKEN,
            named=vespera.access,
            body_limit=settings.body_limit_bytes,
        )
        listeners = await stack.enter_async_context(doors)
        assert listeners.url is not None
        over = httpx.AsyncHTTPTransport(uds=str(sock))
        local = await stack.enter_async_context(httpx.AsyncClient(base_url="http://v", transport=over, timeout=WITHIN))
        place = Place(vespera, gate, app, listeners.url, local, local, stack)
        place.user = await place.by(TOKEN)
        yield place
