"""Every MCP transport over real sockets: events in order, progress while a call is open, clients that go."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import orjson
import pytest
from deadlines import WITHIN
from mcp_doors import BEARER, KINDS, ME, OVER_HTTP, Doors, Kind, call, eventually, in_loop, opened, refused, waiting
from mcp_types import CancelledNotification, CancelledNotificationParams

from vespera_exec.app.callers import current_caller
from vespera_exec.app.views import Execute
from vespera_exec.model.principal import Caller
from vespera_exec.server.mcp.http import mcp_over_http

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mcp import Client
    from starlette.types import Receive, Scope, Send

JSON_SSE = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    async with opened(tmp_path, http=True, heartbeat_seconds=0.2) as doors:
        yield doors


async def followed(client: Client, task_id: str, cursor: int = 0, **how: Any) -> list[dict[str, Any]]:
    """Every event up to the end of the run, however many calls it takes."""
    events: list[dict[str, Any]] = []
    with anyio.fail_after(WITHIN):
        while True:
            page = await call(
                client, "stream_task_execution_events", task_id=task_id, cursor=cursor, wait_ms=25_000, **how
            )
            events += page["events"]
            cursor = page["next_cursor"]
            if page["done"]:
                return events


@pytest.mark.parametrize("kind", KINDS)
async def test_events_are_complete_and_in_order(doors: Doors, kind: Kind) -> None:
    async with doors.client(kind) as client, anyio.create_task_group() as group:
        handle = await call(client, "execute_task", title="count", role="gated", inputs={"steps": 40})

        async def open_later() -> None:
            await waiting(doors.vespera, handle["task_id"], "progress_update")
            doors.gate.open.set()

        group.start_soon(open_later)
        events = await followed(client, handle["task_id"], max_events=7, follow=True)
        stored = await doors.vespera.read_events(ME, handle["task_id"], max_events=1000)
        assert events == stored.events
        assert "execution_completed" in [event["type"] for event in events[-3:]]
        assert all(before["cursor"] < after["cursor"] for before, after in pairwise(events))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_reader_that_went_away_goes_on_from_its_cursor(doors: Doors, kind: Kind) -> None:
    async with doors.client(kind) as first:
        handle = await call(first, "execute_task", title="count", role="gated", inputs={"steps": 20})
        await waiting(doors.vespera, handle["task_id"], "progress_update")
        begun = await call(first, "stream_task_execution_events", task_id=handle["task_id"], max_events=5)
        assert len(begun["events"]) == 5
        assert not begun["done"]
    doors.gate.open.set()
    async with doors.client(kind) as second:
        rest = await followed(second, handle["task_id"], begun["next_cursor"])
    stored = await doors.vespera.read_events(ME, handle["task_id"], max_events=1000)
    assert begun["events"] + rest == stored.events


@pytest.mark.parametrize("kind", KINDS)
async def test_progress_arrives_while_the_call_is_open_rises_and_stops_with_it(doors: Doors, kind: Kind) -> None:
    seen: list[tuple[float, str | None]] = []
    heard = anyio.Event()

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, message))
        if progress != int(progress) and message and "step 3" in message:
            heard.set()

    async with doors.client(kind) as client, anyio.create_task_group() as group:

        async def open_after_a_heartbeat() -> None:
            with anyio.fail_after(WITHIN):
                await heard.wait()
            doors.gate.open.set()

        group.start_soon(open_after_a_heartbeat)
        result = await client.call_tool(
            "execute_task",
            {"title": "count", "role": "gated", "inputs": {"steps": 3}, "wait_ms": 25_000},
            progress_callback=on_progress,
        )
        assert result.structured_content is not None
        assert result.structured_content["done"]
        at_the_result = len(seen)
        await call(client, "get_task_execution_status", task_id=result.structured_content["task_id"])
        await call(client, "list_roles")
        assert len(seen) == at_the_result
    assert all(before < after for (before, _), (after, _) in pairwise(seen))
    messages = [message for _, message in seen]
    assert any(message and "step 3" in message for message in messages)
    assert not any(message and "completed" in message.lower() for message in messages)  # the answer says that


@pytest.mark.parametrize("kind", KINDS)
async def test_what_comes_with_the_answer_is_not_announced_beside_it(doors: Doors, kind: Kind) -> None:
    seen: list[float] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        seen.append(progress)

    doors.gate.open.set()
    async with doors.client(kind) as client:
        handle = await call(client, "execute_task", title="count", role="gated", inputs={"steps": 2}, wait_ms=25_000)
        result = await client.call_tool(
            "stream_task_execution_events",
            {"task_id": handle["task_id"], "wait_ms": 25_000, "follow": True},
            progress_callback=on_progress,
        )
    assert result.structured_content is not None
    assert result.structured_content["done"]
    assert result.structured_content["events"]
    # Some clients take a notification for late that arrives together with the answer, and drop the connection.
    assert seen == []


@pytest.mark.parametrize("kind", KINDS)
async def test_another_client_cancels_what_this_one_waits_for(doors: Doors, kind: Kind) -> None:
    async with doors.client(kind) as waiter, doors.client(kind) as other, anyio.create_task_group() as group:
        handle = await call(waiter, "execute_task", title="hold", role="gated")

        async def cancel() -> None:
            await waiting(doors.vespera, handle["task_id"], "execution_started")
            answer = await call(other, "cancel_task_execution", task_id=handle["task_id"])
            assert answer["status"] == "cancelled"

        group.start_soon(cancel)
        with anyio.fail_after(WITHIN):
            events = await followed(waiter, handle["task_id"], follow=True)
        assert "execution_cancelled" in [event["type"] for event in events[-3:]]


@pytest.mark.parametrize("kind", KINDS)
async def test_each_request_is_answered_for_its_own_caller(doors: Doors, kind: Kind) -> None:
    async with doors.client(kind) as client:
        roles = {role["name"]: role["allowed"] for role in (await call(client, "list_roles"))["roles"]}
        assert roles["command"] is (kind not in OVER_HTTP)
        if kind in OVER_HTTP:
            error = await refused(client, "execute_task", title="x", role="command", inputs={"argv": ["true"]})
            assert error["error_code"] == "PERMISSION_DENIED"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_goes_during_a_wait_leaves_nothing_behind(doors: Doors, kind: Kind) -> None:
    async with doors.client(kind) as client:
        handle = await call(client, "execute_task", title="hold", role="gated")
        started = anyio.Event()

        async def on_progress(progress: float, total: float | None, message: str | None) -> None:
            started.set()

        async with anyio.create_task_group() as group:

            async def wait() -> None:
                await client.call_tool(
                    "stream_task_execution_events",
                    {"task_id": handle["task_id"], "wait_ms": 25_000, "follow": True},
                    progress_callback=on_progress,
                )

            group.start_soon(wait)
            with anyio.fail_after(WITHIN):
                await started.wait()
            group.cancel_scope.cancel()
        again = await call(client, "get_task_execution_status", task_id=handle["task_id"])
        assert again["executing"]
    await eventually(lambda: followers(doors) == 0)
    doors.gate.open.set()


@pytest.mark.parametrize("kind", OVER_HTTP)
async def test_a_client_that_dies_during_a_wait_leaves_nothing_behind(doors: Doors, kind: Kind) -> None:
    handle = await doors.vespera.execute_task(ME, Execute(title="hold", role="gated"))
    heard = anyio.Event()

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        heard.set()

    async with anyio.create_task_group() as group:

        async def wait() -> None:
            async with doors.client(kind) as client:
                await client.call_tool(
                    "stream_task_execution_events",
                    {"task_id": handle.task_id, "wait_ms": 2000, "follow": True},
                    progress_callback=on_progress,
                )

        group.start_soon(wait)
        with anyio.fail_after(WITHIN):
            await heard.wait()
        await eventually(lambda: followers(doors) > 0)
        group.cancel_scope.cancel()
    # The stateful transport does not notice; there the wait ends by itself.
    await eventually(lambda: followers(doors) == 0)
    doors.gate.open.set()


@pytest.mark.parametrize("kind", ["memory-legacy", "http-legacy", "sse"])
async def test_a_cancel_for_a_call_that_has_ended_is_ignored(doors: Doors, kind: Kind) -> None:
    """opencode sends one after each call."""
    async with doors.client(kind) as client:
        await call(client, "list_tasks")
        for number in range(5):
            await client.session.send_notification(
                CancelledNotification(params=CancelledNotificationParams(request_id=number, reason="over"))
            )
        assert (await call(client, "list_tasks"))["total"] == 0


def followers(doors: Doors) -> int:
    return doors.vespera._store.feed.followers()  # pyright: ignore[reportPrivateUsage]


async def test_one_server_serves_every_transport_at_once(doors: Doors) -> None:
    doors.gate.open.set()
    done: list[str] = []

    async def use(kind: Kind) -> None:
        async with doors.client(kind) as client:
            for _ in range(3):
                handle = await call(client, "execute_task", title=kind, role="gated", wait_ms=25_000)
                done.append(handle["status"])

    async with anyio.create_task_group() as group:
        for kind in KINDS:
            group.start_soon(use, kind)
    assert done == ["completed"] * 3 * len(KINDS)


async def test_a_burst_of_progress_reaches_the_reader_whole(doors: Doors) -> None:
    async def burst(context: Any) -> None:
        for step in range(300):
            context.log(f"line {step}")

    doors.vespera.roles.add(in_loop(burst, "burst"))
    async with doors.client("http-modern") as client:
        handle = await call(client, "execute_task", title="burst", role="burst")
        events = await followed(client, handle["task_id"], follow=True)
    lines = [event["message"] for event in events if event["message"].startswith("line ")]
    assert lines == [f"line {step}" for step in range(300)]


@pytest.mark.promise("malformed")
async def test_garbage_over_http_is_refused_and_the_door_stays_open(doors: Doors) -> None:
    bodies = [b"", b"{", b"[]", b"null", b"1", b'{"jsonrpc":"1.0"}', b'{"jsonrpc":"2.0","id":1}', b"\xff\xfe"]
    bodies += [b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":' + b"[" * 5000]
    async with httpx.AsyncClient(base_url=doors.url or "", headers=BEARER, trust_env=False, timeout=WITHIN) as http:
        for body in bodies:
            for path in ("/mcp", "/messages/?session_id=" + "0" * 32, "/messages/?session_id=x", "/messages/"):
                answer = await http.post(path, content=body, headers=JSON_SSE)
                assert 400 <= answer.status_code < 500, (path, body, answer.text)
                assert "Traceback" not in answer.text
    async with doors.client("http-legacy") as client:
        assert (await call(client, "list_tasks"))["total"] == 0


@pytest.mark.promise("tcp_denies")
@pytest.mark.parametrize("path", ["/mcp", "/sse", "/messages/"])
async def test_no_transport_opens_without_the_token(doors: Doors, path: str) -> None:
    async with httpx.AsyncClient(base_url=doors.url or "", trust_env=False, timeout=WITHIN) as http:
        for method in ("GET", "POST", "DELETE"):
            answer = await http.request(method, path, headers=JSON_SSE, content=b"{}")
            assert answer.status_code == 401


async def test_a_session_belongs_to_who_opened_it(tmp_path: Path) -> None:
    """Two principals before one MCP door: the session of the one does not exist for the other."""
    hello = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-11-25",
            "capabilities": {},
            "clientInfo": {"name": "t", "version": "0"},
        },
    }
    async with opened(tmp_path) as doors, mcp_over_http(doors.server) as app:

        async def named(scope: Scope, receive: Receive, send: Send) -> None:
            name = dict(scope["headers"])[b"x-name"].decode()
            reset = current_caller.set(Caller(principal=name, over_tcp=True))
            try:
                await app(scope, receive, send)
            finally:
                current_caller.reset(reset)

        transport = httpx.ASGITransport(app=named)
        async with httpx.AsyncClient(transport=transport, base_url="http://door", headers=JSON_SSE) as http:
            opened_by_ann = await http.post("/mcp", json=hello, headers={"x-name": "ann"})
            assert opened_by_ann.status_code == 200
            session = {"mcp-session-id": opened_by_ann.headers["mcp-session-id"]}
            ping = {"jsonrpc": "2.0", "id": 2, "method": "ping"}
            theirs = await http.post("/mcp", json=ping, headers={"x-name": "bob", **session})
            assert theirs.status_code == 404
            own = await http.post("/mcp", json=ping, headers={"x-name": "ann", **session})
            assert own.status_code == 200


async def test_open_streams_do_not_hold_up_the_end(tmp_path: Path) -> None:
    with anyio.fail_after(WITHIN):
        async with httpx.AsyncClient(headers=BEARER, trust_env=False, timeout=WITHIN) as http:
            async with opened(tmp_path, http=True) as doors:
                request = http.build_request("GET", f"{doors.url}/sse")
                stream = await http.send(request, stream=True)
                chunks = stream.aiter_bytes()
                assert b"/messages/?session_id=" in await anext(chunks)
            assert b"".join([chunk async for chunk in chunks]) == b""


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        (b'{"path":"a\\u0000b"}', "NUL"),
        (b'{"path":NaN}', "not finite"),
        (b'"{\\"path\\":\\"\\\\ud800\\"}"', "surrogate"),
    ],
)
async def test_arguments_that_json_should_not_hold_are_refused_over_http(
    doors: Doors, inputs: bytes, complaint: str
) -> None:
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": "t", "version": "0"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    call_of = {"name": "execute_task", "arguments": {"title": "t", "role": "gated", "inputs": "?"}, "_meta": meta}
    body = orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call_of})
    modern = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": "execute_task"}
    async with httpx.AsyncClient(base_url=doors.url or "", headers=BEARER, trust_env=False, timeout=WITHIN) as http:
        answer = await http.post("/mcp", content=body.replace(b'"?"', inputs), headers=JSON_SSE | modern)
    assert answer.status_code == 200, answer.text
    data = next((line[5:] for line in answer.text.splitlines() if line.startswith("data:")), answer.text)
    result = orjson.loads(data)["result"]
    assert result["isError"]
    assert result["structuredContent"]["error_code"] == "INVALID_INPUT"
    assert complaint in result["structuredContent"]["error"]


async def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(doors: Doors) -> None:
    body = b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":[' + b"0," * 1_000_000 + b"0]}}"
    async with httpx.AsyncClient(base_url=doors.url or "", headers=BEARER, trust_env=False, timeout=WITHIN) as http:
        for path in ("/mcp", "/messages/?session_id=" + "0" * 32, "/v1/tasks"):
            answer = await http.post(path, content=body, headers=JSON_SSE)
            assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_INPUT")
            assert "50000" in answer.json()["detail"]
