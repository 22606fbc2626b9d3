"""Take capacity out of the pools that the operator has set up, and give it back.

    python examples/resource_management.py

Steps ask for theirs in the plan (`capacity: {computational: 4}`), are given it before they begin, and have it taken
away at their end, however they end. What a program takes for itself, it gives back itself.
"""

from __future__ import annotations

import os
from pathlib import Path

import anyio

from vespera_exec import Conflict, DefaultExecutionEngine, ResourceRequirement, Settings

POOLS = Path(__file__).parent / "capacity.yaml"
REQUIREMENTS = [
    ResourceRequirement(
        type="computational",
        amount=4,
        duration_ms=3_600_000,  # one hour
        priority=8,
        constraints={"minMemory": 8192, "gpuRequired": False},
    ),
    ResourceRequirement(type="memory", amount=16384, duration_ms=3_600_000, priority=7),
]


async def main() -> None:
    settings = Settings.load(os.environ, capacity=str(POOLS.resolve()))
    async with DefaultExecutionEngine.open(settings=settings) as engine:
        resources = await engine.allocate_resources(REQUIREMENTS)  # all of it, or nothing
        try:
            for each in resources:
                print(f"Allocated: {each.amount:g} {each.type} ({each.available:g} of {each.capacity:g} are left)")
            try:
                await engine.allocate_resources([ResourceRequirement(type="computational", amount=6)], wait_ms=100)
            except Conflict as refusal:
                print("Resource allocation failed:", refusal)
        finally:
            await engine.release_resources([each.id for each in resources])
        print("Resources released")


if __name__ == "__main__":
    anyio.run(main)
