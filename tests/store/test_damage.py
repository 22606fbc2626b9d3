"""Damage: found, named, and nothing is done to the file; another program's file is left alone."""

from __future__ import annotations

import random
import sqlite3
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import anyio
import pytest
from stored import content, fill, names, opened

from vespera_exec.errors import StoreDamaged, StoreUnavailable, VesperaError
from vespera_exec.model.task import Task
from vespera_exec.store.damage import examine
from vespera_exec.store.database import APPLICATION_ID

if TYPE_CHECKING:
    from pathlib import Path


def severities(database: Path) -> set[str]:
    return {finding.severity for finding in examine(database)}


def changed(whole: bytes, draw: random.Random) -> bytes:
    """The same with one bit the other way round."""
    place, bit = draw.randrange(len(whole)), draw.randrange(8)
    return whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]


def reads_the_same(database: Path, sound: dict[str, list[tuple[object, ...]]]) -> bool:
    try:
        return content(database) == sound
    except sqlite3.Error:
        return False


async def use(data_dir: Path) -> None:
    """Open it, read all that there is, and write."""
    async with opened(data_dir) as store:
        for row in (await store.queries.list_tasks(limit=500)).items:
            await store.queries.get_task(row.task.task_id)
            if row.execution_id is not None:
                await store.queries.get_execution(row.execution_id)
                await store.queries.get_result(row.execution_id)
        await store.queries.unfinished()
        await store.feed.read(limit=10_000)
        Task(title="one more", sink=store.journal)
        await store.journal.sync()


async def flip(data_dir: Path, *, flips: int, seed: int) -> tuple[int, int]:
    """How many single flipped bits changed what the file says, and how many of these were found."""
    draw = random.Random(seed)
    database = await fill(data_dir, tasks=50)
    whole, sound = database.read_bytes(), content(database)
    harmful = found = 0
    for _ in range(flips):
        database.write_bytes(changed(whole, draw))
        noticed = "error" in severities(database)
        if not noticed and reads_the_same(database, sound):
            continue  # it fell on what no row uses
        harmful += 1
        found += noticed
        try:
            await use(data_dir)
        except* VesperaError:
            pass
        for ending in ("-wal", "-shm"):
            database.with_name(database.name + ending).unlink(missing_ok=True)
    return harmful, found


@pytest.mark.promise("damage")
async def test_a_flipped_bit_is_found_and_crashes_nobody(data_dir: Path) -> None:
    harmful, found = await flip(data_dir, flips=20, seed=4)
    assert harmful >= 12
    assert found >= 0.85 * harmful


@pytest.mark.full
@pytest.mark.timeout(300)
async def test_of_300_flipped_bits_most_are_found(data_dir: Path) -> None:
    harmful, found = await flip(data_dir, flips=300, seed=1)
    assert harmful >= 200
    assert found >= 0.85 * harmful


async def test_a_sound_database_has_nothing_but_good_findings_and_is_not_changed(data_dir: Path) -> None:
    database = await fill(data_dir, tasks=5)
    before = database.read_bytes()
    assert severities(database) == {"ok"}
    assert database.read_bytes() == before
    assert names(data_dir) == ["cancels", "vespera.db"]


async def test_a_row_that_is_not_the_fold_of_its_log_is_found(data_dir: Path) -> None:
    database = await fill(data_dir, tasks=2)
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE executions SET doc = json_set(doc, '$.attempt', 7) WHERE rowid = 2")
    assert ["executions" in each.what for each in examine(database) if each.severity == "error"] == [True]


async def test_a_missing_event_is_found(data_dir: Path) -> None:
    database = await fill(data_dir, tasks=2)
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("DELETE FROM events WHERE cursor = 7")
    faults = [each for each in examine(database) if each.severity == "error"]
    assert any("missing" in each.what for each in faults)
    assert all("restore` a backup" in each.hint for each in faults)


@pytest.mark.promise("damage")
async def test_an_event_that_does_not_match_its_checksum_is_given_to_nobody(data_dir: Path) -> None:
    database = await fill(data_dir, tasks=1)
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE events SET body = CAST(replace(body, 'step 3', 'step 4') AS BLOB)")
    async with opened(data_dir) as store:
        with pytest.raises(StoreDamaged, match="checksum"):
            await store.feed.read()
        with pytest.raises(StoreDamaged, match="checksum"):
            await store.feed.recent(limit=20)


async def test_a_damaged_database_is_left_as_it_is(data_dir: Path) -> None:
    database = await fill(data_dir, tasks=5)
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE meta SET value = '0' WHERE key = 'clean'")
    whole = bytearray(database.read_bytes())
    middle = len(whole) // 4096 // 2 * 4096
    whole[middle : middle + 200] = bytes(200)
    database.write_bytes(whole)
    with pytest.raises(StoreDamaged) as caught:
        async with opened(data_dir):
            pytest.fail("opened")
    assert "restore a backup" in caught.value.hint
    assert database.read_bytes() == whole


@pytest.mark.parametrize("mode", ["delete", "wal"])
async def test_another_programs_database_is_refused_and_not_touched(data_dir: Path, mode: str) -> None:
    database = data_dir / "vespera.db"
    with closing(sqlite3.connect(database)) as db, db:
        db.execute(f"PRAGMA journal_mode = {mode}")
        db.execute("CREATE TABLE letters (text)")
    before = database.read_bytes()
    with pytest.raises(StoreUnavailable, match="another program") as caught:
        async with opened(data_dir):
            pytest.fail("opened")
    assert "VESPERA_DATA_DIR" in caught.value.hint
    assert database.read_bytes() == before
    assert names(data_dir) == ["vespera.db"]
    (finding,) = examine(database)
    assert (finding.severity, "another program" in finding.what) == ("error", True)


async def test_what_another_program_left_in_its_wal_stays_there(data_dir: Path) -> None:
    database = data_dir / "vespera.db"
    program = (
        "import os, sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "db.execute('PRAGMA journal_mode = wal'); db.execute('CREATE TABLE letters (text)'); os._exit(0)"
    )
    await anyio.run_process([sys.executable, "-c", program, str(database)])
    files = [database, data_dir / "vespera.db-wal"]
    before = [each.read_bytes() for each in files]
    with pytest.raises(StoreUnavailable, match="another program"):
        async with opened(data_dir):
            pytest.fail("opened")
    assert [each.read_bytes() for each in files] == before


async def test_a_gap_in_one_log_is_found_where_retention_has_made_others(data_dir: Path) -> None:
    database = await fill(data_dir, tasks=2)
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("INSERT INTO meta VALUES ('removed_to', '1000')")
        db.execute("DELETE FROM events WHERE cursor = 7")
    assert any("has a gap" in each.what for each in examine(database) if each.severity == "error")


async def test_our_database_says_that_it_is_ours(data_dir: Path) -> None:
    database = await fill(data_dir, tasks=1)
    with closing(sqlite3.connect(database)) as db:
        assert db.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert int.from_bytes(database.read_bytes()[68:72], "big") == APPLICATION_ID


def test_what_is_not_there_or_no_database_is_a_finding_too(data_dir: Path) -> None:
    database = data_dir / "vespera.db"
    assert [each.severity for each in examine(database)] == ["warning"]
    assert not database.exists()
    database.write_bytes(b"a letter, not a database " * 100)
    assert [each.severity for each in examine(database)] == ["error"]
    database.write_bytes(b"")
    assert [each.severity for each in examine(database)] == ["ok"]
