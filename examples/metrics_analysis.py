"""What the metrics of an execution say: time, cost, quality, capacity, and the whole timeline.

    python examples/metrics_analysis.py

A metric that is not known is None, and never a number that was made up.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from vespera_exec import DefaultExecutionEngine, ExecutionError, ExecutionResult, Role, Settings

if TYPE_CHECKING:
    from roles.context import Context

POOLS = Path(__file__).parent / "capacity.yaml"
PLAN: dict[str, Any] = {
    "name": "Draft and review",
    "steps": [
        {"id": "draft", "role": "draft", "capacity": {"computational": 2}},
        {"id": "review", "role": "review", "depends_on": ["draft"], "capacity": {"computational": 1}},
        {"id": "publish", "role": "publish", "depends_on": ["draft"], "continue_on_failure": True},
    ],
}


async def draft(context: Context) -> str:
    await anyio.sleep(0.2)
    return "a draft"


async def review(context: Context) -> dict[str, Any]:
    await anyio.sleep(0.1)
    return {"verdict": "good", "quality_score": 0.85}


async def publish(context: Context) -> None:
    raise ExecutionError("the printer is out of paper", code="NO_PAPER")


def shown(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def analyze(result: ExecutionResult) -> None:
    metrics = result.metrics
    print("=== Execution Analysis ===")
    print(f"Duration: {shown(metrics.total_duration, '.0f')} ms")
    print(f"Effective Duration: {shown(metrics.effective_duration, '.0f')} ms")
    print(f"Efficiency: {shown(metrics.efficiency, '.1%')}")
    print(f"Cost: ${shown(metrics.total_cost, '.6f')}")
    print(f"Quality Score: {shown(metrics.quality_score, '.1%')}")
    print(f"Success Rate: {shown(metrics.success_rate, '.1%')}")
    print(f"Throughput: {shown(metrics.throughput, '.2f')} tasks/sec")
    print(f"Error Rate: {shown(metrics.error_rate, '.1%')}")
    print("\n=== Resource Usage ===")
    for usage in result.resource_usage:
        print(f"{usage.resource_type}: {usage.amount_used:g} units for {usage.task_id}")
        print(f"  Cost: ${shown(usage.cost, '.6f')}")
        print(f"  Efficiency: {shown(usage.efficiency, '.1%')}")
        print(f"  Duration: {shown(usage.duration, '.0f')} ms")
    print("\n=== Timeline ===")
    for event in result.timeline:
        print(f"{event.timestamp.isoformat()}: {event.type} - {event.description}")


async def main() -> None:
    settings = Settings.load(os.environ, capacity=str(POOLS.resolve()))
    roles = [Role.from_callable(each, in_loop=True, inputs=None) for each in (draft, review, publish)]
    async with DefaultExecutionEngine.open(settings=settings, roles=roles) as engine:
        analyze(await engine.execute(PLAN))


if __name__ == "__main__":
    anyio.run(main)
