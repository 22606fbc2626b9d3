"""Plans on a real store, from the request to the end, and what is left of them: steps, memory, status, restart.

    python benchmarks/plan_runs.py [STEPS]

Each part is a process of its own, so that its memory is its own. The floor of a step is a task of the same callable,
executed alone: as many, 16 callers at a time, each waiting for the end. Time is told as CPU, since the disk is shared;
"in the way" is the longest that the loop could not turn to anybody else.
"""

from __future__ import annotations

import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio

from roles.definition import Role
from vespera_exec.app.plan_views import ExecutePlan
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from roles.context import Context
    from vespera_exec.app.views import Handle

ROUNDS: Final = 3
CALLERS: Final = 16
WIDE: Final = 1000
ASKED: Final = 200
"""Times that a status is asked for."""
ME: Final = Caller(cwd="/", env={"PATH": "/usr/bin:/bin"})


async def nothing(_: Context) -> str:
    return "done"


async def wait(_: Context) -> str:
    await anyio.sleep(1)
    return "done"


async def stay(_: Context) -> str:
    await anyio.sleep_forever()
    return "never"


ROLES: Final = [Role.from_callable(each, in_loop=True, inputs=None) for each in (nothing, wait, stay)]


class Delays:
    """Looks at the loop every few milliseconds: the longest that it was late."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        while True:
            before = time.perf_counter()
            await anyio.sleep(0.002)
            self.longest = max(self.longest, time.perf_counter() - before - 0.002)

    def taken(self) -> float:
        """In milliseconds, since the last look."""
        longest, self.longest = self.longest, 0.0
        return longest * 1e3


@asynccontextmanager
async def opened(folder: str, *, slots: int = CALLERS) -> AsyncGenerator[Vespera]:
    settings = Settings.load(
        {"HOME": folder}, data_dir=Path(folder) / "data", roles_dir=Path(folder) / "roles", max_concurrent=slots
    )
    async with Vespera.open(settings=settings, roles=ROLES) as vespera:
        yield vespera


@asynccontextmanager
async def watched() -> AsyncGenerator[Delays]:
    delays = Delays()
    async with anyio.create_task_group() as group:
        group.start_soon(delays.watch)
        await anyio.sleep(0.01)
        yield delays
        group.cancel_scope.cancel()


def plan_of(size: int, role: str = "nothing", **more: Any) -> dict[str, Any]:
    """A hundred chains beside each other."""
    steps = [
        {"id": f"s{at}", "role": role, **({"depends_on": [f"s{at - 100}"]} if at >= 100 else {})} for at in range(size)
    ]
    return {"name": "Benchmark", "max_parallel": CALLERS, "steps": steps, **more}


async def started(vespera: Vespera, plan: dict[str, Any]) -> Handle:
    return await vespera.plans.execute(ME, ExecutePlan(plan=plan))


async def done(vespera: Vespera, handle: Handle) -> dict[str, Any]:
    while True:
        cursor = vespera.head if hasattr(vespera, "head") else 0
        page = await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=60_000)
        if page.done:
            break
    result = await vespera.get_result(ME, handle.task_id)
    return result.result  # type: ignore[return-value]


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
