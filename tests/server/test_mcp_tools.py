"""What an agent sees of the tools: answers, errors and sizes, by both generations of the protocol."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import anyio
import orjson
import pytest
from deadlines import WITHIN
from jsonschema import Draft202012Validator
from mcp_doors import IN_MEMORY, Doors, Gate, Kind, call, in_loop, opened, refused, text_of

from vespera_exec.app.callers import current_caller
from vespera_exec.app.views import NewTask
from vespera_exec.errors import InvalidInput
from vespera_exec.model.principal import Caller
from vespera_exec.server.mcp.schemas import check
from vespera_exec.server.mcp.toolsets.core import PLANS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mcp import Client

NAMES = {
    "create_task",
    "execute_task",
    "execute_plan",
    "list_tasks",
    "list_roles",
    "get_task_result",
    "get_task_execution_status",
    "stream_task_execution_events",
    "cancel_task_execution",
    "pause_task_execution",
    "resume_task_execution",
    "answer_task_input",
    "get_task_performance_metrics",
}
UNKNOWN = "no-such-task-anywhere"


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    async with opened(tmp_path) as doors:
        yield doors


def open_gate(doors: Doors) -> Gate:
    doors.gate.open.set()
    return doors.gate


@pytest.mark.parametrize("kind", IN_MEMORY)
async def test_the_tools_are_listed_with_schemas_and_hints_in_few_tokens(doors: Doors, kind: Kind) -> None:
    async with doors.client(kind) as client:
        listed = await client.list_tools()
        assert client.instructions is not None
        assert "execute_task" in client.instructions
    assert {tool.name for tool in listed.tools} == NAMES
    wire = listed.model_dump(mode="json", by_alias=True, exclude_none=True)["tools"]
    assert len(orjson.dumps(wire)) / 4 < 4000
    for tool in listed.tools:
        assert tool.title
        assert tool.description
        assert tool.annotations is not None
        assert tool.annotations.read_only_hint is not None
        assert tool.output_schema is not None
        Draft202012Validator.check_schema(tool.input_schema)
        Draft202012Validator.check_schema(tool.output_schema)
        assert tool.input_schema["additionalProperties"] is False
    hints = {tool.name: tool.annotations for tool in listed.tools}
    cancel = hints["cancel_task_execution"]
    assert cancel is not None
    assert (cancel.read_only_hint, cancel.destructive_hint, cancel.idempotent_hint) == (False, True, True)


@pytest.mark.parametrize("kind", IN_MEMORY)
async def test_a_task_goes_from_created_to_its_result(doors: Doors, kind: Kind) -> None:
    open_gate(doors)
    async with doors.client(kind) as client:
        made = await call(client, "create_task", title="Count", role="gated", inputs={"steps": 3})
        assert (await call(client, "get_task_execution_status", task_id=made["task_id"]))["executing"] is False
        handle = await call(client, "execute_task", task_id=made["task_id"], wait_ms=25_000)
        assert handle["done"]
        assert handle["status"] == "completed"
        assert handle["run_id"] == handle["session_id"]
        result = await call(client, "get_task_result", task_id=made["task_id"])
        assert result["result"] == {"steps": 3, "nothing": None}
        metrics = await call(client, "get_task_performance_metrics", task_id=made["task_id"])
        assert metrics["total_executions"] == 1
        assert metrics["success_rate"] == 1.0
        assert {"average_duration_seconds", "retry_count", "last_error"} <= metrics.keys()
        assert metrics["execution"]["success_rate"] == 1.0
        assert metrics["execution"]["total_cost"] is None
        tasks = await call(client, "list_tasks", text="Count")
        assert [row["task_id"] for row in tasks["tasks"]] == [made["task_id"]]
        roles = {role["name"]: role for role in (await call(client, "list_roles"))["roles"]}
        assert {"survey", "command", "gated"} <= roles.keys()


async def test_a_status_has_the_promised_keys_idle_running_and_ended(doors: Doors) -> None:
    promised = {"executing", "task_found", "status", "lifecycle", "session_id", "session", "legacy_compatibility"}
    async with doors.client("memory-modern") as client:
        made = await call(client, "create_task", title="Count", role="gated", inputs={"steps": 2})
        idle = await call(client, "get_task_execution_status", task_id=made["task_id"])
        assert promised <= idle.keys()
        assert (idle["status"], idle["session_id"], idle["session"]) == ("idle", None, None)
        handle = await call(client, "execute_task", task_id=made["task_id"])
        await at_the_gate(client, handle)
        running = await call(client, "get_task_execution_status", task_id=made["task_id"])
        assert promised <= running.keys()
        assert running["executing"]
        assert running["session_id"] == handle["session_id"]
        assert running["session"].keys() >= {
            "session_id",
            "task_id",
            "status",
            "current_phase",
            "overall_progress",
            "time_tracking",
        }
        assert running["session"]["time_tracking"].keys() >= {
            "elapsed_seconds",
            "estimated_completion",
            "eta_confidence",
        }
        open_gate(doors)
        await call(client, "stream_task_execution_events", task_id=made["task_id"], wait_ms=25_000, follow=True)
        ended = await call(client, "get_task_execution_status", task_id=made["task_id"])
        assert (ended["executing"], ended["status"], ended["done"]) == (False, "completed", True)
        assert ended["session"]["session_id"] == handle["session_id"]


async def test_a_status_stays_small_whatever_the_work_says(doors: Doors) -> None:
    long = "x" * 5000

    async def talkative(context: Any) -> None:
        context.progress(10, long)
        raise ValueError(long)

    doors.vespera.roles.add(in_loop(talkative, "talkative"))
    async with doors.client("memory-modern") as client:
        handle = await call(client, "execute_task", title="t" * 500, role="talkative", wait_ms=25_000)
        assert handle["status"] == "failed"
        result = await client.call_tool("get_task_execution_status", {"task_id": handle["task_id"]})
        assert len(text_of(result)) / 4 < 300 + 100  # an error and its code are worth some tokens more
        detailed = await call(client, "get_task_execution_status", task_id=handle["task_id"], detail=True)
        assert len(detailed["title"]) == 500
        assert detailed["recent_events"]
        open_gate(doors)
        fine = await call(client, "execute_task", title="fine", role="gated", inputs={"steps": 3}, wait_ms=25_000)
        small = await client.call_tool("get_task_execution_status", {"task_id": fine["task_id"]})
        assert len(text_of(small)) / 4 < 300


async def at_the_gate(client: Client, handle: dict[str, Any]) -> int:
    """Returns the cursor behind the last progress report of a gated task with two steps."""
    cursor = handle["cursor"]
    with anyio.fail_after(WITHIN):
        while True:
            page = await call(
                client, "stream_task_execution_events", task_id=handle["task_id"], cursor=cursor, wait_ms=25_000
            )
            cursor = page["next_cursor"]
            if any(event["message"] == "step 2" for event in page["events"]):
                return cursor


@pytest.mark.parametrize("kind", IN_MEMORY)
async def test_an_unknown_task_keeps_the_promised_keys_in_its_error(doors: Doors, kind: Kind) -> None:
    async with doors.client(kind) as client:
        status = await refused(client, "get_task_execution_status", task_id=UNKNOWN)
        assert status["executing"] is False
        assert status["task_found"] is False
        cancel = await refused(client, "cancel_task_execution", task_id=UNKNOWN)
        assert cancel["success"] is False
        assert cancel["error"] == "Task not found"
        metrics = await refused(client, "get_task_performance_metrics", task_id=UNKNOWN)
        assert metrics["error"] == "Task not found"
        stream = await refused(client, "stream_task_execution_events", task_id=UNKNOWN, wait_ms=25_000, follow=True)
        assert stream["error"] == "Task not found"
        result = await refused(client, "get_task_result", task_id=UNKNOWN)
        execute = await refused(client, "execute_task", task_id=UNKNOWN)
        for error in (status, cancel, metrics, stream, result, execute):
            assert error["error_code"] == "TASK_NOT_FOUND"
            assert "list_tasks" in error["hint"]


@pytest.mark.parametrize(
    ("tool", "arguments", "complaint", "expected"),
    [
        ("get_task_execution_status", {}, "task_id is missing", "task_id (string, required)"),
        ("get_task_execution_status", {"task_id": 7}, "task_id: should be a valid string", "task_id"),
        ("get_task_execution_status", {"task_id": ""}, "task_id", "task_id"),
        ("get_task_execution_status", {"task": "x", "task_id": "x"}, "did you mean task_id?", "detail (boolean)"),
        ("stream_task_execution_events", {"task_id": "x", "wait_ms": 60_000}, "less than or equal to 25000", "wait_ms"),
        ("stream_task_execution_events", {"task_id": "x", "cursor": -1}, "greater than or equal to 0", "cursor"),
        ("stream_task_execution_events", {"task_id": "x", "max_events": 0}, "max_events", "max_events"),
        ("stream_task_execution_events", {"task_id": "x", "cursor": 10**30}, "cursor", "cursor"),
        ("execute_task", {"title": "t", "role": "gated", "inputs": [1]}, "inputs", "inputs (object)"),
        ("execute_task", {"title": "t", "role": "gated", "priority": 11}, "priority", "priority (integer)"),
        ("list_roles", {"all": True}, "'all' is no argument", "none"),
        ("create_task", {"title": None}, "title", "title (string, required)"),
    ],
)
async def test_wrong_arguments_are_told_with_what_is_expected(
    doors: Doors, tool: str, arguments: dict[str, Any], complaint: str, expected: str
) -> None:
    async with doors.client("memory-modern") as client:
        error = await refused(client, tool, **arguments)
        assert error["error_code"] == "INVALID_INPUT"
        assert complaint in error["error"]
        assert expected in error["hint"]


async def test_refusals_of_the_app_reach_the_agent_with_their_code(doors: Doors) -> None:
    async with doors.client("memory-modern") as client:
        cases: list[tuple[str, dict[str, Any], str]] = [
            ("execute_task", {}, "INVALID_INPUT"),
            ("execute_task", {"title": "  ", "role": "gated"}, "INVALID_INPUT"),
            ("execute_task", {"title": "a\x00b", "role": "gated"}, "INVALID_INPUT"),
            ("execute_task", {"title": "x" * 1_000_000, "role": "gated"}, "INVALID_INPUT"),
            ("execute_task", {"title": "t", "role": "nobody"}, "ROLE_NOT_FOUND"),
            ("execute_task", {"title": "t", "role": "../../etc"}, "ROLE_NOT_FOUND"),
            ("execute_task", {"title": "t", "role": "survey", "inputs": {"pfad": "/"}}, "INVALID_INPUT"),
            ("get_task_execution_status", {"task_id": "\ud800" * 10}, "INVALID_INPUT"),
            ("get_task_execution_status", {"task_id": "'; DROP TABLE task; --"}, "TASK_NOT_FOUND"),
            ("list_tasks", {"status": "sleeping"}, "INVALID_INPUT"),
            ("list_tasks", {"page": "not-ours"}, "INVALID_INPUT"),
        ]
        for tool, arguments, code in cases:
            error = await refused(client, tool, **arguments)
            assert error["error_code"] == code, (tool, arguments, error)
        made = await call(client, "create_task", title="never run")
        assert (await refused(client, "get_task_result", task_id=made["task_id"]))["error_code"] == "CONFLICT"


async def test_a_role_that_a_token_may_not_use_is_denied_and_nothing_is_made(doors: Doors) -> None:
    remote = Caller(principal="token:default", over_tcp=True)
    async with doors.client("memory-modern") as client:
        current_caller.set(remote)
        error = await refused(client, "execute_task", title="sh", role="command", inputs={"argv": ["true"]})
        assert error["error_code"] == "PERMISSION_DENIED"
        assert (await call(client, "list_tasks"))["total"] == 0
        current_caller.set(Caller(principal="reader", over_tcp=True, scopes=frozenset({"read"})))
        error = await refused(client, "cancel_task_execution", task_id=UNKNOWN)
        assert error["error_code"] == "PERMISSION_DENIED"


async def test_an_unknown_tool_is_answered_with_the_names_of_those_there_are(doors: Doors) -> None:
    async with doors.client("memory-legacy") as client:
        error = await refused(client, "get_status", task_id="x")
        assert error["error_code"] == "INVALID_INPUT"
        assert "get_task_execution_status" in error["hint"]


async def test_a_fault_of_ours_is_a_number_for_the_agent_and_a_traceback_in_the_log(
    doors: Doors, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr(doors.vespera, "get_status", broken)
    async with doors.client("memory-modern") as client:
        with caplog.at_level(logging.ERROR):
            error = await refused(client, "get_task_execution_status", task_id="x")
    assert error["error_code"] == "INTERNAL_ERROR"
    assert "secret" not in str(error)
    number = error["error"].split()[-1]
    assert any(number in record.getMessage() and record.exc_info for record in caplog.records)


async def test_answers_and_errors_alike_fit_the_listed_output_schema(doors: Doors) -> None:
    """Clients of other makes hold errors, too, against the schema."""
    open_gate(doors)
    async with doors.client("memory-modern") as client:
        schemas = {tool.name: tool.output_schema for tool in (await client.list_tools()).tools}
        handle = await call(client, "execute_task", title="t", role="gated", wait_ms=25_000)
        for plan in PLANS:
            takes_task = "task_id" in plan.takes.model_fields
            for arguments in [{"task_id": handle["task_id"]}, {"task_id": UNKNOWN}, {"nonsense": 1}, {}]:
                if arguments == {"task_id": handle["task_id"]} and not takes_task:
                    continue
                result = await client.call_tool(plan.name, arguments)
                schema = schemas[plan.name]
                assert schema is not None
                assert not list(Draft202012Validator(schema).iter_errors(result.structured_content))  # pyright: ignore[reportUnknownMemberType]
                assert set(result.structured_content or {}) - {"error", "error_code", "hint"} <= set(
                    schema["properties"]
                )


async def test_inputs_sent_as_the_text_of_their_json_are_meant_as_the_object(doors: Doors) -> None:
    open_gate(doors)
    async with doors.client("memory-modern") as client:
        handle = await call(client, "execute_task", title="t", role="gated", inputs='{"steps": 2}', wait_ms=25_000)
        assert (await call(client, "get_task_result", task_id=handle["task_id"]))["result"]["steps"] == 2


async def test_a_repeat_with_the_same_key_gives_the_same_ids(doors: Doors) -> None:
    open_gate(doors)
    async with doors.client("memory-modern") as client:
        given = {"title": "once", "role": "gated", "idempotency_key": "k1", "wait_ms": 25_000}
        first = await call(client, "execute_task", **given)
        second = await call(client, "execute_task", **given)
        assert second["repeated"]
        assert (second["task_id"], second["run_id"]) == (first["task_id"], first["run_id"])
        assert (await call(client, "list_tasks"))["total"] == 1


async def test_the_output_is_read_in_pages_and_by_its_tail(doors: Doors) -> None:
    code = "i=0; while [ $i -lt 2000 ]; do echo line-$i; i=$((i+1)); done"
    async with doors.client("memory-modern") as client:
        handle = await call(
            client, "execute_task", title="talk", role="command", inputs={"argv": ["sh", "-c", code]}, wait_ms=25_000
        )
        tail = (await call(client, "get_task_result", task_id=handle["task_id"]))["output"]
        assert tail["text"].endswith("line-1999\n")
        assert len(tail["text"]) <= 4000
        assert tail["eof"]
        text, offset = "", 0
        while offset < tail["total_bytes"]:
            page = await call(
                client, "get_task_result", task_id=handle["task_id"], output_offset=offset, output_limit=10_000
            )
            text, offset = text + page["output"]["text"], page["output"]["next_offset"]
        assert text.split() == [f"line-{number}" for number in range(2000)]


async def test_a_large_result_is_cut_and_says_so(doors: Doors) -> None:
    async def large(context: Any) -> dict[str, Any]:
        return {"rows": ["y" * 100] * 2000}

    doors.vespera.roles.add(in_loop(large, "large"))
    async with doors.client("memory-modern") as client:
        handle = await call(client, "execute_task", title="large", role="large", wait_ms=25_000)
        assert handle["status"] == "completed"
        result = await call(client, "get_task_result", task_id=handle["task_id"])
        assert result["result_truncated"]
        assert result["result"].startswith('{"rows":["yyy')
        assert result["result_bytes"] > 200_000
        assert len(orjson.dumps(result)) < 60_000


async def test_a_page_of_events_holds_what_a_model_can_read_and_the_next_goes_on(doors: Doors) -> None:
    async def talking(context: Any) -> None:
        for number in range(90):  # progress in a burst would become few events
            context.log(f"line {number} " + "x" * 600)

    doors.vespera.roles.add(in_loop(talking, "talking"))
    async with doors.client("memory-modern") as client:
        handle = await call(client, "execute_task", title="many", role="talking", wait_ms=25_000)
        everything = await doors.vespera.read_events(Caller(), handle["task_id"], max_events=1000)
        read: list[Any] = []
        cursor, sizes, page = 0, list[int](), dict[str, Any]()
        while not page.get("done"):
            page = await call(
                client, "stream_task_execution_events", task_id=handle["task_id"], cursor=cursor, max_events=500
            )
            sizes.append(len(orjson.dumps(page)))
            read += page["events"]
            cursor = page["next_cursor"]
        assert read == everything.events
        assert len(sizes) > 1
        assert max(sizes) < 45_000


async def test_cancel_says_what_became_of_it(doors: Doors) -> None:
    async with doors.client("memory-modern") as client:
        handle = await call(client, "execute_task", title="hold", role="gated")
        cancelled = await call(client, "cancel_task_execution", task_id=handle["task_id"], reason="enough")
        assert (cancelled["success"], cancelled["message"]) == (True, "Cancellation requested")
        assert cancelled["status"] == "cancelled"
        again = await call(client, "cancel_task_execution", task_id=handle["task_id"])
        assert (again["success"], again["message"]) == (False, "Cancellation not possible")
        assert "ended" in again["reason"]
        result = await call(client, "get_task_result", task_id=handle["task_id"])
        assert result["error"]["message"] == "enough"


async def test_a_task_made_by_the_program_is_seen_by_the_agent(doors: Doors) -> None:
    made = await doors.vespera.create_task(Caller(), NewTask(title="by the program"))
    async with doors.client("memory-legacy") as client:
        status = await call(client, "get_task_execution_status", task_id=made.task_id[:8])
        assert status["title"] == "by the program"


def test_a_flood_of_unknown_arguments_is_refused_without_looking_at_each() -> None:
    began = time.thread_time()
    for count in (90, 100_000):
        with pytest.raises(InvalidInput):
            check(NewTask, {"title": "x", **{f"tittle{number}": number for number in range(count)}})
    assert time.thread_time() - began < 3  # to look at each takes minutes
