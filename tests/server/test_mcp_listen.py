"""`subscriptions/listen` with `taskIds`, over HTTP and over stdio: the state of tasks as it changes, and only that."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import orjson
import pytest
from daemon_place import Place
from deadlines import WITHIN
from mcp_doors import ME, TOKEN, Doors, eventually, in_loop, opened
from task_peers import (
    KNOWS_TASKS,
    TASKS,
    VERSION,
    WAYS,
    Peer,
    Refused,
    Way,
    connected,
    enveloped,
    execute,
    settled,
)

from vespera_exec.app.views import Execute
from vespera_exec.model.principal import Caller
from vespera_exec.server.mcp.listening import Listening, close_streams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from echo_place import Client as Bridge

INVALID_PARAMS, MISSING_CAPABILITY = -32602, -32021
SUBSCRIPTION = "io.modelcontextprotocol/subscriptionId"
SERVER = "io.modelcontextprotocol/serverInfo"


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    async with opened(tmp_path, http=True) as doors:
        yield doors


@pytest.fixture(params=WAYS)
async def peer(doors: Doors, request: pytest.FixtureRequest) -> AsyncIterator[Peer]:
    way: Way = request.param
    async with connected(doors, way) as peer:
        yield peer


async def heard(stream: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    """The params of the next `notifications/tasks`; nothing else may come before it."""
    with anyio.fail_after(WITHIN):
        message = await anext(stream)
    assert message["method"] == "notifications/tasks"
    return message["params"]


async def acknowledged(stream: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    """What the first message on a stream says has been agreed."""
    with anyio.fail_after(WITHIN):
        message = await anext(stream)
    assert message["method"] == "notifications/subscriptions/acknowledged"
    assert message["params"]["_meta"][SUBSCRIPTION]
    return message["params"]["notifications"]


def said(task: dict[str, Any]) -> dict[str, Any]:
    """A task without what differs between an answer and a notification by its nature."""
    meta = {key: value for key, value in task["_meta"].items() if key not in (SUBSCRIPTION, SERVER)}
    return {**{key: value for key, value in task.items() if key != "resultType"}, "_meta": meta}


async def test_the_state_comes_at_once_and_at_the_end_what_get_says(doors: Doors, peer: Peer) -> None:
    made = await execute(peer, title="hold", role="gated")
    async with peer.listen(taskIds=[made["taskId"], "no-such-task", made["taskId"]]) as stream:
        assert (await acknowledged(stream))["taskIds"] == [made["taskId"]]
        task = await heard(stream)
        assert (task["taskId"], task["status"]) == (made["taskId"], "working")
        doors.gate.open.set()
        while task["status"] == "working":
            task = await heard(stream)
        assert said(task) == said(await peer.request("tasks/get", taskId=made["taskId"]))
        assert task["result"]["structuredContent"]["done"]


async def test_a_task_that_has_ended_is_told_once_and_the_stream_stays(doors: Doors, peer: Peer) -> None:
    doors.gate.open.set()
    ended = await execute(peer, title="brief", role="gated")
    await settled(peer, ended["taskId"])
    doors.gate.open = anyio.Event()
    running = await execute(peer, title="hold", role="gated")
    async with peer.listen(taskIds=[ended["taskId"], running["taskId"]]) as stream:
        await acknowledged(stream)
        first = {(await heard(stream))["taskId"] for _ in range(2)}
        assert first == {ended["taskId"], running["taskId"]}
        await peer.request("tasks/cancel", taskId=running["taskId"])
        told = await heard(stream)
        while told["status"] == "working":
            told = await heard(stream)
        assert (told["taskId"], told["status"]) == (running["taskId"], "cancelled")
        with anyio.move_on_after(0.3):
            raise AssertionError(await anext(stream))


async def test_progress_is_told_now_and_then_the_last_of_it_always(doors: Doors, peer: Peer) -> None:
    async def busy(context: Any) -> None:
        for step in range(1, 101):
            context.progress(step * 0.9, f"step {step}")
            await anyio.sleep(0.006)
        await doors.gate.open.wait()

    doors.vespera.roles.add(in_loop(busy, "busy"))
    made = await execute(peer, title="busy", role="busy")
    told: list[dict[str, Any]] = []
    began = anyio.current_time()
    async with peer.listen(taskIds=[made["taskId"]]) as stream:
        await acknowledged(stream)
        while not told or "step 100" not in told[-1]["statusMessage"]:
            told.append(await heard(stream))
        took = anyio.current_time() - began
        doors.gate.open.set()
        end = await heard(stream)
        while end["status"] == "working":
            end = await heard(stream)
    # However late they are heard: so many cannot have been said in this time.
    assert len(told) <= 1 + took / 0.19
    percentages = [task["_meta"]["vespera-exec/progress"]["percentage"] for task in told]
    assert percentages == sorted(percentages)
    assert end["status"] == "completed"


def listening_of(doors: Doors) -> Listening:
    (listening,) = (each for each in doors.server.middleware if isinstance(each, Listening))
    return listening


async def test_a_question_and_the_end_do_not_wait_for_their_turn(doors: Doors, peer: Peer) -> None:
    listening_of(doors)._every_seconds = 3600.0  # pyright: ignore[reportPrivateUsage]

    async def asking(context: Any) -> str:
        context.progress(50, "half")
        return context.ask("sure", "Are you sure?").action

    doors.vespera.roles.add(in_loop(asking, "asking"))
    made = await execute(peer, title="ask", role="asking")
    async with peer.listen(taskIds=[made["taskId"]]) as stream:
        await acknowledged(stream)
        task = await heard(stream)
        while task["status"] == "working":
            task = await heard(stream)
        assert task["status"] == "input_required"
        assert list(task["inputRequests"]) == ["sure"]
        await peer.request("tasks/update", taskId=made["taskId"], inputResponses={"sure": {"action": "decline"}})
        while task["status"] != "completed":
            task = await heard(stream)
        assert task["result"]["structuredContent"]["result"] == "decline"


async def test_only_tasks_are_told_on_it(doors: Doors, peer: Peer) -> None:
    async def talking(context: Any) -> None:
        for step in range(20):
            context.log(f"line {step}")
            context.progress(step, f"step {step}")
        await doors.gate.open.wait()

    doors.vespera.roles.add(in_loop(talking, "talking"))
    made = await execute(peer, title="talk", role="talking")
    methods: set[str] = set()
    async with peer.listen(taskIds=[made["taskId"]], toolsListChanged=True) as stream:
        assert (await acknowledged(stream))["toolsListChanged"] is True
        doors.gate.open.set()
        with anyio.fail_after(WITHIN):
            async for message in stream:
                methods.add(message["method"])
                if message["params"]["status"] == "completed":
                    break
    assert methods == {"notifications/tasks"}


async def test_two_streams_of_one_client_are_told_apart(doors: Doors, peer: Peer) -> None:
    one = await execute(peer, title="one", role="gated")
    two = await execute(peer, title="two", role="gated")
    async with (
        peer.listen(taskIds=[one["taskId"]]) as first,
        peer.listen(taskIds=[two["taskId"], one["taskId"]]) as second,
    ):
        await acknowledged(first)
        await acknowledged(second)
        own = await heard(first)
        others = [await heard(second), await heard(second)]
        assert own["taskId"] == one["taskId"]
        assert {each["taskId"] for each in others} == {one["taskId"], two["taskId"]}
        assert {each["_meta"][SUBSCRIPTION] for each in others}.isdisjoint({own["_meta"][SUBSCRIPTION]})
    doors.gate.open.set()


async def test_a_resource_that_shows_a_task_is_told_in_the_same_stream(doors: Doors, peer: Peer) -> None:
    made = await execute(peer, title="hold", role="gated")
    uri = f"vespera://tasks/{made['_meta']['vespera-exec/progress']['task_id']}"
    wanted = [uri, "vespera://tasks/no-such-task"]
    async with peer.listen(taskIds=[made["taskId"]], resourceSubscriptions=wanted) as stream:
        agreed = await acknowledged(stream)
        assert agreed == {"taskIds": [made["taskId"]], "resourceSubscriptions": wanted}
        doors.gate.open.set()
        seen: set[str] = set()
        with anyio.fail_after(WITHIN):
            while seen != {uri, made["taskId"]}:
                message = await anext(stream)
                params = message["params"]
                seen.add(params["uri"] if message["method"] == "notifications/resources/updated" else params["taskId"])
                assert params["_meta"][SUBSCRIPTION]


async def test_without_the_extension_tasks_cannot_be_listened_to(doors: Doors, peer: Peer) -> None:
    made = await execute(peer, title="hold", role="gated")
    peer.can = {"elicitation": {}}
    with pytest.raises(Refused) as refused:
        async with peer.listen(taskIds=[made["taskId"]]) as stream:
            await anext(stream)
    assert refused.value.code == MISSING_CAPABILITY
    assert refused.value.data == {"requiredCapabilities": {"extensions": {TASKS: {}}}}
    async with peer.listen(toolsListChanged=True) as stream:
        assert await acknowledged(stream) == {"toolsListChanged": True}
    doors.gate.open.set()


@pytest.mark.parametrize("wrong", [0, {}, "all", [1], {"a": 1}, [f"task-{n}" for n in range(257)]])
async def test_ids_that_are_none_are_refused(peer: Peer, wrong: Any) -> None:
    with pytest.raises(Refused, match="taskIds") as refused:
        async with peer.listen(taskIds=wrong) as stream:
            await anext(stream)
    assert refused.value.code == INVALID_PARAMS


async def test_tasks_of_somebody_else_are_left_out(doors: Doors) -> None:
    ann = Caller(principal="token:ann", over_tcp=True, sees_only="token:ann")
    bob = Caller(principal="token:bob", over_tcp=True, sees_only="token:bob")
    async with connected(doors, "stdio", caller=ann) as hers, connected(doors, "stdio", caller=bob) as his:
        of_ann = await execute(hers, title="hers", role="gated")
        of_bob = await execute(his, title="his", role="gated")
        uri = f"vespera://tasks/{of_ann['_meta']['vespera-exec/progress']['task_id']}"
        async with his.listen(taskIds=[of_ann["taskId"], of_bob["taskId"]], resourceSubscriptions=[uri]) as stream:
            assert (await acknowledged(stream))["taskIds"] == [of_bob["taskId"]]
            doors.gate.open.set()
            await settled(hers, of_ann["taskId"])
            task = await heard(stream)
            while task["status"] == "working":
                task = await heard(stream)
                assert task["taskId"] == of_bob["taskId"]
            with anyio.move_on_after(0.3):
                raise AssertionError(await anext(stream))


async def test_a_client_that_goes_leaves_nobody_behind(doors: Doors, peer: Peer) -> None:
    made = await execute(peer, title="hold", role="gated")
    uri = f"vespera://tasks/{made['_meta']['vespera-exec/progress']['task_id']}/events"
    async with peer.listen(taskIds=[made["taskId"]], resourceSubscriptions=[uri]) as stream:
        await acknowledged(stream)
        await eventually(lambda: followers(doors) == 2)
    await eventually(lambda: followers(doors) == 0)
    doors.gate.open.set()


def followers(doors: Doors) -> int:
    return doors.vespera._store.feed.followers()  # pyright: ignore[reportPrivateUsage]


async def test_a_listener_that_does_not_read_holds_up_nobody_and_gets_the_last_state(doors: Doors) -> None:
    """Its socket is full long before the work has ended."""

    async def loud(context: Any) -> None:
        for step in range(1, 601):
            context.progress(step / 10, f"{step} " + "x" * 190)
            await anyio.sleep(0.001)
        await doors.gate.open.wait()

    doors.vespera.roles.add(in_loop(loud, "loud"))
    listening_of(doors)._every_seconds = 0.0  # pyright: ignore[reportPrivateUsage]
    handle = await doors.vespera.execute_task(ME, Execute(title="loud", role="loud"))
    body = orjson.dumps(
        {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "subscriptions/listen",
            "params": enveloped({"notifications": {"taskIds": [handle.run_id]}}, KNOWS_TASKS),
        }
    )
    assert doors.url is not None
    port = int(doors.url.rpartition(":")[2])
    head = (
        f"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Accept: application/json, text/event-stream\r\nContent-Type: application/json\r\n"
        f"MCP-Protocol-Version: {VERSION}\r\nMcp-Method: subscriptions/listen\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with closing(socket.socket()) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        with anyio.fail_after(WITHIN):
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, ("127.0.0.1", port))
            await loop.sock_sendall(deaf, head.encode() + body)
        async with connected(doors, "http") as peer:
            with anyio.fail_after(WITHIN):
                task = await peer.request("tasks/get", taskId=handle.run_id)
                while not task["statusMessage"].split(" · ")[-1].startswith("600 "):
                    task = await peer.request("tasks/get", taskId=handle.run_id)
            doors.gate.open.set()
            ended = await settled(peer, handle.run_id)
        received = bytearray()
        with anyio.fail_after(WITHIN):
            while b'"status":"completed"' not in received:
                received += await loop.sock_recv(deaf, 65536)
    told = received.count(b"notifications/tasks")
    assert ended["status"] == "completed"
    assert 2 <= told < 300  # what fits between us; the others were never made


async def test_the_end_of_the_server_is_said_on_the_streams_and_waits_for_nobody(tmp_path: Path) -> None:
    with anyio.fail_after(WITHIN):
        async with AsyncExitStack() as stack, opened(tmp_path, http=True) as doors:
            peer = await stack.enter_async_context(connected(doors, "http"))
            made = await execute(peer, title="hold", role="gated")
            stream = await stack.enter_async_context(peer.listen(taskIds=[made["taskId"]]))
            await acknowledged(stream)
            await heard(stream)
            await stack.enter_async_context(peer.listen(taskIds=[made["taskId"]]))  # nobody reads it
            await close_streams(doors.server)
            last = [message async for message in stream]
    assert last[-1]["result"]["resultType"] == "complete"
    assert last[-1]["result"]["_meta"][SUBSCRIPTION] == last[-1]["id"]


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="vx-", dir="/tmp") as folder, Place(Path(folder)) as place:
        yield place


def test_a_bridge_carries_the_notifications_of_the_daemon(place: Place) -> None:
    work = place.work()
    arguments = {"title": "work", "role": "command", "inputs": {"argv": work.argv}}
    with place.client(greet=False) as bridge, place.client(greet=False) as listener:
        made = asked(bridge, "tools/call", name="execute_task", arguments=arguments)
        listener.request(
            "subscriptions/listen", **enveloped({"notifications": {"taskIds": [made["taskId"]]}}, KNOWS_TASKS)
        )
        assert listener.read()["params"]["notifications"]["taskIds"] == [made["taskId"]]
        assert listener.read()["params"]["status"] == "working"
        work.pids()
        work.let_go()
        while (told := listener.read()["params"])["status"] == "working":
            assert told["taskId"] == made["taskId"]
        assert told["status"] == "completed"
        assert said(told) == said(asked(bridge, "tasks/get", taskId=made["taskId"]))


def asked(bridge: Bridge, method: str, **params: Any) -> dict[str, Any]:
    return bridge.call(method, **enveloped(params, KNOWS_TASKS))
