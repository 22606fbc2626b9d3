"""What the tools answer fits the schemas that are listed, and what a model can hold, whatever the work asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest
from asking_roles import FORM
from jsonschema import Draft202012Validator
from mcp_doors import Doors, call, in_loop, opened, text_of

from vespera_exec.server.mcp.schemas import output_schema
from vespera_exec.server.mcp.tools import TOOLSETS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mcp import Client

    from vespera_exec.server.mcp.tooling import ToolPlan

TOOLS = {plan.name for plans in TOOLSETS.values() for plan in plans}
ERROR_KEYS = {"error", "error_code", "hint"}
WIDE: dict[str, Any] = {
    "type": "object",
    "properties": {f"f{n}": {"type": "string", "description": "d" * 1000} for n in range(14)},
}
LONG = "Please tell us where this is to be deployed, and how many copies of it there are to be. " * 20


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    (tmp_path / "roles").mkdir()
    (tmp_path / "roles" / "review.yaml").write_text("name: review\nrunner: external\n")
    async with opened(tmp_path, toolsets=",".join(TOOLSETS)) as doors:
        yield doors


def asks(questions: int, schema: dict[str, Any], message: str = LONG) -> Any:
    async def work(context: Any) -> None:
        context.ask_all({f"question-{number}": (message, schema) for number in range(questions)})

    return in_loop(work, "asks")


@pytest.mark.parametrize("plan", [plan for plans in TOOLSETS.values() for plan in plans], ids=lambda plan: plan.name)
def test_the_kinds_that_are_listed_are_those_that_pydantic_would_tell(plan: ToolPlan) -> None:
    told: dict[str, Any] = plan.gives.model_json_schema(mode="serialization").get("properties", {})
    expected: dict[str, Any] = {}
    for name, schema in told.items():
        kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
        kind = "object" if "$ref" in kinds[0] else kinds[0].get("type")
        expected[name] = {"type": kind} if kind is not None and len(kinds) == 1 else {}
    assert output_schema(plan.gives) == {"type": "object", "properties": expected}


class Held:
    """Calls tools, and holds each answer against what `tools/list` says of it."""

    def __init__(self, client: Client, schemas: dict[str, dict[str, Any]]) -> None:
        self._client = client
        self._schemas = schemas
        self.called: set[str] = set()

    @classmethod
    async def over(cls, client: Client) -> Held:
        return cls(client, {tool.name: tool.output_schema or {} for tool in (await client.list_tools()).tools})

    async def __call__(self, tool: str, /, *, error: str | None = None, **arguments: Any) -> dict[str, Any]:
        result = await self._client.call_tool(tool, arguments)
        answer = result.structured_content
        assert answer is not None
        assert (result.is_error, answer.get("error_code")) == ((True, error) if error else (False, None)), answer
        schema = self._schemas[tool]
        assert not list(Draft202012Validator(schema).iter_errors(answer)), answer  # pyright: ignore[reportUnknownMemberType]
        assert answer.keys() - (ERROR_KEYS if error else set()) <= schema["properties"].keys()
        self.called.add(tool)
        return answer


async def test_every_answer_fits_its_schema_at_each_turn_of_a_task(doors: Doors, tmp_path: Path) -> None:
    doors.vespera.roles.add(asks(2, FORM))
    async with doors.client("memory-modern") as client:
        held = await Held.over(client)
        await held("list_roles")
        await held("create_task", title="Later", role="asks")
        await held("list_tasks")

        asked = await held("execute_task", title="It asks", role="asks", wait_ms=25_000)
        one = {"task_id": asked["task_id"]}
        for detail in (False, True):
            status = await held("get_task_execution_status", **one, detail=detail)
            assert [each["key"] for each in status["inputs"]] == ["question-0", "question-1"]
        await held("stream_task_execution_events", **one)
        await held("get_task_result", **one)
        await held("resume_task_execution", **one)
        await held("answer_task_input", **one, key="question-0", content={"target": "nowhere"}, error="INVALID_INPUT")
        await held("answer_task_input", **one, key="question-0", content={"target": "staging"})
        await held("answer_task_input", **one, action="decline", wait_ms=25_000)
        await held("answer_task_input", **one, action="accept", error="CONFLICT")
        await held("answer_task_input", task_id="nothing", action="accept", error="TASK_NOT_FOUND")
        await held("get_task_performance_metrics", **one)

        running = await held("execute_task", title="Hold", role="gated", wait_ms=50)
        await held("pause_task_execution", task_id=running["task_id"], wait_ms=50)
        await held("cancel_task_execution", task_id=running["task_id"])
        await held("get_task_execution_status", task_id=running["task_id"])
        await held("get_task_result", task_id=running["task_id"])

        assert not (await held("claim_task"))["claimed"]
        await held("execute_task", title="Review", role="review", inputs={})
        task = await held("claim_task", wait_ms=25_000)
        lease = {"session_id": task["session_id"], "lease": task["lease"]}
        await held("report_task_progress", **lease, percentage=10, reports=[{"percentage": -1}])
        assert (await held("report_task_progress", **lease, ask={"key": "ok", "message": "Is it?"}))["parked"]
        await held("report_task_progress", **lease, error="LEASE_LOST")
        await held("answer_task_input", task_id=task["task_id"], action="accept")
        task = await held("claim_task", wait_ms=25_000)
        assert task["answers"]["ok"]["action"] == "accept"
        lease = {"session_id": task["session_id"], "lease": task["lease"]}
        for repeated in (False, True):
            done = await held("complete_task_execution", **lease, result=[None, 1])
            assert done["repeated"] is repeated

        await _held_at_each_turn_of_a_plan(held)

        await held("get_server_status")
        await held("check_database")
        await held("back_up_database", path=str(tmp_path / "copy.db"))
        assert held.called == TOOLS
        for tool in TOOLS:
            await held(tool, nonsense=1, error="INVALID_INPUT")


async def _held_at_each_turn_of_a_plan(held: Held) -> None:
    plan = {"steps": [{"id": "ask", "role": "asks"}, {"id": "then", "role": "gated", "depends_on": ["ask"]}]}
    await held("execute_plan", plan={"steps": [{"id": "ask", "role": "nobody"}]}, error="INVALID_PLAN")
    asked = await held("execute_plan", plan=plan, wait_ms=25_000)
    one = {"task_id": asked["task_id"]}
    for detail in (False, True):
        status = await held("get_task_execution_status", **one, detail=detail)
        assert [each["key"] for each in status["inputs"]] == ["ask/question-0", "ask/question-1"]
    await held("stream_task_execution_events", **one)
    await held("get_plan_steps", **one)
    made = await held("create_checkpoint", **one, metadata={"why": None})
    await held("list_checkpoints", **one)
    await held("restore_checkpoint", checkpoint_id=made["checkpoint_id"])
    await held("restore_checkpoint", checkpoint_id="nothing", error="CHECKPOINT_NOT_FOUND")
    for action in ("pause", "resume", "cancel", "cancel"):
        await held("control_plan_step", **one, step="then", action=action)
    await held("control_plan_step", **one, step="nothing", action="pause", error="NOT_FOUND")
    await held("cancel_task_execution", **one)
    await held("get_task_result", **one)
    await held("get_plan_steps", **one)
    await held("list_dead_letters")
    await held("requeue_dead_letters", task_ids=[asked["task_id"]])
    await held("get_capacity")


async def test_a_status_is_small_also_with_questions_open_and_whole_on_demand(doors: Doors) -> None:
    doors.vespera.roles.add(asks(3, FORM))
    async with doors.client("memory-modern") as client:
        asked = await call(client, "execute_task", title="Deploy build 7", role="asks", wait_ms=25_000)
        result = await client.call_tool("get_task_execution_status", {"task_id": asked["task_id"]})
        assert len(text_of(result)) / 4 < 300
        status = result.structured_content
        assert status is not None
        assert [each["key"] for each in status["inputs"]] == ["question-0", "question-1", "question-2"]
        assert all(LONG.startswith(each["message"][:-1]) for each in status["inputs"])
        whole = await call(client, "get_task_execution_status", task_id=asked["task_id"], detail=True)
    assert [(each["message"], each["schema"]["required"]) for each in whole["inputs"]] == [(LONG, ["target"])] * 3
    assert "more_inputs" not in status | whole


async def test_questions_of_any_size_and_number_leave_an_answer_that_a_model_can_hold(doors: Doors) -> None:
    doors.vespera.roles.add(asks(32, WIDE))
    async with doors.client("memory-modern") as client:
        held = await Held.over(client)
        answers = [await held("execute_task", title="It asks", role="asks", wait_ms=25_000)]
        one = {"task_id": answers[0]["task_id"]}
        answers.append(await held("get_task_execution_status", **one, detail=True))
        answers.append(await held("stream_task_execution_events", **one, max_events=500))
        given = {"question-0": {"action": "decline"}}
        answers.append(await held("answer_task_input", **one, answers=given))
        brief = await held("get_task_execution_status", **one)
        prompt = await client.get_prompt("answer_questions", {})
    for answer, open_ones in zip(answers, (32, 32, 32, 31), strict=True):
        assert len(orjson.dumps(answer)) / 4 < 25_000
        assert len(answer["inputs"]) + answer["more_inputs"] == open_ones
        assert answer["inputs"][0]["schema"]["properties"].keys() == WIDE["properties"].keys()
    assert (len(brief["inputs"]), brief["more_inputs"]) == (3, 28)
    assert len(prompt.model_dump_json()) / 4 < 25_000
