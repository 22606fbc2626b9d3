"""A second principal at every door: what another has made does not exist for it, nor is there a hint that it does.

Every route, tool, resource, prompt and method stands in a table here; one that does not is a failed test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import orjson
import pytest
from deadlines import WITHIN
from starlette.routing import Route
from task_peers import HttpPeer, Refused, execute
from token_place import LOCAL, Place, opened

from roles.definition import Permissions, Role
from vespera_exec.app.token_views import NewToken
from vespera_exec.server.mcp.tools import TOOLSETS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    import httpx
    from mcp import Client

MARK = "sesame"
ALL = ["read", "operate", "worker"]
NO_ID = None
LOCAL_ONLY = "for the local user alone"
PLAN = {"steps": [{"id": "asks", "role": "asking"}]}

# What is sent with each route that has an id.
WITH_ID: dict[tuple[str, str], dict[str, Any] | None] = {
    ("GET", ""): None,
    ("GET", "/definition"): None,
    ("GET", "/progress"): None,
    ("GET", "/events"): None,
    ("GET", "/result"): None,
    ("GET", "/output"): None,
    ("GET", "/metrics"): None,
    ("GET", "/inputs"): None,
    ("POST", "/cancel"): {"reason": "mine now"},
    ("POST", "/pause"): {"reason": "mine now"},
    ("POST", "/resume"): {"reason": "mine now"},
    ("POST", "/inputs"): {"answers": {"open": {"action": "accept"}}},
}
ROUTES: dict[tuple[str, str], dict[str, Any] | str | None] = {
    **{(method, "/tasks/{id}" + path): body for (method, path), body in WITH_ID.items()},
    **{(method, "/executions/{id}" + path): body for (method, path), body in WITH_ID.items() if path != "/definition"},
    ("POST", "/tasks"): {"title": "mine"},
    ("GET", "/tasks"): None,
    ("POST", "/executions"): {"task_id": "{id}", "role": "gated"},
    ("POST", "/worker/claim"): {},
    ("POST", "/worker/report"): {"session_id": "{id}", "lease": "1", "percentage": 1},
    ("POST", "/worker/complete"): {"session_id": "{id}", "lease": "1", "success": True},
    ("GET", "/inputs"): None,
    ("GET", "/roles"): None,
    ("GET", "/daemon"): None,
    ("GET", "/healthz"): None,
    ("POST", "/plans"): {"plan": PLAN},
    ("POST", "/plans/check"): {"plan": PLAN},
    ("GET", "/plans/schema"): None,
    ("GET", "/tasks/{id}/steps"): None,
    ("POST", "/tasks/{id}/steps/{step}/cancel"): {"reason": "mine now"},
    ("POST", "/tasks/{id}/steps/{step}/pause"): {"reason": "mine now"},
    ("POST", "/tasks/{id}/steps/{step}/resume"): {"reason": "mine now"},
    ("POST", "/tasks/{id}/checkpoints"): {"metadata": {"whose": "mine now"}},
    ("GET", "/tasks/{id}/checkpoints"): None,
    ("POST", "/tasks/{id}/restore"): {},
    ("GET", "/checkpoints/{id}"): None,
    ("POST", "/checkpoints/{id}/restore"): {},
    ("GET", "/dead-letters"): None,
    ("POST", "/dead-letters/requeue"): {"all": True},
    ("POST", "/dead-letters/discard"): {"all": True},
    ("GET", "/capacity"): None,
    ("POST", "/doctor"): LOCAL_ONLY,
    ("POST", "/backup"): LOCAL_ONLY,
    ("POST", "/tokens"): LOCAL_ONLY,
    ("GET", "/tokens"): LOCAL_ONLY,
    ("DELETE", "/tokens/{id}"): LOCAL_ONLY,
    ("*", "/mcp"): "by its tools, resources, prompts and methods, below",
    ("GET", "/sse"): "as /mcp",
    ("*", "/messages"): "belongs to the session of /sse",
}

TOOLS: dict[str, Callable[[str], dict[str, Any]] | None] = {
    "execute_task": lambda any_id: {"task_id": any_id, "role": "gated"},
    "get_task_execution_status": lambda any_id: {"task_id": any_id, "detail": True},
    "stream_task_execution_events": lambda any_id: {"task_id": any_id},
    "get_task_result": lambda any_id: {"task_id": any_id},
    "cancel_task_execution": lambda any_id: {"task_id": any_id},
    "pause_task_execution": lambda any_id: {"task_id": any_id},
    "resume_task_execution": lambda any_id: {"task_id": any_id},
    "answer_task_input": lambda any_id: {"task_id": any_id, "answers": {"open": {"action": "accept"}}},
    "get_task_performance_metrics": lambda any_id: {"task_id": any_id},
    "report_task_progress": lambda any_id: {"session_id": any_id, "lease": "1", "percentage": 1},
    "complete_task_execution": lambda any_id: {"session_id": any_id, "lease": "1", "success": True},
    "get_plan_steps": lambda any_id: {"task_id": any_id},
    "control_plan_step": lambda any_id: {"task_id": any_id, "step": "asks", "action": "cancel"},
    "create_checkpoint": lambda any_id: {"task_id": any_id},
    "list_checkpoints": lambda any_id: {"task_id": any_id},
    "restore_checkpoint": lambda any_id: {"task_id": any_id},
    "execute_plan": NO_ID,
    "list_dead_letters": NO_ID,
    "requeue_dead_letters": NO_ID,
    "get_capacity": NO_ID,
    "list_tasks": NO_ID,
    "list_roles": NO_ID,
    "create_task": NO_ID,
    "claim_task": NO_ID,
    "get_server_status": NO_ID,
    "check_database": NO_ID,
    "back_up_database": NO_ID,
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "create_task": {"title": "mine"},
    "execute_plan": {"plan": PLAN},
    "requeue_dead_letters": {"all": True},
    "back_up_database": {"path": "/nowhere/x.db"},
}

RESOURCES = {"vespera://roles"}
TEMPLATES = {"vespera://tasks/{id}", "vespera://tasks/{id}/events"}
PROMPTS = {
    "run_long_task": {"title": "mine"},
    "what_happened": {"task_id": "{id}"},
    "answer_questions": {},
}


@dataclass
class Two:
    """Alice has made `ids`: of a task that has ended, one that runs, one that waits for an answer, one not begun.

    `of_plan` are those of a plan that waits for an answer, and of the task of its step.
    """

    place: Place
    alice: httpx.AsyncClient
    bob: httpx.AsyncClient
    bobs_token: str
    ids: list[str]
    of_plan: list[str]

    async def before(self) -> list[Any]:
        """What Alice has, as she sees it."""
        rows = (await self.alice.get("/tasks")).json()["tasks"]
        return sorted((row["task_id"], row["status"], row["execution_status"]) for row in rows)


@pytest.fixture
async def two(tmp_path: Path, runtime_dir: Path) -> AsyncIterator[Two]:
    settings = {"toolsets": ",".join(TOOLSETS), "allow_command_over_tcp": True}
    async with opened(tmp_path, runtime_dir / "http.sock", **settings) as place:
        place.vespera.roles.add(_asking())
        place.vespera.roles.add(Role(name="closed", argv=("true",), runner="process"))
        alice = await place.bob("alice", scopes=ALL)
        token = await place.made("bob", scopes=ALL)
        ids: list[str] = []
        for asked in (
            {"title": MARK, "role": "command", "inputs": {"argv": ["echo", MARK]}, "wait_ms": 25_000},
            {"title": MARK, "description": MARK, "role": "gated", "inputs": {MARK: MARK}},
            {"title": MARK, "role": "asking"},
        ):
            handle = (await alice.post("/executions", json=asked)).json()
            ids += [handle["task_id"], handle["session_id"]]
        ids.append((await alice.post("/tasks", json={"title": MARK})).json()["task_id"])
        plan = (await alice.post("/plans", json={"title": MARK, "plan": PLAN})).json()
        with anyio.fail_after(WITHIN):
            while (await alice.get("/inputs")).json()["total"] < 2:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        (step,) = (await alice.get(f"/tasks/{plan['task_id']}/steps")).json()["steps"]
        of_plan = [plan["task_id"], plan["session_id"], step["task_id"]]
        yield Two(place, alice, await place.by(token), token, ids, of_plan)


def _asking() -> Role:
    async def work(context: Any) -> None:
        await context.ask("open", MARK)

    anybody = Permissions(principals=("local",), scopes=("operate",))
    return Role.from_callable(work, name="asking", in_loop=True, inputs=None, permissions=anybody)


def unlike(any_id: str) -> str:
    """An id of the same form that nobody has."""
    return any_id[::-1].translate(str.maketrans("0123456789", "9876543210"))


def each_way(two: Two) -> list[str]:
    """Ids of each of Alice's tasks: of tasks and sessions, whole and as prefixes."""
    ended, ended_session, running, running_session, waiting, _, untouched = two.ids
    return [ended, running_session, waiting, untouched, ended_session[:10], running[:10], *two.of_plan]


