"""Pause, resume and cancel an execution.

    python examples/execution_control.py

`pause` returns when the work stands still, `cancel` when nothing of it is left. What has ended meanwhile is neither
paused nor resumed: that is an InvalidTransitionError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from vespera_exec import DefaultExecutionEngine, InvalidTransitionError, NewTask, Role

if TYPE_CHECKING:
    from roles.context import Context


async def count(context: Context) -> int:
    for number in range(context.inputs["to"]):
        await context.pause_point()  # where work in the loop can stand still
        context.steps(number, context.inputs["to"])
        await anyio.sleep(0.05)
    return context.inputs["to"]


async def pause_and_resume(engine: DefaultExecutionEngine, execution_id: str) -> None:
    try:
        await engine.pause(execution_id)
        print("Execution paused:", await engine.get_status(execution_id))
        await anyio.sleep(0.5)  # some condition, or a person
        await engine.resume(execution_id)
        print("Execution resumed:", await engine.get_status(execution_id))
    except InvalidTransitionError as refusal:
        print("Too late:", refusal)


async def main() -> None:
    async with DefaultExecutionEngine.open(roles=[Role.from_callable(count, in_loop=True, inputs=None)]) as engine:
        long = await engine.submit(NewTask(title="Count far", role="count", inputs={"to": 1000}))
        async for update in engine.monitor(long):
            if update.progress.percentage:
                break
        await pause_and_resume(engine, long)
        await engine.cancel(long, reason="far enough")
        print("Execution cancelled:", await engine.get_status(long))

        short = await engine.execute(NewTask(title="Count", role="count", inputs={"to": 3}))
        print("Counted to", short.output)
        await pause_and_resume(engine, short.execution_id)


if __name__ == "__main__":
    anyio.run(main)
