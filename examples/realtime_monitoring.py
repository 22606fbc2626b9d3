"""Follow an execution as it goes on: progress, the current step, events, messages.

    python examples/realtime_monitoring.py

`submit` gives the id at once, so that what happens from the first moment on is seen; `execute` would return at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from vespera_exec import DefaultExecutionEngine, Role

if TYPE_CHECKING:
    from roles.context import Context

PLAN: dict[str, Any] = {
    "name": "Build",
    "steps": [
        {"id": "compile", "role": "work", "inputs": {"parts": 4}},
        {"id": "link", "role": "work", "inputs": {"parts": 2}, "depends_on": ["compile"]},
    ],
}


async def work(context: Context) -> int:
    parts: int = context.inputs["parts"]
    for part in range(parts):
        context.progress(100 * part / parts, f"part {part + 1} of {parts}")
        await anyio.sleep(0.15)
    context.log(f"{parts} parts made")
    return parts


async def monitor(engine: DefaultExecutionEngine, execution_id: str) -> None:
    async for update in engine.monitor(execution_id):  # ends by itself, after the terminal update
        print(f"Progress: {update.progress.percentage:.0f}%")
        print(f"Current task: {update.current_task}")
        print(f"Status: {update.status}")
        for event in update.events:
            print(f"Event: {event.type} - {event.description}")
        for message in update.messages:
            print(f"[{message.level}] {message.message}")


async def main() -> None:
    async with DefaultExecutionEngine.open(roles=[Role.from_callable(work, in_loop=True, inputs=None)]) as engine:
        execution_id = await engine.submit(PLAN)
        await monitor(engine, execution_id)


if __name__ == "__main__":
    anyio.run(main)
