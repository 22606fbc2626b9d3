"""Who owns a database: told one after another, and only the last one writes."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from vespera_exec.errors import StoreError
from vespera_exec.model.task import Task
from vespera_exec.store.journal import Journal
from vespera_exec.store.lock import OwnerLock
from vespera_exec.store.owners import recorded


@pytest.fixture
def path(data_dir: Path) -> Path:
    return data_dir / "vespera.db"


def count(path: Path, sql: str) -> int:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchone()[0]
    finally:
        connection.close()


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
            # As an owner would that does not see our lock, on a file system that does not know locks.
            other = sqlite3.connect(path, isolation_level=None)
            other.execute(
                "INSERT INTO owners (owner, pid, purpose, version, since) VALUES ('daemon:1:other', 1, 'daemon', '', '')"
            )
            session.update_progress(40)
            with pytest.raises(StoreError, match="taken over by another owner"):
                await journal.sync()
            with pytest.raises(StoreError, match="taken over by another owner"):
                session.update_progress(50)
            assert other.execute("SELECT count(*) FROM events").fetchone() == (events,)
        assert other.execute("SELECT value FROM meta WHERE key = 'clean'").fetchone() == ("0",)
        assert other.execute("SELECT ended FROM owners").fetchall() == [(None,), (None,)]
        other.close()
