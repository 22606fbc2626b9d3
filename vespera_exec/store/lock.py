"""The lock that keeps a data directory with one owner, and the row that says who it is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from vespera_exec import __version__, paths
from vespera_exec.errors import DataDirectoryInUse, StoreUnavailable

if TYPE_CHECKING:
    from types import TracebackType

Purpose = Literal["daemon", "in-process", "library", "doctor", "backup", "restore"]

_WHAT_TO_DO = {
    "daemon": "use it through `vespera-exec`, or stop it with `vespera-exec daemon stop`",
    "in-process": "close the client that started `vespera-exec --in-process`",
    "library": "close the `Vespera.open` of that program",
    "doctor": "wait until the check has ended",
    "backup": "wait until the backup has ended",
    "restore": "wait until the backup has been put in place",
}

# How long a refusal is doubted: `read_owner` holds a shared lock for an instant, which is long on a busy machine.
_PROBE_SECONDS = 0.25

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a fifo", stat.S_IFSOCK: "a socket"}

# Locks held by this process. A forked child drops them, or it would keep a dead owner's directory locked.
_held: set[int] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who holds a data directory.

    `start_ticks` (clock ticks since boot) with `boot_id` tell this process from a later one with the same
    pid; both are None where the system has no /proc. `since` is ISO 8601, UTC. `id` names it in the log, as no
    other is named.
    """

    pid: int
    purpose: str
    version: str
    since: str
    start_ticks: int | None = None
    boot_id: str | None = None
    id: str = ""

    @property
    def is_alive(self) -> bool:
        """The process is still there, and no later one with its pid."""
        if self.boot_id != _boot_id():
            return False
        return self.start_ticks is not None and self.start_ticks == _start_ticks(str(self.pid))


class OwnerLock:
    """A held data directory. A context manager; `release` may be called twice.

    The kernel drops the lock with the process, however it dies, so a file left behind means nothing.
    Not promised on network file systems.
    """

    def __init__(self, descriptor: int, owner: Owner) -> None:
        self._descriptor: int | None = descriptor
        self.owner = owner

    @classmethod
    def acquire(cls, data_dir: Path, *, purpose: Purpose, wait_seconds: float = 0.0) -> OwnerLock:
        """Takes the directory, creating it when missing. Blocks for at most `wait_seconds`.

        A daemon waits some seconds, so that the successor of one that is shutting down gets its turn.

        Raises:
            DataDirectoryInUse: somebody else holds it; names who, and what to do.
            StoreUnavailable: it cannot be created or written.
        """
        paths.create_data_dir(data_dir)
        descriptor = _open(data_dir)
        try:
            _lock(descriptor, data_dir, until=time.monotonic() + max(wait_seconds, _PROBE_SECONDS))
            owner = _this_process(purpose)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(owner)).encode() + b"\n", 0)
        except OSError as fault:
            os.close(descriptor)
            raise StoreUnavailable(
                f"cannot lock the data directory {data_dir}: {fault.strerror}",
                hint="free space on the disk, or name a local folder in VESPERA_DATA_DIR",
            ) from fault
        except BaseException:
            os.close(descriptor)
            raise
        _held.add(descriptor)
        return cls(descriptor, owner)

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _held.discard(descriptor)
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def read_owner(data_dir: Path) -> Owner | None:
    """Who holds the directory now; None when nobody does.

    Looks by taking a shared lock for an instant. An `acquire` in that instant is not refused, since it
    doubts a refusal for a moment; the answer itself may be outdated when it arrives.

    Raises:
        StoreUnavailable: what stands in the lock's place is no file.
    """
    try:
        descriptor = _opened(data_dir / paths.LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_row(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def last_owner(data_dir: Path) -> Owner | None:
    """Who took the directory last, gone or not; None where the row is missing or half written.

    Raises:
        StoreUnavailable: as `read_owner`.
    """
    try:
        descriptor = _opened(data_dir / paths.LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _read_row(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def locked_by(data_dir: Path) -> list[int]:
    """The processes that the kernel says hold the lock, ours or not; empty where it does not tell."""
    try:
        seen = (data_dir / paths.LOCK).lstat()
        lines = Path("/proc/locks").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    inode = f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}:{seen.st_ino}"
    held = [line.split() for line in lines if "->" not in line and inode in line]
    return [int(fields[4]) for fields in held if fields[1] == "FLOCK" and fields[5] == inode]


def holds(data_dir: Path) -> bool:
    """The lock file that stands there is one that this process holds: nobody has removed or replaced it."""
    try:
        there = (data_dir / paths.LOCK).lstat()
    except OSError:
        return False
    return any(os.path.samestat(there, os.fstat(descriptor)) for descriptor in _held)


def what_to_do(owner: Owner) -> str:
    """How somebody else gets the directory that `owner` holds."""
    return _WHAT_TO_DO.get(owner.purpose, "end that process, or wait for it")


def _open(data_dir: Path) -> int:
    try:
        return _opened(data_dir / paths.LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as fault:
        raise StoreUnavailable(
            f"cannot write to the data directory {data_dir}: {fault.strerror}",
            hint="give yourself write permission, or name another folder in VESPERA_DATA_DIR",
        ) from fault


def _opened(path: Path, flags: int) -> int:
    """
    Raises:
        StoreUnavailable: it is no file; a fifo, say, which nobody need write for us to come back.
        OSError: it cannot be opened.
    """
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "a device")
            raise StoreUnavailable(f"{path} is {kind}, not a lock file", hint="look at it, and remove it")
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


def _lock(descriptor: int, data_dir: Path, *, until: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            if fault.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if time.monotonic() >= until:
                raise _in_use(data_dir, _read_row(descriptor)) from None
            time.sleep(0.005)
        else:
            return


def _in_use(data_dir: Path, owner: Owner | None) -> DataDirectoryInUse:
    if owner is None:
        return DataDirectoryInUse(f"{data_dir} is in use by another process", hint="end it, or wait for it")
    return DataDirectoryInUse(
        f"{data_dir} is in use by process {owner.pid} ({owner.purpose}, since {owner.since})",
        hint=what_to_do(owner),
    )


def _read_row(descriptor: int) -> Owner | None:
    """The row of the holder; None while it is being written."""
    try:
        row: Any = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    known = {field.name for field in fields(Owner)}
    try:
        return Owner(**{name: value for name, value in cast("dict[str, Any]", row).items() if name in known})
    except TypeError:
        return None


def _this_process(purpose: Purpose) -> Owner:
    return Owner(
        pid=os.getpid(),
        purpose=purpose,
        version=__version__,
        since=datetime.now(UTC).isoformat(timespec="milliseconds"),
        start_ticks=_start_ticks(),
        boot_id=_boot_id(),
        id=f"{purpose}:{os.getpid()}:{uuid.uuid4().hex[:8]}",
    )


def _start_ticks(pid: str = "self") -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])  # a zombie has ended
    except (OSError, ValueError, IndexError):
        return None


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _forget_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)  # closing leaves the parent's lock alone; unlocking would not
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