# the tables are whole


@pytest.mark.promise("isolation")
async def test_every_route_stands_in_the_table(two: Two) -> None:
    found = set[tuple[str, str]]()
    for route in two.place.app.routes:
        path: str = getattr(route, "path", "")
        methods = route.methods if isinstance(route, Route) else None
        found |= {(method, path) for method in (methods or {"*"}) - {"HEAD"}}
    assert found == set(ROUTES)


@pytest.mark.promise("isolation")
def test_every_tool_stands_in_the_table() -> None:
    assert {plan.name for plans in TOOLSETS.values() for plan in plans} == set(TOOLS)


@pytest.mark.promise("isolation")
async def test_every_resource_and_prompt_stands_in_the_table(two: Two) -> None:
    async with two.place.agent(two.bobs_token) as agent:
        resources = {str(each.uri) for each in (await agent.list_resources()).resources}
        templates = {each.uri_template for each in (await agent.list_resource_templates()).resource_templates}
        prompts = {each.name for each in (await agent.list_prompts()).prompts}
    assert {uri for uri in resources if not uri.startswith("ui://")} == RESOURCES
    assert templates == TEMPLATES
    assert prompts == set(PROMPTS)


# REST


@pytest.mark.promise("isolation")
async def test_no_route_tells_a_strangers_task_from_one_that_does_not_exist(two: Two) -> None:
    before = await two.before()
    for (method, path), body in ROUTES.items():
        if isinstance(body, str) or "{id}" not in path + str(body):
            continue
        for any_id in each_way(two):
            theirs = await _asked(two.bob, method, path, body, any_id)
            nobodys = await _asked(two.bob, method, path, body, unlike(any_id))
            assert theirs == nobodys, f"{method} {path}"
            assert theirs[0] in (404, 409)
    assert await two.before() == before


