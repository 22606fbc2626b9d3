"""Pause and resume as the doors show them: MCP tools, REST, and the library behind both."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import orjson
import pytest
from deadlines import WITHIN
from mcp_doors import BEARER, IN_MEMORY, ME, Doors, Kind, call, eventually, in_loop, opened, refused, waiting

from roles.definition import Role
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute
from vespera_exec.errors import PermissionDenied, TaskNotFound
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from vespera_exec.app.views import Handle

UNKNOWN = "no-such-task-anywhere"


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    async with opened(tmp_path) as doors:
        yield doors


async def started(vespera: Vespera, *argv: str, role: str = "command") -> Handle:
    """A run whose work has begun."""
    inputs = {"argv": list(argv)} if argv else {}
    handle = await vespera.execute_task(ME, Execute(title="a task", role=role, inputs=inputs))
    cursor = 0
    with anyio.fail_after(WITHIN):
        while True:
            page = await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=25_000)
            if any(event["status"]["new"] == "running" for event in page.events):
                return handle
            cursor = page.next_cursor


async def status(vespera: Vespera, handle: Handle) -> str:
    return (await vespera.get_status(ME, handle.task_id)).status


# MCP


@pytest.mark.parametrize("kind", IN_MEMORY)
async def test_an_agent_pauses_a_command_and_lets_it_go_on(doors: Doors, kind: Kind) -> None:
    handle = await started(doors.vespera, "sleep", "60")
    async with doors.client(kind) as client:
        paused = await call(client, "pause_task_execution", task_id=handle.task_id, reason="Lunch")
        assert (paused["success"], paused["status"], paused["already"], paused["pending"]) == (
            True,
            "paused",
            False,
            False,
        )
        shown = await call(client, "get_task_execution_status", task_id=handle.task_id)
        assert (shown["status"], shown["lifecycle"], shown["executing"]) == ("paused", "paused", True)
        assert shown["session"]["time_tracking"]["estimated_completion"] is None
        again = await call(client, "pause_task_execution", task_id=handle.task_id)
        assert (again["success"], again["already"]) == (True, True)
        page = await doors.vespera.read_events(ME, handle.task_id, max_events=1000)
        (event,) = [event for event in page.events if event["type"] == "execution_paused"]
        assert event["message"] == "Lunch"
        resumed = await call(client, "resume_task_execution", task_id=handle.task_id)
        assert (resumed["success"], resumed["status"], resumed["already"]) == (True, "running", False)
        idle = await call(client, "resume_task_execution", task_id=handle.task_id)
        assert (idle["success"], idle["already"]) == (True, True)
        await call(client, "cancel_task_execution", task_id=handle.task_id)
        for tool in ("pause_task_execution", "resume_task_execution"):
            late = await call(client, tool, task_id=handle.task_id)
            assert (late["success"], late["reason"]) == (False, "it has ended (cancelled)")


async def test_an_unknown_task_keeps_the_promised_keys(doors: Doors) -> None:
    async with doors.client("memory-modern") as client:
        for tool in ("pause_task_execution", "resume_task_execution"):
            answer = await refused(client, tool, task_id=UNKNOWN)
            assert (answer["success"], answer["error_code"]) == (False, "TASK_NOT_FOUND")


async def test_the_hints_say_that_a_pause_destroys_nothing_and_may_be_repeated(doors: Doors) -> None:
    async with doors.client("memory-modern") as client:
        assert "pause_task_execution" in (client.instructions or "")
        hints = {tool.name: tool.annotations for tool in (await client.list_tools()).tools}
    for tool in ("pause_task_execution", "resume_task_execution"):
        hint = hints[tool]
        assert hint is not None
        assert (hint.read_only_hint, hint.destructive_hint, hint.idempotent_hint) == (False, False, True)


# what may be paused


async def test_a_pause_that_waits_for_a_pause_point_is_pending_and_takes_effect_later(doors: Doors) -> None:
    let, passed = anyio.Event(), list[str]()

    async def work(context: Any) -> str:
        await let.wait()
        await context.pause_point()
        passed.append("passed")
        return "done"

    doors.vespera.roles.add(in_loop(work, "cooperative"))
    handle = await started(doors.vespera, role="cooperative")
    pending = await doors.vespera.pause(ME, handle.task_id, wait_ms=50)
    assert (pending.success, pending.pending, pending.status) == (True, True, "running")
    let.set()
    await waiting(doors.vespera, handle.task_id, "execution_paused")
    assert passed == []
    resumed = await doors.vespera.resume(ME, handle.task_id)
    assert (resumed.success, resumed.already, resumed.message) == (True, False, "Resumed")
    await waiting(doors.vespera, handle.task_id, "execution_completed")
    assert passed == ["passed"]


async def test_a_pending_pause_is_taken_back_by_a_resume(doors: Doors) -> None:
    handle = await started(doors.vespera, role="gated")
    assert (await doors.vespera.pause(ME, handle.task_id, wait_ms=0)).pending
    back = await doors.vespera.resume(ME, handle.task_id)
    assert (back.success, back.already, "taken back" in back.message) == (True, False, True)
    doors.gate.open.set()
    await waiting(doors.vespera, handle.task_id, "execution_completed")
    page = await doors.vespera.read_events(ME, handle.task_id, max_events=1000)
    assert not [event for event in page.events if event["type"] in ("execution_paused", "execution_resumed")]


async def test_a_cancel_at_a_pause_point_is_raised_there(doors: Doors) -> None:
    seen: list[str] = []

    async def work(context: Any) -> None:
        try:
            await begun.wait()
            await context.pause_point()
        except Exception as error:
            seen.append(type(error).__name__)
            raise

    begun = anyio.Event()
    doors.vespera.roles.add(in_loop(work, "cooperative"))
    handle = await started(doors.vespera, role="cooperative")
    assert (await doors.vespera.pause(ME, handle.task_id, wait_ms=0)).pending
    begun.set()
    await waiting(doors.vespera, handle.task_id, "execution_paused")
    assert (await doors.vespera.cancel(ME, handle.task_id, wait_ms=25_000)).status == "cancelled"
    assert seen == ["Cancelled"]


async def test_a_callable_in_a_child_process_is_stopped_as_a_whole(doors: Doors, tmp_path: Path) -> None:
    (tmp_path / "ticking.py").write_text(
        "import itertools\n\ndef work(context):\n    for step in itertools.count():\n        context.log(str(step))\n"
    )
    role = Role(name="ticking", runner="python", target="ticking:work", python_path=str(tmp_path), grace_seconds=0.5)
    doors.vespera.roles.add(role)
    handle = await started(doors.vespera, role="ticking")
    assert (await doors.vespera.pause(ME, handle.task_id)).status == "paused"
    await doors.vespera.cancel(ME, handle.task_id, wait_ms=25_000)
    assert await status(doors.vespera, handle) == "cancelled"


async def test_what_is_queued_was_never_started_or_is_not_allowed_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path, max_concurrent=1) as doors:
        first = await started(doors.vespera, role="gated")
        queued = await doors.vespera.execute_task(ME, Execute(title="queued", role="gated"))
        refusal = await doors.vespera.pause(ME, queued.task_id)
        assert (refusal.success, refusal.status) == (False, "pending")
        assert refusal.reason == "it is still queued (pending): nothing of it runs yet"
        with pytest.raises(TaskNotFound):
            await doors.vespera.pause(ME, UNKNOWN)
        with pytest.raises(PermissionDenied):
            await doors.vespera.pause(Caller(scopes=frozenset({"read"})), first.task_id)
        with pytest.raises(PermissionDenied):
            await doors.vespera.resume(Caller(scopes=frozenset({"read"})), first.task_id)
        doors.gate.open.set()
        await waiting(doors.vespera, queued.task_id, "execution_completed")


async def test_work_that_ends_before_it_could_be_paused_says_so(doors: Doors) -> None:
    handle = await started(doors.vespera, role="gated")

    async def let_it_end() -> None:
        await anyio.wait_all_tasks_blocked()
        doors.gate.open.set()

    async with anyio.create_task_group() as group:
        group.start_soon(let_it_end)
        refusal = await doors.vespera.pause(ME, handle.task_id)
        assert not refusal.success
        assert refusal.reason in ("its work is over", "it has ended (completed)", "it is completing already")
    await waiting(doors.vespera, handle.task_id, "execution_completed")


# over a change of owners


def resuming(tmp_path: Path) -> Settings:
    """Settings with a role `resuming`, which notes each beginning and ends once the file `go` is there."""
    code = (
        f"import os, pathlib, time; place = pathlib.Path({str(tmp_path)!r})\n"
        "open(place / 'began', 'a').write('.')\n"
        "while not (place / 'go').exists(): time.sleep(0.01)\n"
    )
    (tmp_path / "work.py").write_text(code)
    roles = tmp_path / "roles"
    roles.mkdir()
    argv = orjson.dumps([sys.executable, "-S", str(tmp_path / "work.py")]).decode()
    (roles / "resuming.yaml").write_text(f"name: resuming\nrunner: process\nargv: {argv}\non_interrupt: resume\n")
    return Settings.load({"HOME": str(tmp_path)}, data_dir=tmp_path / "data", roles_dir=roles, max_concurrent=1)


async def test_a_run_that_was_left_paused_stays_so_under_the_next_owner_until_it_is_resumed(tmp_path: Path) -> None:
    settings, began = resuming(tmp_path), tmp_path / "began"
    async with Vespera.open(settings=settings) as first:
        handle = await started(first, role="resuming")
        await eventually(lambda: began.exists() and began.read_text() != "")
        assert (await first.pause(ME, handle.task_id, reason="Lunch")).status == "paused"
    (tmp_path / "go").touch()
    async with Vespera.open(settings=settings) as second:
        assert await status(second, handle) == "paused"
        again = await second.pause(ME, handle.task_id)
        assert (again.success, again.already) == (True, True)
        other = await second.execute_task(ME, Execute(title="beside", role="resuming", wait_ms=25_000))
        assert other.status == "completed", "what is paused so holds no slot"
        assert began.read_text() == ".."
        assert (await second.resume(ME, handle.task_id)).success
        await waiting(second, handle.task_id, "execution_completed")
        assert began.read_text() == "..."


async def test_a_run_that_waits_for_a_slot_to_go_on_can_be_paused_and_cancelled_there(tmp_path: Path) -> None:
    settings, began = resuming(tmp_path), tmp_path / "began"
    async with Vespera.open(settings=settings) as first:
        handle = await started(first, role="resuming")
        await eventually(lambda: began.exists() and began.read_text() != "")
        await first.pause(ME, handle.task_id)
    async with Vespera.open(settings=settings) as second:
        beside = await started(second, role="resuming")
        assert (await second.resume(ME, handle.task_id)).status == "preparing"
        paused = await second.pause(ME, handle.task_id, reason="Again")
        assert (paused.success, paused.status, paused.already) == (True, "paused", False)
        (tmp_path / "go").touch()
        await waiting(second, beside.task_id, "execution_completed")
        assert await status(second, handle) == "paused"
        assert (await second.cancel(ME, handle.task_id, wait_ms=25_000)).status == "cancelled"
        assert began.read_text() == ".."


# REST


async def test_rest_answers_with_200_202_or_409_and_on_both_paths(tmp_path: Path) -> None:
    async with opened(tmp_path, http=True) as doors:
        handle = await started(doors.vespera, "sleep", "60")
        gated = await started(doors.vespera, role="gated")
        async with httpx.AsyncClient(base_url=doors.url or "", headers=BEARER, timeout=WITHIN) as client:
            paused = await client.post(f"/tasks/{handle.task_id}/pause", json={"reason": "Lunch"})
            assert (paused.status_code, paused.json()["status"]) == (200, "paused")
            shown = (await client.get(f"/executions/{handle.session_id}")).json()
            assert (shown["status"], shown["lifecycle"]) == ("paused", "paused")
            resumed = await client.post(f"/executions/{handle.session_id}/resume")
            assert (resumed.status_code, resumed.json()["status"]) == (200, "running")
            pending = await client.post(f"/executions/{gated.session_id}/pause", json={"wait_ms": 0})
            assert (pending.status_code, pending.json()["pending"]) == (202, True)
            await client.post(f"/tasks/{handle.task_id}/cancel", json={"wait_ms": 25_000})
            for verb in ("pause", "resume"):
                late = await client.post(f"/tasks/{handle.task_id}/{verb}")
                assert (late.status_code, late.json()["reason"]) == (409, "it has ended (cancelled)")
                assert (await client.post(f"/tasks/{UNKNOWN}/{verb}")).status_code == 404
                assert (await client.post(f"/tasks/{handle.task_id}/{verb}", json={"resaon": "x"})).status_code == 400
