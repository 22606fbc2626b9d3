"""Backups: taken while others write, complete, checked, and never in the way of what is there."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import stat
import threading
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

import anyio
import pytest
from deadlines import WITHIN
from stored import content, fill, names, opened

from vespera_exec.errors import Conflict, InvalidInput, StoreDamaged, StoreUnavailable
from vespera_exec.model.task import Task
from vespera_exec.store.backup import back_up
from vespera_exec.store.damage import examine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vespera_exec.store.store import Store

WRITERS = 100


async def write_on(store: Store, acked: dict[str, int]) -> None:
    session = Task(title="busy", sink=store.journal).start_execution("role")
    while True:
        session.update_progress(1.0, message="x" * 200)
        sequence = session.progress.sequence
        await store.journal.sync()
        acked[session.session_id] = sequence


@asynccontextmanager
async def written_to(store: Store, acked: dict[str, int]) -> AsyncGenerator[None]:
    """Under load by 100 writers, each of which has been acknowledged at least once."""
    async with anyio.create_task_group() as group:
        for _ in range(WRITERS):
            group.start_soon(write_on, store, acked)
        with anyio.fail_after(WITHIN):
            while len(acked) < WRITERS:  # noqa: ASYNC110 - the writers tell nobody
                await anyio.sleep(0.005)
        yield
        group.cancel_scope.cancel()


def restored(backup: Path, tmp_path: Path) -> Path:
    """A new data directory with the backup as its database."""
    folder = tmp_path / "restored"
    folder.mkdir(mode=0o700)
    shutil.copyfile(backup, folder / "vespera.db")
    return folder


@pytest.mark.promise("backup")
async def test_a_backup_under_load_has_all_that_was_acknowledged_before(data_dir: Path, tmp_path: Path) -> None:
    await fill(data_dir, tasks=200)
    acked: dict[str, int] = {}
    target = tmp_path / "backup.db"
    async with opened(data_dir) as store, written_to(store, acked):
        before, head = dict(acked), store.journal.head
        report = await store.backup(target)
    assert report.head >= head
    assert (report.path, report.size_bytes) == (target, target.stat().st_size)
    # The fold of every log is its snapshot, and no event is missing.
    assert {each.severity for each in examine(target)} == {"ok"}
    async with opened(restored(target, tmp_path)) as store:
        assert store.journal.head == report.head
        for session_id, sequence in before.items():
            (last,) = await store.queries.last_events(execution_id=session_id, limit=1)
            assert last.sequence >= sequence
        Task(title="it goes on", sink=store.journal)
        assert await store.journal.sync() == report.head + 1


async def test_a_write_is_acknowledged_while_a_backup_stands_in_its_middle(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = await fill(data_dir, tasks=20)
    reached, go_on = threading.Event(), threading.Event()

    def stand() -> None:
        reached.set()
        assert go_on.wait(WITHIN)

    monkeypatch.setattr("vespera_exec.store.store.check_cancelled", stand)
    async with opened(data_dir) as store, anyio.create_task_group() as group:
        head = store.journal.head
        group.start_soon(store.backup, tmp_path / "backup.db")
        assert await anyio.to_thread.run_sync(reached.wait, WITHIN)
        Task(title="meanwhile", sink=store.journal)
        with anyio.fail_after(WITHIN):
            written = await store.journal.sync()
        assert written == head + 1
        go_on.set()
    assert content(tmp_path / "backup.db")["tasks"] == content(database)["tasks"][:20]


async def test_a_backup_is_one_file_of_ours_alone(data_dir: Path, tmp_path: Path) -> None:
    database = await fill(data_dir, tasks=3)
    target = tmp_path / "backup.db"
    async with opened(data_dir) as store:
        await store.backup(target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert names(tmp_path) == ["backup.db", "data"]
    assert content(target) == content(database)


async def test_an_existing_file_is_overwritten_only_when_told(data_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup.db"
    target.write_bytes(b"mine")
    async with opened(data_dir) as store:
        with pytest.raises(Conflict, match="exists already"):
            await store.backup(target)
        assert target.read_bytes() == b"mine"
        await store.backup(target, overwrite=True)
    assert {each.severity for each in examine(target)} == {"ok"}


async def test_the_data_directory_is_no_place_for_a_backup(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        for name in ("vespera.db", "owner.lock", "new.db"):
            with pytest.raises(InvalidInput, match="data directory"):
                await store.backup(data_dir / name, overwrite=True)
        Task(title="still there", sink=store.journal)
        await store.journal.sync()
        assert (await store.queries.list_tasks()).total == 1


async def test_where_it_cannot_be_written_it_says_why_and_leaves_nothing(data_dir: Path, tmp_path: Path) -> None:
    async with opened(data_dir) as store:
        with pytest.raises(StoreUnavailable, match="folder does not exist"):
            await store.backup(tmp_path / "missing" / "backup.db")
        (tmp_path / ".backup.db.vespera-part").mkdir()
        with pytest.raises(StoreUnavailable, match="cannot write"):
            await store.backup(tmp_path / "backup.db")
    assert names(tmp_path) == [".backup.db.vespera-part", "data"]


async def test_a_backup_that_is_told_to_end_leaves_nothing(data_dir: Path, tmp_path: Path) -> None:
    await fill(data_dir, tasks=300)  # several steps of copying
    target = tmp_path / "backup.db"
    target.write_bytes(b"an older one")
    asked = 0

    def ask() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        back_up(data_dir / "vespera.db", target, overwrite=True, ask=ask)
    assert target.read_bytes() == b"an older one"
    assert names(tmp_path) == ["backup.db", "data"]


async def test_two_backups_to_one_file_never_mix(data_dir: Path, tmp_path: Path) -> None:
    await fill(data_dir, tasks=3)
    target, other = tmp_path / "backup.db", tmp_path / "backup.db.part"
    other.write_bytes(b"somebody's own")
    part = tmp_path / ".backup.db.vespera-part"
    async with opened(data_dir) as store:
        with part.open("wb") as being_made:
            fcntl.flock(being_made, fcntl.LOCK_EX)
            being_made.write(b"half of another backup")
            being_made.flush()
            with pytest.raises(Conflict, match="another backup is being made"):
                await store.backup(target)
            assert part.read_bytes() == b"half of another backup"
        # That one was killed: what it left is in nobody's way.
        await store.backup(target)
    assert {each.severity for each in examine(target)} == {"ok"}
    assert other.read_bytes() == b"somebody's own"
    assert names(tmp_path) == ["backup.db", "backup.db.part", "data"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
async def test_without_permission_it_says_so(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    async with opened(data_dir) as store:
        with pytest.raises(StoreUnavailable, match="Permission denied"):
            await store.backup(folder / "backup.db")


@pytest.mark.promise("backup")
async def test_damage_is_not_copied_over_a_good_backup(data_dir: Path, tmp_path: Path) -> None:
    database = await fill(data_dir, tasks=20)
    with closing(sqlite3.connect(database)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'executions_of_run'").fetchone()
    whole = bytearray(database.read_bytes())
    whole[(root - 1) * 4096 : (root - 1) * 4096 + 200] = b"\xff" * 200
    database.write_bytes(whole)
    target = tmp_path / "backup.db"
    target.write_bytes(b"an older, good one")
    async with opened(data_dir) as store:
        with pytest.raises(StoreDamaged):
            await store.backup(target, overwrite=True)
    assert target.read_bytes() == b"an older, good one"
    assert names(tmp_path) == ["backup.db", "data"]
