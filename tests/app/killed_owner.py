"""An owner of a data directory that starts runs, and says on stdout what it has accepted, until it is killed.

`python killed_owner.py HOME PLACE ROUND`. The first line is `open SECONDS`, how long the opening took.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import anyio

from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})


def told(line: str) -> None:
    """One write, so that the reader sees a whole line or none."""
    os.write(1, f"{line}\n".encode())


async def main(home: str, place: str, turn: str) -> None:
    settings = Settings.load(
        {"HOME": home}, data_dir=Path(place, "data"), roles_dir=Path(place, "roles"), max_concurrent=6
    )
    began = time.perf_counter()
    async with Vespera.open(settings=settings, purpose="daemon") as vespera:
        told(f"open {time.perf_counter() - began}")
        for number in range(1000):
            role = ("reader", "reader", "stubborn")[number % 3]
            request = Execute(title=f"Run {number}", role=role, idempotency_key=f"{turn}-{number}")
            handle = await vespera.execute_task(ME, request)
            told(f"{role} {handle.task_id} {handle.session_id}")
            await anyio.sleep(0.02)
            if number == 12:
                await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2], sys.argv[3])
