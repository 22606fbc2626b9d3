"""An owner of a data directory that starts one plan and says on stdout which, until it is killed.

`python killed_planner.py HOME PLACE PLAN [MARK]`; PLAN is a file with the plan as JSON. With MARK, a file, it kills
itself after it has announced the first step and before it makes its task, once that file is there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import anyio

from vespera_exec.app.plans.views import ExecutePlan
from vespera_exec.app.service import Vespera
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})


def dies_at_the_first_step(vespera: Vespera, mark: Path) -> None:
    tasks: Any = vespera._tasks  # pyright: ignore[reportPrivateUsage]
    made = tasks.make

    def make(**fields: Any) -> Any:
        if "step_id" in fields:
            while not mark.exists():  # the loop stands; the journal's thread writes meanwhile
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return made(**fields)

    tasks.make = make


async def goes_back(vespera: Vespera, session_id: str) -> None:
    """Returns when that is on disk."""
    queries = vespera._store.queries  # pyright: ignore[reportPrivateUsage]
    while True:
        head = await queries.plan_head(session_id)
        if head is not None and head.restoring:
            return
        await anyio.sleep(0.005)


async def main(home: str, place: str, plan: str, mark: str | None = None) -> None:
    settings = Settings.load({"HOME": home}, data_dir=Path(place, "data"), roles_dir=Path(place, "roles"))
    async with Vespera.open(settings=settings, purpose="daemon") as vespera:
        if mark is not None:
            dies_at_the_first_step(vespera, Path(mark))
        request = ExecutePlan(plan=json.loads(Path(plan).read_text()))  # noqa: ASYNC240 - nothing else runs yet
        handle = await vespera.plans.execute(ME, request)
        os.write(1, f"{handle.model_dump_json()}\n".encode())
        while line := await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            word, _, reason = line.strip().partition(" ")
            if word == "heard":
                while True:
                    if (await vespera.list_steps(ME, handle.task_id, status=reason)).steps:
                        break
                    await anyio.sleep(0.01)
                os.write(1, f"{reason}\n".encode())
            elif word == "restore":
                async with anyio.create_task_group() as group:
                    group.start_soon(vespera.checkpoints.restore, ME, reason)
                    await goes_back(vespera, handle.session_id)
                    status = (await vespera.get_status(ME, handle.task_id)).status
                    os.write(1, f"{status}\n".encode())
            else:
                said = await getattr(vespera, word)(ME, handle.task_id, reason=reason)
                os.write(1, f"{said.status}\n".encode())


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2], sys.argv[3], *sys.argv[4:5])
