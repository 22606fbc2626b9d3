"""Plans over REST: executed, checked, looked at step by step, answered, put back; and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import orjson
import pytest
from asking_roles import asks_once
from deadlines import WITHIN
from mcp_doors import in_loop
from token_place import Place, opened

from vespera_exec.app.plans.views import ExecutePlan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    import httpx

CHAIN = {
    "name": "chain",
    "steps": [
        {"id": "one", "role": "echo", "inputs": {"x": 1}},
        {"id": "two", "role": "gated", "depends_on": ["one"]},
        {"id": "three", "role": "echo", "inputs": {"x": "${steps.one.output.said.x}"}, "depends_on": ["two"]},
    ],
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "cycle": ({"steps": [{"id": "a", "role": "echo", "depends_on": ["a"]}]}, "a -> a"),
    "role": ({"steps": [{"id": "a", "role": "nobody"}]}, "Role not found: nobody; list_roles shows"),
    "closed": ({"steps": [{"id": "a", "role": "command"}]}, "needs VESPERA_ALLOW_COMMAND_OVER_TCP=1"),
    "reference": ({"steps": [{"id": "a", "role": "echo", "inputs": {"x": "${steps.gone.output}"}}]}, "gone"),
    "code": ({"steps": [{"id": "a", "role": "echo", "inputs": {"x": "${__import__('os')}"}}]}, "__import__"),
    "key": ({"steps": [{"id": "a", "role": "echo", "__class__": {}}]}, "__class__"),
    "id": ({"steps": [{"id": "a\u202e", "role": "echo"}]}, "id"),
    "map": ({"steps": {"a": {"role": "echo"}}}, "steps"),
    "many": ({"steps": [{"id": f"s{n}", "role": "echo"} for n in range(20_001)]}, "20,000"),
    "parallel": ({"steps": [{"id": "a", "role": "echo"}], "max_parallel": 10**9}, "max_parallel"),
    "plan": ({"steps": [{"id": "a", "role": "plan"}]}, "plan"),
    "empty": ({}, "steps"),
}
HELD = {"steps": [{"id": "held", "role": "gated"}, {"id": "other", "role": "gated"}]}


@pytest.fixture
async def place(tmp_path: Path, runtime_dir: Path) -> AsyncIterator[Place]:
    async with opened(tmp_path, runtime_dir / "http.sock") as place:
        for role in (in_loop(echo, "echo"), in_loop(fails, "fails"), asks_once()):
            place.vespera.roles.add(role)
        yield place


async def echo(context: Any) -> dict[str, Any]:
    return {"said": dict(context.inputs)}


async def fails(context: Any) -> None:
    raise ValueError("it broke")


async def executed(client: httpx.AsyncClient, plan: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = await client.post("/plans", json={"plan": plan, "wait_ms": 25_000, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def queued(client: httpx.AsyncClient, plan: dict[str, Any], **more: Any) -> str:
    """The task's id."""
    answer = await client.post("/plans", json={"plan": plan, **more})
    assert answer.status_code == 202, answer.text
    return answer.json()["task_id"]


