"""Plans that the next owner cannot read: they end, and so do all their steps, before them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, closing
from typing import TYPE_CHECKING, Any

import pytest
from planning import ME, ended, heard, standing, started

from vespera_exec.app.service import Vespera

if TYPE_CHECKING:
    from pathlib import Path

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]

LOST = "DELETE FROM requests WHERE id = (SELECT id FROM streams WHERE name = ?)"
GARBLED = "UPDATE requests SET body = x'00' WHERE id = (SELECT id FROM streams WHERE name = ?)"
NO_STEPS = "DELETE FROM steps WHERE execution = (SELECT id FROM streams WHERE name = ?)"
CUT_STEPS = "UPDATE steps SET doc = '{' WHERE execution = (SELECT id FROM streams WHERE name = ?)"
EMPTIED = "UPDATE requests SET body = x'7b7d' WHERE id = (SELECT id FROM streams WHERE name = ?)"
STUBBORN = ["sh", "-c", "trap '' INT TERM; while :; do sleep 1; done"]


def spoil(place: Path, how: str, run_id: str) -> None:
    with closing(sqlite3.connect(place / "data" / "vespera.db")) as database, database:
        assert database.execute(how, (run_id,)).rowcount == 1


def sleeping(name: str, *needs: str) -> dict[str, Any]:
    asleep = {"role": "command", "inputs": {"argv": ["sleep", "60"]}, "on_interrupt": "resume"}
    return {"id": name, "depends_on": list(needs), **asleep}


@pytest.mark.parametrize("how", [LOST, GARBLED, EMPTIED], ids=["lost", "garbled", "emptied"])
async def test_a_plan_whose_request_is_gone_ends_after_all_its_steps(
    opening: Opening, tmp_path: Path, how: str
) -> None:
    async with opening() as first:
        done = {"id": "done", "role": "command", "inputs": {"argv": ["true"]}}
        handle = await started(first, done, sleeping("works", "done"), sleeping("waits", "works"))
        await heard(first, handle, "step_started", "works")
    spoil(tmp_path, how, handle.run_id)
    async with opening() as vespera:
        result = await ended(vespera, handle)
        assert (result.status, (result.error or {})["code"]) == ("failed", "INTERRUPTED")
        assert await standing(vespera, handle) == {"done": "completed", "works": "cancelled", "waits": "cancelled"}
        steps = (await vespera.list_steps(ME, handle.task_id)).steps
        why = (result.error or {})["message"]
        assert [each.reason for each in steps] == [None, "Its plan does not go on", why]
        child = (await vespera.last_events(ME, steps[1].task_id or "")).events
        of_plan = (await vespera.last_events(ME, handle.session_id)).events
        end = next(each["cursor"] for each in of_plan if each["type"] == "execution_failed")
        assert next(each["cursor"] for each in child if each["type"] == "execution_cancelled") < end
        assert max(each["cursor"] for each in of_plan if each["type"] == "step_cancelled") < end


async def test_a_paused_plan_that_cannot_be_read_ends_too(opening: Opening, tmp_path: Path) -> None:
    async with opening() as first:
        handle = await started(first, sleeping("a"), sleeping("b", "a"))
        await heard(first, handle, "step_started", "a")
        assert (await first.pause(ME, handle.task_id)).status == "paused"
    spoil(tmp_path, LOST, handle.run_id)
    async with opening() as vespera:
        assert (await ended(vespera, handle)).status == "failed"
        assert await standing(vespera, handle) == {"a": "cancelled", "b": "cancelled"}


@pytest.mark.parametrize("cancelling", [False, True], ids=["running", "cancelling"])
@pytest.mark.parametrize("how", [NO_STEPS, CUT_STEPS], ids=["none", "cut"])
async def test_a_plan_of_which_not_even_the_steps_can_be_read_keeps_nobody_out(
    opening: Opening, tmp_path: Path, how: str, cancelling: bool
) -> None:
    async with opening() as first:
        handle = await started(first, sleeping("a") | {"inputs": {"argv": STUBBORN}})
        await heard(first, handle, "step_started", "a")
        (step,) = (await first.list_steps(ME, handle.task_id)).steps
        if cancelling:
            await first.cancel(ME, handle.task_id)
    spoil(tmp_path, LOST, handle.run_id)
    spoil(tmp_path, how, handle.session_id)
    async with opening() as vespera:
        result = await ended(vespera, handle)
        expected = ("cancelled", "CANCELLED") if cancelling else ("failed", "INTERRUPTED")
        assert (result.status, (result.error or {})["code"]) == expected
        assert (await vespera.get_status(ME, step.task_id or "")).status == "cancelled"
