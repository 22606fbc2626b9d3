"""A store with something in it, for the tests that hurt, copy and thin it out."""

from __future__ import annotations

import sqlite3
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.ledger import ResultRecord
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path


@asynccontextmanager
async def opened(data_dir: Path) -> AsyncGenerator[Store]:
    async with Store.open(Settings.load({}, data_dir=data_dir)) as store:
        yield store


async def fill(data_dir: Path, *, tasks: int) -> Path:
    """The database, closed, with so many executed tasks of some 15 events each."""
    async with opened(data_dir) as store:
        for number in range(tasks):
            task = Task(title=f"task {number}", description="what it is about", sink=store.journal)
            session = task.start_execution("role")
            session.update_status(ExecutionStatus.RUNNING)
            for step in range(10):
                session.update_progress(step * 10.0, message=f"step {step}")
            session.complete(result=ResultRecord(execution_id=session.session_id, body=b'{"number":%d}' % number))
        await store.journal.sync()
    return data_dir / "vespera.db"


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def content(database: Path) -> dict[str, list[tuple[object, ...]]]:
    """All rows of all tables.

    Raises:
        sqlite3.Error: it cannot be read.
    """
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro&immutable=1", uri=True)) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {name: db.execute(f"SELECT * FROM {name}").fetchall() for name in names}
