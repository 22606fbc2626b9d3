"""What becomes of a run whose owner goes: it goes on from its last checkpoint, stays paused, or ends and says why."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN

from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute, Handle
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from pathlib import Path

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]
ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})

# Counts to ten pages; from the third on it waits for the file `go`. Says in a file of its own where it began.
_PAGES = """
import json, os, sys, time
place = sys.argv[1]
task = json.load(open(os.environ["VESPERA_TASK_FILE"]))
first = (task["checkpoint"] or {"page": 0})["page"]
with open(place + "/began", "a") as began:
    began.write(f"{first} ")
out = os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w", buffering=1)
for page in range(first + 1, 11):
    while page > 3 and not os.path.exists(place + "/go"):
        time.sleep(0.01)
    print(f"page {page}", flush=True)
    out.write(json.dumps({"done": page, "total": 10, "checkpoint": {"page": page}}) + "\\n")
out.write(json.dumps({"result": {"pages": 10}}) + "\\n")
"""


@pytest.fixture
def reader(tmp_path: Path) -> Callable[..., Execute]:
    """`reader(on_interrupt="fail")`: a request for the role that reads pages."""

    def make(on_interrupt: str = "resume", **more: Any) -> Execute:
        roles = tmp_path / "roles"
        roles.mkdir(exist_ok=True)
        (tmp_path / "pages.py").write_text(_PAGES)
        argv = json.dumps([sys.executable, str(tmp_path / "pages.py"), str(tmp_path)])
        definition = f"name: reader\nrunner: process\nargv: {argv}\non_interrupt: {on_interrupt}\n"
        (roles / "reader.yaml").write_text(definition)
        return Execute(title="Read ten pages", role="reader", **more)

    return make


async def at_page(vespera: Vespera, handle: Handle, page: int) -> None:
    """Returns once the checkpoint of that page is in the log."""
    cursor = 0
    with anyio.fail_after(WITHIN):
        while True:
            read = await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=25_000)
            if any(event["details"].get("state") == {"page": page} for event in read.events):
                return
            cursor = read.next_cursor


async def ended(vespera: Vespera, handle: Handle) -> Any:
    cursor = 0
    with anyio.fail_after(WITHIN):
        while True:
            read = await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=25_000)
            if read.done:
                return await vespera.get_result(ME, handle.task_id)
            cursor = read.next_cursor


async def running(vespera: Vespera, handle: Handle) -> None:
    """Returns once it is."""
    with anyio.fail_after(WITHIN):
        while True:
            if (await vespera.get_status(ME, handle.task_id)).status == "running":
                return
            await anyio.sleep(0.01)


async def elapsed(vespera: Vespera, handle: Handle) -> float:
    session = (await vespera.get_status(ME, handle.task_id)).session
    assert session is not None
    return session.time_tracking.elapsed_seconds


async def at_work_for(vespera: Vespera, handle: Handle, seconds: float) -> None:
    """Returns once it has been at work for so long."""
    with anyio.fail_after(WITHIN):
        while True:
            if await elapsed(vespera, handle) >= seconds:
                return
            await anyio.sleep(0.01)


async def events(vespera: Vespera, handle: Handle) -> list[Any]:
    return (await vespera.read_events(ME, handle.session_id, max_events=1000)).events


@pytest.mark.promise("dead_owner")
async def test_a_role_that_resumes_goes_on_from_its_last_checkpoint_in_the_same_session(
    opening: Opening, reader: Callable[..., Execute], tmp_path: Path
) -> None:
    async with opening() as vespera:
        handle = await vespera.execute_task(ME, reader())
        await at_page(vespera, handle, 3)
        before = await vespera.get_status(ME, handle.task_id)
    (tmp_path / "go").touch()
    async with opening() as vespera:
        result = await ended(vespera, handle)
        assert (result.status, result.session_id) == ("completed", handle.session_id)
        assert result.result["result"] == {"pages": 10}
        assert (tmp_path / "began").read_text() == "0 3 "
        told = await events(vespera, handle)
        recovered = [event for event in told if event["type"] == "recovery_initiated"]
        assert len(recovered) == 1
        assert "library:" in recovered[0]["message"]  # the dead owner
        assert [event["sequence"] for event in told] == list(range(1, len(told) + 1))
        shown = [event["progress"]["percentage"] for event in told if event["progress"]]
        assert shown == sorted(shown)
        assert before.session is not None
        assert shown[-1] >= before.session.overall_progress.percentage
        phases = [event["phase"] for event in told if event["type"] == "phase_change"]
        assert "recovery" in phases
        output = await vespera.read_output(ME, handle.task_id)
        assert output.text == "".join(f"page {page}\n" for page in range(1, 11))
        metrics = await vespera.get_metrics(ME, handle.task_id)
        assert (metrics.retry_count, metrics.total_executions) == (0, 1)


@pytest.mark.promise("dead_owner")
async def test_a_role_that_does_not_resume_ends_interrupted_and_names_its_owner(
    opening: Opening, reader: Callable[..., Execute]
) -> None:
    async with opening() as vespera:
        handle = await vespera.execute_task(ME, reader("fail"))
        await at_page(vespera, handle, 3)
    async with opening() as vespera:
        result = await ended(vespera, handle)
        assert (result.status, result.error["code"]) == ("failed", "INTERRUPTED")
        assert "library:" in result.error["message"]


async def test_a_run_that_brings_its_owner_down_every_time_is_given_up(
    opening: Opening, reader: Callable[..., Execute]
) -> None:
    async with opening() as vespera:
        handle = await vespera.execute_task(ME, reader())
        await at_page(vespera, handle, 3)
    for _ in range(3):
        async with opening() as vespera:
            await running(vespera, handle)
    async with opening() as vespera:
        result = await ended(vespera, handle)
        assert (result.status, result.error["code"]) == ("failed", "INTERRUPTED")
        assert "the last of 3 recoveries" in result.error["message"]


async def test_what_was_asked_to_stop_before_its_owner_went_is_cancelled_and_not_resumed(
    opening: Opening, reader: Callable[..., Execute]
) -> None:
    async with opening() as vespera:
        handle = await vespera.execute_task(ME, reader())
        await at_page(vespera, handle, 3)
        await vespera.cancel(ME, handle.task_id)
    async with opening() as vespera:
        assert (await ended(vespera, handle)).status == "cancelled"


async def test_resumed_runs_wait_for_a_slot_and_go_before_what_had_not_begun(
    opening: Opening, reader: Callable[..., Execute], tmp_path: Path
) -> None:
    async with opening(max_concurrent=3) as vespera:
        begun = [await vespera.execute_task(ME, reader()) for _ in range(3)]
        for handle in begun:
            await at_page(vespera, handle, 3)
        waiting = await vespera.execute_task(ME, reader(priority=10))
    async with opening(max_concurrent=1) as vespera:
        await running(vespera, begun[0])
        states = [(await vespera.get_status(ME, handle.task_id)).status for handle in (*begun, waiting)]
        assert states == ["running", "recovering", "recovering", "pending"]
        assert (await vespera.cancel(ME, begun[2].task_id, wait_ms=25_000)).status == "cancelled"
        (tmp_path / "go").touch()
        ends = [(await ended(vespera, handle)).status for handle in (begun[0], begun[1], waiting)]
        assert ends == ["completed"] * 3
        order = [(await events(vespera, handle))[-1]["cursor"] for handle in (begun[0], begun[1], waiting)]
        assert order == sorted(order)


async def test_a_role_that_is_gone_leaves_its_run_interrupted(
    opening: Opening, reader: Callable[..., Execute], tmp_path: Path
) -> None:
    async with opening() as vespera:
        handle = await vespera.execute_task(ME, reader())
        await at_page(vespera, handle, 3)
    (tmp_path / "roles" / "reader.yaml").unlink()
    async with opening() as vespera:
        result = await ended(vespera, handle)
        assert (result.status, result.error["code"]) == ("failed", "INTERRUPTED")
        assert "reader" in result.error["message"]


async def test_a_paused_run_stays_paused_however_many_owners_die(
    opening: Opening, reader: Callable[..., Execute], tmp_path: Path
) -> None:
    async with opening() as vespera:
        handle = await vespera.execute_task(ME, reader())
        await at_page(vespera, handle, 3)
        assert (await vespera.pause(ME, handle.task_id, reason="Lunch")).success
    for _ in range(5):
        async with opening() as vespera:
            status = await vespera.get_status(ME, handle.task_id)
            assert status.status == "paused"
    (tmp_path / "go").touch()
    async with opening() as vespera:
        assert (await vespera.resume(ME, handle.task_id)).success
        assert (await ended(vespera, handle)).status == "completed"
        told = await events(vespera, handle)
        assert len([event for event in told if event["type"] == "recovery_initiated"]) == 1
        assert [event["message"] for event in told if "goes on" in event["message"]] == [
            "It goes on from its last checkpoint"
        ]
        assert (tmp_path / "began").read_text() == "0 3 "


async def test_a_paused_run_that_is_resumed_without_a_slot_is_not_at_work_while_it_waits(
    opening: Opening, reader: Callable[..., Execute], tmp_path: Path
) -> None:
    async with opening(max_concurrent=2) as vespera:
        first, second = [await vespera.execute_task(ME, reader(timeout_seconds=20)) for _ in range(2)]
        for handle in (first, second):
            await at_page(vespera, handle, 3)
        await vespera.pause(ME, second.task_id)
    async with opening(max_concurrent=1) as vespera:
        await running(vespera, first)
        resumed = await vespera.resume(ME, second.task_id)
        assert (resumed.success, resumed.already) == (True, False)
        before = await elapsed(vespera, second)
        await at_work_for(vespera, first, await elapsed(vespera, first) + 0.3)
        assert await elapsed(vespera, second) == before
        (tmp_path / "go").touch()
        assert (await ended(vespera, second)).status == "completed"
