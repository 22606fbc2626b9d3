"""An owner with one GPU that starts two runs which need it, says on stdout which, and is killed.

`python capacity_owner.py PLACE`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio

from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})


async def main(place: str) -> None:
    settings = Settings.load(
        {"HOME": place}, data_dir=Path(place, "data"), roles_dir=Path(place, "roles"), capacity="gpu=1"
    )
    async with Vespera.open(settings=settings, purpose="daemon") as vespera:
        for title in ("holds", "waits"):
            handle = await vespera.execute_task(ME, Execute(title=title, role="training"))
            wanted, cursor = {"holds": "running", "waits": "resource_waiting"}[title], 0
            while True:
                page = await vespera.read_events(ME, handle.session_id, cursor=cursor, wait_ms=5000)
                if any(wanted in (event["type"], event["status"]["new"]) for event in page.events):
                    break
                cursor = page.next_cursor
            os.write(1, f"{handle.session_id}\n".encode())
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(main, sys.argv[1])
