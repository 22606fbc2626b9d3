"""What retention and the daily check found out is told to those who ask."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, closing
from datetime import UTC, datetime, timedelta

from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute
from vespera_exec.model.principal import Caller
from vespera_exec.store.store import Store

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]
ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})


async def test_a_reader_of_what_is_in_part_removed_is_told_so(opening: Opening) -> None:
    async with opening() as vespera:
        request = Execute(title="again and again", role="command", inputs={"argv": ["true"]}, wait_ms=25_000)
        handle = await vespera.execute_task(ME, request)
        for _ in range(2):
            await vespera.execute_task(ME, Execute(task_id=handle.task_id, wait_ms=25_000))
        assert (await vespera.read_events(ME, handle.task_id)).removed_before is None
        settings = vespera.settings
    async with Store.open(settings) as store:
        assert (await store.remove_ended(before=datetime.now(UTC) + timedelta(days=1))).executions == 2
    async with opening() as vespera:
        page = await vespera.read_events(ME, handle.task_id, max_events=1000)
        assert page.removed_before is not None
        left = [event["cursor"] for event in page.events]
        assert left != list(range(left[0], left[-1] + 1))
        assert left[left.index(page.removed_before) :] == list(range(page.removed_before, left[-1] + 1))
        # From there on the log is whole, and so is that of the run that is left.
        assert (await vespera.read_events(ME, handle.task_id, cursor=page.removed_before)).removed_before is None
        session = (await vespera.get_status(ME, handle.task_id)).session_id
        assert session is not None
        assert (await vespera.read_events(ME, session)).removed_before is None


async def test_damage_that_the_daily_check_has_found_is_told(opening: Opening) -> None:
    async with opening() as vespera:
        request = Execute(title="sound", role="command", inputs={"argv": ["true"]}, wait_ms=25_000)
        await vespera.execute_task(ME, request)
        assert vespera.describe().damage is None
        database = vespera.settings.database
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE events SET checksum = checksum + 1 WHERE cursor = 3")
    async with opening() as vespera:
        await vespera._store.upkeep.check()  # pyright: ignore[reportPrivateUsage] - it comes by itself, once a day
        assert vespera.describe().damage == "the log: event 3 does not match its checksum"
