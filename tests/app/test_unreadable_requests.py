"""What was asked for cannot be read any more: its execution ends, and the next owner begins all the same."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, closing
from typing import TYPE_CHECKING, Any

import pytest
from planning import ME, ended, heard, started

from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute
from vespera_exec.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path

    from vespera_exec.app.views import Handle

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]

SLEEPING: dict[str, Any] = {"role": "command", "inputs": {"argv": ["sleep", "60"]}}
BODIES = [b"[]", b"1", b"{}", b"{", b'{"principal": "local", "scopes": 1, "over_tcp": false, "cwd": "/"}']


def spoil(place: Path, run_id: str, body: bytes) -> None:
    with closing(sqlite3.connect(place / "data" / "vespera.db")) as database, database:
        how = "UPDATE requests SET body = ? WHERE id = (SELECT id FROM streams WHERE name = ?)"
        assert database.execute(how, (body, run_id)).rowcount == 1


async def asleep(vespera: Vespera) -> Handle:
    return await vespera.execute_task(ME, Execute(title="Asleep", **SLEEPING))


@pytest.mark.parametrize("body", BODIES)
async def test_what_ran_and_what_waited_end_and_what_can_be_read_goes_on(
    opening: Opening, tmp_path: Path, body: bytes
) -> None:
    async with opening(max_concurrent=1) as first:
        ran, waited, whole = await asleep(first), await asleep(first), await asleep(first)
    for handle in (ran, waited):
        spoil(tmp_path, handle.run_id, body)
    async with opening(max_concurrent=1) as vespera:
        for handle in (ran, waited):
            result = await ended(vespera, handle)
            assert (result.status, (result.error or {})["code"]) == ("failed", "INTERRUPTED")
            assert "cannot be read any more" in (result.error or {})["message"]
        await heard(vespera, whole, "execution_started")


@pytest.mark.parametrize("body", BODIES)
async def test_the_step_of_a_plan_fails_and_its_plan_hears_of_it(opening: Opening, tmp_path: Path, body: bytes) -> None:
    async with opening() as first:
        handle = await started(first, {"id": "a", "on_interrupt": "resume", **SLEEPING})
        begun = await heard(first, handle, "step_started", "a")
    spoil(tmp_path, begun["details"]["run_id"], body)
    async with opening() as vespera:
        result = await ended(vespera, handle)
        assert (result.error or {})["code"] == "STEP_FAILED"
        assert (result.error or {})["context"]["failed"][0]["code"] == "INTERRUPTED"


@pytest.mark.parametrize("body", BODIES)
async def test_what_failed_before_is_put_back_where_it_can_be_read(
    opening: Opening, tmp_path: Path, body: bytes
) -> None:
    failing: dict[str, Any] = {"role": "command", "inputs": {"argv": ["false"]}}
    async with opening() as first:
        plan = await started(first, {"id": "a", **failing})
        task = await first.execute_task(ME, Execute(title="Fails", **failing))
        for handle in (plan, task):
            await ended(first, handle)
            spoil(tmp_path, handle.run_id, body)
        done = await first.dead_letters.requeue(ME, all=True)
        assert [each.task_id for each in done.requeued] == [task.task_id]
        assert [(each.task_id, each.error_code) for each in done.refused] == [(plan.task_id, "CONFLICT")]
        await ended(first, task)
        with pytest.raises(InvalidInput, match="not known any more"):
            await first.execute_task(ME, Execute(task_id=plan.task_id))
        assert [each.title for each in (await first.list_steps(ME, plan.task_id)).steps] == ["a"]
