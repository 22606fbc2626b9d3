"""What can be wrong with a data directory and the place it stands in, and what to do about each.

Cheap to import: the command line looks around with it. Only `contents` opens the database, and only for its owner.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vespera_exec import __version__, paths
from vespera_exec.app.owning import listener
from vespera_exec.errors import InvalidInput, StoreError, StoreUnavailable
from vespera_exec.settings import Settings
from vespera_exec.store.lock import last_owner, locked_by, read_owner, what_to_do

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Level = Literal["ok", "warning", "error"]

_MIB = 1024 * 1024
_FULL_BYTES = 64 * _MIB  # what the write-ahead log alone may take
_SCARCE_BYTES = 512 * _MIB
_SOCKET_NAME_LIMIT = 107
_NETWORK = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "lustre", "gluster", "gfs2", "ocfs2", "sshfs", "ncpfs", "davfs")
# Damage under a write and a checkpoint at once.
_WAL_RESET_BUG = ((3, 7, 0), (3, 51, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at. `hint` says what to do; empty where nothing needs to be done."""

    name: str
    level: Level
    what: str
    hint: str = ""


def surroundings(data_dir: Path, environ: Mapping[str, str]) -> list[Check]:
    """All that can be seen without opening the database. Changes nothing."""
    checks = [_settings(data_dir, environ), *_folder(data_dir), _sockets(data_dir, environ), _sqlite()]
    if data_dir.is_dir():
        checks += [_lock(data_dir, environ), _token(data_dir)]
    below = next(folder for folder in (data_dir, *data_dir.parents) if folder.is_dir())
    return [*checks, _space(below), _file_system(below)]


def contents(database: Path, roles_dir: Path, *, ask: Callable[[], None] | None = None) -> list[Check]:
    """The database and the role files; blocking. For the owner of the directory alone, in its own process.

    An owner that has the database open, and may write meanwhile, gives `ask`: called every few milliseconds, it
    may raise to end the look.
    """
    return [*_database(database, ask), *_roles(roles_dir)]


def version_of_daemon(running: str, pid: int) -> Check:
    """Whether the daemon that runs is the one that is installed."""
    if running == __version__:
        return Check(name="version", level="ok", what=f"the daemon (process {pid}) is this version, {__version__}")
    return Check(
        name="version",
        level="warning",
        what=f"the daemon (process {pid}) is version {running}, this is {__version__}",
        hint="`vespera-exec daemon stop` when its work is done; the next client starts the installed version",
    )


def _settings(data_dir: Path, environ: Mapping[str, str]) -> Check:
    try:
        Settings.load(environ, cwd=Path("/"), data_dir=data_dir)
    except InvalidInput as error:
        return Check(name="settings", level="error", what=error.message, hint="correct or unset that variable")
    given = sum(name.startswith("VESPERA_") for name in environ)
    return Check(name="settings", level="ok", what=f"{given} VESPERA_ variables are set" if given else "the defaults")


def _folder(data_dir: Path) -> Iterator[Check]:
    name = "data directory"
    try:
        seen = data_dir.stat()
    except FileNotFoundError:
        yield Check(name=name, level="ok", what=f"{data_dir} does not exist yet; the first client makes it")
        return
    except OSError as fault:
        hint = "give yourself permission, or name another folder in VESPERA_DATA_DIR"
        yield Check(name=name, level="error", what=f"{data_dir} cannot be seen: {fault.strerror}", hint=hint)
        return
    if not stat.S_ISDIR(seen.st_mode):
        hint = "move it away, or name another folder in VESPERA_DATA_DIR"
        yield Check(name=name, level="error", what=f"{data_dir} is not a folder", hint=hint)
        return
    if os.statvfs(data_dir).f_flag & os.ST_RDONLY:
        hint = "mount it writable, or name another folder in VESPERA_DATA_DIR"
        yield Check(name=name, level="error", what=f"{data_dir} is on a read-only file system", hint=hint)
        return
    if not os.access(data_dir, os.R_OK | os.W_OK | os.X_OK):
        yield Check(name=name, level="error", what=f"{data_dir} is not yours to write", hint=f"chmod u+rwx {data_dir}")
        return
    if seen.st_mode & 0o077:
        yield Check(name=name, level="warning", what=f"{data_dir} is open to others", hint=f"chmod 700 {data_dir}")
    foreign = list(_not_ours(data_dir))
    if seen.st_uid != os.getuid() or foreign:
        whose = ", ".join(sorted(foreign)[:5]) or str(data_dir)
        yield Check(
            name=name,
            level="error",
            what=f"other users own parts of {data_dir}: {whose}",
            hint=f"chown -R {os.getuid()} {data_dir}, as root; then never start vespera-exec here as another user",
        )
    else:
        yield Check(name=name, level="ok", what=f"{data_dir} is yours")


