"""Make a checkpoint every now and then, and go back to one.

    python examples/checkpointing.py

A plan has a checkpoint at the end of each step anyway, and with `checkpoint_interval_seconds` in the plan the engine
makes more by itself. This is for a program that wants to decide when.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from vespera_exec import Conflict, DefaultExecutionEngine, ExecutionCheckpoint, Role

if TYPE_CHECKING:
    from roles.context import Context

PLAN: dict[str, Any] = {
    "name": "Chapters",
    "steps": [
        {"id": "one", "role": "write", "inputs": {"chapter": 1}},
        {"id": "two", "role": "write", "inputs": {"chapter": 2}, "depends_on": ["one"]},
        {"id": "three", "role": "write", "inputs": {"chapter": 3}, "depends_on": ["two"]},
    ],
}


async def write(context: Context) -> str:
    await anyio.sleep(0.5)
    print(f"Chapter {context.inputs['chapter']} is written")
    return f"chapter {context.inputs['chapter']}"


async def create_periodic_checkpoints(
    engine: DefaultExecutionEngine, execution_id: str, interval_seconds: float
) -> list[ExecutionCheckpoint]:
    """One loop, so that no two of them overlap; it ends when the execution does."""
    made: list[ExecutionCheckpoint] = []

    async def repeat() -> None:
        while True:
            await anyio.sleep(interval_seconds)
            try:
                made.append(await engine.create_checkpoint(execution_id))
                print(f"Checkpoint created: {made[-1].id}")
            except Conflict as refusal:  # it has not begun, or ends just now
                print(f"Failed to create checkpoint: {refusal}")

    async with anyio.create_task_group() as group:
        group.start_soon(repeat)
        async for update in engine.monitor(execution_id):
            if update.status.is_terminal:
                group.cancel_scope.cancel()
    return made


async def main() -> None:
    async with DefaultExecutionEngine.open(roles=[Role.from_callable(write, in_loop=True, inputs=None)]) as engine:
        execution_id = await engine.submit(PLAN)
        checkpoints = await create_periodic_checkpoints(engine, execution_id, 0.3)
        chosen = next(each for each in checkpoints if each.state.completed_tasks)
        print("Back to where these were done:", *chosen.state.completed_tasks)
        again = await engine.restore_from_checkpoint(chosen.id)
        async for update in engine.monitor(again):
            if update.status.is_terminal:
                print(f"Written again, from there on: {update.status}")


if __name__ == "__main__":
    anyio.run(main)
