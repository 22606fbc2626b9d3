"""Have a function called with what happens in an execution.

    python examples/event_subscription.py

A subscription ends by itself with the execution. One that comes after the end hears of the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from vespera_exec import DefaultExecutionEngine, EventType, ExecutionStatus, ExecutionUpdate, NewTask, Role

if TYPE_CHECKING:
    from roles.context import Context


async def deliver(context: Context) -> None:
    for stop in range(8):
        context.progress(12 * stop, f"stop {stop + 1}")
        await context.pause_point()
        await anyio.sleep(0.1)
    raise ConnectionError("nobody opens the door")


def heard(update: ExecutionUpdate) -> None:
    match update.status:
        case ExecutionStatus.RUNNING:
            print(f"Execution running: {update.progress.percentage:.0f}% complete")
        case ExecutionStatus.PAUSED:
            print("Execution paused")
        case ExecutionStatus.COMPLETED:
            print("Execution completed successfully")
        case ExecutionStatus.CANCELLED:
            print("Execution cancelled")
        case ExecutionStatus.FAILED | ExecutionStatus.TIMED_OUT:
            ends = (EventType.EXECUTION_FAILED, EventType.EXECUTION_TIMEOUT)
            print("Execution failed:", *(event.message for event in update.events if event.type in ends))
        case _:  # it begins, or ends
            print(f"Execution {update.status}")


async def main() -> None:
    async with DefaultExecutionEngine.open(roles=[Role.from_callable(deliver, in_loop=True, inputs=None)]) as engine:
        execution_id = await engine.submit(NewTask(title="Deliver a parcel", role="deliver"))
        begun, over = anyio.Event(), anyio.Event()

        def watched(update: ExecutionUpdate) -> None:
            heard(update)
            if update.status is ExecutionStatus.RUNNING:
                begun.set()
            if update.status.is_terminal:
                over.set()

        engine.subscribe(execution_id, watched)
        await begun.wait()
        await engine.pause(execution_id)
        await anyio.sleep(0.25)
        await engine.resume(execution_id)
        await over.wait()


if __name__ == "__main__":
    anyio.run(main)
