"""Plans that are stopped before their end: what they had reached is their result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from planning import ME, ended, heard, started

from vespera_exec.app.service import Vespera

if TYPE_CHECKING:
    from pathlib import Path

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]

SLEEPING = {"role": "command", "inputs": {"argv": ["sleep", "60"]}, "on_interrupt": "resume"}
STEPS: tuple[dict[str, Any], ...] = (
    {"id": "done", "role": "command", "inputs": {"argv": ["echo", "hello"]}},
    {"id": "long", "depends_on": ["done"], **SLEEPING},
    {"id": "later", "depends_on": ["long"], **SLEEPING},
)
OUTPUT = {"said": "${steps.done.output.output_tail}"}
COUNTS = {"completed": 1, "cancelled": 2}


def reached(why: str, of_later: str | None = None) -> dict[str, Any]:
    cancelled = [{"step": "long", "reason": why}, {"step": "later", "reason": of_later or why}]
    return {"output": {"said": "hello\n"}, "counts": COUNTS, "failed": [], "skipped": [], "cancelled": cancelled}


async def test_the_result_of_a_cancelled_plan_is_what_it_had_reached(vespera: Vespera) -> None:
    handle = await started(vespera, *STEPS, output=OUTPUT)
    await heard(vespera, handle, "step_started", "long")
    await vespera.cancel(ME, handle.task_id, reason="Enough", wait_ms=5000)
    result = await ended(vespera, handle)
    assert (result.status, result.error) == ("cancelled", {"code": "CANCELLED", "message": "Enough"})
    assert result.result == reached("Enough")


async def test_the_result_of_a_plan_that_took_too_long_is_what_it_had_reached(vespera: Vespera) -> None:
    handle = await started(vespera, *STEPS, output=OUTPUT, timeout_seconds=4)
    result = await ended(vespera, handle)
    assert (result.status, (result.error or {})["code"]) == ("timed_out", "TIMEOUT")
    assert result.result == reached("Timeout after 4 seconds of work")


async def test_what_a_cancelled_plan_does_not_reach_its_template_has_not(vespera: Vespera) -> None:
    handle = await started(vespera, *STEPS, output={"end": "${steps.later.output.output_tail}"})
    await heard(vespera, handle, "step_started", "long")
    await vespera.cancel(ME, handle.task_id, wait_ms=5000)
    result = await ended(vespera, handle)
    assert (result.result["output"], result.result["counts"]) == (None, COUNTS)


async def test_the_result_of_a_plan_that_may_not_go_on_is_what_it_had_reached(opening: Opening, tmp_path: Path) -> None:
    async with opening() as first:
        handle = await started(first, *STEPS, output=OUTPUT)
        await heard(first, handle, "step_started", "long")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    async with opening(data_dir=tmp_path / "copy") as vespera:
        result = await ended(vespera, handle)
        error = result.error or {}
        assert (result.status, error["code"]) == ("failed", "INTERRUPTED")
        assert result.result == reached("Its plan does not go on", error["message"])
