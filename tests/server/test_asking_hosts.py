"""Whom a question of the work is put to, and for how long: who may answer it, and as long as it is open."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from asking_roles import FORM, User, accept, asks_once, asks_twice, write_asking_role
from daemon_place import BRIDGE, STOPS_WITHIN, Place, ends
from daemon_place import call as ask
from deadlines import WITHIN
from echo_place import HELLO
from mcp_doors import IN_MEMORY, KINDS, ME, Doors, Kind, call, eventually, in_loop, opened
from task_peers import KNOWS_TASKS, TASKS, WAYS, Way, connected, enveloped, execute, settled

from roles.definition import RetryPolicy
from vespera_exec.errors import ExecutionError
from vespera_exec.model.principal import Caller
from vespera_exec.server.mcp import watching

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from mcp_types import ElicitResult

REVIEW = "name: review\nrunner: external\n"
CAN_ASK: dict[str, Any] = {
    "protocolVersion": "2025-06-18",
    "capabilities": {"elicitation": {}},
    "clientInfo": {"name": "test", "version": "0"},
}


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    async with opened(tmp_path, http=True, heartbeat_seconds=0.05) as doors:
        doors.vespera.roles.add(asks_once())
        doors.vespera.roles.add(asks_twice())
        yield doors


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    write_asking_role(tmp_path / "roles-dir", tmp_path / "starts")
    (tmp_path / "roles-dir" / "review.yaml").write_text(REVIEW)
    with Place(tmp_path) as made:
        made.set(toolsets="core,worker")
        yield made


async def undecided(message: str) -> ElicitResult:
    await anyio.sleep_forever()
    raise AssertionError("nobody decides")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_question_of_a_later_attempt_is_asked_until_it_is_answered(doors: Doors, kind: Kind) -> None:
    async def flaky(context: Any) -> str:
        if context.attempt == 1:
            raise ExecutionError("not yet", code="FLAKY")
        return context.ask("where", "Where to?", schema=FORM).content["target"]

    retry = RetryPolicy(max_retries=1, retry_on=("FLAKY",), backoff_seconds=0.01)
    doors.vespera.roles.add(in_loop(flaky, "flaky", retry=retry))

    async def thinks_a_while(message: str) -> ElicitResult:
        await anyio.sleep(0.2)  # some heartbeats: the dialog must not close by itself
        return accept(target="staging")

    user = User({"Where to?": thinks_a_while})
    async with doors.client(kind, elicitation_callback=user) as client:
        answer = await call(client, "execute_task", title="It asks", role="flaky", wait_ms=25_000)
    assert (answer["status"], answer["result"]) == ("completed", "staging")
    assert user.asked == ["Where to?"]


@pytest.mark.parametrize("kind", IN_MEMORY)
async def test_who_may_not_answer_is_not_asked(doors: Doors, kind: Kind) -> None:
    auditor = Caller(principal="auditor", scopes=frozenset({"read"}), over_tcp=True)
    user = User({"Where to?": accept(target="staging")})
    async with doors.client("memory-modern") as starter:
        handle = await call(starter, "execute_task", title="It asks", role="asks-once", wait_ms=25_000)
    async with doors.client(kind, caller=auditor, elicitation_callback=user) as client:
        page = await call(
            client, "stream_task_execution_events", task_id=handle["task_id"], wait_ms=25_000, follow=True
        )
    assert [each["key"] for each in page["inputs"]] == ["where"]
    assert user.asked == []


async def test_a_run_that_is_cancelled_closes_its_dialog(doors: Doors) -> None:
    user, answers = User({"Where to?": undecided}), list[dict[str, Any]]()
    async with doors.client("memory-legacy", elicitation_callback=user) as client, anyio.create_task_group() as group:

        async def wait() -> None:
            answers.append(await call(client, "execute_task", title="It asks", role="asks-once", wait_ms=25_000))

        group.start_soon(wait)
        await eventually(lambda: user.asked == ["Where to?"])
        (asked,) = (await doors.vespera.list_inputs(ME)).inputs
        assert (await doors.vespera.cancel(ME, asked.task_id, wait_ms=25_000)).success
        await eventually(lambda: bool(answers))
    assert (answers[0]["done"], answers[0]["status"]) == (True, "cancelled")


async def test_each_question_has_its_own_dialog_and_the_time_of_both_is_one(
    doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "SILENT_SECONDS", 3.0)
    user = User({"Are you sure?": accept(), "Where to?": undecided})
    async with doors.client("memory-legacy", elicitation_callback=user) as client:
        answer = await call(client, "execute_task", title="It asks", role="asks-twice", wait_ms=2900)
    assert user.asked == ["Are you sure?", "Where to?"]
    assert [each["key"] for each in answer["inputs"]] == ["where"]


@pytest.mark.parametrize("way", WAYS)
async def test_a_task_asks_only_a_client_that_can_ask_its_user(doors: Doors, way: Way) -> None:
    async with connected(doors, way) as peer:
        cannot_ask: tuple[dict[str, Any], ...] = ({}, {"elicitation": {"url": {}}})
        for can in cannot_ask:
            peer.can = {**can, "extensions": {TASKS: {}}}
            made = await execute(peer, title="It asks", role="asks-once")
            with anyio.fail_after(WITHIN):
                task = made
                while "Where to?" not in task["statusMessage"]:
                    task = await peer.request("tasks/get", taskId=made["taskId"])
            assert task["status"] == "working"
            assert task["statusMessage"].endswith("waits for an answer: Where to?")
            assert "inputRequests" not in task
            async with peer.listen(taskIds=[made["taskId"]]) as stream:
                await anext(stream)
                told = (await anext(stream))["params"]
            assert (told["status"], told["statusMessage"]) == ("working", task["statusMessage"])

            peer.can = KNOWS_TASKS
            task = await peer.request("tasks/get", taskId=made["taskId"])
            assert (task["status"], list(task["inputRequests"])) == ("input_required", ["where"])
            given = {"where": {"action": "decline"}}
            await peer.request("tasks/update", taskId=made["taskId"], inputResponses=given)
            assert (await settled(peer, made["taskId"]))["status"] == "completed"


def test_a_daemon_stops_in_time_with_a_dialog_a_claim_and_a_listener_open(place: Place) -> None:
    daemon = place.start()
    dialog, claim, listener = (place.client(greet=False) for _ in range(3))
    with dialog, claim, listener:
        dialog.send(HELLO | {"params": CAN_ASK})
        assert dialog.read()["id"] == 0
        dialog.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        call_number = dialog.request(
            "tools/call", name="execute_task", arguments={"title": "t", "role": "asker", "wait_ms": 25_000}
        )
        assert dialog.read()["method"] == "elicitation/create"
        with place.client() as other:
            (task,) = ask(other, "list_tasks")["tasks"]
            run_id = ask(other, "get_task_execution_status", task_id=task["task_id"])["session"]["run_id"]
        claimed = claim.request("tools/call", **enveloped({"name": "claim_task", "arguments": {"wait_ms": 25_000}}, {}))
        listener.request("subscriptions/listen", **enveloped({"notifications": {"taskIds": [run_id]}}, KNOWS_TASKS))
        assert listener.read()["params"]["notifications"]["taskIds"] == [run_id]
        assert listener.read()["params"]["status"] == "input_required"

        daemon.send_signal(signal.SIGTERM)
        assert ends(daemon.pid, within=STOPS_WITHIN)
        assert daemon.wait() == 0
        assert listener.read()["result"]["resultType"] == "complete"
        for client, number in ((dialog, call_number), (claim, claimed)):
            lost = client.read()
            assert (lost["id"], lost["error"]["data"]["retriable"]) == (number, True)

        again = ask_again(dialog, task["task_id"])
        assert (again["done"], again["status"]) == (True, "completed")


def ask_again(client: Any, task_id: str) -> dict[str, Any]:
    """Answers through the same bridge, under the next daemon; waits for the end."""
    given = {"task_id": task_id, "content": {"target": "staging"}, "wait_ms": 25_000}
    return ask(client, "answer_task_input", **given)


def test_in_process_a_question_is_asked_and_a_task_followed_as_by_a_daemon(place: Place) -> None:
    with place.client([*BRIDGE, "--in-process"], greet=False) as client:

        def request(method: str, **params: Any) -> dict[str, Any]:
            return client.call(method, **enveloped(params, KNOWS_TASKS))

        made = request("tools/call", name="execute_task", arguments={"title": "t", "role": "asker"})
        assert made["resultType"] == "task"
        client.request(
            "subscriptions/listen", **enveloped({"notifications": {"taskIds": [made["taskId"]]}}, KNOWS_TASKS)
        )
        assert client.read()["params"]["notifications"]["taskIds"] == [made["taskId"]]
        while (told := client.read()["params"])["status"] == "working":
            assert told["taskId"] == made["taskId"]
        assert list(told["inputRequests"]) == ["where"]
        given = {"where": {"action": "accept", "content": {"target": "staging"}}}
        update = client.request(
            "tasks/update", **enveloped({"taskId": made["taskId"], "inputResponses": given}, KNOWS_TASKS)
        )
        acknowledged, task = False, told
        while not (acknowledged and task["status"] == "completed"):
            message = client.read()
            acknowledged = acknowledged or message.get("id") == update
            task = message.get("params", task)
        assert task["result"]["structuredContent"]["result"]["result"]["content"]["target"] == "staging"
        claimed = request("tools/call", name="claim_task", arguments={})
        assert claimed["structuredContent"]["claimed"] is False