async def _asked(
    client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None, any_id: str
) -> tuple[int, str]:
    content = None if body is None else orjson.loads(orjson.dumps(body).replace(b"{id}", any_id.encode()))
    answer = await client.request(method, path.replace("{id}", any_id), json=content)
    return answer.status_code, answer.text.replace(any_id, "ID")


@pytest.mark.promise("isolation")
async def test_no_stream_opens_on_a_strangers_task(two: Two) -> None:
    stream = {"Accept": "text/event-stream"}
    for any_id in each_way(two):
        theirs = await two.bob.get(f"/tasks/{any_id}/events", headers=stream)
        nobodys = await two.bob.get(f"/tasks/{unlike(any_id)}/events", headers=stream)
        assert theirs.status_code == nobodys.status_code == 404
        assert theirs.text.replace(any_id, "") == nobodys.text.replace(unlike(any_id), "")


@pytest.mark.promise("isolation")
async def test_no_list_shows_what_a_stranger_has_made(two: Two) -> None:
    for (method, path), body in ROUTES.items():
        if isinstance(body, str) or "{id}" in path + str(body):
            continue
        answer = await two.bob.request(method, path, json=body)
        assert answer.is_success, path
        _assert_nothing_of_hers(two, answer.text)
    assert (await two.bob.get("/tasks")).json()["total"] == 2  # what POST /tasks and POST /plans have made
    assert {each["title"] for each in (await two.bob.get("/tasks")).json()["tasks"]}.isdisjoint({MARK})
    assert (await two.place.user.get("/tasks")).json()["total"] == 7


