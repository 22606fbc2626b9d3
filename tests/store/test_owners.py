"""Who owns a database: told one after another, and only the last one writes."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import anyio
import pytest
from deadlines import WITHIN

from vespera_exec.errors import StoreError, StoreUnavailable
from vespera_exec.model.task import Task
from vespera_exec.store.journal import Journal
from vespera_exec.store.lock import OwnerLock
from vespera_exec.store.owners import recorded
from vespera_exec.store.writer import Sample

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(data_dir: Path) -> Path:
    return data_dir / "vespera.db"


def count(path: Path, sql: str) -> int:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchone()[0]
    finally:
        connection.close()


def taken_over(path: Path) -> sqlite3.Connection:
    """The connection of an owner that does not see our lock, on a file system that does not know locks."""
    other = sqlite3.connect(path, isolation_level=None)
    row = "('daemon:1:other', 1, 'daemon', '', '')"
    other.execute(f"INSERT INTO owners (owner, pid, purpose, version, since) VALUES {row}")
    return other


async def test_each_owner_learns_who_was_before_and_how_that_ended(path: Path) -> None:
    for generation in (1, 2):
        with OwnerLock.acquire(path.parent, purpose="library") as lock:
            async with Journal.open(path) as journal, recorded(journal, lock.owner) as tenures:
                assert [tenure.generation for tenure in tenures] == list(range(generation, 0, -1))
                assert [tenure.ended for tenure in tenures] == [None, "clean"][:generation]


async def test_an_owner_that_another_has_replaced_writes_nothing_more(path: Path) -> None:
    with OwnerLock.acquire(path.parent, purpose="library") as lock:
        async with Journal.open(path) as journal, recorded(journal, lock.owner):
            session = Task(title="First", sink=journal).start_execution("role")
            await journal.sync()
            events = count(path, "SELECT count(*) FROM events")
            other = taken_over(path)
            session.update_progress(40)
            with pytest.raises(StoreError, match="taken over by another owner"):
                await journal.sync()
            with pytest.raises(StoreError, match="taken over by another owner"):
                session.update_progress(50)
            assert other.execute("SELECT count(*) FROM events").fetchone() == (events,)
        assert other.execute("SELECT value FROM meta WHERE key = 'clean'").fetchone() == ("0",)
        assert other.execute("SELECT ended FROM owners").fetchall() == [(None,), (None,)]
        other.close()


async def test_a_replaced_owner_neither_measures_nor_removes_anything(path: Path) -> None:
    with OwnerLock.acquire(path.parent, purpose="library") as lock:
        async with Journal.open(path) as journal, recorded(journal, lock.owner):
            session = Task(title="First", sink=journal).start_execution("role")
            await journal.sync()
            other = taken_over(path)
            with pytest.raises(StoreError, match="taken over by another owner"):
                await journal.perform(lambda connection: connection.execute("DELETE FROM events").rowcount)
            journal.append_samples([Sample(session.session_id, datetime.now(UTC), "cpu_usage", 1.0)])
        assert count(path, "SELECT count(*) FROM events") > 0
        assert count(path, "SELECT count(*) FROM samples") == 0
        other.close()


async def test_an_owner_ends_also_when_the_disk_takes_nothing_more(path: Path) -> None:
    with OwnerLock.acquire(path.parent, purpose="library") as lock, anyio.fail_after(WITHIN):
        async with Journal.open(path) as journal:
            async with recorded(journal, lock.owner):
                journal.limit_pages(1)
                Task(title="x" * 100_000, sink=journal)
                with pytest.raises(StoreUnavailable):
                    await journal.sync()
            # Its end cannot be written, and nobody waits for that.
            assert count(path, "SELECT count(*) FROM owners WHERE ended IS NULL") == 1
            journal.limit_pages(1_000_000)
    assert count(path, "SELECT count(*) FROM tasks") == 1