def _not_ours(data_dir: Path) -> Iterator[str]:
    with os.scandir(data_dir) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # a daemon that comes or goes makes and removes files
                if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                    yield entry.name


def _lock(data_dir: Path, environ: Mapping[str, str]) -> Check:
    try:
        served_by = _listener(data_dir, environ)
        owner, holders = read_owner(data_dir), locked_by(data_dir)
    except StoreUnavailable as error:
        return Check(name="lock", level="error", what=error.message, hint=error.hint)
    known = holders or ([owner.pid] if owner is not None else [])
    # Asked twice: a daemon may have begun or ended while we looked.
    if served_by and served_by not in known and _listener(data_dir, environ) == served_by:
        holder = f"process {known[0]} holds the lock" if known else "nobody holds the lock"
        if not (data_dir / paths.LOCK).exists():
            holder = f"{data_dir / paths.LOCK} is missing"
        hint = "`vespera-exec daemon stop --now`; the next client starts one that holds the lock"
        return Check(name="lock", level="error", what=f"process {served_by} serves, but {holder}", hint=hint)
    if owner is not None:
        who = f"process {owner.pid} ({owner.purpose}, version {owner.version}, since {owner.since}) holds it"
        if holders and owner.pid not in holders:
            who = f"process {holders[0]} holds the lock of {owner.purpose} {owner.pid}"
            return Check(name="lock", level="error", what=who, hint=f"end process {holders[0]}")
        if owner.purpose in ("daemon", "doctor"):
            return Check(name="lock", level="ok", what=who)
        return Check(name="lock", level="warning", what=who, hint=what_to_do(owner))
    if holders:
        what = f"{data_dir / paths.LOCK} is locked by process {holders[0]}, which is none of ours"
        return Check(name="lock", level="error", what=what, hint=f"end process {holders[0]}")
    if (last := last_owner(data_dir)) is None:
        return Check(name="lock", level="ok", what="nobody holds it")
    state = "is alive and has let it go" if last.is_alive else "is gone"
    what = f"nobody holds it; process {last.pid} ({last.purpose}, since {last.since}), the last that did, {state}"
    return Check(name="lock", level="ok", what=what)


def _listener(data_dir: Path, environ: Mapping[str, str]) -> int | None:
    try:
        path, _ = paths.socket_paths(data_dir, environ)
    except OSError:
        return None
    return listener(path)


def _sockets(data_dir: Path, environ: Mapping[str, str]) -> Check:
    try:
        path, _ = paths.socket_paths(data_dir, environ)
    except OSError as fault:
        hint = "name a folder of your own in VESPERA_RUNTIME_DIR"
        return Check(name="sockets", level="error", what=f"no folder for sockets: {fault}", hint=hint)
    if len(os.fsencode(path)) > _SOCKET_NAME_LIMIT:
        what = f"{path} is longer than the {_SOCKET_NAME_LIMIT} bytes that a socket's name may have"
        return Check(name="sockets", level="error", what=what, hint="name a shorter VESPERA_RUNTIME_DIR")
    return Check(name="sockets", level="ok", what=f"{path.parent} is yours alone")


