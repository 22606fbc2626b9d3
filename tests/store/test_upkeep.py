"""Upkeep: the full check runs beside the work and says what it found; retention follows the setting."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import anyio
import pytest
from deadlines import WITHIN
from stored import fill, names, opened

from vespera_exec.model.clock import Clock
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store import damage, upkeep
from vespera_exec.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vespera_exec.store.damage import Finding

LONG_AGO = Clock(now=lambda: datetime.now(UTC) - timedelta(days=40), monotonic=lambda: 0.0)


async def checked(store: Store) -> list[str]:
    """The severities of the background check, once it has ended."""
    async with store.upkeep.running(after_seconds=0):
        with anyio.fail_after(WITHIN):
            while store.upkeep.findings is None:  # noqa: ASYNC110 - the check tells the log only
                await anyio.sleep(0.005)
    return [each.severity for each in store.upkeep.findings]


async def test_a_sound_database_is_found_sound_once_a_day(data_dir: Path) -> None:
    await fill(data_dir, tasks=20)
    async with opened(data_dir) as store:
        await store.upkeep.once()
        assert store.upkeep.findings is not None
        assert [each.severity for each in store.upkeep.findings] == ["ok", "ok"]
    async with opened(data_dir) as store:
        await store.upkeep.once()
        assert store.upkeep.findings is None


@pytest.mark.promise("damage")
async def test_damage_that_no_open_noticed_is_logged(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = await fill(data_dir, tasks=5)
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE events SET checksum = checksum + 1 WHERE cursor = 9")
    async with opened(data_dir) as store:
        assert await checked(store) == ["ok", "error"]
    assert "event 9 does not match its checksum" in caplog.text
    assert "restore` a backup" in caplog.text


async def test_damage_is_looked_for_again_until_it_is_gone(data_dir: Path) -> None:
    database = await fill(data_dir, tasks=5)
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE events SET checksum = checksum + 1 WHERE cursor = 9")
    for _ in range(2):  # a restart does not make it good
        async with opened(data_dir) as store:
            await store.upkeep.once()
            assert [each.severity for each in store.upkeep.findings or ()] == ["ok", "error"]


async def test_upkeep_that_stumbles_ends_nobody(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = await fill(data_dir, tasks=1)
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("INSERT INTO meta VALUES ('checked', '9000000000000000000')")  # a year that no calendar has
    async with opened(data_dir) as store:
        async with store.upkeep.running(after_seconds=0):
            with anyio.fail_after(WITHIN):
                while "Upkeep failed" not in caplog.text:  # noqa: ASYNC110 - it tells the log only
                    await anyio.sleep(0.005)
        assert (await store.queries.list_tasks()).total == 1


async def test_closing_ends_a_check_that_is_under_way(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def stands(path: Path, *, ask: Callable[[], None]) -> list[Finding]:
        def asks_again_and_again() -> None:
            begun.set()
            while True:
                ask()

        return damage.examine_in_use(path, ask=asks_again_and_again)

    monkeypatch.setattr(upkeep, "examine_in_use", stands)
    database = await fill(data_dir, tasks=200)
    with anyio.fail_after(WITHIN):
        async with opened(data_dir) as store, store.upkeep.running(after_seconds=0):
            assert await anyio.to_thread.run_sync(begun.wait, WITHIN)
        assert store.upkeep.findings is None
    assert names(data_dir) == ["cancels", database.name]


async def test_the_setting_removes_and_nothing_is_removed_without_it(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        Task(title="old", clock=LONG_AGO, sink=store.journal).start_execution("role").complete()
        Task(title="new", sink=store.journal)
        await store.journal.sync()
        await store.upkeep.once()
        assert (await store.queries.list_tasks()).total == 2
    async with Store.open(Settings.load({"VESPERA_RETENTION_DAYS": "30"}, data_dir=data_dir)) as store:
        async with store.upkeep.running(after_seconds=0):
            with anyio.fail_after(WITHIN):
                while (await store.queries.list_tasks()).total == 2:  # noqa: ASYNC110 - the removal tells nobody
                    await anyio.sleep(0.005)
        assert [row.task.title for row in (await store.queries.list_tasks()).items] == ["new"]