async def until(claim: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(WITHIN):
        while True:
            if await claim():
                return
            await anyio.sleep(0.01)


async def stands(client: httpx.AsyncClient, task_id: str, **counts: int) -> None:
    """Returns when the steps have these statuses."""

    async def claim() -> bool:
        return (await client.get(f"/tasks/{task_id}/steps")).json()["counts"] == counts

    await until(claim)


async def begun(client: httpx.AsyncClient, task_id: str) -> None:
    """Returns when the work of every step runs."""
    steps = (await client.get(f"/tasks/{task_id}/steps")).json()["steps"]

    async def claim() -> bool:
        tasks = [(await client.get(f"/tasks/{each['task_id']}")).json() for each in steps]
        return all(each["status"] == "running" for each in tasks)

    await until(claim)


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    said = answer.json()
    assert said["error_code"] == code, said
    return said


async def test_a_plan_is_followed_to_its_result(place: Place) -> None:
    task_id = await queued(place.user, CHAIN)
    await stands(place.user, task_id, completed=1, running=1, pending=1)
    status = (await place.user.get(f"/tasks/{task_id}")).json()
    progress = (await place.user.get(f"/tasks/{task_id}/progress")).json()
    place.gate.open.set()
    events = (await place.user.get(f"/tasks/{task_id}/events", headers={"Accept": "text/event-stream"})).text
    result = (await place.user.get(f"/tasks/{task_id}/result")).json()
    ended = (await place.user.get(f"/tasks/{task_id}/progress")).json()
    assert status["plan"]["current"][0]["step"] == "two"
    assert (progress["current_step"], progress["total_steps"], progress["current_step_name"]) == (2, 3, "two")
    assert 33.0 <= progress["percentage"] < 66.0
    assert (ended["current_step"], ended["percentage"], ended["current_step_name"]) == (3, 100.0, None)
    assert result["result"]["output"] == {"three": {"said": {"x": 1}}}
    told = [orjson.loads(line[5:]) for line in events.splitlines() if line.startswith("data:")]
    assert [each["step_id"] for each in told if each.get("type") == "step_completed"] == ["one", "two", "three"]
    assert (await place.user.get("/tasks")).json()["total"] == 1  # the steps' own tasks are not in the list


async def test_a_check_says_what_is_wrong_or_what_runs_beside_what(place: Place) -> None:
    good = (await place.user.post("/plans/check", json={"plan": CHAIN})).json()
    bad = await place.user.post("/plans/check", json={"plan": {"steps": [{"id": "a"}, {"id": "b", "role": 1}]}})
    assert (good["valid"], good["steps"], good["order"]) == (True, 3, [["one"], ["two"], ["three"]])
    assert bad.status_code == 200
    assert {each["step"] for each in bad.json()["problems"]} == {"a", "b"}
    assert (await place.user.get("/tasks")).json()["total"] == 0


async def test_unknown_roles_are_told_together_with_faults_of_form(place: Place) -> None:
    steps: list[Any] = [
        {"id": "a", "role": "ecko", "timeout": 1},
        {"id": "b", "role": "nobody"},
        {"id": "c", "role": "echo", "needs": ["gone"], "fallback": {"role": "noone"}},
        {"id": "d", "role": "plan"},
        {"id": 5, "role": "odd"},
        "nonsense",
    ]
    checked = (await place.user.post("/plans/check", json={"plan": {"steps": steps}})).json()
    said = assert_problem(await place.user.post("/plans", json={"plan": {"steps": steps}}), 400, "INVALID_PLAN")
    told = [(each["step"], each["problem"].partition(";")[0]) for each in checked["problems"]]
    assert said["problems"] == checked["problems"]
    assert {("a", "unknown key 'timeout'"), ("c", "depends_on: there is no step 'gone'")} < set(told)
    assert told[-3:] == [("a", "Role not found: ecko"), ("b", "Role not found: nobody"), ("c", "Role not found: noone")]


async def test_the_schema_is_one_that_the_examples_fit(place: Place) -> None:
    from jsonschema import Draft202012Validator

    answer = await place.user.get("/plans/schema")
    assert answer.headers["content-type"] == "application/schema+json"
    Draft202012Validator.check_schema(answer.json())
    validator = Draft202012Validator(answer.json())
    assert not list(validator.iter_errors(CHAIN))  # pyright: ignore[reportUnknownMemberType]
    assert list(validator.iter_errors({"steps": [{"id": "a"}]}))  # pyright: ignore[reportUnknownMemberType]


async def test_a_key_used_again_starts_no_second_plan(place: Place) -> None:
    first = await executed(place.user, {"steps": [{"id": "a", "role": "echo"}]}, idempotency_key="k")
    again = await executed(place.user, {"steps": [{"id": "a", "role": "echo"}]}, idempotency_key="k")
    other = await place.user.post("/plans", json={"plan": CHAIN, "idempotency_key": "k"})
    assert (again["task_id"], again["repeated"]) == (first["task_id"], True)
    assert_problem(other, 409, "CONFLICT")


# refusals


@pytest.mark.parametrize(("plan", "words"), BAD.values(), ids=BAD)
async def test_a_bad_plan_is_a_400_that_names_all_its_problems(place: Place, plan: dict[str, Any], words: str) -> None:
    said = assert_problem(await place.user.post("/plans", json={"plan": plan}), 400, "INVALID_PLAN")
    assert any(words in each["problem"] for each in said["problems"]), said["problems"]
    assert (await place.user.get("/tasks")).json()["total"] == 0


async def test_a_blank_name_or_title_is_as_good_as_none(place: Place) -> None:
    done = await executed(place.user, {"name": " ", "steps": [{"id": "a", "role": "echo", "title": "  "}]})
    (step,) = (await place.user.get(f"/tasks/{done['task_id']}/steps")).json()["steps"]
    assert done["status"] == "completed"
    assert (step["title"], (await place.user.get(f"/tasks/{step['task_id']}")).json()["title"]) == ("a", "a")


async def test_a_plan_that_the_check_finds_valid_is_not_refused_afterwards(place: Place) -> None:
    named = [{"name": text, "steps": [{"id": "a", "role": "echo"}]} for text in ("\x1b[2J", "a\nb", "x" * 200)]
    for plan in named:
        valid = (await place.user.post("/plans/check", json={"plan": plan})).json()["valid"]
        assert valid == ((await place.user.post("/plans", json={"plan": plan})).status_code == 202), plan


async def test_what_is_no_plan_at_all_is_refused_at_the_door(place: Place) -> None:
    post = place.user.post
    yaml = {"Content-Type": "application/yaml"}
    assert_problem(await post("/plans", content=b"steps: []", headers=yaml), 415, "WRONG_MEDIA_TYPE")
    bodies: list[dict[str, Any]] = [{"plan": []}, {"plan": CHAIN, "plam": 1}, {"plan": CHAIN, "variables": 3}, {}]
    for body in bodies:
        assert_problem(await post("/plans", json=body), 400, "INVALID_INPUT")
    json = {"Content-Type": "application/json"}
    deep = b'{"plan": {"steps": ' + b"[" * 200 + b"]" * 200 + b"}}"
    large = b'{"plan": {"steps": [{"id": "a", "role": "echo", "inputs": {"x": "' + b"x" * 5_000_000 + b'"}}]}}'
    values = b'{"plan": {"x": [' + b"0," * 400_001 + b"0]}}"
    for content, status, code in (
        (deep, 400, "INVALID_INPUT"),
        (large, 413, "BODY_TOO_LARGE"),
        (values, 400, "INVALID_INPUT"),
        (b'{"plan": {"name": "\\ud800"}}', 400, "INVALID_INPUT"),
        (b'{"plan": {"steps": [NaN]}}', 400, "INVALID_INPUT"),
    ):
        assert_problem(await post("/plans", content=content, headers=json), status, code)
    elsewhere = await post("/executions", content=b'{"inputs": {"x": [' + b"0," * 50_001 + b"0]}}", headers=json)
    assert_problem(elsewhere, 400, "INVALID_INPUT")


@pytest.mark.full
async def test_a_plan_of_twenty_thousand_steps_comes_through_the_door(place: Place) -> None:
    steps = [
        {"id": f"s{n}", "role": "gated", "depends_on": [f"s{n - 1}"] if n else [], "inputs": {"steps": 1, "name": "x"}}
        for n in range(20_000)
    ]
    checked = (await place.local.post("/plans/check", json={"plan": {"steps": steps}})).json()
    assert (checked["valid"], checked["steps"]) == (True, 20_000)


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "after=-2", "after=x", "status=bogus", "limit=1&limit=2", "what=1"]
)
async def test_a_page_of_steps_that_cannot_be_made_is_a_400(place: Place, query: str) -> None:
    done = await executed(place.user, {"steps": [{"id": "a", "role": "echo"}]})
    assert_problem(await place.user.get(f"/tasks/{done['task_id']}/steps?{query}"), 400, "INVALID_INPUT")


