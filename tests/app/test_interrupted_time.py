"""How long a run was at work whose owner was killed in the middle of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from typing import TYPE_CHECKING

from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from vespera_exec.app.service import Vespera

ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})

_WORK = """
import os, time
out = os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w", buffering=1)
for page in range(1, 4):
    time.sleep(0.05)
    out.write('{"done": %d, "total": 10, "checkpoint": {"page": %d}}\\n' % (page, page))
time.sleep(60)
"""

_OWNER = """
import os, sys
from pathlib import Path
import anyio
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

async def main():
    home = Path(sys.argv[1])
    settings = Settings.load({"HOME": str(home)}, data_dir=home / "data", roles_dir=home / "roles")
    me = Caller(cwd="/", env={"PATH": os.environ["PATH"]})
    async with Vespera.open(settings=settings) as vespera:
        handle = await vespera.execute_task(me, Execute(title="Read", role="reader"))
        cursor = 0
        while True:
            read = await vespera.read_events(me, handle.task_id, cursor=cursor, wait_ms=5000)
            if any(event["details"].get("state") == {"page": 3} for event in read.events):
                break
            cursor = read.next_cursor
        print(handle.task_id, flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


def owned_until_the_third_page(home: Path) -> str:
    """The task that an owner ran there, when it was killed."""
    with subprocess.Popen([sys.executable, "-c", _OWNER, str(home)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        task_id = owner.stdout.readline().strip()
        owner.kill()
    return task_id


async def test_a_run_whose_owner_was_killed_was_at_work_up_to_its_last_event(
    opening: Callable[..., AbstractAsyncContextManager[Vespera]], tmp_path: Path
) -> None:
    (tmp_path / "roles").mkdir()
    (tmp_path / "work.py").write_text(_WORK)
    argv = json.dumps([sys.executable, str(tmp_path / "work.py")])
    (tmp_path / "roles" / "reader.yaml").write_text(f"name: reader\nrunner: process\nargv: {argv}\n")
    task_id = owned_until_the_third_page(tmp_path)
    async with opening() as vespera:
        status = await vespera.get_status(ME, task_id)
        told = (await vespera.read_events(ME, task_id, max_events=1000)).events
    assert status.session is not None
    assert status.session.error_context is not None
    assert status.session.error_context["code"] == "INTERRUPTED"
    began = next(event["timestamp"] for event in told if event["status"]["new"] == "preparing")
    last = next(event["timestamp"] for event in reversed(told) if event["type"] == "checkpoint_created")
    worked = (datetime.fromisoformat(last) - datetime.fromisoformat(began)).total_seconds()
    assert worked > 0.15
    assert abs(status.session.time_tracking.elapsed_seconds - worked) < 0.1
