"""Plans of thousands of steps: whoever else is served goes on, and what is asked of them is answered in short."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
from deadlines import WITHIN

from tests.app.planning import ME, ended, started
from vespera_exec.app.plans.views import CheckPlan, ExecutePlan
from vespera_exec.model.plans.board import PlanBoard

if TYPE_CHECKING:
    import pytest

    from vespera_exec.app.service import Vespera

_STEPS: list[dict[str, Any]] = [
    {
        "id": f"s{number}",
        "role": "command",
        "inputs": {"argv": ["sleep", "60"] if number else ["true"]},
        "depends_on": ["s0"] if number else [],
    }
    for number in range(2000)
]


async def turns_during(call: Any) -> int:
    """How often others in the loop had their turn."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(count)
        await call
        group.cancel_scope.cancel()
    return turns


async def test_while_a_large_plan_is_read_the_loop_belongs_to_others(vespera: Vespera) -> None:
    assert await turns_during(vespera.plans.check(ME, CheckPlan(plan={"steps": _STEPS}))) > 100
    assert await turns_during(vespera.plans.check(ME, CheckPlan(plan={"steps": _STEPS[:5]}))) < 5


async def test_the_status_of_a_large_plan_names_what_goes_on_and_the_last_checkpoint(vespera: Vespera) -> None:
    handle = await started(vespera, *_STEPS, max_parallel=8)
    with anyio.fail_after(WITHIN):
        while True:
            told = (await vespera.get_status(ME, handle.task_id)).plan
            assert told is not None
            if told.counts.get("running", 0) + told.counts.get("waiting", 0) == 8 and told.last_checkpoint:
                break
            await anyio.sleep(0.01)
    assert [each.step for each in told.current] == ["s1", "s2", "s3", "s4", "s5"]
    (last,) = (await vespera.checkpoints.list(ME, handle.task_id, limit=1)).checkpoints
    assert (told.last_checkpoint, last.step) == (last.checkpoint_id, "s0")
    await vespera.cancel(ME, handle.task_id)
    result = await ended(vespera, handle)
    assert result.status == "cancelled"
    # A step that was never done leaves nothing to go back to.
    assert len((await vespera.checkpoints.list(ME, handle.task_id, limit=50)).checkpoints) == 1


async def test_what_a_key_stands_for_is_known_before_anything_is_recorded(vespera: Vespera) -> None:
    asked = ExecutePlan(plan={"steps": _STEPS[:300]}, idempotency_key="large")
    first = await vespera.plans.execute(ME, asked)
    again = await vespera.plans.execute(ME, asked)
    assert (again.task_id, again.repeated) == (first.task_id, True)
    assert (await vespera.list_tasks(ME)).total == 1
    await vespera.cancel(ME, first.task_id)
    await ended(vespera, first)


async def test_a_large_plan_begins_again_beside_the_loop_and_not_in_it(
    vespera: Vespera, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    opened = PlanBoard.open

    def noted(board: PlanBoard, **given: Any) -> None:
        threads.append(threading.get_ident())
        opened(board, **given)

    bad = {"id": "s0", "role": "survey", "inputs": {"path": "/nowhere"}}
    handle = await started(vespera, *[bad, *_STEPS[1:300]], output={"done": True})
    assert (await ended(vespera, handle)).status == "failed"
    (last, *_) = (await vespera.checkpoints.list(ME, handle.task_id)).checkpoints
    monkeypatch.setattr(PlanBoard, "open", noted)
    await vespera.checkpoints.restore(ME, last.checkpoint_id)
    await ended(vespera, handle)
    await vespera.checkpoints.restore_ended(ME, handle.task_id)
    await ended(vespera, handle)
    assert len(threads) == 2
    assert threading.get_ident() not in threads
