"""The MCP tasks extension on 2026-07-28, over HTTP and over stdio: create, get, update, cancel, and who may not."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from daemon_place import Place, end
from deadlines import WITHIN
from mcp import Client
from mcp.client.extension import advertise
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.shared.exceptions import MCPError
from mcp.shared.inbound import encode_header_value
from mcp_doors import BEARER, ME, Doors, in_loop, opened
from mcp_types import METHOD_NOT_FOUND, Request, Result
from task_peers import (
    KNOWS_TASKS,
    TASKS,
    WAYS,
    HttpPeer,
    Peer,
    Refused,
    Way,
    connected,
    enveloped,
    execute,
    settled,
)

from roles.definition import RetryPolicy
from vespera_exec.app.callers import current_caller
from vespera_exec.errors import ExecutionError, TaskNotFound
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from echo_place import Client as Bridge

INVALID_PARAMS, MISSING_CAPABILITY, HEADER_MISMATCH = -32602, -32021, -32020
METHODS: dict[str, dict[str, Any]] = {"tasks/get": {}, "tasks/update": {"inputResponses": {}}, "tasks/cancel": {}}
"""Those that take a handle, each with what else it needs."""


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    async with opened(tmp_path, http=True) as doors:
        yield doors


@pytest.fixture(params=WAYS)
async def peer(doors: Doors, request: pytest.FixtureRequest) -> AsyncIterator[Peer]:
    way: Way = request.param
    async with connected(doors, way) as peer:
        yield peer


async def test_a_call_becomes_a_task_at_once_and_its_handle_answers(doors: Doors, peer: Peer) -> None:
    with anyio.fail_after(20):  # whatever it says of waiting
        made = await execute(peer, title="count", role="gated", inputs={"steps": 2}, wait_ms=25_000)
    assert made["resultType"] == "task"
    assert made["status"] == "working"
    assert made["ttlMs"] is None
    assert made["pollIntervalMs"] == 1000
    assert datetime.fromisoformat(made["createdAt"]) <= datetime.fromisoformat(made["lastUpdatedAt"])
    assert not {"result", "error", "inputRequests", "requestState", "task"} & made.keys()

    working = await peer.request("tasks/get", taskId=made["taskId"])
    assert (working["resultType"], working["status"]) == ("complete", "working")
    assert working["createdAt"] == made["createdAt"]
    assert "result" not in working

    doors.gate.open.set()
    task = await settled(peer, made["taskId"])
    assert (task["status"], task["createdAt"]) == ("completed", made["createdAt"])
    assert task["result"]["isError"] is False
    assert task["result"]["structuredContent"]["result"] == {"steps": 2, "nothing": None}


async def test_a_working_task_says_how_far_it_is(doors: Doors, peer: Peer) -> None:
    made = await execute(peer, title="count", role="gated", inputs={"steps": 3})
    with anyio.fail_after(WITHIN):
        task = made
        while "step 3" not in task["statusMessage"]:
            task = await peer.request("tasks/get", taskId=made["taskId"])
    progress = task["_meta"]["vespera-exec/progress"]
    assert task["statusMessage"] == f"execution · {progress['percentage']:.0f} % · step 3"
    assert progress["phase"] == "execution"
    assert {"cursor", "task_id", "session_id"} <= progress.keys()
    doors.gate.open.set()


async def test_its_result_is_what_the_tool_answers_to_who_waits(doors: Doors, peer: Peer) -> None:
    doors.gate.open.set()
    made = await execute(peer, title="count", role="gated", inputs={"steps": 1})
    result = (await settled(peer, made["taskId"]))["result"]["structuredContent"]
    peer.can = {}
    waited = (await execute(peer, title="count", role="gated", inputs={"steps": 1}, wait_ms=25_000))[
        "structuredContent"
    ]
    assert waited["done"]
    own = ("task_id", "run_id", "session_id", "cursor")
    assert {key: result[key] for key in result if key not in own} == {
        key: waited[key] for key in waited if key not in (*own, "repeated")
    }


async def test_work_that_fails_is_completed_with_an_error_in_its_result(doors: Doors, peer: Peer) -> None:
    async def failing(context: Any) -> None:
        raise ExecutionError("the disk is made of cheese", code="CHEESE")

    doors.vespera.roles.add(in_loop(failing, "failing"))
    made = await execute(peer, title="fail", role="failing")
    task = await settled(peer, made["taskId"])
    assert task["status"] == "completed"
    assert task["statusMessage"] == "the disk is made of cheese"
    assert task["result"]["isError"] is True
    assert task["result"]["structuredContent"]["error_code"] == "CHEESE"
    assert "error" not in task


async def test_work_that_times_out_is_completed_with_an_error_too(doors: Doors, peer: Peer) -> None:
    made = await execute(peer, title="late", role="gated", timeout_seconds=0.1)
    task = await settled(peer, made["taskId"])
    assert (task["status"], task["result"]["isError"]) == ("completed", True)
    assert task["result"]["structuredContent"]["status"] == "timed_out"


async def test_a_protocol_error_alone_is_failed(doors: Doors, peer: Peer) -> None:
    async def broken(context: Any) -> None:
        context_of = {"jsonrpc_code": -32001, "data": {"limit": 3}}
        raise ExecutionError("rate limit exceeded", code="PROTOCOL_ERROR", context=context_of)

    doors.vespera.roles.add(in_loop(broken, "broken"))
    made = await execute(peer, title="break", role="broken")
    task = await settled(peer, made["taskId"])
    assert task["status"] == "failed"
    assert task["error"] == {"code": -32001, "message": "rate limit exceeded", "data": {"limit": 3}}
    assert "result" not in task


async def test_a_cancel_is_acknowledged_with_nothing_and_ends_the_work(doors: Doors, peer: Peer) -> None:
    made = await execute(peer, title="hold", role="gated")
    ack = await peer.request("tasks/cancel", taskId=made["taskId"])
    assert ack.keys() - {"_meta"} == {"resultType"}
    task = await settled(peer, made["taskId"])
    assert task["status"] == "cancelled"
    assert not {"result", "error"} & task.keys()
    again = await peer.request("tasks/cancel", taskId=made["taskId"])
    assert again["resultType"] == "complete"
    assert await settled(peer, made["taskId"]) == task


async def test_arguments_that_the_tool_refuses_make_no_task(doors: Doors, peer: Peer) -> None:
    for arguments, code in (
        ({"title": "x", "role": "gated", "wait": 3}, "INVALID_INPUT"),
        ({"title": "x", "role": "nobody"}, "ROLE_NOT_FOUND"),
        ({"task_id": "no-such-task"}, "TASK_NOT_FOUND"),
    ):
        answer = await execute(peer, **arguments)
        assert (answer["resultType"], answer["isError"]) == ("complete", True)
        assert answer["structuredContent"]["error_code"] == code
    assert (await doors.vespera.list_tasks(ME)).total == 0


async def test_other_tools_answer_at_once(peer: Peer) -> None:
    answer = await peer.request("tools/call", name="list_tasks", arguments={})
    assert answer["resultType"] == "complete"
    assert answer["structuredContent"]["total"] == 0


async def test_a_repeat_with_its_key_gets_the_same_handle(doors: Doors, peer: Peer) -> None:
    doors.gate.open.set()
    made = await execute(peer, title="once", role="gated", idempotency_key="k")
    ended = await settled(peer, made["taskId"])
    again = await execute(peer, title="once", role="gated", idempotency_key="k")
    assert (again["taskId"], again["status"], again["resultType"]) == (made["taskId"], "completed", "task")
    assert again["lastUpdatedAt"] == ended["lastUpdatedAt"]


async def test_the_handle_is_the_same_through_all_attempts(doors: Doors, peer: Peer) -> None:
    tried: list[int] = []
    first_failed = anyio.Event()

    async def flaky(context: Any) -> str:
        tried.append(context.attempt)
        if len(tried) == 1:
            first_failed.set()
            raise ExecutionError("not yet", code="FLAKY")
        await doors.gate.open.wait()
        return "at last"

    retry = RetryPolicy(max_retries=2, retry_on=("FLAKY",), backoff_seconds=0.05)
    doors.vespera.roles.add(in_loop(flaky, "flaky", retry=retry))
    made = await execute(peer, title="try", role="flaky")
    await first_failed.wait()
    with anyio.fail_after(WITHIN):
        task = made
        while task["_meta"]["vespera-exec/progress"]["session_id"] == made["taskId"]:
            assert task["status"] == "working"
            task = await peer.request("tasks/get", taskId=made["taskId"])
    assert (task["taskId"], task["createdAt"]) == (made["taskId"], made["createdAt"])
    second = task["_meta"]["vespera-exec/progress"]["session_id"]
    doors.gate.open.set()
    task = await settled(peer, made["taskId"])
    assert task["result"]["structuredContent"]["result"] == "at last"
    assert task["createdAt"] == made["createdAt"]
    with pytest.raises(Refused):
        await peer.request("tasks/get", taskId=second)


async def asking(context: Any) -> dict[str, Any]:
    form = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    said = context.ask_all({"who": ("Who are you?", form), "where": ("Where are you?", form)})
    return {key: [answer.action, answer.content] for key, answer in said.items()}


async def test_questions_are_asked_answered_in_part_and_never_twice(doors: Doors, peer: Peer) -> None:
    doors.vespera.roles.add(in_loop(asking, "asking"))
    made = await execute(peer, title="ask", role="asking")
    task = await settled(peer, made["taskId"], status="input_required")
    assert task["statusMessage"] == "Who are you?"
    assert task["inputRequests"].keys() == {"who", "where"}
    who = task["inputRequests"]["who"]
    assert who["method"] == "elicitation/create"
    assert (who["params"]["mode"], who["params"]["message"]) == ("form", "Who are you?")
    assert who["params"]["requestedSchema"]["required"] == ["name"]

    ann = {"action": "accept", "content": {"name": "Ann"}}
    ack = await peer.request(
        "tasks/update", taskId=made["taskId"], inputResponses={"who": ann, "why": {"action": "perhaps"}}
    )
    assert ack.keys() - {"_meta"} == {"resultType"}
    task = await peer.request("tasks/get", taskId=made["taskId"])
    assert (task["status"], list(task["inputRequests"])) == ("input_required", ["where"])

    bob = {"action": "accept", "content": {"name": "Bob"}}
    await peer.request(
        "tasks/update", taskId=made["taskId"], inputResponses={"who": bob, "where": {"action": "cancel"}}
    )
    task = await peer.request("tasks/get", taskId=made["taskId"])
    assert (task["status"], list(task["inputRequests"])) == ("input_required", ["where"])  # only dismissed

    await peer.request("tasks/update", taskId=made["taskId"], inputResponses={"where": {"action": "decline"}})
    task = await settled(peer, made["taskId"])
    assert task["result"]["structuredContent"]["result"] == {
        "who": ["accept", {"name": "Ann"}],
        "where": ["decline", None],
    }
    assert (await peer.request("tasks/update", taskId=made["taskId"], inputResponses={"who": bob}))["resultType"]


@pytest.mark.parametrize(
    "said", [{"action": "perhaps"}, {"action": "accept", "content": 3}, {"action": "accept", "content": {}}, "yes"]
)
async def test_an_answer_that_is_none_is_refused_and_recorded_nowhere(doors: Doors, peer: Peer, said: Any) -> None:
    doors.vespera.roles.add(in_loop(asking, "asking"))
    made = await execute(peer, title="ask", role="asking")
    await settled(peer, made["taskId"], status="input_required")
    with pytest.raises(Refused, match="who") as refused:
        await peer.request("tasks/update", taskId=made["taskId"], inputResponses={"who": said})
    assert refused.value.code == INVALID_PARAMS
    task = await peer.request("tasks/get", taskId=made["taskId"])
    assert list(task["inputRequests"]) == ["who", "where"]


@pytest.mark.parametrize("said", [{}, None, False, "no", [], {"Action": "decline"}, {"response": "reject"}], ids=str)
async def test_an_approval_is_not_given_by_an_answer_that_says_something_else(
    doors: Doors, peer: Peer, said: Any
) -> None:
    async def careful(context: Any) -> None:
        context.approve("sure", "Are you sure?")

    doors.vespera.roles.add(in_loop(careful, "careful"))
    made = await execute(peer, title="approve", role="careful")
    await settled(peer, made["taskId"], status="input_required")
    with pytest.raises(Refused, match=r"'sure'.*action") as refused:
        await peer.request("tasks/update", taskId=made["taskId"], inputResponses={"sure": said})
    assert refused.value.code == INVALID_PARAMS
    assert (await peer.request("tasks/get", taskId=made["taskId"]))["status"] == "input_required"


async def test_a_client_without_the_extension_gets_no_task_and_may_not_ask_for_one(doors: Doors, peer: Peer) -> None:
    doors.gate.open.set()
    made = await execute(peer, title="hold", role="gated")
    peer.can = {"elicitation": {}}
    answer = await execute(peer, title="hold", role="gated", wait_ms=25_000)
    assert answer["resultType"] == "complete"
    assert answer["structuredContent"]["done"]
    for method, more in METHODS.items():
        with pytest.raises(Refused) as refused:
            await peer.request(method, taskId=made["taskId"], **more)
        assert refused.value.code == MISSING_CAPABILITY
        assert refused.value.data == {"requiredCapabilities": {"extensions": {TASKS: {}}}}
        assert refused.value.status in (400, None)
    peer.can = KNOWS_TASKS
    assert (await execute(peer, title="hold", role="gated"))["resultType"] == "task"


async def test_a_caller_that_may_not_look_gets_no_task(doors: Doors) -> None:
    doors.gate.open.set()
    blind = Caller(principal="blind", scopes=frozenset({"operate"}), over_tcp=True)
    async with connected(doors, "stdio", caller=blind) as peer:
        answer = await execute(peer, title="hold", role="gated")
        assert answer["resultType"] == "complete"
        assert not answer.get("isError")


async def test_the_extension_is_told_and_the_old_slot_is_not_used(peer: Peer) -> None:
    capabilities = (await peer.request("server/discover"))["capabilities"]
    assert capabilities["extensions"][TASKS] == {}
    assert "tasks" not in capabilities


@pytest.mark.parametrize("kind", ["memory", "http"])
async def test_a_legacy_peer_that_knows_the_extension_gets_no_task(doors: Doors, kind: str) -> None:
    class Get(Request[dict[str, Any], str]):
        method: str = "tasks/get"

    doors.gate.open.set()
    reset = current_caller.set(ME)
    try:
        async with create_mcp_http_client(headers=BEARER) as http:
            target: Any = streamable_http_client(f"{doors.url}/mcp", http_client=http)
            target = target if kind == "http" else doors.server
            async with Client(target, mode="legacy", extensions=[advertise(TASKS)]) as client:
                result = await client.call_tool("execute_task", {"title": "x", "role": "gated", "wait_ms": 25_000})
                assert result.structured_content is not None
                run_id = result.structured_content["run_id"]
                with pytest.raises(MCPError) as refused:
                    await client.session.send_request(Get(params={"taskId": run_id}), Result)
    finally:
        current_caller.reset(reset)
    assert result.structured_content["done"]
    assert refused.value.code == METHOD_NOT_FOUND


@pytest.mark.parametrize("method", METHODS)
async def test_over_http_the_task_is_named_in_the_header_too(doors: Doors, method: str) -> None:
    async with connected(doors, "http") as peer:
        assert isinstance(peer, HttpPeer)
        made = await execute(peer, title="hold", role="gated")
        params = {"taskId": made["taskId"], **METHODS[method]}
        right = peer.headers(method, params)
        missing = {name: value for name, value in right.items() if name != "Mcp-Name"}
        for wrong in (missing, {**right, "Mcp-Name": "another"}, {**right, "Mcp-Name": ""}):
            with pytest.raises(Refused) as refused:
                await peer.post(method, params, wrong)
            assert (refused.value.code, refused.value.status) == (HEADER_MISMATCH, 400)
        assert (await peer.request("tasks/get", taskId=made["taskId"]))["status"] == "working"
        encoded = encode_header_value(made["taskId"])
        assert (await peer.post(method, params, {**right, "Mcp-Name": encoded}))["resultType"] == "complete"
    doors.gate.open.set()


async def test_a_handle_is_the_whole_id_of_a_run_and_nothing_else(doors: Doors, peer: Peer) -> None:
    made = await execute(peer, title="hold", role="gated")
    own = made["_meta"]["vespera-exec/progress"]["task_id"]
    for unknown in ("no-such-task", made["taskId"][:12], own, "", "\x7f" * 50, "a" * 200):
        for method, more in METHODS.items():
            with pytest.raises(Refused) as refused:
                await peer.request(method, taskId=unknown, **more)
            assert refused.value.code == INVALID_PARAMS
    assert (await peer.request("tasks/get", taskId=made["taskId"]))["status"] == "working"
    doors.gate.open.set()


async def test_a_handle_of_somebody_else_does_not_exist(doors: Doors) -> None:
    ann = Caller(principal="token:ann", over_tcp=True, sees_only="token:ann")
    bob = Caller(principal="token:bob", over_tcp=True, sees_only="token:bob")
    doors.vespera.roles.add(in_loop(asking, "asking"))
    async with connected(doors, "stdio", caller=ann) as hers, connected(doors, "stdio", caller=bob) as his:
        made = await execute(hers, title="ask", role="asking")
        await settled(hers, made["taskId"], status="input_required")
        answers = {key: {"action": "accept", "content": {"name": "Bob"}} for key in ("who", "where")}
        for method in METHODS:
            with pytest.raises(Refused, match="not found") as refused:
                await his.request(method, taskId=made["taskId"], inputResponses=answers)
            assert refused.value.code == INVALID_PARAMS
        task = await hers.request("tasks/get", taskId=made["taskId"])
        assert (task["status"], len(task["inputRequests"])) == ("input_required", 2)
        await hers.request("tasks/cancel", taskId=made["taskId"])
        assert (await settled(hers, made["taskId"]))["status"] == "cancelled"
        with pytest.raises(Refused, match="not found"):
            await his.request("tasks/get", taskId=made["taskId"])


TTL, RETENTION = "mcp_task_ttl_seconds", "retention_days"
DAY = 86_400.0


@pytest.mark.parametrize("kept", [{TTL: 600.0}, {TTL: 9000.0, RETENTION: 600 / DAY}, {TTL: 600.0, RETENTION: 30.0}])
async def test_a_handle_says_when_it_expires_once_its_task_has_ended(tmp_path: Path, kept: dict[str, Any]) -> None:
    async with opened(tmp_path, mcp_poll_interval_ms=250, **kept) as doors, connected(doors, "stdio") as peer:
        made = await execute(peer, title="brief", role="gated")
        assert (made["ttlMs"], made["pollIntervalMs"]) == (None, 250)
        doors.gate.open.set()
        task = await settled(peer, made["taskId"])
        lived = datetime.fromisoformat(task["lastUpdatedAt"]) - datetime.fromisoformat(task["createdAt"])
        assert task["ttlMs"] == pytest.approx((lived.total_seconds() + 600) * 1000, abs=20)


@pytest.mark.parametrize("kept", [{TTL: 0.2}, {TTL: 600.0, RETENTION: 0.2 / DAY}, {TTL: 0.2, RETENTION: 30.0}])
async def test_a_handle_expires_its_time_after_the_end(tmp_path: Path, kept: dict[str, Any]) -> None:
    async with opened(tmp_path, **kept) as doors, connected(doors, "stdio") as peer:
        made = await execute(peer, title="brief", role="gated", idempotency_key="k")
        doors.gate.open.set()
        await gone(doors, made["taskId"])
        with pytest.raises(Refused, match="expired") as refused:
            await peer.request("tasks/get", taskId=made["taskId"])
        assert refused.value.code == INVALID_PARAMS
        again = await execute(peer, title="brief", role="gated", idempotency_key="k")
        assert (again["resultType"], again.get("isError", False)) == ("complete", False)
        assert again["structuredContent"] | {"run_id": made["taskId"], "repeated": True} == again["structuredContent"]


async def gone(doors: Doors, run_id: str) -> None:
    """Returns when the run is not found any more."""
    with anyio.fail_after(WITHIN):
        while True:
            try:
                await doors.vespera.get_run(ME, run_id)
            except TaskNotFound:
                return
            await anyio.sleep(0.02)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        yield place


def asked(bridge: Bridge, method: str, **params: Any) -> dict[str, Any]:
    """What a modern client that knows tasks is answered through a bridge."""
    return bridge.call(method, **enveloped(params, KNOWS_TASKS))


_GUARDED = """
name: guarded
runner: process
argv: [/bin/echo, touched]
approval: May it touch the wall?
"""


@pytest.mark.promise("handle")
def test_after_a_sigkill_of_the_daemon_the_same_handles_answer(place: Place) -> None:
    (place.folder / "roles-dir").mkdir()
    (place.folder / "roles-dir" / "guarded.yaml").write_text(_GUARDED)
    work = place.work()
    with place.client(greet=False) as bridge:
        ended = started(bridge, role="command", inputs={"argv": ["/bin/echo", "hi"]})
        running = started(bridge, role="command", inputs={"argv": work.argv})
        parked = started(bridge, role="guarded")
        before = followed(bridge, ended)
        question = followed(bridge, parked)["inputRequests"]
        work.pids()
        assert asked(bridge, "tasks/get", taskId=running["taskId"])["status"] == "working"
    (daemon,) = place.served_by()
    end(daemon)
    with place.client(greet=False) as bridge:
        assert asked(bridge, "tasks/get", taskId=ended["taskId"]) == before
        after = asked(bridge, "tasks/get", taskId=running["taskId"])
        assert after["createdAt"] == running["createdAt"]
        assert (after["status"], after["result"]["isError"]) == ("completed", True)
        assert after["result"]["structuredContent"]["error_code"] == "INTERRUPTED"
        assert asked(bridge, "tasks/cancel", taskId=running["taskId"])["resultType"] == "complete"

        still = asked(bridge, "tasks/get", taskId=parked["taskId"])
        assert (still["status"], still["inputRequests"]) == ("input_required", question)
        accepted: dict[str, Any] = {"action": "accept", "content": {}}
        answers = dict.fromkeys(question, accepted)
        asked(bridge, "tasks/update", taskId=parked["taskId"], inputResponses=answers)
        touched = followed(bridge, parked)
        assert (touched["status"], touched["result"]["isError"]) == ("completed", False)
    assert len(place.served_by()) == 2


def started(bridge: Bridge, **arguments: Any) -> dict[str, Any]:
    return asked(bridge, "tools/call", name="execute_task", arguments={"title": "work", **arguments})


def followed(bridge: Bridge, made: dict[str, Any]) -> dict[str, Any]:
    """The task as soon as it is not working any more."""
    deadline = time.monotonic() + WITHIN
    while (task := asked(bridge, "tasks/get", taskId=made["taskId"]))["status"] == "working":
        assert time.monotonic() < deadline, task
    return task