async def test_a_task_without_a_plan_has_no_steps(place: Place) -> None:
    task = (await place.user.post("/executions", json={"title": "t", "role": "echo", "wait_ms": 25_000})).json()
    assert_problem(await place.user.get(f"/tasks/{task['task_id']}/steps"), 409, "CONFLICT")


# steps


async def test_a_step_is_paused_resumed_and_cancelled(place: Place) -> None:
    task_id = await queued(place.user, HELD)
    await stands(place.user, task_id, running=2)
    await begun(place.user, task_id)
    step = f"/tasks/{task_id}/steps/held"
    for action in ("pause", "resume", "cancel"):
        answer = await place.user.post(f"{step}/{action}", json={"reason": "a try"})
        assert answer.status_code in (200, 202), answer.text
        assert answer.json()["success"]
    place.gate.open.set()
    await stands(place.user, task_id, cancelled=1, completed=1)
    assert (await place.user.post(f"{step}/cancel", json={})).status_code == 409
    for unknown in ("nothing", "%00", "a" * 300, "..%2f.."):
        for action in ("cancel", "pause", "resume"):
            answer = await place.user.post(f"/tasks/{task_id}/steps/{unknown}/{action}", json={})
            assert answer.status_code in (400, 404, 409), answer.text


async def test_the_task_of_a_step_or_a_plan_is_executed_by_nothing_but_its_plan(place: Place) -> None:
    done = await executed(place.user, {"steps": [{"id": "a", "role": "fails"}]})
    (step,) = (await place.user.get(f"/tasks/{done['task_id']}/steps")).json()["steps"]
    before = (await place.user.get(f"/tasks/{step['task_id']}")).json()["session_id"]
    for task_id in (step["task_id"], step["session_id"]):
        said = assert_problem(await place.user.post("/executions", json={"task_id": task_id}), 409, "CONFLICT")
        assert "step a of a plan" in said["detail"]
    other = await place.user.post("/executions", json={"task_id": done["task_id"], "role": "echo"})
    assert "executes a plan" in assert_problem(other, 400, "INVALID_INPUT")["detail"]
    assert (await place.user.get(f"/tasks/{step['task_id']}")).json()["session_id"] == before