async def test_a_page_of_anothers_list_goes_on_in_ones_own(two: Two) -> None:
    page = (await two.alice.get("/tasks", params={"limit": 1})).json()["next_page"]
    answer = await two.bob.get("/tasks", params={"page": page})
    assert answer.json()["tasks"] == []


async def test_what_is_for_the_local_user_alone_is_not_for_token_holders(two: Two) -> None:
    for (method, path), body in ROUTES.items():
        if body == LOCAL_ONLY:
            sent = {"path": "/nowhere/x.db"} if path == "/backup" else {"name": "x"} if method == "POST" else None
            answer = await two.bob.request(
                method, path.replace("{id}", "alice"), json=sent if path != "/doctor" else {}
            )
            assert answer.status_code == 403, path
            _assert_nothing_of_hers(two, answer.text)


async def test_an_idempotency_key_is_ones_own(two: Two) -> None:
    key = {"idempotency_key": "the same"}
    hers = (await two.alice.post("/executions", json={"title": "t", "role": "gated", **key})).json()
    his = (await two.bob.post("/executions", json={"title": "other", "role": "gated", **key})).json()
    assert his["repeated"] is False
    assert his["task_id"] != hers["task_id"]


# MCP


def _assert_nothing_of_hers(two: Two, text: str) -> None:
    assert MARK not in text
    assert "alice" not in text
    for any_id in (*two.ids, *two.of_plan):
        assert any_id not in text


@pytest.mark.promise("isolation")
async def test_no_tool_tells_a_strangers_task_from_one_that_does_not_exist(two: Two) -> None:
    before = await two.before()
    async with two.place.agent(two.bobs_token) as agent:
        for name, arguments in TOOLS.items():
            if arguments is None:
                answer = await _called(agent, name, ARGUMENTS.get(name, {}))
                _assert_nothing_of_hers(two, answer)
                continue
            for any_id in each_way(two):
                theirs = await _called(agent, name, arguments(any_id))
                nobodys = await _called(agent, name, arguments(unlike(any_id)))
                assert theirs.replace(any_id, "ID") == nobodys.replace(unlike(any_id), "ID"), name
                assert '"isError":true' in theirs, name
    assert await two.before() == before


async def _called(agent: Client, name: str, arguments: dict[str, Any]) -> str:
    result = await agent.call_tool(name, arguments)
    return result.model_dump_json(by_alias=True)


@pytest.mark.promise("isolation")
async def test_no_resource_and_no_prompt_shows_a_strangers_task(two: Two) -> None:
    async with two.place.agent(two.bobs_token) as agent:
        for uri in RESOURCES:
            _assert_nothing_of_hers(two, (await agent.read_resource(uri)).model_dump_json())
        for any_id in each_way(two):
            for template in TEMPLATES:
                theirs = await _failed(agent.read_resource(template.replace("{id}", any_id)))
                nobodys = await _failed(agent.read_resource(template.replace("{id}", unlike(any_id))))
                assert theirs.replace(any_id, "ID") == nobodys.replace(unlike(any_id), "ID")
            theirs = await _failed(agent.get_prompt("what_happened", {"task_id": any_id}))
            nobodys = await _failed(agent.get_prompt("what_happened", {"task_id": unlike(any_id)}))
            assert theirs.replace(any_id, "ID") == nobodys.replace(unlike(any_id), "ID")
        for name, arguments in PROMPTS.items():
            if "{id}" not in str(arguments):
                _assert_nothing_of_hers(two, (await agent.get_prompt(name, arguments)).model_dump_json())


async def _failed(asked: Any) -> str:
    from mcp.shared.exceptions import MCPError

    with pytest.raises(MCPError) as refused:
        await asked
    return repr(refused.value.error)


