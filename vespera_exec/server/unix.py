"""Listening unix sockets of our own user: they appear ready, replace dead ones, and go with their maker."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from vespera_exec.errors import DaemonUnavailable

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_PROBE_SECONDS = 1.0


class Listener:
    """A listening socket with its name in the file system. Made by `listen`; a context manager."""

    def __init__(self, listener: socket.socket, path: Path, made: os.stat_result) -> None:
        self.socket = listener
        self._path = path
        self._made = made

    def withdraw(self) -> None:
        """Nobody finds it any more, unless somebody else has put a socket of their own in its place."""
        with suppress(FileNotFoundError):
            if os.path.samestat(self._path.lstat(), self._made):
                self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.withdraw()
        self.socket.close()


def listen(path: Path, *, backlog: int) -> Listener:
    """A non-blocking socket that listens at `path`, instead of one that nobody serves any more.

    It is moved into place when it is ready, so that nobody meets one that refuses or is open to others
    (mode 0600).

    Raises:
        DaemonUnavailable: somebody else serves at `path`, or it cannot be made.
    """
    if _is_served(path):
        raise DaemonUnavailable(f"another process serves {path}", hint="stop it, or use another data directory")
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        draft.unlink(missing_ok=True)
        listener.bind(os.fspath(draft))
        draft.chmod(0o600)
        listener.listen(backlog)
        made = draft.lstat()
        draft.replace(path)
    except OSError as fault:
        listener.close()
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise DaemonUnavailable(f"cannot listen at {path}: {fault.strerror or fault}") from fault
    return Listener(listener, path, made)


def _is_served(path: Path) -> bool:
    try:
        seen = path.lstat()
    except FileNotFoundError:
        return False
    except OSError as fault:
        raise DaemonUnavailable(f"cannot listen at {path}: {fault.strerror or fault}") from fault
    if not stat.S_ISSOCK(seen.st_mode):
        raise DaemonUnavailable(f"{path} is not a socket", hint="remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # it does not answer, but somebody holds it
        return True
