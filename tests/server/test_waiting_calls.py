"""A call that waits: its answer has the result, or the question that the work asks; it never ends in a timeout."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from asking_roles import User, accept, asks_once, asks_twice, write_asking_role
from daemon_place import Place
from deadlines import WITHIN
from echo_place import HELLO
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.shared.exceptions import MCPError
from mcp_doors import IN_MEMORY, KINDS, ME, Doors, Kind, call, eventually, in_loop, opened, refused, waiting
from mcp_types import ElicitResult, InputRequiredResult
from mcp_types.version import LATEST_MODERN_VERSION

from vespera_exec.app.views import Execute, InputAnswer
from vespera_exec.server.mcp import watching

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

LEGACY: tuple[Kind, ...] = ("memory-legacy", "http-legacy", "sse")
HELLO_PARAMS = {"protocolVersion": "2025-06-18", "clientInfo": {"name": "test", "version": "0"}}
DISMISSED = ElicitResult(action="cancel")
DECLINED = ElicitResult(action="decline")
PRODUCTION = {"target": "production", "copies": 1}
LESS_THAN_THE_WAIT = 20
"""Seconds, of the 25 that a call may wait."""
ASKED_ALREADY: dict[str, Any] = {"title": "It asks", "role": "asks-once", "idempotency_key": "asked already"}


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    async with opened(tmp_path, http=True, heartbeat_seconds=0.2) as doors:
        doors.vespera.roles.add(asks_once())
        doors.vespera.roles.add(asks_twice())
        yield doors


async def asking_already(doors: Doors) -> None:
    """What `ASKED_ALREADY` starts, runs, and its question is open: who repeats it is asked, however short he waits."""
    handle = await doors.vespera.execute_task(ME, Execute(**ASKED_ALREADY))
    await waiting(doors.vespera, handle.task_id, "execution_paused")


async def run(client: Client, role: str, *, wait_ms: int = 10_000) -> dict[str, Any]:
    return await call(client, "execute_task", title="It asks", role=role, wait_ms=wait_ms)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_answer_of_a_short_run_holds_its_result(doors: Doors, kind: Kind) -> None:
    doors.gate.open.set()
    async with doors.client(kind) as client:
        handle = await call(client, "execute_task", title="Short", role="gated", inputs={"steps": 2}, wait_ms=25_000)
    assert (handle["done"], handle["status"]) == (True, "completed")
    assert handle["result"] == {"steps": 2, "nothing": None}
    assert "error" not in handle


async def test_the_answer_of_a_run_that_failed_says_why_and_is_an_error_as_its_task_would_be(doors: Doors) -> None:
    async def broken(context: Any) -> None:
        raise ValueError("no such luck")

    doors.vespera.roles.add(in_loop(broken, "broken"))
    async with doors.client("memory-modern") as client:
        answer = await client.call_tool("execute_task", {"title": "It fails", "role": "broken", "wait_ms": 25_000})
    assert answer.is_error
    handle: dict[str, Any] = answer.structured_content or {}
    assert (handle["done"], handle["status"]) == (True, "failed")
    assert "no such luck" in handle["error"]
    assert handle["error_code"]
    assert "result" not in handle


async def test_a_large_result_is_cut_in_the_answer_as_in_get_task_result(doors: Doors) -> None:
    async def large(context: Any) -> str:
        return "y" * 100_000

    doors.vespera.roles.add(in_loop(large, "large"))
    async with doors.client("memory-modern") as client:
        handle = await run(client, "large")
        fetched = await call(client, "get_task_result", task_id=handle["task_id"])
    assert handle["result_truncated"]
    assert (handle["result"], handle["result_bytes"]) == (fetched["result"], fetched["result_bytes"])
    assert len(handle["result"]) < 50_000


async def test_a_run_that_takes_longer_than_the_wait_leaves_a_cursor_to_follow_it_from(doors: Doors) -> None:
    async with doors.client("memory-modern") as client:
        handle = await run(client, "gated", wait_ms=100)
        assert (handle["done"], "result" in handle) == (False, False)
        doors.gate.open.set()
        page = await call(
            client, "stream_task_execution_events",
            task_id=handle["task_id"], cursor=handle["cursor"], wait_ms=25_000, follow=True,
        )  # fmt: skip
    assert page["done"]
    assert page["events"][0]["cursor"] > handle["cursor"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_cannot_ask_its_user_gets_the_question_at_once(doors: Doors, kind: Kind) -> None:
    async with doors.client(kind) as client:
        with anyio.fail_after(LESS_THAN_THE_WAIT):
            handle = await run(client, "asks-twice", wait_ms=25_000)
            assert (handle["done"], handle["status"]) == (False, "paused")
            (question,) = handle["inputs"]
            assert (question["key"], question["kind"], question["message"]) == ("sure", "approval", "Are you sure?")
            answered = await call(
                client, "answer_task_input", task_id=handle["task_id"], action="accept", wait_ms=25_000
            )
            assert (answered["success"], answered["accepted"], answered["done"]) == (True, ["sure"], False)
            (form,) = answered["inputs"]
            assert form["key"] == "where"
            assert form["schema"]["properties"]["target"]["enum"] == ["staging", "production"]
            answers = {"where": {"action": "accept", "content": {"target": "production"}}}
            ended = await call(client, "answer_task_input", task_id=handle["task_id"], answers=answers, wait_ms=25_000)
    assert (ended["done"], ended["status"]) == (True, "completed")
    assert ended["result"] == {"action": "accept", "content": PRODUCTION}


async def test_a_follower_hears_of_the_question_and_of_one_that_was_asked_before_it_came(doors: Doors) -> None:
    async with doors.client("memory-modern") as client:
        handle = await call(client, "execute_task", title="It asks", role="asks-once")
        cursor, began = handle["cursor"], anyio.current_time()

        async def followed(wait_ms: int) -> dict[str, Any]:
            page = await call(
                client, "stream_task_execution_events",
                task_id=handle["task_id"], cursor=cursor, wait_ms=wait_ms, follow=True,
            )  # fmt: skip
            assert (page["status"], page["done"]) == ("paused", False)
            assert [each["key"] for each in page["inputs"]] == ["where"]
            return page

        with anyio.fail_after(LESS_THAN_THE_WAIT):
            page = await followed(25_000)
            while page["events"]:  # it may be asked while a call is on its way
                cursor, began = page["next_cursor"], anyio.current_time()
                page = await followed(400)
        assert anyio.current_time() - began >= 0.4, "what is known is no news to return for"
        looked = await call(client, "get_task_execution_status", task_id=handle["task_id"])
        assert [each["key"] for each in looked["inputs"]] == ["where"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_host_that_can_asks_its_user_and_the_call_goes_on(doors: Doors, kind: Kind) -> None:
    user = User({"Are you sure?": accept(), "Where to?": accept(target="production")})
    async with doors.client(kind, elicitation_callback=user) as client:
        handle = await run(client, "asks-twice")
    assert user.asked == ["Are you sure?", "Where to?"]
    assert (handle["done"], handle["status"]) == (True, "completed")
    assert handle["result"] == {"action": "accept", "content": PRODUCTION}
    tasks = await doors.vespera.list_tasks(ME)
    assert tasks.total == 1  # no round of the call has started another


@pytest.mark.parametrize("kind", IN_MEMORY)
async def test_a_user_who_declines_has_answered(doors: Doors, kind: Kind) -> None:
    user = User({"Are you sure?": accept(), "Where to?": DECLINED})
    async with doors.client(kind, elicitation_callback=user) as client:
        formed = await run(client, "asks-twice")
        user.replies["Are you sure?"] = DECLINED
        rejected = await run(client, "asks-twice")
    assert formed["result"] == {"action": "decline", "content": None}
    assert (rejected["done"], rejected["status"], rejected["error_code"]) == (True, "failed", "APPROVAL_REJECTED")


@pytest.mark.parametrize("kind", IN_MEMORY)
async def test_a_user_who_dismisses_the_question_leaves_it_open_and_is_not_asked_again_in_the_call(
    doors: Doors, kind: Kind
) -> None:
    user = User({"Where to?": DISMISSED})
    async with doors.client(kind, elicitation_callback=user) as client:
        handle = await run(client, "asks-once", wait_ms=25_000)
        assert (handle["done"], handle["status"]) == (False, "paused")
        assert [each["key"] for each in handle["inputs"]] == ["where"]
        assert user.asked == ["Where to?"]
        user.replies["Where to?"] = accept(target="staging", copies=2)
        page = await call(
            client, "stream_task_execution_events",
            task_id=handle["task_id"], cursor=handle["cursor"], wait_ms=25_000, follow=True,
        )  # fmt: skip
    assert page["done"]
    types = [event["type"] for event in page["events"]]
    assert types.index("approval_requested") < types.index("approval_approved") < types.index("execution_completed")


@pytest.mark.parametrize("kind", IN_MEMORY)
async def test_an_answer_that_does_not_fit_leaves_the_question_open_and_says_so(doors: Doors, kind: Kind) -> None:
    user = User({"Where to?": accept(target="the moon")})
    async with doors.client(kind, elicitation_callback=user) as client:
        handle = await run(client, "asks-once")
    assert handle["status"] == "paused"
    assert "'target' is one of staging, production" in handle["input_error"]


@pytest.mark.parametrize("kind", LEGACY)
async def test_an_answer_at_another_door_closes_the_dialog_and_the_call_goes_on(doors: Doors, kind: Kind) -> None:
    closed = anyio.Event()

    async def undecided(message: str) -> ElicitResult:
        try:
            await anyio.sleep_forever()
        finally:
            closed.set()
        raise AssertionError("nobody decides")

    user, handles = User({"Where to?": undecided}), list[dict[str, Any]]()
    async with doors.client(kind, elicitation_callback=user) as client, anyio.create_task_group() as group:

        async def wait() -> None:
            handles.append(await run(client, "asks-once"))

        group.start_soon(wait)
        await eventually(lambda: user.asked == ["Where to?"])
        (asked,) = (await doors.vespera.list_inputs(ME)).inputs
        given = {"where": InputAnswer(action="accept", content={"target": "staging"})}
        answered = await doors.vespera.answer_input(ME, asked.task_id, given)
        assert answered.accepted == ["where"]
        with anyio.fail_after(WITHIN):
            await closed.wait()
    assert handles[0]["result"] == {"action": "accept", "content": {"target": "staging", "copies": 1}}


async def test_two_connections_that_watch_a_run_never_ask_their_users_at_once(doors: Doors) -> None:
    decided = anyio.Event()

    async def decide(message: str) -> ElicitResult:
        await decided.wait()
        return accept(target="staging")

    first, second = User({"Where to?": decide}), User({"Where to?": accept(target="production")})
    handles = list[dict[str, Any]]()
    async with (
        doors.client("memory-legacy", elicitation_callback=first) as one,
        doors.client("memory-modern", elicitation_callback=second) as other,
        anyio.create_task_group() as group,
    ):

        async def wait() -> None:
            handles.append(await run(one, "asks-once"))

        group.start_soon(wait)
        await eventually(lambda: first.asked == ["Where to?"])
        (asked,) = (await doors.vespera.list_inputs(ME)).inputs
        cursor, wait_ms, news, began = 0, 25_000, True, 0.0
        while news:  # what led to the question; some of it may come after the question itself
            began = anyio.current_time()
            page = await call(
                other, "stream_task_execution_events",
                task_id=asked.task_id, cursor=cursor, wait_ms=wait_ms, follow=True,
            )  # fmt: skip
            assert [each["key"] for each in page["inputs"]] == ["where"]
            cursor, wait_ms, news = page["next_cursor"], 400, bool(page["events"])
        assert anyio.current_time() - began >= 0.4
        assert second.asked == []
        decided.set()
    assert handles[0]["result"]["content"]["target"] == "staging"


async def test_a_call_that_is_given_up_closes_its_dialog_and_leaves_the_question_for_the_next(doors: Doors) -> None:
    async def undecided(message: str) -> ElicitResult:
        await anyio.sleep_forever()
        raise AssertionError("nobody decides")

    user, page = User({"Where to?": undecided}), dict[str, Any]()
    async with doors.client("memory-legacy", elicitation_callback=user) as client:
        async with anyio.create_task_group() as group:
            group.start_soon(run, client, "asks-once")
            await eventually(lambda: user.asked == ["Where to?"])
            group.cancel_scope.cancel()
        (asked,) = (await doors.vespera.list_inputs(ME)).inputs
        user.replies["Where to?"] = accept(target="staging")
        with anyio.fail_after(WITHIN):
            while len(user.asked) < 2:  # the first call may still be on its way out
                page = await call(
                    client, "stream_task_execution_events", task_id=asked.task_id, wait_ms=25_000, follow=True
                )
    assert page["done"]


async def test_while_the_user_thinks_the_client_hears_that_the_call_is_alive(doors: Doors) -> None:
    heard: list[tuple[float, str | None]] = []
    enough = anyio.Event()

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        heard.append((progress, message))
        if sum("Where to?" in (said or "") for _, said in heard) > 3:
            enough.set()

    async def decide(message: str) -> ElicitResult:
        await enough.wait()
        return accept(target="staging")

    await asking_already(doors)
    async with doors.client("memory-legacy", elicitation_callback=User({"Where to?": decide})) as client:
        result = await client.call_tool(
            "execute_task", ASKED_ALREADY | {"wait_ms": 25_000}, progress_callback=on_progress
        )
    assert result.structured_content is not None
    assert result.structured_content["status"] == "completed"
    values = [progress for progress, _ in heard]
    assert values == sorted(set(values))


async def test_a_client_that_hears_nothing_meanwhile_has_its_answer_before_it_gives_up(
    doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watching.SILENT_SECONDS < 60
    monkeypatch.setattr(watching, "SILENT_SECONDS", 0.5)

    async def undecided(message: str) -> ElicitResult:
        await anyio.sleep_forever()
        raise AssertionError("nobody decides")

    user = User({"Where to?": undecided})
    await asking_already(doors)
    async with doors.client("memory-legacy", elicitation_callback=user) as client:
        with anyio.fail_after(WITHIN):
            handle = await call(client, "execute_task", **ASKED_ALREADY, wait_ms=200)
    assert user.asked == ["Where to?"]
    assert [each["key"] for each in handle["inputs"]] == ["where"]


async def first_round(client: Client, **arguments: Any) -> InputRequiredResult:
    asked = await client.session.call_tool("execute_task", arguments, allow_input_required=True)
    assert isinstance(asked, InputRequiredResult)
    assert asked.input_requests is not None
    assert asked.request_state is not None
    return asked


ARGUMENTS: dict[str, Any] = {"title": "It asks", "role": "asks-once", "wait_ms": 25_000}


@asynccontextmanager
async def over_http(place: Place, user: User) -> AsyncGenerator[Client]:
    """A client of the daemon's TCP door, in the revision of 2026."""
    url = await anyio.to_thread.run_sync(lambda: place.ask("/daemon")["url"])
    bearer = {"Authorization": f"Bearer {(place.data_dir / 'token').read_text().strip()}"}
    async with create_mcp_http_client(headers=bearer) as http:
        transport = streamable_http_client(f"{url}/mcp", http_client=http)
        # Without asking for it first: a daemon that begins at a load of ten takes longer than clients wait for that.
        async with Client(transport, mode=LATEST_MODERN_VERSION, elicitation_callback=user) as client:
            yield client


