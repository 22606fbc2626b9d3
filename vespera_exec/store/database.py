"""The database file: known for ours, opened for its one writer, brought up to date, and its faults named."""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
from contextlib import closing
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from vespera_exec import __version__
from vespera_exec.errors import Conflict, Fenced, StoreDamaged, StoreError, StoreTooNew, StoreUnavailable, VesperaError

if TYPE_CHECKING:
    from pathlib import Path

APPLICATION_ID = 0x56455350
"""Marks a file as ours, also for `file(1)`: "VESP"."""
BUSY_MS = 5000
JOURNAL_SIZE_LIMIT = 16 * 1024 * 1024
"""What is left of the WAL file after a reset, in bytes."""

FAULTS = (sqlite3.Error, UnicodeDecodeError)
"""What the use of a database can come to. The sqlite3 module tells of a damaged name in the schema by the second."""

_UNREADABLE = "Could not decode to UTF-8"  # how the sqlite3 module says it; SQLite has no code for it
_MARKED_SINCE = 2
_OUR_TABLES = {"meta", "streams", "events"}
_THE_LOG = ("events", "segments", "ends")
_REFUSALS = {sqlite3.SQLITE_CONSTRAINT}
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_PASSING = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOMEM,
}


def open_for_writing(database: Path) -> sqlite3.Connection:
    """The write connection: WAL, FULL, autocommit, migrated; checked where the last owner did not close it.

    Raises:
        StoreUnavailable: it cannot be created, opened or written, or is another program's; that one stays as it is.
        StoreDamaged: it is no database, the check found damage, or it is gone and its WAL is not.
        StoreTooNew: a newer version wrote it.
    """
    check_place(database)
    bind_plainly()
    try:
        # Created by us, so that what SQLite puts beside it takes over its 0600.
        os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as fault:
        raise StoreUnavailable(
            f"cannot open {database}: {fault.strerror}", hint="check its permissions, or name another VESPERA_DATA_DIR"
        ) from fault
    try:
        with closing(open_untouched(database)) as looked_at:
            check_ours(looked_at, database)
        connection = sqlite3.connect(database, isolation_level=None, cached_statements=256)
        try:
            return _prepared(connection, database)
        except BaseException:
            connection.close()
            raise
    except FAULTS as fault:
        raise named(fault, database) from fault


def bind_plainly() -> None:
    """Bytes and None are bound as they are: for each of them the sqlite3 module else looks for an adapter in vain.

    That is some 7 % of what a task costs the writer. For the whole process, in which nothing but that changes: an
    adapter that somebody else has registered stays.
    """
    for kind in (bytes, type(None)):
        if (kind, sqlite3.PrepareProtocol) not in sqlite3.adapters:
            sqlite3.register_adapter(kind, _itself)


def open_for_reading(database: Path) -> sqlite3.Connection:
    """A connection that cannot write. It may be handed to one other thread."""
    connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA query_only = ON")
    connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    return connection


def open_untouched(database: Path) -> sqlite3.Connection:
    """A connection that changes no byte of the file nor of its WAL. Only while nobody writes it."""
    # A WAL counts as part of the file. Without one, not even an index for it is made beside the file.
    how = "mode=ro" if _size(_wal(database)) else "mode=ro&immutable=1"
    return sqlite3.connect(f"{database.absolute().as_uri()}?{how}", uri=True, isolation_level=None)


def check_place(database: Path) -> None:
    """What stands at `database` may be opened, or made where nothing does. Changes nothing.

    Raises:
        StoreUnavailable: a folder or the like stands there.
        StoreDamaged: it is missing or empty, and a WAL that was written to it is left: SQLite would throw that away.
    """
    try:
        seen = database.stat()
    except OSError:
        pass  # not there; or what opens it will say why it cannot
    else:
        if not stat.S_ISREG(seen.st_mode):
            what = "a folder" if stat.S_ISDIR(seen.st_mode) else "no file"
            raise StoreUnavailable(f"{database} is {what}, not a database", hint="move it away")
    wal = _wal(database)
    if not _size(database) and _size(wal):
        raise StoreDamaged(
            f"{database} is missing or empty, and what was last written to it stands in {wal.name}",
            hint=f"put the {database.name} that belongs to it back; "
            f"or move both files away, and `vespera-exec restore` a backup where you have one",
        )


def identity(database: Path) -> tuple[int, int] | None:
    """Which file stands there; None when none does."""
    try:
        seen = database.stat()
    except OSError:
        return None
    return seen.st_dev, seen.st_ino


