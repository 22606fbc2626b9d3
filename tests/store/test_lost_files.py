"""A database that is not what it was: moved or replaced under its journal, gone beside its WAL, its schema no text."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import anyio
import pytest
from stored import fill, opened

from vespera_exec.errors import StoreDamaged, StoreUnavailable
from vespera_exec.model.task import Task
from vespera_exec.store.backup import put_back
from vespera_exec.store.damage import examine, examine_in_use

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


async def left_with_a_wal(data_dir: Path, folder: Path) -> Path:
    """The place of a database whose WAL alone is in `folder`: its last commits are in there."""
    async with opened(data_dir) as store:
        Task(title="in the WAL", sink=store.journal)
        await store.journal.sync()
        shutil.copy(data_dir / "vespera.db-wal", folder / "vespera.db-wal")
    return folder / "vespera.db"


def removed(database: Path) -> None:
    database.unlink()


def moved(database: Path) -> None:
    database.parent.rename(database.parent.with_name("elsewhere"))


def replaced(database: Path) -> None:
    copy = database.with_name("copy")
    shutil.copy(database, copy)
    copy.replace(database)


@pytest.mark.parametrize("lose", [removed, moved, replaced])
async def test_nothing_new_is_decided_once_the_database_is_gone(data_dir: Path, lose: Callable[[Path], None]) -> None:
    async with opened(data_dir) as store:
        Task(title="before", sink=store.journal)
        await store.journal.sync()
        store.journal.check_writable()
        lose(store.database)
        await anyio.lowlevel.checkpoint()  # one look serves a turn of the loop
        with pytest.raises(StoreUnavailable, match="removed or replaced"):
            store.journal.check_writable()


async def test_a_database_that_is_put_back_is_written_again(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        moved(store.database)
        with pytest.raises(StoreUnavailable):
            store.journal.check_writable()
        data_dir.with_name("elsewhere").rename(data_dir)
        store.journal.check_writable()
        Task(title="again", sink=store.journal)
        await store.journal.sync()
        assert (await store.queries.list_tasks()).total == 1


@pytest.mark.parametrize("emptied", [False, True])
async def test_a_wal_without_its_database_is_not_thrown_away(data_dir: Path, tmp_path: Path, *, emptied: bool) -> None:
    folder = tmp_path / "left"
    folder.mkdir(mode=0o700)
    database = await left_with_a_wal(data_dir, folder)
    if emptied:
        database.touch()
    wal = (folder / "vespera.db-wal").read_bytes()
    with pytest.raises(StoreDamaged, match=r"vespera\.db-wal") as refused:
        async with opened(folder):
            pytest.fail("opened")
    assert "restore" in refused.value.hint
    (finding,) = examine(database)
    assert (finding.severity, "vespera.db-wal" in finding.what) == ("error", True)
    assert (folder / "vespera.db-wal").read_bytes() == wal
    assert database.exists() is emptied


async def test_a_backup_is_not_put_beside_the_wal_of_another_database(data_dir: Path, tmp_path: Path) -> None:
    backup = await fill(tmp_path / "other", tasks=1)
    place = tmp_path / "place"
    place.mkdir()
    database = await left_with_a_wal(data_dir, place)
    with pytest.raises(StoreDamaged, match=r"vespera\.db-wal"):
        put_back(backup, database)
    assert not database.exists()


async def test_a_schema_that_is_no_text_is_damage(data_dir: Path) -> None:
    database = await fill(data_dir, tasks=1)
    database.write_bytes(database.read_bytes().replace(b"CREATE TABLE streams", b"CRE\xffTE TABLE streams"))
    (finding,) = examine(database)
    assert (finding.severity, "damaged" in finding.what) == ("error", True)
    (finding,) = examine_in_use(database, ask=lambda: None)
    assert (finding.severity, "restore" in finding.hint) == ("error", True)
    with pytest.raises(StoreDamaged, match="its schema is no text") as refused:
        async with opened(data_dir):
            pytest.fail("opened")
    assert "restore a backup" in refused.value.hint


async def test_a_folder_in_the_place_of_the_database_is_named(data_dir: Path) -> None:
    (data_dir / "vespera.db").mkdir(parents=True)
    with pytest.raises(StoreUnavailable, match="is a folder, not a database"):
        async with opened(data_dir):
            pytest.fail("opened")
    (finding,) = examine(data_dir / "vespera.db")
    assert (finding.severity, "is a folder" in finding.what, finding.hint) == ("error", True, "move it away")
