"""Plans as an agent sees them: started by a tool, followed as any task, answered, looked at step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import orjson
import pytest
from asking_roles import User, accept, asks_once
from deadlines import WITHIN
from mcp_doors import IN_MEMORY, KINDS, ME, Doors, Kind, call, eventually, in_loop, opened, refused, text_of
from task_peers import WAYS, Way, connected, settled

from vespera_exec.app.plans.views import ExecutePlan
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

APPROVED = {"steps": [{"id": "build", "role": "echo"}, {"id": "ship", "role": "echo", "approval": "Ship it?"}]}
ASKS: dict[str, Any] = {"steps": [{"id": "ask", "role": "asks-once"}, {"id": "aside", "role": "echo"}]}


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    async with opened(tmp_path, http=True, heartbeat_seconds=0.05, toolsets="core,plans") as doors:
        doors.vespera.roles.add(echo())
        doors.vespera.roles.add(fails())
        doors.vespera.roles.add(asks_once())
        yield doors


def echo() -> Any:
    async def work(context: Any) -> dict[str, Any]:
        return {"said": dict(context.inputs)}

    return in_loop(work, "echo")


def fails() -> Any:
    async def work(context: Any) -> None:
        raise ValueError("it broke")

    return in_loop(work, "fails")


def gated(steps: int, *, at_once: int = 4) -> dict[str, Any]:
    """Steps that need nothing of each other, and wait for the gate."""
    names = [f"a-step-with-a-rather-long-name-{number:05}" for number in range(steps)]
    return {"name": "large", "max_parallel": at_once, "steps": [{"id": name, "role": "gated"} for name in names]}


async def at_work(doors: Doors, task_id: str, steps: int) -> None:
    """Returns when so many steps of the plan run."""

    async def at_work() -> bool:
        found = (await doors.vespera.list_steps(ME, task_id, status="running", limit=1000)).steps
        begun = [await doors.vespera.get_status(ME, each.task_id or "") for each in found]
        return len(begun) == steps and all(each.status == "running" for each in begun)

    await until(at_work)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_plan_is_done_in_the_answer_with_what_its_steps_gave_each_other(doors: Doors, kind: Kind) -> None:
    plan = {
        "name": "greet",
        "variables": {"whom": "nobody"},
        "steps": [
            {"id": "first", "role": "echo", "inputs": {"whom": "${variables.whom}"}},
            {"id": "then", "role": "echo", "inputs": {"text": "hello ${steps.first.output.said.whom}"}},
        ],
        "output": {"text": "${steps.then.output.said.text}"},
    }
    async with doors.client(kind) as client:
        done = await call(client, "execute_plan", plan=plan, variables={"whom": "world"}, wait_ms=25_000)
        assert (done["status"], done["done"]) == ("completed", True)
        assert done["result"]["output"] == {"text": "hello world"}
        status = await call(client, "get_task_execution_status", task_id=done["task_id"])
        assert status["title"] == "greet"
        assert status["plan"]["counts"] == {"completed": 2}
        assert status["plan"]["last_checkpoint"]
        result = await call(client, "get_task_result", task_id=done["task_id"])
        assert result["result"]["counts"] == {"completed": 2}
        assert [row["task_id"] for row in (await call(client, "list_tasks"))["tasks"]] == [done["task_id"]]


@pytest.mark.parametrize(
    ("plan", "step", "words"),
    [
        ({"steps": [{"id": "a", "role": "echo", "needs": ["b"]}, {"id": "b", "role": "echo", "needs": ["a"]}]},
         "a", "a -> b -> a"),
        ({"steps": [{"id": "a", "role": "nobody"}]}, "a", "nobody"),
        ({"steps": [{"id": "a", "role": "echo", "inputs": {"x": "${steps.z.output}"}}]}, "a", "z"),
        ({"steps": [{"id": "a", "role": "echo", "rolle": 1}]}, "a", "rolle"),
        ({"steps": [{"id": "a", "role": "echo"}, {"id": "a", "role": "echo"}]}, "a", "a"),
        ({"steps": []}, None, "steps"),
        ({"steps": "all of them"}, None, "steps"),
        ({"steps": [{"id": "../../etc", "role": "echo"}]}, "../../etc", "id"),
        ({"steps": [{"id": f"s{n}", "role": "echo"} for n in range(20_001)]}, None, "20,000"),
    ],
    ids=["cycle", "role", "reference", "key", "twice", "none", "text", "id", "too many"],
)  # fmt: skip
async def test_a_plan_that_is_refused_says_what_is_wrong_with_which_step_and_starts_nothing(
    doors: Doors, plan: dict[str, Any], step: str | None, words: str
) -> None:
    async with doors.client("memory-modern") as client:
        error = await refused(client, "execute_plan", plan=plan)
        assert error["error_code"] == "INVALID_PLAN"
        assert any(each["step"] == step and words in each["problem"] for each in error["problems"]), error["problems"]
        assert len(orjson.dumps(error)) < 60_000
        assert (await call(client, "list_tasks"))["tasks"] == []


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_takes_tasks_gets_the_problems_of_a_plan_at_once(doors: Doors, way: Way) -> None:
    async with connected(doors, way) as peer:
        said = await peer.request("tools/call", name="execute_plan", arguments={"plan": {"steps": [{"id": "a"}]}})
    assert said["isError"]
    assert said["structuredContent"]["problems"] == [{"step": "a", "problem": "role: is missing"}]


async def test_a_status_is_small_also_for_ten_thousand_steps_while_they_run_and_when_they_ended(doors: Doors) -> None:
    handle = await doors.vespera.plans.execute(ME, ExecutePlan(plan=gated(10_000)))
    await at_work(doors, handle.task_id, 4)

    async def ended() -> bool:
        return (await doors.vespera.get_status(ME, handle.task_id)).done

    async with doors.client("memory-modern") as client:
        for counts in ({"pending": 9996, "running": 4}, {"cancelled": 10_000}):
            result = await client.call_tool("get_task_execution_status", {"task_id": handle.task_id})
            assert len(text_of(result)) / 4 < 300
            assert result.structured_content is not None
            assert result.structured_content["plan"]["counts"] == counts
            await doors.vespera.cancel(ME, handle.task_id)
            await until(ended)


async def test_steps_are_read_page_by_page_and_by_their_status(doors: Doors) -> None:
    plan = {
        "steps": [
            {"id": "good", "role": "echo", "title": "The good one"},
            {"id": "bad", "role": "fails"},
            {"id": "after", "role": "echo", "depends_on": ["bad"]},
        ]
    }
    async with doors.client("memory-modern") as client:
        done = await client.call_tool("execute_plan", {"plan": plan, "wait_ms": 25_000})
        assert done.is_error
        assert done.structured_content is not None
        assert done.structured_content["error_code"] == "STEP_FAILED"
        task_id = done.structured_content["task_id"]
        first = await call(client, "get_plan_steps", task_id=task_id, limit=2)
        rest = await call(client, "get_plan_steps", task_id=task_id, after=first["next_after"])
        failed = await call(client, "get_plan_steps", task_id=task_id, status="failed")
        wrong = await refused(client, "get_plan_steps", task_id=task_id, status="bad")
        good, bad = first["steps"]
        told = await call(client, "get_task_result", task_id=good["task_id"])
        nothing = await refused(client, "get_plan_steps", task_id=good["task_id"])
    assert (good["id"], good["title"], good["status"]) == ("good", "The good one", "completed")
    assert (bad["id"], bad["error"]["message"]) == ("bad", "it broke")
    (after,) = rest["steps"]
    assert (after["status"], after["reason"], after["depends_on"]) == ("skipped", "needs bad, which failed", ["bad"])
    assert "next_after" not in rest
    assert first["counts"] == {"completed": 1, "failed": 1, "skipped": 1}
    assert ([each["id"] for each in failed["steps"]], failed["total"]) == (["bad"], 1)
    assert wrong["error_code"] == "INVALID_INPUT"
    assert told["result"] == {"said": {}}
    assert nothing["error_code"] == "CONFLICT"


async def test_one_step_is_paused_resumed_and_cancelled_and_the_others_go_on(doors: Doors) -> None:
    async with doors.client("memory-modern") as client:
        handle = await call(client, "execute_plan", plan=gated(2))
        task_id = handle["task_id"]
        await at_work(doors, task_id, 2)
        first, second = (await call(client, "get_plan_steps", task_id=task_id))["steps"]
        act = {"task_id": task_id, "step": first["id"]}
        for action in ("pause", "resume", "cancel"):
            answer = await call(client, "control_plan_step", **act, action=action)
            assert answer["success"], answer
        assert (await refused(client, "control_plan_step", task_id=task_id, step="x", action="cancel"))["error"]
        doors.gate.open.set()
        await call(client, "stream_task_execution_events", task_id=task_id, wait_ms=25_000, follow=True)
        steps = (await call(client, "get_plan_steps", task_id=task_id))["steps"]
        again = await call(client, "control_plan_step", **act, action="cancel")
    assert {each["id"]: each["status"] for each in steps} == {first["id"]: "cancelled", second["id"]: "completed"}
    assert not again["success"]
    assert again["reason"]


# questions of steps


@pytest.mark.parametrize("kind", KINDS)
async def test_the_approval_of_a_step_is_asked_by_the_client_that_waits_for_the_plan(doors: Doors, kind: Kind) -> None:
    user = User({"Ship it?": accept()})
    async with doors.client(kind, elicitation_callback=user) as client:
        done = await call(client, "execute_plan", plan=APPROVED, wait_ms=25_000)
    assert (done["status"], user.asked) == ("completed", ["Ship it?"])


@pytest.mark.parametrize("kind", IN_MEMORY)
async def test_a_form_of_a_step_is_filled_by_who_only_follows_the_plan(doors: Doors, kind: Kind) -> None:
    user = User({"Where to?": accept(target="staging")})
    async with doors.client("memory-modern") as starter:
        handle = await call(starter, "execute_plan", plan=ASKS)
        await eventually_asks(doors, handle["task_id"], ["ask/where"])
    cursor = doors.vespera.describe().head
    async with doors.client(kind, elicitation_callback=user) as client:
        page = await call(
            client,
            "stream_task_execution_events",
            task_id=handle["task_id"],
            cursor=cursor,
            wait_ms=25_000,
            follow=True,
        )
        result = (await call(client, "get_task_result", task_id=handle["task_id"]))["result"]
    assert page["done"]
    assert user.asked == ["Where to?"]
    assert result["output"]["ask"]["content"]["target"] == "staging"


@pytest.mark.parametrize("way", WAYS)
async def test_a_plan_that_waits_for_an_approval_is_an_mcp_task_that_requires_input(doors: Doors, way: Way) -> None:
    async with connected(doors, way) as peer:
        task = await peer.request("tools/call", name="execute_plan", arguments={"plan": APPROVED})
        assert task["resultType"] == "task"
        waiting = await settled(peer, task["taskId"], status="input_required")
        ((key, asked),) = waiting["inputRequests"].items()
        assert key.startswith("ship/")
        assert asked["params"]["message"] == "Ship it?"
        answer: dict[str, Any] = {key: {"action": "accept", "content": {}}, "ship/nothing": {"action": "accept"}}
        await peer.request("tasks/update", taskId=task["taskId"], inputResponses=answer)
        done = await settled(peer, task["taskId"])
    assert done["status"] == "completed"
    assert done["result"]["structuredContent"]["result"]["counts"] == {"completed": 2}


@pytest.mark.parametrize("way", WAYS)
async def test_a_plan_that_waits_is_cancelled_as_an_mcp_task_with_all_its_steps(doors: Doors, way: Way) -> None:
    plan = {
        "steps": [*ASKS["steps"], {"id": "held", "role": "gated"}, {"id": "then", "role": "echo", "needs": ["ask"]}]
    }
    async with connected(doors, way) as peer:
        task = await peer.request("tools/call", name="execute_plan", arguments={"plan": plan})
        await settled(peer, task["taskId"], status="input_required")
        await at_work(doors, task["taskId"], 1)
        await peer.request("tasks/cancel", taskId=task["taskId"])
        ended = await settled(peer, task["taskId"])
    steps = (await doors.vespera.list_steps(ME, task["taskId"])).steps
    assert ended["status"] == "cancelled"
    assert {each.id: each.status for each in steps} == {
        "ask": "cancelled", "aside": "completed", "held": "cancelled", "then": "cancelled",
    }  # fmt: skip


async def test_a_listener_hears_that_a_step_asks(doors: Doors) -> None:
    async with connected(doors, "http") as peer:
        task = await peer.request("tools/call", name="execute_plan", arguments={"plan": APPROVED})
        async with peer.listen(taskIds=[task["taskId"]]) as heard:
            await anext(heard)
            with anyio.fail_after(WITHIN):
                while (message := await anext(heard))["params"]["status"] != "input_required":
                    pass
    assert next(iter(message["params"]["inputRequests"])).startswith("ship/")


async def test_without_dialogs_the_agent_is_told_what_is_asked_and_passes_the_answer_on(doors: Doors) -> None:
    async with doors.client("memory-modern") as client:
        asked = await call(client, "execute_plan", plan=APPROVED, wait_ms=25_000)
        (question,) = asked["inputs"]
        status = await call(client, "get_task_execution_status", task_id=asked["task_id"])
        seen = (await doors.vespera.list_inputs(ME)).inputs
        unknown = await call(client, "answer_task_input", task_id=asked["task_id"], key="build/sure", action="accept")
        done = await call(client, "answer_task_input", task_id=asked["task_id"], action="accept", wait_ms=25_000)
    assert not asked["done"]
    assert (question["key"].split("/")[0], question["message"]) == ("ship", "Ship it?")
    assert [each["key"] for each in status["inputs"]] == [question["key"]]
    assert [(each.parent_task_id, each.step) for each in seen] == [(asked["task_id"], "ship")]
    assert seen[0].task_id != asked["task_id"]
    assert (unknown["success"], unknown["ignored"], unknown["open"]) == (False, ["build/sure"], [question["key"]])
    assert (done["accepted"], done["status"], done["done"]) == ([question["key"]], "completed", True)


async def test_an_answer_that_does_not_fit_records_none_of_those_beside_it(doors: Doors) -> None:
    two = {"steps": [{"id": "one", "role": "asks-once"}, {"id": "two", "role": "asks-once"}]}
    async with doors.client("memory-modern") as client:
        handle = await call(client, "execute_plan", plan=two)
        await eventually_asks(doors, handle["task_id"], ["one/where", "two/where"])
        good, bad = ({"action": "accept", "content": {"target": target}} for target in ("staging", "the moon"))
        answers = {"one/where": good, "two/where": bad}
        wrong = await refused(client, "answer_task_input", task_id=handle["task_id"], answers=answers)
        assert wrong["error_code"] == "INVALID_INPUT"
        assert wrong["error"].startswith("the answer to two/where: ")
        await eventually_asks(doors, handle["task_id"], ["one/where", "two/where"])
        answers["two/where"] = good
        done = await call(client, "answer_task_input", task_id=handle["task_id"], answers=answers, wait_ms=25_000)
    assert sorted(done["accepted"]) == ["one/where", "two/where"]
    assert done["status"] == "completed"


async def test_a_step_that_is_not_approved_fails_and_the_plan_says_so(doors: Doors) -> None:
    async with doors.client("memory-modern") as client:
        asked = await call(client, "execute_plan", plan=APPROVED, wait_ms=25_000)
        no = await call(client, "answer_task_input", task_id=asked["task_id"], action="decline", wait_ms=25_000)
        steps = (await call(client, "get_plan_steps", task_id=asked["task_id"], status="failed"))["steps"]
    assert (no["status"], no["error_code"]) == ("failed", "STEP_FAILED")
    assert [each["error"]["code"] for each in steps] == ["APPROVAL_REJECTED"]


async def test_news_of_other_steps_does_not_end_a_wait_while_a_question_stays_open(doors: Doors) -> None:
    plan = {"steps": [{"id": "ask", "role": "asks-once"}, {"id": "slow", "role": "gated", "inputs": {"steps": 3}}]}
    async with doors.client("memory-modern") as client:
        handle = await call(client, "execute_plan", plan=plan)
        await eventually_asks(doors, handle["task_id"], ["ask/where"])
        await at_work(doors, handle["task_id"], 1)
        cursor = doors.vespera.describe().head
        pages = list[dict[str, Any]]()

        async def follow() -> None:
            follow = {"task_id": handle["task_id"], "cursor": cursor, "wait_ms": 25_000, "follow": True}
            pages.append(await call(client, "stream_task_execution_events", **follow))

        async with anyio.create_task_group() as group:
            group.start_soon(follow)
            doors.gate.open.set()

            async def slow_is_done() -> bool:
                return bool((await doors.vespera.list_steps(ME, handle["task_id"], status="completed")).steps)

            await until(slow_is_done)
            assert pages == []
            await call(client, "answer_task_input", task_id=handle["task_id"], action="decline")
            with anyio.fail_after(WITHIN):
                await eventually(lambda: bool(pages))
    assert pages[0]["done"]
    assert {each.get("step_id") for each in pages[0]["events"]} >= {"slow"}


async def test_who_may_only_read_neither_starts_a_plan_nor_stops_a_step(doors: Doors) -> None:
    auditor = Caller(principal="token:auditor", scopes=frozenset({"read"}), over_tcp=True)
    async with doors.client("memory-modern", caller=auditor) as client:
        for tool, arguments in (
            ("execute_plan", {"plan": APPROVED}),
            ("control_plan_step", {"task_id": "x" * 8, "step": "a", "action": "cancel"}),
        ):
            assert (await refused(client, tool, **arguments))["error_code"] == "PERMISSION_DENIED"


async def eventually_asks(doors: Doors, task_id: str, keys: list[str]) -> None:
    async def asks() -> bool:
        return sorted(each.key for each in (await doors.vespera.get_status(ME, task_id)).inputs or ()) == keys

    await until(asks)


async def until(claim: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(WITHIN):
        while True:
            if await claim():
                return
            await anyio.sleep(0.01)