async def test_a_full_queue_takes_no_plan(tmp_path: Path, runtime_dir: Path) -> None:
    async with opened(tmp_path, runtime_dir / "http.sock", max_concurrent=1, max_queued=1) as place:
        one = {"steps": [{"id": "held", "role": "gated"}]}
        first = await queued(place.user, one)
        await stands(place.user, first, running=1)
        await begun(place.user, first)
        second = await queued(place.user, one)
        await until(lambda: is_queued(place))
        said = assert_problem(await place.user.post("/plans", json={"plan": HELD}), 409, "CONFLICT")
        place.gate.open.set()
        for task_id in (first, second):
            await stands(place.user, task_id, completed=1)
    assert "queue is full" in said["detail"]


async def is_queued(place: Place) -> bool:
    return place.vespera.describe().queued == 1


async def test_the_question_of_a_step_is_answered_at_the_plan_or_at_the_step(place: Place) -> None:
    plan = {"steps": [{"id": "first", "role": "asks-once"}, {"id": "second", "role": "asks-once"}]}
    task_id = await queued(place.user, plan)
    await stands(place.user, task_id, waiting=2)
    asked = (await place.user.get(f"/tasks/{task_id}/inputs")).json()
    listed = (await place.user.get("/inputs")).json()
    own = {each["step"]: each for each in listed["inputs"]}
    reply = {"action": "accept", "content": {"target": "staging"}}
    at_plan = await place.user.post(f"/tasks/{task_id}/inputs", json={"answers": {"first/where": reply}})
    at_step = await place.user.post(f"/tasks/{own['second']['task_id']}/inputs", json={"answers": {"where": reply}})
    twice = await place.user.post(f"/tasks/{task_id}/inputs", json={"answers": {"first/where": reply}})
    await stands(place.user, task_id, completed=2)
    assert {each["key"] for each in asked["inputs"]} == {"first/where", "second/where"}
    assert (listed["total"], {each["parent_task_id"] for each in own.values()}) == (2, {task_id})
    assert at_plan.json()["accepted"] == ["first/where"]
    assert at_plan.json()["open"] == ["second/where"]
    assert at_step.json()["accepted"] == ["where"]
    assert twice.status_code == 409


