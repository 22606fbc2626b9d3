"""What we lean on in the SDK and it does not promise: each point once, so that an upgrade says what broke."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from typing import Any, Literal

import anyio
import httpx
import pytest
from deadlines import WITHIN
from mcp import Client
from mcp.client.extension import ClientExtension, NotificationBinding, ResultClaim
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.extension import Extension
from mcp.server.lowlevel import Server
from mcp.server.mcpserver import server as sdk
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.subscriptions import SUBSCRIPTION_ID_META_KEY
from mcp_types import CallToolResult, ElicitResult, Result, TextContent, ToolAnnotations
from pydantic import BaseModel, ConfigDict

from vespera_exec.server.mcp.adapter import (
    ListenSession,
    OwnServer,
    elicit,
    end_session,
    lowlevel,
    notify,
    own_tool,
)


def unknown(name: str) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=f"what is {name}?")], is_error=True)


def echoing(seen: list[dict[str, Any]], *, answer: Any = None) -> OwnServer:
    async def echo(arguments: dict[str, Any], context: Any) -> CallToolResult:
        seen.append(arguments)
        await context.report_progress(1, message="half")
        return CallToolResult(
            content=[TextContent(type="text", text="as it goes out")], structured_content={"a": None}, is_error=False
        )

    tool = own_tool(
        answer or echo,
        name="echo",
        title="Echo",
        description="Says it again",
        arguments={"type": "object", "properties": {"a": {"type": "integer"}}},
        output={"type": "object", "properties": {"a": {"type": ["integer", "null"]}}},
        annotations=ToolAnnotations(read_only_hint=True),
    )

    return OwnServer(name="test", tools=[tool], unknown_tool=unknown)


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
async def test_arguments_come_as_they_were_sent_and_results_go_as_they_were_made(mode: str) -> None:
    seen: list[dict[str, Any]] = []
    said: list[str | None] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        said.append(message)

    async with Client(echoing(seen), mode=mode) as client:
        given = {"a": "not a number", "unknown": {"deep": [1]}}
        result = await client.call_tool("echo", given, progress_callback=on_progress)
    assert seen == [given]
    assert result.structured_content == {"a": None}
    assert [content.text for content in result.content if isinstance(content, TextContent)] == ["as it goes out"]
    assert said == ["half"]


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
async def test_the_schemas_are_listed_as_they_were_given(mode: str) -> None:
    async with Client(echoing([]), mode=mode) as client:
        (tool,) = (await client.list_tools()).tools
    assert tool.input_schema == {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert tool.output_schema == {"type": "object", "properties": {"a": {"type": ["integer", "null"]}}}
    assert tool.annotations is not None
    assert tool.annotations.read_only_hint is True


async def test_an_unknown_tool_is_answered_by_us() -> None:
    async with Client(echoing([]), mode="legacy") as client:
        result = await client.call_tool("other", {})
    assert result.is_error
    assert [content.text for content in result.content if isinstance(content, TextContent)] == ["what is other?"]


async def test_the_server_for_single_connections_is_there_and_serves() -> None:
    low = lowlevel(echoing([]))
    assert isinstance(low, Server)
    async with Client(low, mode="legacy") as first, Client(low, mode="legacy") as second:
        assert (await first.list_tools()).tools == (await second.list_tools()).tools


def test_a_server_is_made_without_rich_and_without_a_word_on_the_root_logger() -> None:
    script = (
        "import logging, sys; from vespera_exec.server.mcp.adapter import OwnServer\n"
        "OwnServer(name='test', tools=[], unknown_tool=print)\n"
        "sys.exit(f'{logging.getLogger().handlers}' if 'rich' in sys.modules or logging.getLogger().handlers else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=WITHIN)
    assert done.returncode == 0, done.stderr


def test_what_sets_logging_up_for_other_servers_of_the_process_is_put_back() -> None:
    before, handlers = vars(sdk)["configure_logging"], [*logging.getLogger().handlers]
    echoing([])
    assert vars(sdk)["configure_logging"] is before
    assert logging.getLogger().handlers == handlers


def test_models_of_the_wire_are_built_with_their_first_message_and_all_can_be() -> None:
    program = """
from vespera_exec.server.mcp.door import import_mcp
import_mcp()
from mcp_types import methods
from mcp_types._wire_base import WireModel

def all_of(model):
    for each in model.__subclasses__():
        yield each
        yield from all_of(each)

