"""The log of an execution in segments: one log to all who read it, whoever goes on with it, and one end."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from stored import content, opened

from vespera_exec.errors import Fenced
from vespera_exec.model.enums import EventType, ExecutionStatus
from vespera_exec.model.events import ExecutionEvent
from vespera_exec.model.ledger import Batch
from vespera_exec.model.progress import ProgressReport
from vespera_exec.model.task import Task
from vespera_exec.store import database
from vespera_exec.store.damage import examine
from vespera_exec.store.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.store.store import Store

LONG = 150
"""Events that take several segments."""


def running(store: Store) -> ExecutionSession:
    session = Task(title="long", sink=store.journal).start_execution("role")
    session.update_status(ExecutionStatus.RUNNING)
    return session


def report(session: ExecutionSession, times: int) -> None:
    for number in range(times):
        session.report(ProgressReport(current=90 * number / times, message=f"step {number}", reset=True))


async def long_log(data_dir: Path) -> tuple[Path, str]:
    """A closed database, and the execution in it whose log takes several segments."""
    async with opened(data_dir) as store:
        session = running(store)
        report(session, LONG)
        session.complete()
        report(running(store), 40)
        await store.journal.sync()
    return data_dir / "vespera.db", session.session_id


def segments(path: Path, name: str) -> list[tuple[object, ...]]:
    """Those of an id: where each begins, and how many events it holds."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute(
            "SELECT g.since, count(e.cursor) FROM streams s JOIN segments g ON g.stream = s.id "
            "LEFT JOIN events e ON e.segment = g.id WHERE s.name = ? GROUP BY g.id ORDER BY g.since",
            (name,),
        ).fetchall()


def ends(sequence: int) -> Batch:
    event = ExecutionEvent(
        event_type=EventType.STATUS_CHANGE,
        task_id="t",
        execution_id="e",
        sequence=sequence,
        new_status=ExecutionStatus.FAILED,
    )
    return Batch((event,))


async def test_a_long_log_is_one_to_all_who_read_it(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        session, other = running(store), running(store)
        for _ in range(LONG):
            report(session, 1)
            report(other, 1)
        await store.journal.sync()
        name, queries = session.session_id, store.queries
        last = session.progress.sequence
        whole = await queries.events_after(0, execution_id=name, limit=1000)
        assert [each.sequence for each in whole] == list(range(1, last + 1))
        assert [each.cursor for each in whole] == sorted(each.cursor for each in whole)

        paged: list[int] = []
        after = 0
        while page := await queries.events_after(after, execution_id=name, limit=20):
            paged += [each.sequence for each in page]
            after = page[-1].cursor
        assert paged == list(range(1, last + 1))
        assert [e.sequence for e in await queries.last_events(execution_id=name, limit=40)] == paged[-40:]

        for up_to in (31, 32, 33, last):
            for after in (0, 30, 31, 32, 33, 100):
                found = [each.sequence for each in await queries.events_of(name, up_to=up_to, after=after, limit=40)]
                assert found == list(range(after + 1, up_to + 1))[:40], (after, up_to)
        known = await queries.get_run(name)
        assert known is not None
        assert known.cursor == whole[-1].cursor
    assert len(segments(data_dir / "vespera.db", name)) == last // 32 + 1


async def test_the_next_owner_goes_on_in_the_last_segment(data_dir: Path) -> None:
    path = data_dir / "vespera.db"
    for begin in (1, 31, 40, 64):
        async with Journal.open(path) as journal:
            for sequence in range(begin, {1: 31, 31: 40, 40: 64, 64: 70}[begin]):
                event = ExecutionEvent(event_type=EventType.INFO, task_id="t", execution_id="e", sequence=sequence)
                journal.append(Batch((event,)))
            await journal.sync()
    assert segments(path, "e") == [(1, 31), (32, 32), (64, 6)]


@pytest.mark.promise("one_end")
@pytest.mark.parametrize("reopened", [False, True])
async def test_an_execution_ends_once_in_whichever_segment(data_dir: Path, *, reopened: bool) -> None:
    path = data_dir / "vespera.db"
    async with Journal.open(path) as journal:
        for sequence in range(1, 31):
            event = ExecutionEvent(event_type=EventType.INFO, task_id="t", execution_id="e", sequence=sequence)
            journal.append(Batch((event,)))
        journal.append(ends(31))
        await journal.sync()
        if not reopened:
            await refused_to_end(journal)
    if reopened:
        async with Journal.open(path) as journal:
            await refused_to_end(journal)


async def refused_to_end(journal: Journal) -> None:
    journal.append(ends(32))
    with pytest.raises(Fenced):
        await journal.sync()
    assert journal.head == 31


def changes(name: str) -> Iterator[str]:
    """What damage may do to the segments of `name`."""
    own = f"(SELECT id FROM streams WHERE name = '{name}')"
    second = f"(SELECT id FROM segments WHERE stream = {own} AND since = 64)"
    yield f"UPDATE events SET segment = {second} WHERE cursor = 10"
    yield f"UPDATE events SET segment = 99999 WHERE segment = {second}"
    yield f"UPDATE segments SET since = 65 WHERE id = {second}"
    yield f"UPDATE segments SET stream = 99999 WHERE id = {second}"
    yield f"UPDATE segments SET stream = 1 WHERE id = {second}"
    yield f"DELETE FROM segments WHERE id = {second}"
    yield f"DELETE FROM events WHERE segment = {second}"
    yield f"DELETE FROM ends WHERE stream = {own}"
    yield "INSERT INTO ends VALUES (1)"


async def test_an_event_in_the_wrong_segment_is_found(data_dir: Path) -> None:
    path, name = await long_log(data_dir)
    assert {each.severity for each in examine(path)} == {"ok"}
    whole = path.read_bytes()
    for change in changes(name):
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("INSERT INTO meta VALUES ('removed_to', '1000')")  # so that no cursor is missed
            assert db.execute(change).rowcount > 0, change
        order = [each.what for each in examine(path) if each.what.startswith("the order of events")]
        assert len(order) == 1, change
        path.write_bytes(whole)


async def test_reading_on_in_a_long_log_costs_what_is_read(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def counted(path: Path) -> sqlite3.Connection:
        def one() -> None:
            nonlocal steps
            steps += 1

        connection = plain(path)
        connection.set_progress_handler(one, 10)
        return connection

    plain = database.open_for_reading
    monkeypatch.setattr(database, "open_for_reading", counted)
    async with opened(data_dir) as store:
        session = running(store)
        report(session, 3000)
        await store.journal.sync()
        name = session.session_id
        costs: list[int] = []
        for after in (0, 1500, 2900):
            steps = 0
            assert len(await store.queries.events_of(name, after=after, up_to=3000, limit=10)) == 10
            costs.append(steps)
        assert costs[2] <= costs[1] <= 1.2 * costs[0]
        head, steps = store.journal.head, 0
        assert len(await store.queries.events_after(head - 50, execution_id=name)) == 50
        assert steps < 3000  # ten of SQLite's steps for each entry of the index, and no body but those asked for


async def test_retention_leaves_no_segment_behind(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        session = running(store)
        report(session, LONG)
        session.complete()
        report(running(store), 1)
        await store.journal.sync()
        ended = session.lifecycle.completed_at
        assert ended is not None
        await store.remove_ended(before=ended.replace(year=ended.year + 1))
    left = content(data_dir / "vespera.db")
    assert (len(left["segments"]), len(left["streams"]), left["ends"]) == (2, 2, [])
    assert {each.severity for each in examine(data_dir / "vespera.db")} == {"ok"}