async def test_a_question_of_a_step_waits_at_the_plan_for_the_next_server(tmp_path: Path, runtime_dir: Path) -> None:
    ship = {"id": "ship", "role": "command", "inputs": {"argv": ["echo", "gone"]}, "approval": "Ship it?"}
    sock = runtime_dir / "http.sock"
    async with opened(tmp_path, sock) as first:
        task_id = await queued(first.local, {"steps": [ship]})
        await stands(first.local, task_id, waiting=1)
    async with opened(tmp_path, sock) as second:
        asked = list[dict[str, Any]]()

        async def is_asked() -> bool:
            asked[:] = (await second.local.get(f"/tasks/{task_id}/inputs")).json()["inputs"]
            return bool(asked)

        await until(is_asked)
        answered = await second.local.post(f"/tasks/{task_id}/inputs", json={"action": "accept"})
        await stands(second.local, task_id, completed=1)
    ((key, message),) = ((each["key"], each["message"]) for each in asked)
    assert (key.split("/")[0], message) == ("ship", "Ship it?")
    assert answered.json()["accepted"] == [key]


# checkpoints, dead letters, capacity


async def test_a_plan_that_failed_goes_on_from_its_last_checkpoint(place: Place) -> None:
    broken = {"steps": [{"id": "good", "role": "echo"}, {"id": "bad", "role": "flaky", "depends_on": ["good"]}]}
    tries = list[int]()

    async def flaky(context: Any) -> str:
        tries.append(1)
        if len(tries) < 2:
            raise ValueError("not yet")
        return "now"

    place.vespera.roles.add(in_loop(flaky, "flaky"))
    done = await executed(place.user, broken)
    listed = (await place.user.get(f"/tasks/{done['task_id']}/checkpoints")).json()["checkpoints"]
    after_good = next(each for each in listed if each["step"] == "good")
    shown = (await place.user.get(f"/checkpoints/{after_good['checkpoint_id']}")).json()
    dead = (await place.user.get("/dead-letters")).json()
    restored = await place.user.post(f"/checkpoints/{after_good['checkpoint_id']}/restore", json={"wait_ms": 25_000})
    assert done["status"] == "failed"
    assert shown["completed_steps"] == 1
    assert [each["task_id"] for each in dead["dead_letters"]] == [done["task_id"]]
    assert restored.status_code == 200, restored.text
    assert restored.json()["session_id"] != done["session_id"]
    steps = (await place.user.get(f"/tasks/{done['task_id']}/steps")).json()
    assert steps["counts"] == {"completed": 2}
    assert (await place.user.get("/dead-letters")).json()["total"] == 0


async def test_a_checkpoint_is_made_of_what_runs_and_gone_back_to_in_place(place: Place) -> None:
    task_id = await queued(place.user, CHAIN)
    await stands(place.user, task_id, completed=1, running=1, pending=1)
    made = await place.user.post(f"/tasks/{task_id}/checkpoints", json={"metadata": {"why": "to be sure"}})
    assert (made.status_code, made.json()["metadata"]["why"]) == (201, "to be sure")
    restored = await place.user.post(f"/tasks/{task_id}/restore", json={})
    assert restored.status_code == 202, restored.text
    assert restored.json()["in_place"]
    place.gate.open.set()
    await stands(place.user, task_id, completed=3)
    assert_problem(await place.user.post("/checkpoints/nothing/restore", json={}), 404, "CHECKPOINT_NOT_FOUND")


