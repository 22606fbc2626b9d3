"""A copy of the database while it is written: one file, checked, complete or not there."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from vespera_exec.errors import Conflict, InvalidInput, StoreDamaged, StoreUnavailable
from vespera_exec.store import database, tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_STEP_PAGES = 1024
_STEPS = 50_000
"""Of SQLite's machine, a few milliseconds."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupReport:
    """What a backup holds: every event up to the cursor `head`. `seconds` it took, the check included."""

    path: Path
    size_bytes: int
    head: int
    seconds: float


def back_up(
    source: Path, target: Path, *, overwrite: bool = False, ask: Callable[[], None] = lambda: None
) -> BackupReport:
    """Copy the database `source` to the file `target`; blocking, from any thread of the owner's process.

    `ask` is called every few milliseconds, and what it raises ends the copying; the target is then as it was.

    The copy is the log, its snapshots and the results. What the work wrote to stdout and stderr lies in files
    and is not in it. The copy is made beside `target`, as `.<its name>.vespera-part`, 0600, and renamed when it is
    checked; what a killed backup left there is replaced.
    `put_back` makes it a database again.

    Raises:
        InvalidInput: `target` lies in the data directory.
        Conflict: `target` exists, and is not to be overwritten; or another backup is being made there.
        StoreUnavailable: there is no room or no permission at the target, or `source` cannot be read.
        StoreDamaged: `source` is damaged; the target is as it was.
    """
    return _copied(source, _checked(source, target, overwrite=overwrite), overwrite=overwrite, ask=ask)


def put_back(backup: Path, target: Path) -> BackupReport:
    """Make the file `backup` the database `target`, which does not exist yet; `backup` stays as it is. Blocking.

    Raises:
        InvalidInput: `backup` is no file, or holds nothing.
        Conflict: `target` exists.
        StoreUnavailable: another program made `backup`, or `target` cannot be written.
        StoreDamaged, StoreTooNew: `backup` cannot be used; or the WAL of another database stands beside `target`.
    """
    if not backup.is_file():
        raise InvalidInput(f"{backup} is not a file", hint="name a file that `vespera-exec backup` has made")
    with closing(_or_named(lambda: database.open_untouched(backup), backup.name)) as looked_at:
        if not _or_named(lambda: database.check_ours(looked_at, backup), backup.name):
            raise InvalidInput(f"{backup} is empty", hint="name a file that `vespera-exec backup` has made")
    _refuse_existing(target, overwrite=False)
    database.check_place(target)
    return _copied(backup, target, overwrite=False, ask=lambda: None)


def _copied(source: Path, target: Path, *, overwrite: bool, ask: Callable[[], None]) -> BackupReport:
    began = time.monotonic()
    part = target.with_name(f".{target.name}.vespera-part")
    try:
        claim = _claimed(part)
        try:
            head = _copy(source, part, ask)
            os.fsync(claim)
            _refuse_existing(target, overwrite=overwrite)
            part.replace(target)
            _sync(target.parent)
        finally:
            for ending in ("", "-journal", "-wal", "-shm"):
                with suppress(OSError):
                    part.with_name(part.name + ending).unlink()
            os.close(claim)
        size = target.stat().st_size
    except OSError as fault:
        raise _unavailable(target, fault.strerror or str(fault)) from fault
    return BackupReport(path=target, size_bytes=size, head=head, seconds=time.monotonic() - began)


def _checked(source: Path, target: Path, *, overwrite: bool) -> Path:
    """The target, absolute, after all that can be known before a byte is copied."""
    target = target.absolute()
    home = source.parent.resolve()
    folder = target.parent.resolve()
    if folder == home or home in folder.parents:
        raise InvalidInput(f"{target} lies in the data directory", hint="name a file outside of it")
    if not folder.is_dir():
        raise StoreUnavailable(f"cannot write {target}: its folder does not exist", hint="make the folder first")
    if target.is_dir():
        raise Conflict(f"{target} is a folder", hint="name a file")
    _refuse_existing(target, overwrite=overwrite)
    needed, free = source.stat().st_size, shutil.disk_usage(folder).free
    if free < needed:
        raise _unavailable(target, f"{needed:,} bytes are needed, {free:,} are free")
    return folder / target.name


def _refuse_existing(target: Path, *, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(target):
        raise Conflict(f"{target} exists already", hint="name another file, or allow it to be overwritten")


def _claimed(part: Path) -> int:
    """A new file, empty and ours alone, and locked while its descriptor is open: no other backup writes there."""
    with suppress(FileNotFoundError):
        left = os.open(part, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _lock(left, part)
            part.unlink()
        finally:
            os.close(left)
    claim = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _lock(claim, part)
    except BaseException:
        os.close(claim)
        raise
    return claim


def _lock(descriptor: int, part: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), part.lstat()):
            return
    except (BlockingIOError, FileNotFoundError):
        pass
    raise Conflict(f"another backup is being made as {part}", hint="wait for it, or name another file")


def _copy(source: Path, part: Path, ask: Callable[[], None]) -> int:
    """Copy in steps out of one snapshot, check the copy; returns the cursor of its last event."""

    def step(_status: int, _remaining: int, _total: int) -> None:
        ask()

    with (
        closing(database.open_for_reading(source)) as reader,
        closing(sqlite3.connect(part, isolation_level=None)) as copy,
    ):
        # While this snapshot is held no write can make the copy begin again.
        _or_named(lambda: reader.execute("BEGIN").execute("SELECT count(*) FROM meta").fetchone(), source.name)
        _or_named(lambda: reader.backup(copy, pages=_STEP_PAGES, progress=step), part.name)
        reader.execute("ROLLBACK")
        copy.set_progress_handler(ask, _STEPS)
        return _or_named(lambda: _finished(copy, source.name, ask), part.name)


def _finished(copy: sqlite3.Connection, name: str, ask: Callable[[], None]) -> int:
    copy.execute("PRAGMA journal_mode = DELETE")  # one file, whatever it was copied from
    copy.execute("PRAGMA synchronous = FULL")
    try:
        found = [row[0] for row in copy.execute("PRAGMA quick_check(5)")]
    except sqlite3.Error:
        ask()  # it may be what interrupted SQLite
        raise
    if found != ["ok"]:
        raise StoreDamaged(f"{name} is damaged: {'; '.join(found)[:300]}", hint="restore an older backup")
    database.mark_clean(copy, clean=True)
    tokens.forget_digests(copy)
    (head,) = copy.execute("SELECT coalesce(max(cursor), 0) FROM events").fetchone()
    return head


def _or_named(act: Callable[[], _T], name: str) -> _T:
    try:
        return act()
    except database.FAULTS as fault:
        raise database.named(fault, name) from fault


def _sync(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unavailable(target: Path, why: str) -> StoreUnavailable:
    return StoreUnavailable(f"cannot write {target}: {why}", hint="make room, or name a file where you may write")
