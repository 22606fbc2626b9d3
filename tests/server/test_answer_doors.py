"""A question of the work is seen and answered at every door, by those who see the task, and once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest
from asking_roles import asks_once, asks_twice
from deadlines import WITHIN
from mcp_doors import BEARER, ME, Doors, call, opened, refused

from vespera_exec.app.views import Execute, InputAnswer
from vespera_exec.errors import PermissionDenied, TaskNotFound
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PRODUCTION = {"target": "production", "copies": 1}
YES = {"action": "accept"}

NO_ANSWERS: list[tuple[dict[str, Any], int, str | None]] = [
    ({}, 400, "nothing is answered"),
    ({"content": {"target": "the moon"}}, 400, "the answer to where: field 'target' is one of staging, production"),
    ({"content": {"target": 7}}, 400, "field 'target' is a text"),
    ({"content": {"target": "staging", "copies": "2"}}, 400, "field 'copies' is an integer"),
    ({"content": {"target": "staging", "copies": 2.5}}, 400, "field 'copies' is an integer"),
    ({"content": {"target": "staging", "more": [[[1]]]}}, 400, "there is no field 'more'"),
    ({"content": {"target": "x" * 50_000}}, 400, "at most 16,384"),
    ({"content": ["staging"]}, 400, "valid dictionary"),
    ({"action": "cancel"}, 400, "'accept' or 'decline'"),
    ({"answers": {"where": {"action": "yes"}}}, 400, "answers.where.action"),
    ({"answers": {f"k{number}": YES for number in range(101)}}, 400, "at most 100"),
    ({"answers": {"where": YES}, "key": "where"}, 400, "one answer beside them"),
    ({"key": "whence"} | YES, 409, None),
    ({"answer": {}}, 400, "answer"),
]


@dataclass
class Rest:
    doors: Doors
    http: httpx.AsyncClient

    async def asking(self, role: str, key: str, *, caller: Caller = ME) -> str:
        """The id of a task whose work waits at the question `key`."""
        started = await self.doors.vespera.execute_task(caller, Execute(title="It asks", role=role))
        await self.until(started.task_id, "paused")
        assert [each["key"] for each in await self.inputs(started.task_id)] == [key]
        return started.task_id

    async def until(self, task_id: str, status: str) -> None:
        """Returns when it is paused, or has ended and that is on disk."""
        cursor = 0
        with anyio.fail_after(WITHIN):
            while True:
                now = await self.doors.vespera.get_status(ME, task_id)
                if now.status == status and (now.done or status == "paused"):
                    return
                page = await self.doors.vespera.read_events(ME, task_id, cursor=cursor, wait_ms=25_000)
                cursor = page.next_cursor

    async def inputs(self, task_id: str) -> list[dict[str, Any]]:
        found = await self.http.get(f"/tasks/{task_id}/inputs")
        assert found.status_code == 200, found.text
        return found.json()["inputs"]

    async def give(self, task_id: str, body: Any, *, prefix: str = "tasks") -> httpx.Response:
        return await self.http.post(f"/{prefix}/{task_id}/inputs", json=body)


@pytest.fixture
async def rest(tmp_path: Path) -> AsyncIterator[Rest]:
    async with opened(tmp_path, http=True) as doors:
        doors.vespera.roles.add(asks_once())
        doors.vespera.roles.add(asks_twice())
        assert doors.url is not None
        async with httpx.AsyncClient(base_url=doors.url, headers=BEARER, timeout=WITHIN) as http:
            yield Rest(doors, http)


async def test_rest_shows_the_questions_and_takes_their_answers(rest: Rest) -> None:
    task_id = await rest.asking("asks-twice", "sure")
    found = (await rest.http.get(f"/executions/{task_id}/inputs")).json()
    assert (found["task_id"], found["status"], found["done"]) == (task_id, "paused", False)
    everything = (await rest.http.get("/inputs", params={"limit": 5})).json()
    assert (everything["total"], everything["inputs"][0]["input"]) == (1, found["inputs"][0])
    assert (await rest.http.get(f"/tasks/{task_id}")).json()["inputs"] == found["inputs"]

    answered = await rest.give(task_id, {"action": "accept"})
    assert answered.status_code == 200
    assert (answered.json()["accepted"], answered.json()["ignored"]) == (["sure"], [])
    await rest.until(task_id, "paused")
    given = {"answers": {"where": YES | {"content": {"target": "production"}}, "sure": YES}}
    answered = await rest.give(task_id, given, prefix="executions")
    assert (answered.json()["accepted"], answered.json()["ignored"]) == (["where"], ["sure"])
    await rest.until(task_id, "completed")
    result = (await rest.http.get(f"/tasks/{task_id}/result")).json()
    assert result["result"] == {"action": "accept", "content": PRODUCTION}
    assert (await rest.http.get("/inputs")).json() == {"inputs": [], "total": 0}
    late = await rest.give(task_id, {"key": "where", "action": "decline"})
    assert (late.status_code, late.json()["success"]) == (409, False)
    assert late.json()["reason"] == "it has ended (completed)"


@pytest.mark.parametrize(("body", "status", "detail"), NO_ANSWERS)
async def test_what_is_no_answer_is_a_problem_that_says_why(
    rest: Rest, body: dict[str, Any], status: int, detail: str | None
) -> None:
    task_id = await rest.asking("asks-once", "where")
    refusal = await rest.give(task_id, body)
    assert refusal.status_code == status, refusal.text
    if detail is not None:
        assert refusal.headers["content-type"] == "application/problem+json"
        assert detail in refusal.json()["detail"]
    else:
        assert (refusal.json()["ignored"], refusal.json()["open"]) == (["whence"], ["where"])
    assert [each["key"] for each in await rest.inputs(task_id)] == ["where"]


@pytest.mark.parametrize(
    "body",
    [{"key": "sure"}, {"key": "sure", "content": {}}, {"content": {}}, {"answers": {"sure": {}}}],
    ids=str,
)
async def test_an_approval_is_given_in_words_or_not_at_all(rest: Rest, body: dict[str, Any]) -> None:
    task_id = await rest.asking("asks-twice", "sure")
    refusal = await rest.give(task_id, body)
    assert (refusal.status_code, refusal.json()["error_code"]) == (400, "INVALID_INPUT")
    async with rest.doors.client("memory-modern") as client:
        assert (await refused(client, "answer_task_input", task_id=task_id, **body))["error_code"] == "INVALID_INPUT"
    assert [each["key"] for each in await rest.inputs(task_id)] == ["sure"]


async def test_of_many_answers_at_once_one_counts(rest: Rest) -> None:
    task_id = await rest.asking("asks-once", "where")
    answers: list[dict[str, Any]] = []

    async def give(copies: int) -> None:
        answered = await rest.give(task_id, {"key": "where", "content": {"target": "staging", "copies": copies}})
        answers.append({"copies": copies} | answered.json())

    async with anyio.create_task_group() as group:
        for copies in range(1, 6):
            group.start_soon(give, copies)
    await rest.until(task_id, "completed")
    (first,) = [each for each in answers if each["success"]]
    assert all(each["ignored"] == ["where"] for each in answers if not each["success"])
    result = (await rest.http.get(f"/tasks/{task_id}/result")).json()["result"]
    assert result["content"]["copies"] == first["copies"]
    events = (await rest.http.get(f"/tasks/{task_id}/events")).json()["events"]
    assert [event["type"] for event in events if event["type"].startswith("approval_")] == [
        "approval_requested",
        "approval_approved",
    ]


async def test_a_principal_sees_and_answers_the_questions_of_its_own_tasks_alone(rest: Rest) -> None:
    ada, bob = (
        Caller(principal=f"token:{name}", scopes=frozenset({"read", "operate"}), sees_only=f"token:{name}")
        for name in ("ada", "bob")
    )
    vespera = rest.doors.vespera
    task_id = await rest.asking("asks-once", "where", caller=ada)
    assert (await vespera.list_inputs(ada)).total == 1
    assert (await vespera.list_inputs(bob)).total == 0
    with pytest.raises(TaskNotFound):
        await vespera.answer_input(bob, task_id, {"where": InputAnswer(action="accept", content={"target": "staging"})})
    reader = Caller(principal="token:ada", scopes=frozenset({"read"}), sees_only="token:ada")
    with pytest.raises(PermissionDenied):
        await vespera.answer_input(
            reader, task_id, {"where": InputAnswer(action="accept", content={"target": "staging"})}
        )
    async with rest.doors.client("memory-modern", caller=bob) as client:
        error = await refused(client, "answer_task_input", task_id=task_id, action="accept")
        assert (error["error_code"], error["success"]) == ("TASK_NOT_FOUND", False)
    async with rest.doors.client("memory-modern", caller=ada) as client:
        ended = await call(client, "answer_task_input", task_id=task_id, content={"target": "staging"}, wait_ms=25_000)
    assert ended["done"]
    events = (await vespera.read_events(ada, task_id)).events
    (approved,) = [event for event in events if event["type"] == "approval_approved"]
    assert approved["details"]["by"] == "token:ada"
