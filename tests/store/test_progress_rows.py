"""How far an execution is: written whole now and then, read whole always."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from stored import opened

from vespera_exec.errors import StoreDamaged
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus
from vespera_exec.model.progress import ProgressReport
from vespera_exec.model.task import Task
from vespera_exec.store.damage import examine

if TYPE_CHECKING:
    from pathlib import Path

    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.store.store import Store

MOST_FOLDED = 16


def running(store: Store) -> ExecutionSession:
    session = Task(title="reports", sink=store.journal).start_execution("role")
    session.update_status(ExecutionStatus.RUNNING)
    session.enter_phase(ExecutionPhase.EXECUTION)
    return session


async def report(store: Store, session: ExecutionSession, *, times: int) -> None:
    """Each on disk before the next."""
    for number in range(times):
        session.update_progress(number, message=f"step {number}")
        await store.journal.sync()


def documented(data_dir: Path) -> int:
    """The sequence of the only execution's whole progress."""
    with closing(sqlite3.connect(data_dir / "vespera.db")) as db:
        ((sequence,),) = db.execute("SELECT sequence FROM progress_docs")
        return sequence


async def test_progress_is_read_as_it_is_after_each_report(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        session = running(store)
        behind: set[int] = set()
        for number in range(40):
            session.report(ProgressReport.steps(number, 50, f"step {number}"), ExecutionPhase.EXECUTION)
            session.report(ProgressReport(current=number * 2, metric="files"))
            await store.journal.sync()
            found = await store.queries.get_execution(session.session_id)
            assert found == (session.lifecycle, session.progress)
            behind.add(session.progress.sequence - documented(data_dir))
            ((row),) = (await store.queries.list_tasks()).items
            assert row.percentage == session.progress.percentage
        assert behind == set(range(0, MOST_FOLDED, 2))


async def test_what_has_ended_is_written_whole(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        session = running(store)
        await report(store, session, times=5)
        assert documented(data_dir) < session.progress.sequence
        session.complete()
        await store.journal.sync()
        assert documented(data_dir) == session.progress.sequence


async def test_the_next_owner_finds_progress_that_was_not_written_whole(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        session = running(store)
        await report(store, session, times=5)
    assert documented(data_dir) < session.progress.sequence
    async with opened(data_dir) as store:
        (left,) = await store.queries.unfinished()
        assert left.progress == session.progress
    assert {each.severity for each in examine(data_dir / "vespera.db")} == {"ok"}


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE progress SET percentage = 7",
        "UPDATE progress_docs SET doc = json_set(doc, '$.overall.message', 'another')",
        "UPDATE progress_docs SET sequence = sequence + 1",
        "DELETE FROM progress_docs",
    ],
)
async def test_progress_that_is_not_the_fold_of_its_log_is_found(data_dir: Path, change: str) -> None:
    async with opened(data_dir) as store:
        session = running(store)
        await report(store, session, times=20)
    database = data_dir / "vespera.db"
    assert {each.severity for each in examine(database)} == {"ok"}
    with closing(sqlite3.connect(database)) as db, db:
        assert db.execute(change).rowcount == 1
    assert "error" in {each.severity for each in examine(database)}


@pytest.mark.promise("damage")
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE events SET body = CAST(replace(body, 'step 4', 'step 5') AS BLOB)",
        "DELETE FROM events WHERE cursor = (SELECT max(cursor) FROM events) - 1",
        "UPDATE progress_docs SET sequence = sequence - 1",
    ],
)
async def test_progress_is_not_folded_from_a_damaged_log(data_dir: Path, change: str) -> None:
    async with opened(data_dir) as store:
        session = running(store)
        await report(store, session, times=5)
    with closing(sqlite3.connect(data_dir / "vespera.db")) as db, db:
        assert db.execute(change).rowcount > 0
    async with opened(data_dir) as store:
        with pytest.raises(StoreDamaged):
            await store.queries.get_execution(session.session_id)


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("flipped", [b"step\xa0", b"step\x00", b"step}", b"step\n"])
async def test_a_flipped_bit_in_one_log_keeps_nobody_from_going_on(data_dir: Path, step: int, flipped: bytes) -> None:
    async with opened(data_dir) as store:
        sessions = [running(store), running(store)]
        for session in sessions:
            await report(store, session, times=5)
    damaged, whole = sessions
    with closing(sqlite3.connect(data_dir / "vespera.db")) as db, db:
        last = damaged.progress.sequence - 4 + step
        where = "stream = (SELECT id FROM streams WHERE name = ?) AND sequence = ?"
        ((cursor, body),) = db.execute(f"SELECT cursor, body FROM log WHERE {where}", (damaged.session_id, last))
        spoilt = body.replace(b"step ", flipped, 1)
        assert db.execute("UPDATE events SET body = ? WHERE cursor = ?", (spoilt, cursor)).rowcount == 1
    async with opened(data_dir) as store:
        left = {each.lifecycle.execution_id: each.progress for each in await store.queries.unfinished()}
        assert left[whole.session_id] == whole.progress
        if step < 4:  # what came after it is known
            assert left[damaged.session_id] == damaged.progress
        with pytest.raises(StoreDamaged):
            await store.queries.get_execution(damaged.session_id)