def _token(data_dir: Path) -> Check:
    path = data_dir / paths.TOKEN
    try:
        seen = path.lstat()
    except OSError:
        return Check(name="token", level="ok", what="there is none yet; the first daemon makes it")
    if not stat.S_ISREG(seen.st_mode) or seen.st_uid != os.getuid():
        hint = "look at it; remove it, and a new one is made"
        return Check(name="token", level="error", what=f"{path} is a link, no file, or another user's", hint=hint)
    if seen.st_mode & 0o077:
        hint = f"rm {path}, since others may have read it; a new one is made"
        return Check(name="token", level="error", what=f"{path} is open to others", hint=hint)
    return Check(name="token", level="ok", what=f"{path} is readable by you alone")


def _sqlite() -> Check:
    low, high = _WAL_RESET_BUG
    what = f"version {sqlite3.sqlite_version}"
    if low <= sqlite3.sqlite_version_info <= high:
        what += (
            "; it can lose a write that meets a checkpoint of another connection (3.7.0 to 3.51.2). "
            "Here one connection alone writes and checkpoints, so that cannot happen"
        )
    return Check(name="sqlite", level="ok", what=what)


def _space(folder: Path) -> Check:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as fault:
        return Check(name="disk", level="warning", what=f"its free space is not known: {fault.strerror}")
    what = f"{free // _MIB} MiB free at {folder}"
    if free < _FULL_BYTES:
        return Check(name="disk", level="error", what=what, hint="make room; until then nothing new is accepted")
    if free < _SCARCE_BYTES:
        return Check(name="disk", level="warning", what=what, hint="make room before it is full")
    return Check(name="disk", level="ok", what=what)


def _file_system(folder: Path) -> Check:
    kind = _kind_of_file_system(folder)
    if kind is None:
        return Check(name="file system", level="ok", what="its kind is not known here")
    if any(name in kind for name in _NETWORK):
        return Check(
            name="file system",
            level="error",
            what=f"{folder} is on {kind}, a network file system; locks and fsync are not to be relied on there",
            hint="name a folder on a local disk in VESPERA_DATA_DIR",
        )
    return Check(name="file system", level="ok", what=kind)


def _kind_of_file_system(folder: Path) -> str | None:
    """By the longest mount point above `folder`; None where the system does not tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        real = folder.resolve()
    except OSError:
        return None
    best: tuple[int, str | None] = (0, None)
    for line in lines:
        place, _, kind = line.partition(" - ")
        fields, described = place.split(" "), kind.split(" ")
        if len(fields) < 5 or not described[0]:
            continue
        point = Path(fields[4].replace("\\040", " "))
        if real.is_relative_to(point) and len(point.parts) >= best[0]:  # of equals the later one covers the earlier
            best = len(point.parts), described[0]
    return best[1]


def _database(database: Path, ask: Callable[[], None] | None) -> list[Check]:
    from vespera_exec.store.damage import examine, examine_in_use
    from vespera_exec.store.database import check_place

    if ask is not None and not database.exists():
        hint = "put it back; else the server ends by itself, and the next client starts afresh"
        return [Check(name="database", level="error", what=f"{database} was removed while in use", hint=hint)]
    try:
        check_place(database)
        if not database.exists():
            return [Check(name="database", level="ok", what="there is none yet")]
        found = examine(database) if ask is None else examine_in_use(database, ask=ask)
    except StoreError as error:
        return [Check(name="database", level="error", what=error.message, hint=error.hint)]
    return [Check(name="database", level=each.severity, what=each.what, hint=each.hint) for each in found]


def _roles(roles_dir: Path) -> list[Check]:
    from roles.registry import RoleRegistry

    registry = RoleRegistry.load(roles_dir)
    names = registry.names()
    hint = f"correct it in {roles_dir}; docs/roles.md has the format"
    broken = [Check(name="roles", level="warning", what=problem, hint=hint) for problem in registry.problems]
    return broken or [Check(name="roles", level="ok", what=f"{len(names)}, all readable")]