@pytest.mark.promise("isolation")
async def test_no_completion_offers_a_strangers_task(two: Two) -> None:
    peer = HttpPeer(two.bob)
    for ref in (
        {"type": "ref/prompt", "name": "what_happened"},
        {"type": "ref/resource", "uri": "vespera://tasks/{id}"},
    ):
        name = "task_id" if ref["type"] == "ref/prompt" else "id"
        for typed in ("", MARK, two.ids[0][:8], two.ids[0]):
            said = await peer.request("completion/complete", ref=ref, argument={"name": name, "value": typed})
            assert said["completion"]["values"] == []


@pytest.mark.parametrize("method", ["tasks/get", "tasks/cancel", "tasks/update"])
@pytest.mark.promise("isolation")
async def test_no_task_handle_of_a_stranger_can_be_used(two: Two, method: str) -> None:
    hers = (await execute(HttpPeer(two.alice), title=MARK, role="gated"))["taskId"]
    bob = HttpPeer(two.bob)
    more: dict[str, Any] = {"inputResponses": {}} if method == "tasks/update" else {}
    said: list[str] = []
    for handle in (hers, unlike(hers), *two.ids, unlike(two.ids[0])):
        with pytest.raises(Refused) as refused:
            await bob.request(method, taskId=handle, **more)
        error = refused.value
        said.append(f"{error.status} {error.code} {error.message} {error.data}".replace(handle, "ID"))
    assert len(set(said)) == 1
    assert (await HttpPeer(two.alice).request("tasks/get", taskId=hers))["status"] == "working"


@pytest.mark.promise("isolation")
async def test_no_subscription_hears_of_a_strangers_task(two: Two) -> None:
    hers = (await execute(HttpPeer(two.alice), title=MARK, role="gated"))["taskId"]
    mine = (await execute(HttpPeer(two.bob), title="mine", role="gated"))["taskId"]
    watched = [f"vespera://tasks/{hers}", f"vespera://tasks/{unlike(hers)}"]
    async with HttpPeer(two.bob).listen(taskIds=[hers, mine], resourceSubscriptions=watched) as heard:
        agreed = await anext(heard)
        assert agreed["params"]["notifications"]["taskIds"] == [mine]
        assert (await anext(heard))["params"]["taskId"] == mine
        assert (await two.alice.post(f"/tasks/{hers}/cancel", json={"wait_ms": 25_000})).is_success
        assert (await two.bob.post(f"/tasks/{mine}/cancel", json={"wait_ms": 25_000})).is_success
        messages = [await anext(heard)]
        while messages[-1]["params"].get("status") != "cancelled":
            messages.append(await anext(heard))
    assert {message["params"]["taskId"] for message in messages} == {mine}


# who sees everything


async def test_the_user_himself_sees_and_may_stop_everything(two: Two) -> None:
    for client in (two.place.user, two.place.local):
        assert (await client.get("/tasks")).json()["total"] == 5
        for any_id in (*two.ids, *two.of_plan):
            assert (await client.get(f"/tasks/{any_id}")).is_success
    running = two.ids[2]
    stopped = await two.place.user.post(f"/tasks/{running}/cancel", json={"wait_ms": 25_000})
    assert stopped.json()["status"] == "cancelled"


async def test_a_successor_by_name_sees_what_was_made_by_that_name(two: Two) -> None:
    new = NewToken(name="alice", scopes=["read"], replace=True)
    made = await two.place.vespera.access.create(LOCAL, new)
    successor = await two.place.by(made.token)
    assert (await successor.get("/tasks")).json()["total"] == 5


async def test_the_use_of_roles_is_counted_for_the_user_alone(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    refused = await two.bob.post("/executions", json={"title": "t", "role": "closed"})
    assert refused.status_code == 403
    assert "token:bob may not use the role closed" in caplog.text
    for client in (two.place.user, two.place.local):
        uses = {role["name"]: role["uses"] for role in (await client.get("/roles")).json()["roles"]}
        assert uses["gated"] == {"allowed": 1, "denied": 0}
        assert uses["closed"] == {"allowed": 0, "denied": 1}
    seen = (await two.bob.get("/roles")).json()["roles"]
    assert {role["uses"] for role in seen} == {None}
