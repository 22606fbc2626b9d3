"""Execute a plan and look at its result.

    python examples/basic_execution.py

The data directory is that of `VESPERA_DATA_DIR`, or the usual one, which a running daemon would own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from vespera_exec import DefaultExecutionEngine, ExecutionStatus, Role

if TYPE_CHECKING:
    from roles.context import Context

PLAN: dict[str, Any] = {
    "name": "Count words",
    "variables": {"text": "one two three"},
    "steps": [
        {"id": "read", "role": "read", "inputs": {"text": "${variables.text}"}},
        {"id": "words", "role": "words", "inputs": {"text": "${steps.read.output}"}},
        {"id": "letters", "role": "letters", "inputs": {"text": "${steps.read.output}"}},
    ],
    "output": {"words": "${steps.words.output}", "letters": "${steps.letters.output}"},
}


async def read(context: Context) -> str:
    return context.inputs["text"]


async def words(context: Context) -> int:
    return len(context.inputs["text"].split())


async def letters(context: Context) -> int:
    return sum(each.isalpha() for each in context.inputs["text"])


ROLES = [Role.from_callable(each, in_loop=True, inputs=None) for each in (read, words, letters)]


async def main() -> None:
    async with DefaultExecutionEngine.open(roles=ROLES) as engine:
        result = await engine.execute(PLAN, variables={"text": "to be or not to be"})
        match result.status:
            case ExecutionStatus.COMPLETED:
                print("Execution completed successfully")
                print("Result:", result.output)
                print("Duration:", result.metrics.total_duration, "ms")
                print("Cost:", result.metrics.total_cost)  # None: it was given no capacity that costs
            case ExecutionStatus.CANCELLED:
                print("Execution cancelled")
            case _:  # failed, or timed out
                print("Execution failed:", result.error)


if __name__ == "__main__":
    anyio.run(main)
