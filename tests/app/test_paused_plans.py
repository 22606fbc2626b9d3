"""Plans that stand still: what is said of their steps, and what these may do meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import pytest
from planning import ME, ended, heard, standing, started, until

from vespera_exec.app.service import Vespera

if TYPE_CHECKING:
    from vespera_exec.app.plans.views import StepView
    from vespera_exec.app.views import Handle

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]


@pytest.fixture
async def vespera(opening: Opening) -> AsyncIterator[Vespera]:
    async with opening(max_concurrent=1) as made:
        yield made


def sleeping(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "role": "command", "inputs": {"argv": ["sleep", "60"]}, **more}


async def steps(vespera: Vespera, handle: Handle) -> dict[str, StepView]:
    return {each.id: each for each in (await vespera.list_steps(ME, handle.task_id)).steps}


async def works(vespera: Vespera, handle: Handle, name: str) -> str:
    """The task of a step, once that runs."""
    await heard(vespera, handle, "step_started", name)
    task_id = (await steps(vespera, handle))[name].task_id or ""

    async def is_running() -> bool:
        return (await vespera.get_status(ME, task_id)).status == "running"

    await until(is_running)
    return task_id


async def test_a_step_of_a_paused_plan_is_not_resumed_by_any_id_of_its_own(vespera: Vespera) -> None:
    handle = await started(vespera, sleeping("a"))
    task_id = await works(vespera, handle, "a")
    assert (await vespera.pause(ME, handle.task_id)).status == "paused"
    session_id = (await vespera.get_status(ME, task_id)).session_id or ""
    answers = [
        await vespera.resume(ME, task_id),
        await vespera.resume(ME, session_id),
        await vespera.plans.resume_step(handle.task_id, "a", ME),
    ]
    assert {(each.success, each.reason) for each in answers} == {
        (False, f"its plan is paused: resume {handle.task_id}")
    }
    assert (await vespera.get_status(ME, task_id)).status == "paused"
    assert (await vespera.resume(ME, handle.task_id)).success
    await until(lambda: is_at(vespera, task_id, "running"))
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)


async def is_at(vespera: Vespera, any_id: str, status: str) -> bool:
    return (await vespera.get_status(ME, any_id)).status == status


async def test_a_step_that_was_paused_by_itself_stays_so_when_its_plan_goes_on(vespera: Vespera) -> None:
    handle = await started(vespera, sleeping("a"))
    task_id = await works(vespera, handle, "a")
    assert (await vespera.pause(ME, task_id)).status == "paused"
    assert (await vespera.pause(ME, handle.task_id)).status == "paused"
    assert not (await vespera.resume(ME, task_id)).success
    assert (await vespera.resume(ME, handle.task_id)).success
    assert (await vespera.get_status(ME, task_id)).status == "paused"
    assert (await vespera.resume(ME, task_id)).success
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)


async def test_the_steps_of_a_paused_plan_wait_for_its_pause(vespera: Vespera) -> None:
    handle = await started(
        vespera,
        sleeping("runs"),
        sleeping("asks", approval=True),
        sleeping("queued"),
        sleeping("later"),
        max_parallel=3,
    )
    await works(vespera, handle, "runs")
    await heard(vespera, handle, "step_waiting", "queued", **{"for": "slot"})
    assert (await vespera.pause(ME, handle.task_id)).status == "paused"

    async def has_told() -> bool:
        told = await steps(vespera, handle)
        return [told[name].waiting_for for name in ("runs", "queued", "later")] == ["pause", "pause", None]

    await until(has_told)
    assert (await standing(vespera, handle))["runs"] == "waiting"
    status = await vespera.get_status(ME, handle.task_id)
    assert status.plan is not None
    assert "pause" in {each.waiting_for for each in status.plan.current}
    assert (await vespera.resume(ME, handle.task_id)).success
    await heard(vespera, handle, "step_waiting", "runs", **{"for": None})
    await heard(vespera, handle, "step_waiting", "queued", **{"for": "slot"})
    assert (await steps(vespera, handle))["runs"].status == "running"
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)


async def test_a_pause_of_a_step_that_waits_for_an_answer_says_so(vespera: Vespera) -> None:
    handle = await started(vespera, sleeping("asks", approval=True))
    await heard(vespera, handle, "step_waiting", "asks", **{"for": "answer"})
    answer = await vespera.plans.pause_step(handle.task_id, "asks", ME)
    assert (answer.success, answer.already) == (True, True)
    assert answer.message == "It stands still already: it waits for an answer: approval"
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)
    assert (await ended(vespera, handle)).status == "cancelled"
