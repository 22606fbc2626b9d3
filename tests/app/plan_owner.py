"""An owner of a data directory that executes a plan, until it is killed: `python plan_owner.py HOME PLACE`.

It says on stdout what it was answered, as JSON.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio

from vespera_exec.app.plans.views import ExecutePlan
from vespera_exec.app.service import Vespera
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})
STEPS = [{"id": "s1", "role": "note"}] + [
    {"id": f"s{each}", "role": "note", "depends_on": [f"s{each - 1}"]} for each in (2, 3, 4, 5)
]
PLAN = {
    "name": "Five steps",
    "steps": STEPS,
    "variables": {"seen": {"pages": [1, 2, {"deep": None}]}, "colour": "red"},
    "output": {"colour": "${variables.colour}", "third": "${steps.s3.output.result}"},
}


async def main(home: str, place: str) -> None:
    settings = Settings.load({"HOME": home}, data_dir=Path(place, "data"), roles_dir=Path(place, "roles"))
    async with Vespera.open(settings=settings, purpose="daemon") as vespera:
        handle = await vespera.plans.execute(ME, ExecutePlan(plan=PLAN))
        os.write(1, f"{handle.model_dump_json()}\n".encode())
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2])
