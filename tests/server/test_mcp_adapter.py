"""What we lean on in the SDK and it does not promise: each point once, so that an upgrade says what broke."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
from mcp import Client
from mcp.server.lowlevel import Server
from mcp.server.mcpserver import server as sdk
from mcp_types import CallToolResult, TextContent, ToolAnnotations

from vespera_exec.server.mcp.adapter import OwnServer, lowlevel, own_tool


def echoing(seen: list[dict[str, Any]]) -> OwnServer:
    async def answer(arguments: dict[str, Any], context: Any) -> CallToolResult:
        seen.append(arguments)
        await context.report_progress(1, message="half")
        return CallToolResult(
            content=[TextContent(type="text", text="as it goes out")], structured_content={"a": None}, is_error=False
        )

    tool = own_tool(
        answer,
        name="echo",
        title="Echo",
        description="Says it again",
        arguments={"type": "object", "properties": {"a": {"type": "integer"}}},
        output={"type": "object", "properties": {"a": {"type": ["integer", "null"]}}},
        annotations=ToolAnnotations(read_only_hint=True),
    )

    def unknown(name: str) -> CallToolResult:
        return CallToolResult(content=[TextContent(type="text", text=f"what is {name}?")], is_error=True)

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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_what_sets_logging_up_for_other_servers_of_the_process_is_put_back() -> None:
    before, handlers = vars(sdk)["configure_logging"], [*logging.getLogger().handlers]
    echoing([])
    assert vars(sdk)["configure_logging"] is before
    assert logging.getLogger().handlers == handlers
