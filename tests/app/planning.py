"""What the tests of plans share: who asks, a short way to start a plan, and to wait for what it becomes."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import anyio
from deadlines import WITHIN

from vespera_exec.app.plans.views import ExecutePlan
from vespera_exec.app.service import Vespera
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from vespera_exec.app.views import Handle, Result

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]

ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})


async def started(vespera: Vespera, *steps: dict[str, Any], wait_ms: int = 0, **plan: Any) -> Handle:
    """A plan of these steps, named "Plan"."""
    given = {"name": "Plan", **plan, "steps": list(steps)}
    return await vespera.plans.execute(ME, ExecutePlan(plan=given, wait_ms=wait_ms))


async def ended(vespera: Vespera, handle: Handle, *, within: float = WITHIN) -> Result:
    """Its result, once it is done."""
    cursor = 0
    with anyio.fail_after(within):
        while True:
            read = await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=25_000)
            if read.done:
                return await vespera.get_result(ME, handle.task_id)
            cursor = read.next_cursor


async def heard(vespera: Vespera, handle: Handle, kind: str, step: str | None = None, **details: Any) -> Any:
    """The first event of this type, about this step, with these details."""
    cursor = 0
    with anyio.fail_after(WITHIN):
        while True:
            read = await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=25_000)
            for event in read.events:
                told = event["details"]
                fits = step is None or event["step_id"] == step
                if event["type"] == kind and fits and all(told.get(name) == details[name] for name in details):
                    return event
            cursor = read.next_cursor


async def standing(vespera: Vespera, handle: Handle) -> dict[str, str]:
    """The status of each step."""
    page = await vespera.list_steps(ME, handle.task_id, limit=1000)
    return {each.id: each.status for each in page.steps}


async def until(holds: Callable[[], bool | Awaitable[bool]]) -> None:
    """Returns once it does."""
    with anyio.fail_after(WITHIN):
        while True:
            told = holds()
            if await told if isinstance(told, Awaitable) else told:
                return
            await anyio.sleep(0.01)
