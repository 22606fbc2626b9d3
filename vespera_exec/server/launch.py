"""Starts a detached daemon for a data directory when none answers, and waits until it does."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from vespera_exec import paths
from vespera_exec.errors import DaemonUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

# What the daemon gets of its starter's environment; its own work gets less, see `paths.CALLER_ENV`.
# The language of messages, where things live, what the operator set, and how this interpreter was found.
_ENV = (*paths.CALLER_ENV, "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONWARNINGS")
# COVERAGE_ so that a measured test run sees the daemon, too.
_ENV_PREFIXES = ("VESPERA_", "XDG_", "LC_", "COVERAGE_")

LOG_LIMIT_BYTES = 5 * 1024 * 1024

# How the daemon says on its last line why it does not start.
_LAST_WORDS = re.compile(r"vespera-exec: (?P<message>.*) \((?P<code>[A-Z][A-Z_]+)\);? ?(?P<hint>.*)\Z", re.DOTALL)


# What a disk or a busy machine says for a while.
PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})


class DaemonRefused(DaemonUnavailable):
    """The daemon ended at once and said why: its own code, message and hint.

    `retriable` says whether waiting may help; the daemon says so with exit code `os.EX_TEMPFAIL`.
    """

    def __init__(self, code: str, message: str, hint: str, *, retriable: bool) -> None:
        super().__init__(message, hint=hint)
        self._code = code
        self.retriable = retriable

    @property
    def error_code(self) -> str:
        return self._code


def ensure_daemon(
    data_dir: Path, environ: Mapping[str, str], timeout: float = 20.0, *, command: Sequence[str] | None = None
) -> None:
    """Returns when a daemon accepts connections on `mcp.sock` of `data_dir`, started here if need be.

    Blocks for at most `timeout` seconds. Of several starters one starts, the others wait for its socket.
    `command` replaces the daemon's own argv.

    Raises:
        DaemonRefused: it ended, and said why; or the directory cannot be written.
        DaemonUnavailable: it died (with the last line of its log), or did not answer in time.
        StoreUnavailable: the data directory cannot be created.
    """
    deadline = time.monotonic() + timeout
    socket_path, _ = paths.socket_paths(data_dir, environ)
    if accepts(socket_path):
        return
    paths.create_data_dir(data_dir)
    try:
        turn = open_own(data_dir / paths.START_LOCK, os.O_RDWR)
    except OSError as fault:
        raise not_writable(data_dir, fault) from fault
    try:
        for _ in _until(deadline):
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if accepts(socket_path):
                    return
            else:
                if not accepts(socket_path):
                    _start(data_dir, environ, command or daemon_command(data_dir), socket_path, deadline)
                return
        raise DaemonUnavailable(
            f"another process is starting the daemon of {data_dir} and has not finished",
            hint=f"see {data_dir / paths.DAEMON_LOG}",
        )
    finally:
        os.close(turn)


def daemon_command(data_dir: Path, *, expect_mcp: bool = False) -> list[str]:
    """`-P`, because a `roles` or `json.py` in some folder must not be imported by accident.

    With `expect_mcp` it gets ready for an MCP client while it starts, else with the first one.
    """
    command = [sys.executable, "-P", "-m", "vespera_exec.server.daemon", "--data-dir", str(data_dir)]
    return [*command, "--expect-mcp"] if expect_mcp else command


def daemon_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that a daemon is started with.

    Of `PYTHONPATH` the absolute entries: relative ones would mean another folder in the daemon.
    """
    kept = {name: value for name, value in environ.items() if name in _ENV or name.startswith(_ENV_PREFIXES)}
    entries = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    if entries:
        kept["PYTHONPATH"] = os.pathsep.join(entries)
    return kept


def accepts(socket_path: Path) -> bool:
    """Somebody accepts connections there now."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(socket_path))
        except OSError:
            return False
        return True


def _start(
    data_dir: Path, environ: Mapping[str, str], command: Sequence[str], socket_path: Path, deadline: float
) -> None:
    log_path = data_dir / paths.DAEMON_LOG
    try:
        log = _open_log(log_path)
    except OSError as fault:
        raise not_writable(data_dir, fault) from fault
    try:
        written = os.fstat(log).st_size
        # Python does not reset this one over exec, and a daemon that inherits "ignore" cannot wait for children.
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            cwd="/",
            env=daemon_environment(environ),
            start_new_session=True,
        )
    except OSError as fault:
        raise DaemonUnavailable(f"cannot start the daemon: {command[0]}: {fault.strerror}") from fault
    finally:
        os.close(log)
    for _ in _until(deadline):
        # Asked before the socket: a daemon that ended because another one won leaves that one's socket.
        ended = process.poll() is not None
        if accepts(socket_path):
            break
        if ended:
            raise _failure(_last_line(log_path, written), process.returncode, log_path)
    else:
        process.returncode = 0  # it is left to itself, see below
        raise DaemonUnavailable(f"the daemon (process {process.pid}) does not answer", hint=f"see {log_path}")
    process.returncode = 0  # detached on purpose: this object has nothing left to wait for, nor to warn about


def _open_log(path: Path) -> int:
    try:
        if path.lstat().st_size > LOG_LIMIT_BYTES:
            path.replace(path.with_suffix(".log.1"))
    except OSError:
        pass  # there is none yet, or it stays long
    return open_own(path, os.O_WRONLY | os.O_APPEND)


def _failure(line: str, code: int, log_path: Path) -> DaemonUnavailable:
    said = _LAST_WORDS.search(line)
    if said is None:
        return DaemonUnavailable(f"the daemon did not start: {line}", hint=f"see {log_path}")
    return DaemonRefused(
        said["code"], said["message"], said["hint"] or f"see {log_path}", retriable=code == os.EX_TEMPFAIL
    )


def open_own(path: Path, flags: int) -> int:
    """A file of ours, made (0600) when it is missing.

    A data directory may come with a repository, and a link in it would have us write elsewhere.

    Raises:
        DaemonUnavailable: it is a link, no regular file, or somebody else's.
        OSError: it cannot be opened.
    """
    # O_NONBLOCK: nobody need read a fifo for it to be refused.
    more = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags | more, 0o600)
    except OSError as fault:
        if fault.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
            raise _not_ours(path) from fault
        raise
    seen = os.fstat(descriptor)
    if stat.S_ISREG(seen.st_mode) and seen.st_uid == os.getuid():
        return descriptor
    os.close(descriptor)
    raise _not_ours(path)


def _not_ours(path: Path) -> DaemonRefused:
    what = f"{path} is a link, no regular file, or another user's"
    return DaemonRefused("STORE_UNAVAILABLE", what, "look at it, and remove it", retriable=False)


def not_writable(data_dir: Path, fault: OSError) -> DaemonRefused:
    """What is told of a file in `data_dir` that could not be made or written."""
    return DaemonRefused(
        "STORE_UNAVAILABLE",
        f"cannot write to the data directory {data_dir}: {fault.strerror}",
        "give yourself write permission, or name another folder in VESPERA_DATA_DIR",
        retriable=fault.errno in PASSING,
    )


def _last_line(log_path: Path, start: int) -> str:
    with log_path.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(start, size - 8192))
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[:2000] if lines else "it ended without a word"


def _until(deadline: float) -> Iterator[None]:
    """Polls with growing pauses, 1 to 5 ms, until the deadline."""
    pause = 0.001
    while time.monotonic() < deadline:
        yield
        time.sleep(pause)
        pause = min(pause * 1.3, 0.005)
