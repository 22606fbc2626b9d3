"""The toolsets, and an agent that does the work itself: over MCP, over REST, and under a daemon that is killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import orjson
import pytest
from daemon_place import Place
from daemon_place import call as ask
from deadlines import WITHIN
from mcp_doors import BEARER, IN_MEMORY, Kind, call, opened, refused

from vespera_exec.errors import InvalidInput
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

REVIEW = "name: review\nrunner: external\ninputs: {file: {type: string, default: a}}\n"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "roles-dir").mkdir()
    (tmp_path / "roles-dir" / "review.yaml").write_text(REVIEW)
    with Place(tmp_path) as made:
        made.set(toolsets="core,worker")
        yield made


def define(folder: Path, text: str = REVIEW) -> None:
    (folder / "roles").mkdir()
    (folder / "roles" / "review.yaml").write_text(text)


async def post(url: str | None, path: str, body: dict[str, Any]) -> None:
    async with httpx.AsyncClient(base_url=url or "", headers=BEARER, timeout=WITHIN) as http:
        await http.post(path, json=body)


# toolsets


@pytest.mark.parametrize("kind", IN_MEMORY)
@pytest.mark.anyio
async def test_only_the_core_tools_are_shown_unless_others_are_named(kind: Kind, tmp_path: Path) -> None:
    async with opened(tmp_path) as doors, doors.client(kind) as client:
        names = {tool.name for tool in (await client.list_tools()).tools}
        assert "execute_task" in names
        assert not names & {"claim_task", "get_server_status"}
        error = await refused(client, "claim_task")
        assert "Unknown tool" in error["error"]
        assert "claim_task" not in error["hint"]


@pytest.mark.parametrize(("toolset", "characters"), [("core", 16_000), ("worker", 6000), ("operations", 6000)])
@pytest.mark.anyio
async def test_a_toolset_is_small_enough_to_be_read_on_every_turn(
    toolset: str, characters: int, tmp_path: Path
) -> None:
    async with opened(tmp_path, toolsets=toolset) as doors, doors.client("memory-modern") as client:
        listed = (await client.list_tools()).model_dump(mode="json", by_alias=True, exclude_none=True)
        assert listed["tools"]
        assert len(orjson.dumps(listed["tools"])) <= characters


def test_a_toolset_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"VESPERA_TOOLSETS names 'wrker'; the toolsets are core, worker, operat"):
        Settings.load({"VESPERA_TOOLSETS": "core, wrker"}, cwd=Path("/"))


@pytest.mark.anyio
async def test_the_operations_describe_check_and_copy(tmp_path: Path) -> None:
    async with opened(tmp_path, toolsets="operations") as doors, doors.client("memory-modern") as client:
        assert (await call(client, "get_server_status"))["pid"] == os.getpid()
        checks = (await call(client, "check_database"))["checks"]
        assert {(check["name"], check["level"]) for check in checks} == {("database", "ok"), ("roles", "ok")}
        copied = await call(client, "back_up_database", path=str(tmp_path / "copy.db"))
        assert (copied["path"], copied["size_bytes"] > 0) == (str(tmp_path / "copy.db"), True)


@pytest.mark.anyio
async def test_the_operations_are_for_the_user_on_this_machine(tmp_path: Path) -> None:
    async with (
        opened(tmp_path, http=True, toolsets="operations") as doors,
        doors.client("http-modern") as client,
    ):
        for tool, arguments in (
            ("get_server_status", {}),
            ("check_database", {}),
            ("back_up_database", {"path": "/x"}),
        ):
            assert (await refused(client, tool, **arguments))["error_code"] == "PERMISSION_DENIED"


# working


@pytest.mark.parametrize("kind", ["memory-modern", "memory-legacy", "http-modern"])
@pytest.mark.anyio
async def test_an_agent_claims_reports_and_completes(kind: Kind, tmp_path: Path) -> None:
    define(tmp_path)
    async with opened(tmp_path, http=True, toolsets="core,worker") as doors, doors.client(kind) as client:
        assert not (await call(client, "claim_task", roles=["review"], wait_ms=10))["claimed"]
        handle = await call(client, "execute_task", title="Look", role="review", inputs={"file": "b.py"})
        task = await call(client, "claim_task", worker="agent", wait_ms=25_000)
        assert (task["claimed"], task["task_id"], task["inputs"]) == (True, handle["task_id"], {"file": "b.py"})
        held = {"session_id": task["session_id"], "lease": task["lease"]}
        said = await call(client, "report_task_progress", **held, percentage=50, message="half", checkpoint={"at": 1})
        assert (said["ok"], said["cancel"], said["pause"], said["refused"]) == (True, False, False, [])
        many = await call(client, "report_task_progress", **held, reports=[{"percentage": 60}, {"percentage": 10}])
        assert [refusal["index"] for refusal in many["refused"]] == [1]
        done = await call(client, "complete_task_execution", **held, result={"findings": 3})
        assert (done["ok"], done["status"]) == (True, "completed")
        assert (await call(client, "get_task_result", task_id=handle["task_id"]))["result"] == {"findings": 3}
        late = await refused(client, "report_task_progress", **held, percentage=70)
        assert late["error_code"] == "LEASE_LOST"


@pytest.mark.anyio
async def test_the_same_over_rest(tmp_path: Path) -> None:
    define(tmp_path)
    async with (
        opened(tmp_path, http=True) as doors,
        httpx.AsyncClient(base_url=doors.url or "", headers=BEARER, timeout=WITHIN) as http,
    ):
        started = (await http.post("/executions", json={"title": "Look", "role": "review"})).json()
        task = (await http.post("/worker/claim", json={"wait_ms": 25_000})).json()
        assert task["session_id"] == started["session_id"]
        held = {"session_id": task["session_id"], "lease": task["lease"]}
        said = await http.post("/worker/report", json={**held, "done": 1, "total": 2, "unit": "files"})
        assert (said.status_code, said.json()["ok"]) == (200, True)
        asked = {"key": "go", "message": "May I?"}
        assert (await http.post("/worker/report", json={**held, "ask": asked})).json()["parked"]
        late = await http.post("/worker/complete", json=held)
        assert (late.status_code, late.json()["error_code"]) == (409, "LEASE_LOST")


@pytest.mark.anyio
async def test_a_client_that_went_away_takes_no_task_with_it(tmp_path: Path) -> None:
    define(tmp_path)
    async with (
        opened(tmp_path, http=True) as doors,
        httpx.AsyncClient(base_url=doors.url or "", headers=BEARER, timeout=WITHIN) as http,
    ):
        async with anyio.create_task_group() as group:
            group.start_soon(post, doors.url, "/worker/claim", {"wait_ms": 25_000})
            while not doors.vespera.workers.waiting:
                await http.get("/healthz")
            group.cancel_scope.cancel()
        with anyio.fail_after(20):  # less than it would have waited
            while doors.vespera.workers.waiting:
                await http.get("/healthz")


# the daemon killed in the middle


@pytest.mark.promise("workers")
def test_a_worker_goes_on_after_the_daemon_was_killed_as_if_nothing_had_happened(place: Place) -> None:
    with place.client() as client:
        handle = ask(client, "execute_task", title="Look", role="review")
        task = ask(client, "claim_task", worker="agent")
        held = {"session_id": task["session_id"], "lease": task["lease"]}
        for file in range(1, 6):
            said = ask(client, "report_task_progress", **held, done=file, total=10, checkpoint={"file": file})
            assert said["ok"]
        os.kill(place.served_by()[-1], signal.SIGKILL)
    with place.client() as client:
        assert len(place.served_by()) == 2
        state = ask(client, "get_task_execution_status", task_id=handle["task_id"])
        assert (state["status"], state["session"]["overall_progress"]["percentage"]) == ("running", 60.0)
        assert ask(client, "report_task_progress", **held, done=6, total=10)["ok"]
        done = ask(client, "complete_task_execution", **held, result={"files": 10})
        assert (done["ok"], done["status"]) == (True, "completed")
        read = ask(client, "stream_task_execution_events", task_id=handle["task_id"], max_events=500)
        kinds = [event["type"] for event in read["events"]]
        assert kinds.count("checkpoint_created") == 5
        assert kinds.count("lease_granted") == 1
        assert "recovery_initiated" not in kinds


def test_what_waited_for_a_worker_still_does_after_the_daemon_was_killed(place: Place) -> None:
    with place.client() as client:
        handle = ask(client, "execute_task", title="Look", role="review")
        os.kill(place.served_by()[-1], signal.SIGKILL)
    with place.client() as client:
        assert ask(client, "get_task_execution_status", task_id=handle["task_id"])["status"] == "pending"
        assert ask(client, "claim_task")["session_id"] == handle["session_id"]


def test_the_example_worker_does_what_is_asked(place: Place) -> None:
    example = Path(__file__).parents[2] / "examples" / "worker.py"
    with place.client() as client:
        handle = ask(client, "execute_task", title="Look", role="review", inputs={"file": "b.py"})
        worker = place.spawn([sys.executable, str(example), "--role", "review", "--tasks", "1"])
        _, complaint = worker.communicate(timeout=WITHIN)
        assert worker.returncode == 0, complaint
        result: Any = ask(client, "get_task_result", task_id=handle["task_id"])
        assert (result["status"], result["result"]["file"]) == ("completed", "b.py")
