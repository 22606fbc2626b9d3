"""A host with MCP Apps in a real browser: the card in a sandboxed frame, its calls handed on to a server."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chromium import browser
from mcp_types import TextResourceContents

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from chromium import Browser, Target
    from mcp import Client
    from mcp_types import CallToolResult

CARD = "ui://vespera/task.html"
CSP = "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
"""What the specification has a host enforce where a card declares no domains."""

_PAGE = """<!doctype html><meta charset="utf-8"><style>body { margin: 16px; background: #f7f7f5 }
body.dark { background: #161615 } iframe { width: 460px; height: 60px; border: 1px solid #8884; border-radius: 10px }
</style><iframe id="view" sandbox="allow-scripts"></iframe><script>
const view = document.getElementById("view"), heard = [];
let given = {};
function tell(message) { view.contentWindow.postMessage({ jsonrpc: "2.0", ...message }, "*") }
function show(everything) {
  given = everything;
  heard.length = 0;
  document.body.className = given.context.theme;
  view.srcdoc = given.html;
}
addEventListener("message", ({ source, data }) => {
  if (source !== view.contentWindow) return;
  heard.push(data);
  const { id, method, params } = data;
  if (method === "ui/initialize") tell({ id, result: { protocolVersion: params.protocolVersion,
    hostInfo: { name: "test", version: "1" }, hostCapabilities: given.capabilities, hostContext: given.context } });
  if (method === "ui/notifications/initialized") {
    tell({ method: "ui/notifications/tool-input", params: { arguments: given.input } });
    if (given.result) tell({ method: "ui/notifications/tool-result", params: given.result });
  }
  if (method === "ui/notifications/size-changed") view.style.height = params.height + "px";
  if (method === "tools/call") callTool(JSON.stringify({ id, params }));
});
</script>"""


@dataclass
class Host:
    """`calls` are the tools that the card has called, in order."""

    browser: Browser
    client: Client
    page: Target
    calls: list[str] = field(default_factory=list[str])

    async def show(
        self,
        result: CallToolResult | None,
        *,
        given: dict[str, Any] | None = None,
        theme: str = "light",
        proxies: bool = True,
    ) -> Target:
        """The frame of a new card, which has been told what was asked and what was answered.

        `proxies`: whether the host hands calls of tools on.
        """
        (content,) = (await self.client.read_resource(CARD)).contents
        assert isinstance(content, TextResourceContents)
        assert content.mime_type == "text/html;profile=mcp-app"
        policy = f'<head><meta http-equiv="Content-Security-Policy" content="{CSP}">'
        everything: dict[str, Any] = {
            "html": content.text.replace("<head>", policy, 1),
            "input": given or {},
            "result": result and result.model_dump(mode="json", by_alias=True, exclude_none=True),
            "context": {"theme": theme},
            "capabilities": {"serverTools": {}} if proxies else {},
        }
        await self.page.evaluate(f"show({json.dumps(everything)})")
        await self.page.until("heard.some(({ method }) => method === 'ui/notifications/initialized')")
        return await self.browser.frame()

    async def call_tool(self, payload: str) -> None:
        asked = json.loads(payload)
        self.calls.append(asked["params"]["name"])
        result = await self.client.call_tool(asked["params"]["name"], asked["params"]["arguments"])
        answer = {"id": asked["id"], "result": result.model_dump(mode="json", by_alias=True, exclude_none=True)}
        await self.page.evaluate(f"tell({json.dumps(answer)})")

    def requested(self) -> list[str]:
        """The addresses of what any document asked the network for."""
        sent = (event for event in self.browser.events if event["method"] == "Network.requestWillBeSent")
        addresses = [event["params"]["request"]["url"] for event in sent]
        return [address for address in addresses if not address.startswith(("about:", "data:"))]

    def complaints(self) -> list[Any]:
        """Errors of scripts, and what the policy has stopped."""
        named = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.browser.events if event["method"] in named]


@asynccontextmanager
async def hosting(path: str, folder: Path, client: Client) -> AsyncGenerator[Host]:
    async with browser(path, folder) as chromium:
        page = await chromium.page(_PAGE)
        host = Host(chromium, client, page)
        chromium.bindings["callTool"] = host.call_tool
        await page.tell("Runtime.addBinding", name="callTool")
        yield host