def check_ours(connection: sqlite3.Connection, database: Path) -> int:
    """The format of our database; 0 of an empty file, which may become one.

    Raises:
        StoreUnavailable: another program made it.
        StoreTooNew: a newer version wrote it.
        StoreDamaged: it is ours, and says so no more in full.
    """
    (mark,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    ours = tables >= _OUR_TABLES
    if not ours and (tables or mark not in (0, APPLICATION_ID)):
        raise StoreUnavailable(
            f"{database} belongs to another program", hint="name another folder in VESPERA_DATA_DIR; it was not touched"
        )
    known = len(migrations())
    if version > known:
        raise StoreTooNew(f"{database} was written by a newer version (format {version}, known: {known})")
    if bool(version) != ours or (mark != APPLICATION_ID and (mark or version >= _MARKED_SINCE)):
        raise StoreDamaged(f"{database} is damaged: its header does not fit its tables")
    return version


def mark_clean(connection: sqlite3.Connection, *, clean: bool) -> None:
    """Whether the owner has closed it, so that the next one knows if it must look for damage."""
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('clean', ?)", ("1" if clean else "0",))


def removed_to(connection: sqlite3.Connection) -> int:
    """The highest cursor that retention has removed; 0 where nothing was."""
    found = connection.execute("SELECT value FROM meta WHERE key = 'removed_to'").fetchone()
    return int(found[0]) if found else 0


def is_refusal(fault: sqlite3.Error) -> bool:
    """The batch is at fault, not the disk: a constraint, or a value that no column takes."""
    return not isinstance(fault, sqlite3.DatabaseError) or _code(fault) in _REFUSALS or _code(fault) is None


def refusal(fault: Exception) -> VesperaError:
    """What the writer of a refused batch is told."""
    text = str(fault)
    if "fenced:" in text or any(f"failed: {table}." in text for table in _THE_LOG):
        reason = text.partition("fenced: ")[2] or "the log of this execution was continued by another owner"
        return Fenced(reason[:1].upper() + reason[1:], hint="read its state again; this copy is out of date")
    if "idempotency." in text:
        return Conflict("the idempotency key has been used", hint="repeat the request to get the first one's ids")
    return StoreError(f"the store refused a decision: {text}")


def named(fault: sqlite3.Error | UnicodeDecodeError, database: Path | str) -> StoreError:
    """The error that says what is wrong with the file, and what to do. Clients see it: give them a name, no path."""
    code = _code(fault)
    if code in _DAMAGE or isinstance(fault, UnicodeDecodeError) or (code is None and _UNREADABLE in str(fault)):
        what = "its schema is no text" if isinstance(fault, UnicodeDecodeError) else fault
        return StoreDamaged(f"{database} is damaged or no database: {what}")
    if code == sqlite3.SQLITE_FULL:
        return StoreUnavailable(
            f"cannot write {database}: the disk is full", hint="make room; writing goes on by itself"
        )
    if (most := _file_limit(fault)) is not None:
        return StoreUnavailable(
            f"cannot write {database}: {fault}; this process may write files of {most:,} bytes at most",
            hint="raise its limit (ulimit -f), and start it again",
        )
    if code in _PASSING:
        return StoreUnavailable(f"cannot use {database}: {fault}", hint="check the disk and the file's permissions")
    return StoreError(f"{database}: {fault}")


def _itself(value: bytes | None) -> Any:
    return value


def _code(fault: Exception) -> int | None:
    """The primary result code; None where the fault is not SQLite's own."""
    code = getattr(fault, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _file_limit(fault: Exception) -> int | None:
    """The most bytes that a file of ours may have, where a write failed and there is such a limit.

    SQLite has no code for it, and the sqlite3 module does not hand on the system's.
    """
    if sys.platform == "win32" or getattr(fault, "sqlite_errorcode", None) != sqlite3.SQLITE_IOERR_WRITE:
        return None
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if most == resource.RLIM_INFINITY else most


def _wal(database: Path) -> Path:
    return database.with_name(f"{database.name}-wal")


def _size(file: Path) -> int:
    """In bytes; 0 where it cannot be seen."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _prepared(connection: sqlite3.Connection, database: Path) -> sqlite3.Connection:
    connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    version = check_ours(connection, database)
    if version:
        _check(connection, database)
    # Takes effect in a new file only, before its first page is written.
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute(f"PRAGMA journal_size_limit = {JOURNAL_SIZE_LIMIT}")
    for number, script in enumerate(migrations()[version:], start=version + 1):
        try:
            connection.executescript(f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version = {number};\nCOMMIT;")
        finally:
            if connection.in_transaction:
                connection.rollback()
    if not version:
        connection.execute("INSERT INTO meta VALUES ('created_by', ?)", (__version__,))
    mark_clean(connection, clean=False)
    return connection


def _check(connection: sqlite3.Connection, database: Path) -> None:
    """Look for damage where the last owner did not close the file."""
    clean = connection.execute("SELECT value FROM meta WHERE key = 'clean'").fetchone()
    if clean == ("1",):
        return
    found = [row[0] for row in connection.execute("PRAGMA quick_check(5)")]
    if found != ["ok"]:
        raise StoreDamaged(f"{database} is damaged: {'; '.join(found)[:300]}")


@cache
def migrations() -> list[str]:
    """The scripts that lead from one format to the next, the first from nothing."""
    folder = resources.files("vespera_exec.store").joinpath("migrations")
    files = sorted((each for each in folder.iterdir() if each.name.endswith(".sql")), key=lambda each: each.name)
    return [each.read_text(encoding="utf-8") for each in files]
