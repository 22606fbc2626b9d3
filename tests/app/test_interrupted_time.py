"""How long a run was at work whose owner was killed in the middle of it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import datetime
from typing import TYPE_CHECKING

import anyio
from deadlines import WITHIN

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
        handle = await vespera.execute_task(me, Execute(title="Read", role=sys.argv[2]))
        cursor = 0
        while sys.argv[2] == "reader":
            read = await vespera.read_events(me, handle.task_id, cursor=cursor, wait_ms=25_000)
            if any(event["details"].get("state") == {"page": 3} for event in read.events):
                break
            cursor = read.next_cursor
        print(handle.task_id, flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


def owner_of(home: Path, role: str) -> subprocess.Popen[str]:
    """Says the task that it runs: the reader's when its third page is read, any other's at once."""
    return subprocess.Popen([sys.executable, "-c", _OWNER, str(home), role], stdout=subprocess.PIPE, text=True)


def task_of(owner: subprocess.Popen[str]) -> str:
    assert owner.stdout is not None
    return owner.stdout.readline().strip()


def role_file(home: Path, name: str, *argv: str) -> None:
    (home / "roles").mkdir()
    (home / "roles" / f"{name}.yaml").write_text(f"name: {name}\nrunner: process\nargv: {json.dumps(argv)}\n")


def seconds(first: str, last: str) -> float:
    return (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()


def measured(database: Path) -> tuple[int, float]:
    """How often a work was measured, and when last, in seconds since 1970."""
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as db:
        count, last = db.execute("SELECT count(DISTINCT at), max(at) FROM samples").fetchone()
    return count, (last or 0) / 1e6


async def test_a_run_whose_owner_was_killed_was_at_work_up_to_its_last_event(
    opening: Callable[..., AbstractAsyncContextManager[Vespera]], tmp_path: Path
) -> None:
    (tmp_path / "work.py").write_text(_WORK)
    role_file(tmp_path, "reader", sys.executable, str(tmp_path / "work.py"))
    with owner_of(tmp_path, "reader") as owner:
        task_id = task_of(owner)
        owner.kill()
    async with opening() as vespera:
        status = await vespera.get_status(ME, task_id)
        told = (await vespera.read_events(ME, task_id, max_events=1000)).events
    assert status.session is not None
    assert status.session.error_context is not None
    assert status.session.error_context["code"] == "INTERRUPTED"
    began = next(event["timestamp"] for event in told if event["status"]["new"] == "preparing")
    last = next(event["timestamp"] for event in reversed(told) if event["type"] == "checkpoint_created")
    taken_over = next(event["timestamp"] for event in told if event["type"] == "owner_changed")
    assert seconds(began, last) > 0.15
    assert seconds(began, last) - 0.3 < status.session.time_tracking.elapsed_seconds < seconds(began, taken_over)


async def test_a_run_that_says_nothing_was_at_work_up_to_its_last_measurement(
    opening: Callable[..., AbstractAsyncContextManager[Vespera]], tmp_path: Path
) -> None:
    role_file(tmp_path, "sleeper", "sleep", "60")
    with owner_of(tmp_path, "sleeper") as owner:
        task_id = task_of(owner)
        database = tmp_path / "data" / "vespera.db"
        deadline = time.monotonic() + WITHIN
        while measured(database)[0] < 2:
            assert time.monotonic() < deadline
            await anyio.sleep(0.02)
        owner.kill()
    _, last = measured(database)
    async with opening() as vespera:
        status = await vespera.get_status(ME, task_id)
        told = (await vespera.read_events(ME, task_id, max_events=1000)).events
    assert status.session is not None
    began = next(event["timestamp"] for event in told if event["status"]["new"] == "preparing")
    worked = last - datetime.fromisoformat(began).timestamp()
    assert worked > 0.2
    assert abs(status.session.time_tracking.elapsed_seconds - worked) < 0.3