async def test_between_two_rounds_the_daemon_may_be_killed(tmp_path: Path) -> None:
    arguments = ARGUMENTS | {"role": "asker"}
    starts = tmp_path / "starts"
    write_asking_role(tmp_path / "roles-dir", starts)
    with Place(tmp_path) as place:
        daemon = await anyio.to_thread.run_sync(place.start)
        async with over_http(place, User({})) as client:
            asked = await first_round(client, **arguments)
        daemon.kill()
        daemon.wait()
        await anyio.to_thread.run_sync(place.start)
        async with over_http(place, User({})) as client:
            ended = await client.session.call_tool(
                "execute_task", arguments,
                input_responses={"where": accept(target="production")}, request_state=asked.request_state,
            )  # fmt: skip
            tasks = await call(client, "list_tasks")
    assert ended.structured_content is not None
    assert ended.structured_content["result"]["result"] == {"action": "accept", "content": PRODUCTION}
    assert tasks["total"] == 1
    assert starts.read_text().split() == ["started", "started"]


async def test_the_state_between_two_rounds_is_bound_to_who_asked_and_what_for(doors: Doors) -> None:
    user = User({})
    replies: Any = {"where": accept(target="production")}
    async with doors.client("memory-modern", elicitation_callback=user) as client:
        asked = await first_round(client, **ARGUMENTS)
        for arguments, state in ((ARGUMENTS | {"title": "Other"}, asked.request_state), (ARGUMENTS, "v1.AAAA")):
            with pytest.raises(MCPError, match="requestState"):
                await client.session.call_tool("execute_task", arguments, input_responses=replies, request_state=state)
        async with doors.client("http-modern", elicitation_callback=user) as stranger:
            with pytest.raises(MCPError, match="requestState"):
                await stranger.session.call_tool(
                    "execute_task", ARGUMENTS, input_responses=replies, request_state=asked.request_state
                )
        lost = await client.session.call_tool("execute_task", ARGUMENTS, input_responses=replies)
        assert lost.is_error
        assert (await doors.vespera.list_tasks(ME)).total == 1
        again = [
            await client.session.call_tool(
                "execute_task", ARGUMENTS, input_responses=replies, request_state=asked.request_state
            )
            for _ in range(2)
        ]
    for result in again:
        assert result.structured_content is not None
        assert result.structured_content["result"]["content"] == PRODUCTION
    assert (await doors.vespera.list_tasks(ME)).total == 1


