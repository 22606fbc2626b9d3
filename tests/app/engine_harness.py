"""An engine with two roles, work that waits for its test, and ways to wait for both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
from deadlines import WITHIN

from roles.definition import Role
from vespera_exec.app.executions.engine import DefaultExecutionEngine
from vespera_exec.app.views import NewTask
from vespera_exec.errors import ExecutionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vespera_exec.app.executions.result import ExecutionUpdate
    from vespera_exec.app.service import Vespera


def engine_over(vespera: Vespera) -> DefaultExecutionEngine:
    """An engine with the roles `add` and `fail`."""

    async def add(context: Any) -> dict[str, Any]:
        return {"sum": context.inputs["a"] + context.inputs["b"], "quality_score": 0.5}

    async def fail(context: Any) -> None:
        raise ExecutionError("the line is down", code="NETWORK", context={"host": "a"})

    for work in (add, fail):
        vespera.roles.add(Role.from_callable(work, in_loop=True, inputs=None))
    return DefaultExecutionEngine(vespera)


class Held:
    """Work that stands at each of its points until it is let on."""

    def __init__(self, engine: DefaultExecutionEngine, **policy: Any) -> None:
        self.begun, self.go_on = anyio.Event(), anyio.Event()
        role = Role.from_callable(self.work, name="held", in_loop=True, inputs=None, grace_seconds=0.1, **policy)
        engine.vespera.roles.add(role)

    async def work(self, context: Any) -> str:
        context.progress(40, "half way")
        self.begun.set()
        while not self.go_on.is_set():
            await context.pause_point()
            with anyio.move_on_after(0.02):
                await self.go_on.wait()
        return "made"


def adding(**more: Any) -> NewTask:
    return NewTask(title="Add", role="add", inputs={"a": 1, "b": 2}, **more)


async def collected(engine: DefaultExecutionEngine, execution_id: str) -> list[ExecutionUpdate]:
    with anyio.fail_after(WITHIN):
        return [update async for update in engine.monitor(execution_id)]


async def until(claim: Callable[[], bool]) -> None:
    with anyio.fail_after(WITHIN):
        while not claim():  # noqa: ASYNC110 - a deadline bounds it
            await anyio.sleep(0.01)
