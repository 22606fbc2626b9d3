"""The WAL stays small however long the load lasts, also while somebody always reads."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from typing import TYPE_CHECKING

import anyio
import pytest
from deadlines import WITHIN
from stored import opened

from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from pathlib import Path

LIMIT = 64 * 1024 * 1024


def read_on(database: Path, stop: threading.Event, reads: list[int], hold: float) -> None:
    """Two readers in turn, each for `hold` seconds and more: at any moment one has a snapshot, mostly an older one."""
    with (
        closing(sqlite3.connect(database, isolation_level=None)) as first,
        closing(sqlite3.connect(database, isolation_level=None)) as second,
    ):
        one, other = first, second
        while not stop.is_set():
            one.execute("BEGIN")
            reads.append(one.execute("SELECT count(*) FROM events").fetchone()[0])
            stop.wait(hold)
            if other.in_transaction:
                other.execute("ROLLBACK")
            one, other = other, one


@pytest.mark.promise("no_leak")
@pytest.mark.parametrize("hold", [0.005, pytest.param(0.1, marks=pytest.mark.full)])
async def test_the_wal_stays_under_64_mb_while_somebody_reads_on(data_dir: Path, hold: float) -> None:
    wal = data_dir / "vespera.db-wal"
    stop, reads = threading.Event(), list[int]()
    written = largest = 0
    async with opened(data_dir) as store, anyio.create_task_group() as group:
        task = Task(title="busy", sink=store.journal)
        await store.journal.sync()
        group.start_soon(anyio.to_thread.run_sync, read_on, data_dir / "vespera.db", stop, reads, hold)
        while written < 2 * LIMIT:
            for _ in range(16):
                task.execution.change(execution_context={"written": written, "text": "x" * 200_000})
                written += 200_000
            await store.journal.sync()
            before = len(reads)
            with anyio.fail_after(WITHIN):
                while len(reads) == before:  # noqa: ASYNC110 - the thread tells nobody
                    await anyio.sleep(0.001)
            largest = max(largest, wal.stat().st_size)
        stop.set()
    assert len(reads) > 10
    assert largest < LIMIT