async def test_what_failed_for_good_is_tried_again_or_let_go(place: Place) -> None:
    for title in ("one", "two"):
        task = (await place.user.post("/tasks", json={"title": title, "role": "fails", "max_retries": 0})).json()
        await place.user.post("/executions", json={"task_id": task["task_id"], "wait_ms": 25_000})
    page = (await place.user.get("/dead-letters?limit=1")).json()
    (letter,) = page["dead_letters"]
    again = (await place.user.post("/dead-letters/requeue", json={"task_ids": [letter["task_id"], "nothing"]})).json()
    assert (letter["error"]["message"], page["total"]) == ("it broke", 2)
    assert [each["task_id"] for each in again["requeued"]] == [letter["task_id"]]
    assert [each["task_id"] for each in again["refused"]] == ["nothing"]

    async def back_again() -> bool:
        return (await place.user.get("/dead-letters")).json()["total"] == 2

    await until(back_again)
    assert len((await place.user.post("/dead-letters/discard", json={"all": True})).json()["discarded"]) == 2
    assert (await place.user.get("/dead-letters")).json()["total"] == 0
    for nothing in ({}, {"task_ids": ["x"], "all": True}, {"task_ids": ["x"] * 1001}):
        assert_problem(await place.user.post("/dead-letters/requeue", json=nothing), 400, "INVALID_INPUT")


async def test_capacity_is_shown_also_where_there_is_none(place: Place) -> None:
    assert (await place.user.get("/capacity")).json() == {"pools": [], "waiting": [], "waiting_total": 0}


# who sees it


async def test_another_principal_sees_no_step_no_checkpoint_and_no_dead_letter(place: Place) -> None:
    alice, bob = await place.bob("alice"), await place.bob("bob")
    hers = await executed(alice, {"steps": [{"id": "a", "role": "fails"}]})
    steps = (await alice.get(f"/tasks/{hers['task_id']}/steps")).json()
    (checkpoint, *_) = (await alice.get(f"/tasks/{hers['task_id']}/checkpoints")).json()["checkpoints"]
    child = steps["steps"][0]["task_id"]
    assert child is not None
    for any_id in (hers["task_id"], hers["session_id"], child):
        for path in ("", "/steps", "/checkpoints", "/result", "/events"):
            assert (await bob.get(f"/tasks/{any_id}{path}")).status_code == 404
        for action in ("cancel", "pause", "resume"):
            assert (await bob.post(f"/tasks/{any_id}/steps/a/{action}", json={})).status_code == 404
    for path in ("", "/restore"):
        answer = await bob.request("POST" if path else "GET", f"/checkpoints/{checkpoint['checkpoint_id']}{path}")
        assert_problem(answer, 404, "CHECKPOINT_NOT_FOUND")
    assert (await bob.get("/dead-letters")).json()["total"] == 0
    assert (await alice.get("/dead-letters")).json()["total"] == 1
    requeued = (await bob.post("/dead-letters/requeue", json={"task_ids": [hers["task_id"]]})).json()
    assert [each["error_code"] for each in requeued["refused"]] == ["TASK_NOT_FOUND"]


async def test_who_may_only_read_starts_and_changes_nothing(place: Place) -> None:
    handle = await place.vespera.plans.execute(_auditor(), ExecutePlan(plan=HELD))
    reader = await place.bob("auditor", scopes=["read"])
    task_id = handle.task_id
    for path, body in (
        ("/plans", {"plan": CHAIN}),
        (f"/tasks/{task_id}/steps/held/cancel", {}),
        (f"/tasks/{task_id}/checkpoints", {}),
        (f"/tasks/{task_id}/restore", {}),
        ("/checkpoints/nothing/restore", {}),
        ("/dead-letters/requeue", {"all": True}),
        ("/dead-letters/discard", {"all": True}),
    ):
        assert_problem(await reader.post(path, json=body), 403, "PERMISSION_DENIED")
    assert (await reader.get(f"/tasks/{task_id}/steps")).json()["total"] == 2
    assert (await reader.post("/plans/check", json={"plan": CHAIN})).status_code == 200


def _auditor() -> Any:
    from vespera_exec.model.principal import Caller

    return Caller(principal="token:auditor", scopes=frozenset({"read", "operate"}), over_tcp=True)
