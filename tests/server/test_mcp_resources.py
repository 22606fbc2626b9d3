"""What an agent reads by URI: roles, a task, the last lines of its log; by both generations of the protocol."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import orjson
import pytest
from deadlines import WITHIN
from mcp.shared.exceptions import MCPError
from mcp.shared.subscriptions import ResourceUpdated
from mcp_doors import IN_MEMORY, ME, Doors, Kind, call, in_loop, opened, waiting
from mcp_types import INVALID_PARAMS, TextResourceContents

from vespera_exec.app.callers import current_caller
from vespera_exec.app.views import Execute
from vespera_exec.server.mcp.resources import LAST_EVENTS, task_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator
    from pathlib import Path

    from mcp import Client

    from vespera_exec.model.principal import Caller

ALICE = replace(
    ME, principal="token:alice", scopes=frozenset({"read", "operate"}), over_tcp=True, sees_only="token:alice"
)
BOB = replace(ALICE, principal="token:bob", sees_only="token:bob")


@contextmanager
def asking(caller: Caller) -> Generator[None]:
    """Requests that are made inside come from this caller."""
    reset = current_caller.set(caller)
    try:
        yield
    finally:
        current_caller.reset(reset)


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    async with opened(tmp_path) as doors:
        yield doors


async def read(client: Client, uri: str) -> dict[str, Any]:
    (content,) = (await client.read_resource(uri)).contents
    assert isinstance(content, TextResourceContents)
    assert (content.uri, content.mime_type) == (uri, "application/json")
    return orjson.loads(content.text)


def types_of(log: dict[str, Any]) -> set[str]:
    return {event["type"] for event in log["events"]}


async def not_there(client: Client, uri: str) -> MCPError:
    with pytest.raises(MCPError) as caught:
        await client.read_resource(uri)
    assert caught.value.code == INVALID_PARAMS
    return caught.value


@pytest.mark.parametrize("kind", IN_MEMORY)
async def test_what_can_be_read_is_listed(doors: Doors, kind: Kind) -> None:
    async with doors.client(kind) as client:
        listed = {resource.uri: resource for resource in (await client.list_resources()).resources}
        templates = (await client.list_resource_templates()).resource_templates
        roles = await read(client, "vespera://roles")
    assert set(listed) == {"vespera://roles", "ui://vespera/task.html"}
    assert [template.uri_template for template in templates] == ["vespera://tasks/{id}", "vespera://tasks/{id}/events"]
    assert all(template.title and template.description for template in templates)
    assert "gated" in {role["name"] for role in roles["roles"]}


@pytest.mark.parametrize("kind", IN_MEMORY)
async def test_a_task_is_read_while_it_runs_and_with_its_result_when_it_is_done(doors: Doors, kind: Kind) -> None:
    async with doors.client(kind) as client:
        started = await call(client, "execute_task", title="Count", role="gated", inputs={"steps": 3})
        uri = f"vespera://tasks/{started['task_id']}"
        running = await read(client, uri)
        assert (running["title"], running["done"]) == ("Count", False)
        assert "result" not in running
        doors.gate.open.set()
        await waiting(doors.vespera, started["task_id"], "execution_completed")
        await call(client, "stream_task_execution_events", task_id=started["task_id"], wait_ms=25_000, follow=True)
        ended = await read(client, uri)
        log = await read(client, ended["events"])
    assert (ended["status"], ended["done"]) == ("completed", True)
    assert ended["result"] == {"steps": 3, "nothing": None}
    assert ended["result_truncated"] is False
    assert log["done"] is True
    assert "execution_completed" in types_of(log)
    assert log["next_cursor"] == log["events"][-1]["cursor"]
    assert f"cursor {log['next_cursor']}" in log["more"]


async def test_a_task_that_waits_for_somebody_shows_its_questions(doors: Doors) -> None:
    async def asks(context: Any) -> None:
        context.ask("deploy", message="Deploy build 7?")

    doors.vespera.roles.add(in_loop(asks, "asks"))
    async with doors.client("memory-modern") as client:
        started = await call(client, "execute_task", title="Deploy", role="asks")
        await waiting(doors.vespera, started["task_id"], "execution_paused")
        parked = await read(client, f"vespera://tasks/{started['task_id']}")
    assert [(asked["key"], asked["message"]) for asked in parked["inputs"]] == [("deploy", "Deploy build 7?")]


async def test_a_long_log_shows_its_end_and_a_large_result_its_beginning(doors: Doors) -> None:
    async def chatter(context: Any) -> str:
        for step in range(2 * LAST_EVENTS):
            context.checkpoint({"step": step, "filling": "x" * 2000})
        return "y" * 50_000

    doors.vespera.roles.add(in_loop(chatter, "chatter"))
    async with doors.client("memory-modern") as client:
        done = await call(client, "execute_task", title="Talk", role="chatter", wait_ms=25_000)
        assert done["done"] is True
        log = await read(client, f"vespera://tasks/{done['task_id']}/events")
        task = await read(client, f"vespera://tasks/{done['task_id']}")
    assert 1 < len(log["events"]) <= LAST_EVENTS
    assert len(orjson.dumps(log)) < 45_000
    assert "execution_completed" in types_of(log)
    assert "execution_started" not in types_of(log)
    assert task["result_truncated"] is True
    assert task["result"].startswith('"yyy')
    assert len(task["result"]) == 2000


@pytest.mark.parametrize("kind", IN_MEMORY)
async def test_what_is_not_there_is_an_invalid_parameter_that_says_why(doors: Doors, kind: Kind) -> None:
    async with doors.client(kind) as client:
        unknown = await not_there(client, "vespera://tasks/no-such-task-anywhere")
        await not_there(client, "vespera://tasks/no-such-task-anywhere/events")
        await not_there(client, "vespera://nothing")
        await not_there(client, "vespera://tasks/..%2F..%2Fetc")
    assert "no-such-task-anywhere" in unknown.message
    assert unknown.data == {"error_code": "TASK_NOT_FOUND", "uri": "vespera://tasks/no-such-task-anywhere"}


async def test_a_task_of_somebody_else_is_not_there(doors: Doors) -> None:
    doors.gate.open.set()
    hers = await doors.vespera.execute_task(ALICE, Execute(title="Secret plan", role="gated", wait_ms=25_000))
    uri = f"vespera://tasks/{hers.task_id}"
    async with doors.client("memory-modern") as client:
        with asking(ALICE):
            assert (await read(client, uri))["title"] == "Secret plan"
        with asking(BOB):
            for each in (uri, f"{uri}/events", uri[:-20]):
                assert "Secret" not in (await not_there(client, each)).message
        with asking(replace(BOB, scopes=frozenset())):
            assert "scope" in (await not_there(client, "vespera://roles")).message


@pytest.mark.parametrize("kind", IN_MEMORY)
async def test_the_tools_that_show_a_task_name_the_card_and_a_host_can_read_it(doors: Doors, kind: Kind) -> None:
    async with doors.client(kind) as client:
        tools = (await client.list_tools()).tools
        (card,) = (await client.read_resource("ui://vespera/task.html")).contents
        listed = {resource.uri: resource for resource in (await client.list_resources()).resources}
        extensions = client.server_capabilities.extensions
    shown = {tool.name for tool in tools if (tool.meta or {}).get("ui") == {"resourceUri": "ui://vespera/task.html"}}
    assert shown == {"execute_task", "execute_plan", "get_task_execution_status"}
    assert isinstance(card, TextResourceContents)
    assert card.mime_type == listed[card.uri].mime_type == "text/html;profile=mcp-app"
    assert len(card.text.encode()) < 30_000
    assert not re.search(r"https?://|//[a-z]", card.text), "it loads nothing from anywhere"
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|\beval\b", card.text), "what comes in stays text"
    assert kind == "memory-legacy" or "io.modelcontextprotocol/ui" in (extensions or {})


async def test_who_listens_hears_of_news_of_what_he_sees_and_seldom_enough(doors: Doors) -> None:
    async def busy(context: Any) -> None:
        for step in range(1, 41):
            context.progress(step)
            await anyio.sleep(0.005)
        await doors.gate.open.wait()

    doors.vespera.roles.add(in_loop(busy, "busy"))
    heard: list[float] = []
    async with doors.client("memory-modern") as client, AsyncExitStack() as stack:
        with asking(ALICE):
            started = await call(client, "execute_task", title="Busy", role="busy")
            uri, began = f"vespera://tasks/{started['task_id']}", anyio.current_time()
            hers = await stack.enter_async_context(client.listen(resource_subscriptions=[uri]))
        with asking(BOB):
            his = await stack.enter_async_context(client.listen(resource_subscriptions=[uri]))
        # Forty reports in 0.2 s, and then silence.
        with anyio.fail_after(WITHIN):
            assert await anext(aiter(hers)) == ResourceUpdated(uri=uri)
            heard.append(anyio.current_time())
        with anyio.move_on_after(1):
            async for news in hers:
                assert news == ResourceUpdated(uri=uri)
                heard.append(anyio.current_time())
        doors.gate.open.set()
        with anyio.fail_after(WITHIN):
            assert await anext(aiter(hers)) == ResourceUpdated(uri=uri)
        with anyio.move_on_after(0.3):
            pytest.fail(f"he was told {await anext(aiter(his))}")
    # However late they are heard: so many cannot have been said since it was agreed to.
    assert len(heard) <= 1 + (heard[-1] - began) / 0.19


def test_the_id_in_a_uri() -> None:
    assert task_of("vespera://tasks/abc") == "abc"
    assert task_of("vespera://tasks/abc/events") == "abc"
    for other in (
        "vespera://roles",
        "vespera://tasks/",
        "vespera://tasks//events",
        "vespera://tasks/a/b",
        "x://tasks/a",
    ):
        assert task_of(other) is None
    assert task_of("vespera://tasks/abc/") is None