async def test_answers_that_do_not_fit_are_refused_and_change_nothing(doors: Doors) -> None:
    async with doors.client("memory-modern") as client:
        task_id = (await run(client, "asks-once"))["task_id"]

        async def wrong(**given: Any) -> dict[str, Any]:
            return await refused(client, "answer_task_input", task_id=task_id, **given)

        assert "nothing is answered" in (await wrong())["error"]
        assert "'target' is missing" in (await wrong(action="accept"))["error"]
        assert "'copies' is at most 5" in (await wrong(content={"target": "staging", "copies": 9}))["error"]
        assert "no field 'x'" in (await wrong(content={"target": "staging", "x": 1}))["error"]
        assert "at most" in (await wrong(content={"target": "x" * 100_000}))["error"]
        assert "'accept' or 'decline'" in (await wrong(action="perhaps"))["error"]
        assert (await wrong(answers={"where": {"action": "decline"}}, action="accept"))["error_code"] == "INVALID_INPUT"
        unknown = await call(client, "answer_task_input", task_id=task_id, key="whence", action="accept")
        assert (unknown["success"], unknown["ignored"], unknown["open"]) == (False, ["whence"], ["where"])
        assert [each.key for each in (await doors.vespera.get_status(ME, task_id)).inputs or ()] == ["where"]
        first = await call(client, "answer_task_input", task_id=task_id, content={"target": "staging"}, wait_ms=25_000)
        assert first["done"]
        second = await call(client, "answer_task_input", task_id=task_id, key="where", action="decline")
        assert (second["success"], second["ignored"]) == (False, ["where"])
        assert "it has ended (completed)" in second["reason"]
        assert (await wrong(action="accept"))["error_code"] == "CONFLICT"
        idle = (await call(client, "create_task", title="Not started"))["task_id"]
        nothing = await call(client, "answer_task_input", task_id=idle, key="where", action="accept")
        assert (nothing["success"], nothing["reason"]) == (False, "it asks nothing (idle)")