models = set(all_of(WireModel))
print(len(models) > 200, any(each.__pydantic_complete__ for each in models))
call = {"name": "status", "arguments": {"deep": [1, None]}}
print(methods.parse_client_request("tools/call", "2025-06-18", call).params.arguments)
answer = {"tools": [{"name": "status", "inputSchema": {"type": "object"}, "unknown": 1}]}
print(methods.serialize_server_result("tools/list", "2025-06-18", answer))
print(all(each.model_rebuild() is not False for each in models), all(each.__pydantic_complete__ for each in models))
"""
    said = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.splitlines() == [
        "True False",
        "{'deep': [1, None]}",
        "{'tools': [{'inputSchema': {'type': 'object'}, 'name': 'status'}]}",
        "True True",
    ]


async def test_a_listen_stream_can_be_agreed_to_more_than_the_sdk_knows_and_carry_it() -> None:
    """Middleware around the SDK's handler, whose acknowledgement goes through the session that it is given."""
    server = echoing([])

    async def beside(ctx: Any, call_next: Any) -> Any:
        if ctx.method != "subscriptions/listen":
            return await call_next(ctx)
        acknowledged = anyio.Event()
        async with anyio.create_task_group() as group:

            async def tell() -> None:
                await acknowledged.wait()
                await notify(ctx, "notifications/ours", {"null": None, "_meta": {SUBSCRIPTION_ID_META_KEY: 7}})

            group.start_soon(tell)
            session: Any = ListenSession(ctx.session, {"ours": ["a"]}, acknowledged.set)
            return await call_next(replace(ctx, session=session))

    server.middleware.append(beside)
    told: list[dict[str, Any]] = []
    heard = anyio.Event()

    class Ours(BaseModel):
        model_config = ConfigDict(extra="allow")

    async def take(params: Ours) -> None:
        told.append(params.model_dump())
        heard.set()

    class Binding(ClientExtension):
        identifier = "test/ours"

        def notifications(self) -> list[NotificationBinding[Any]]:
            return [NotificationBinding(method="notifications/ours", params_type=Ours, handler=take)]

    async with Client(server, extensions=[Binding()]) as client, client.listen(tools_list_changed=True) as stream:
        assert stream.honored.model_dump(exclude_none=True) == {"tools_list_changed": True, "ours": ["a"]}
        with anyio.fail_after(WITHIN):
            await heard.wait()
    assert told[0]["null"] is None


async def test_a_result_of_a_kind_of_its_own_goes_out_as_it_is_with_its_nulls() -> None:
    class Making(Extension):
        identifier = "test/making"

        async def intercept_tool_call(self, params: Any, ctx: Any, call_next: Any) -> Any:
            return {"resultType": "made", "ttl": None}

    class Made(Result):
        model_config = ConfigDict(extra="allow")
        result_type: Literal["made"] = "made"

    async def resolve(made: Made, context: Any) -> CallToolResult:
        return CallToolResult(content=[], structured_content=made.model_dump())

    class Taking(ClientExtension):
        identifier = "test/making"

        def claims(self) -> list[ResultClaim[Any]]:
            return [ResultClaim(result_type="made", model=Made, resolve=resolve)]

    server = OwnServer(name="test", tools=[], unknown_tool=unknown, extensions=[Making()])
    async with Client(server, extensions=[Taking()]) as client:
        result = await client.call_tool("any", {})
    assert result.structured_content is not None
    assert result.structured_content["ttl"] is None


async def test_a_dialog_has_an_id_that_was_never_used_before() -> None:
    ids, actions = list[Any](), list[str]()

    async def ask(arguments: dict[str, Any], context: Any) -> CallToolResult:
        replies = [await elicit(context.session, "Name?", {"type": "object", "properties": {}}) for _ in range(2)]
        actions.extend(reply.action for reply in replies)
        return CallToolResult(content=[], structured_content={})

    async def on_elicit(context: Any, params: Any) -> ElicitResult:
        ids.append(context.request_id)
        return ElicitResult(action="decline")

    for _ in range(2):
        async with Client(echoing([], answer=ask), mode="legacy", elicitation_callback=on_elicit) as client:
            await client.call_tool("echo", {})
    assert len(set(ids)) == 4
    assert actions == ["decline"] * 4


async def test_a_session_of_the_streamable_transport_can_be_ended_for_who_opened_it() -> None:
    ann, bob = (AuthenticatedUser(AccessToken(token="", client_id=name, scopes=[])) for name in ("ann", "bob"))
    manager = StreamableHTTPSessionManager(lowlevel(echoing([])))
    hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "0"}}
    both = {"Accept": "application/json, text/event-stream"}

    async def door(scope: Any, receive: Any, send: Any) -> None:
        await manager.handle_request({**scope, "user": ann}, receive, send)

    async def ask(method: str, **headers: str) -> httpx.Response:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": hello if method == "initialize" else {}}
        return await http.post("/mcp", json=body, headers=both | headers)

    transport = httpx.ASGITransport(app=door)
    async with manager.run(), httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:80") as http:
        session = (await ask("initialize")).headers["mcp-session-id"]
        await end_session(manager, "no-such-session", ann)
        await end_session(manager, session, bob)
        assert (await ask("ping", **{"mcp-session-id": session})).status_code == 200
        await end_session(manager, session, ann)
        assert (await ask("ping", **{"mcp-session-id": session})).status_code == 404
