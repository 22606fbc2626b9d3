"""A database that an older version left is brought up to date, with all that is in it, and goes on."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from stored import content, fill, opened

from vespera_exec.errors import StoreDamaged, StoreError
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.inputs import Question
from vespera_exec.model.task import Task
from vespera_exec.store.damage import examine
from vespera_exec.store.database import migrations

if TYPE_CHECKING:
    from pathlib import Path

OLDER_SHAPES = {
    "events": "filled.log",
    "progress": "(SELECT id, percentage, '' AS message, doc FROM filled.progress JOIN filled.progress_docs USING (id))",
}
NEWER_FIELDS = ("inputs", "claims", "lease")


def of_format(version: int, filled: Path, place: Path) -> Path:
    """A database as that version made it, with what is in `filled` as far as it knew it."""
    with closing(sqlite3.connect(place, isolation_level=None)) as old:
        for script in migrations()[:version]:
            old.executescript(script)
        old.execute(f"PRAGMA user_version = {version}")
        old.execute("ATTACH ? AS filled", (str(filled),))
        tables = [name for (name,) in old.execute("SELECT name FROM main.sqlite_schema WHERE type = 'table'")]
        for table in tables:
            columns = ", ".join(row[1] for row in old.execute(f"PRAGMA main.table_info({table})"))
            if columns:
                then = OLDER_SHAPES.get(table, f"filled.{table}")
                old.execute(f"INSERT OR REPLACE INTO main.{table} ({columns}) SELECT {columns} FROM {then}")
        for number, doc in old.execute("SELECT id, doc FROM main.executions").fetchall():
            known = {name: value for name, value in json.loads(doc).items() if name not in NEWER_FIELDS}
            old.execute("UPDATE main.executions SET doc = ? WHERE id = ?", (json.dumps(known), number))
    place.chmod(0o600)
    return place


@pytest.mark.parametrize("version", range(1, len(migrations())))
async def test_a_database_of_an_older_format_is_brought_up_to_date_and_goes_on(
    data_dir: Path, tmp_path: Path, version: int
) -> None:
    newer = tmp_path / "newer"
    newer.mkdir(mode=0o700)
    filled = await fill(newer, tasks=3)
    events = content(filled)["events"]
    database = of_format(version, filled, data_dir / "vespera.db")

    async with opened(data_dir) as store:
        page = await store.queries.list_tasks()
        assert sorted(row.task.title for row in page.items) == ["task 0", "task 1", "task 2"]
        assert {row.execution_status for row in page.items} == {ExecutionStatus.COMPLETED}
        assert await store.queries.open_inputs() == ([], 0)
        task = Task(title="one more", sink=store.journal)
        session = task.start_execution("role")
        session.ask([Question.made("a", "A?")])
        await store.journal.sync()
        step = Task(title="a step", parent_execution_id=session.session_id, step_id="s", sink=store.journal)
        await store.journal.sync()
        assert await store.queries.children(session.session_id) == [step.record]
        assert (await store.queries.list_tasks()).total == 4
        found, total = await store.queries.open_inputs()
        assert ([each.question for each in found], total) == ([session.lifecycle.inputs[0]], 1)
    assert content(database)["events"][: len(events)] == events


async def test_a_log_from_before_segments_goes_on_in_them(data_dir: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    newer.mkdir(mode=0o700)
    async with opened(newer) as store:
        task = Task(title="long", sink=store.journal)
        session = task.start_execution("role")
        session.update_status(ExecutionStatus.RUNNING)
        for step in range(100):
            session.update_progress(step / 2, message=f"step {step}")
        await store.journal.sync()
    last = session.progress.sequence
    old = of_format(5, newer / "vespera.db", data_dir / "vespera.db")
    assert {each.severity for each in examine(old)} == {"ok"}

    async with opened(data_dir) as store:
        assert await store.queries.get_execution(session.session_id) == (session.lifecycle, session.progress)
        task.ledger.sink = store.journal
        for step in range(40):
            session.update_progress(50 + step, message=f"step {step}")
        session.complete()
        await store.journal.sync()
        whole = await store.queries.events_after(0, execution_id=session.session_id)
        assert [each.sequence for each in whole] == list(range(1, session.progress.sequence + 1))
    segments = [row for row in content(old)["segments"] if row[2] != 1]
    assert [since for _, _, since in segments] == [last // 32 * 32 + 32, last // 32 * 32 + 64][: len(segments)]
    assert len(segments) >= 1
    assert {each.severity for each in examine(old)} == {"ok"}


@pytest.mark.parametrize("document", ['{"sequence": 1.5}', '{"sequence": "x"}', '{"sequence": 1e30}', "[]", "no JSON"])
async def test_one_damaged_progress_keeps_no_older_database_closed(
    data_dir: Path, tmp_path: Path, document: str
) -> None:
    newer = tmp_path / "newer"
    newer.mkdir(mode=0o700)
    old = of_format(5, await fill(newer, tasks=2), data_dir / "vespera.db")
    with closing(sqlite3.connect(old)) as db, db:
        db.execute("UPDATE progress SET doc = ? WHERE id = (SELECT min(id) FROM progress)", (document,))
    async with opened(data_dir) as store:
        hurt, whole = sorted((await store.queries.list_tasks()).items, key=lambda row: row.task.title)
        assert (hurt.percentage, whole.percentage) == (100.0, 100.0)
        with pytest.raises(StoreDamaged):
            await store.queries.get_execution(hurt.execution_id or "")
        assert await store.queries.get_execution(whole.execution_id or "") is not None
    assert "error" in {each.severity for each in examine(old)}


@pytest.mark.promise("one_end")
async def test_what_ended_in_an_older_format_does_not_end_again(data_dir: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    newer.mkdir(mode=0o700)
    filled = await fill(newer, tasks=1)
    old = of_format(5, filled, data_dir / "vespera.db")
    (ended,) = [row[0] for row in content(filled)["ends"]]
    async with opened(data_dir) as store:
        with pytest.raises(StoreError, match="ends"):
            await store.journal.perform(lambda db: db.execute("INSERT INTO ends VALUES (?)", (ended,)))
    assert {each.severity for each in examine(old)} == {"ok"}