async def test_an_answer_to_one_of_several_questions_says_what_is_still_open(doors: Doors) -> None:
    async def both(context: Any) -> list[str]:
        asked = context.ask_all({"a": ("A?", None), "b": ("B?", None)})
        return [asked["a"].action, asked["b"].action]

    doors.vespera.roles.add(in_loop(both, "both"))
    async with doors.client("memory-modern") as client:
        handle = await run(client, "both")
        assert [each["key"] for each in handle["inputs"]] == ["a", "b"]
        unclear = await refused(client, "answer_task_input", task_id=handle["task_id"], action="accept")
        assert "name one with key; open: a, b" in unclear["hint"]
        answered = await call(
            client, "answer_task_input", task_id=handle["task_id"], key="b", action="decline", wait_ms=25_000
        )
        assert (answered["open"], [each["key"] for each in answered["inputs"]]) == (["a"], ["a"])
        ended = await call(client, "answer_task_input", task_id=handle["task_id"], action="accept", wait_ms=25_000)
    assert ended["result"] == ["accept", "decline"]


async def test_work_that_was_paused_by_somebody_is_waited_for_as_before(doors: Doors) -> None:
    async with doors.client("memory-modern") as client:
        handle = await call(client, "execute_task", title="Held", role="gated", inputs={"steps": 1})
        await waiting(doors.vespera, handle["task_id"], "progress_update")
        await call(client, "pause_task_execution", task_id=handle["task_id"])
        page = await call(
            client, "stream_task_execution_events",
            task_id=handle["task_id"], cursor=handle["cursor"], wait_ms=300, follow=True,
        )  # fmt: skip
    assert "inputs" not in page
    assert not page["done"]


def test_the_reply_to_a_dialog_of_a_daemon_that_was_killed_answers_nothing_else(tmp_path: Path) -> None:
    write_asking_role(tmp_path / "roles-dir", tmp_path / "starts")
    with Place(tmp_path) as place:
        daemon = place.start()
        client = place.client(greet=False)
        client.send(HELLO | {"params": HELLO_PARAMS | {"capabilities": {"elicitation": {}}}})
        assert client.read()["id"] == 0
        client.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        started = client.request("tools/call", name="execute_task", arguments=ARGUMENTS | {"role": "asker"})
        asked = client.read()
        assert asked["method"] == "elicitation/create"
        daemon.kill()
        lost = client.read()
        assert (lost["id"], lost["error"]["data"]["retriable"]) == (started, True)
        client.request("tools/call", name="list_tasks", arguments={})
        (task,) = client.read()["result"]["structuredContent"]["tasks"]
        task_id = task["task_id"]
        waits = client.request(
            "tools/call",
            name="stream_task_execution_events",
            arguments={"task_id": task_id, "wait_ms": 25_000, "follow": True},
        )
        again = client.read()
        assert again["method"] == "elicitation/create"
        for dialog, target in ((asked, "production"), (again, "staging")):
            reply = {"action": "accept", "content": {"target": target}}
            client.send({"jsonrpc": "2.0", "id": dialog["id"], "result": reply})
        ended = client.read()
        assert (ended["id"], ended["result"]["structuredContent"]["done"]) == (waits, True)
        assert place.ask(f"/tasks/{task_id}/result")["result"]["result"]["content"]["target"] == "staging"
        client.close()
