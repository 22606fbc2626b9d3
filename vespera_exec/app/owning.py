"""Who owns a data directory, asked without opening what is in it."""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import TYPE_CHECKING

from vespera_exec import paths
from vespera_exec.errors import DaemonUnavailable, DataDirectoryInUse
from vespera_exec.store.lock import OwnerLock, holds, last_owner, read_owner

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from vespera_exec.store.lock import Owner

_TURN_SECONDS = 5.0
_CREDENTIALS = struct.Struct("3i")


def check_unserved(data_dir: Path, environ: Mapping[str, str]) -> None:
    """Returns when nobody accepts connections on the socket of its daemon, whatever the lock file says.

    Raises:
        DataDirectoryInUse: names the process that does.
        DaemonUnavailable: there is no folder for sockets.
    """
    try:
        path, _ = paths.socket_paths(data_dir, environ)
    except OSError as fault:
        raise DaemonUnavailable(
            f"no folder for sockets: {fault}", hint="name one of your own in VESPERA_RUNTIME_DIR"
        ) from fault
    pid = listener(path)
    if pid is not None:
        raise DataDirectoryInUse(
            f"{data_dir} is in use by process {pid or 'unknown'}, which serves it",
            hint="use it through `vespera-exec`, or stop it with `vespera-exec daemon stop`",
        )


def taken_by_daemon(data_dir: Path, environ: Mapping[str, str]) -> OwnerLock:
    """The lock, for a daemon. Blocks for at most 5 s: it outlasts the last moments of the one that it follows.

    Raises:
        DataDirectoryInUse: another daemon serves, at once; or somebody else holds the lock, after that time.
        DaemonUnavailable, StoreUnavailable: as `check_unserved` and `OwnerLock.acquire`.
    """
    deadline = time.monotonic() + _TURN_SECONDS
    while True:
        check_unserved(data_dir, environ)
        try:
            return OwnerLock.acquire(data_dir, purpose="daemon")
        except DataDirectoryInUse:
            if time.monotonic() >= deadline:
                raise


def listener(socket_path: Path) -> int | None:
    """The process that listens there, by the kernel's word; None when nobody does. 0: the system does not tell."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(socket_path))
            if not hasattr(socket, "SO_PEERCRED"):
                return 0
            told = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return None
    pid, _, _ = _CREDENTIALS.unpack(told)
    return int(pid)


def still_owns(data_dir: Path) -> bool:
    """The lock that this process took is still the one that stands in the directory."""
    return holds(data_dir)


def present_owner(data_dir: Path) -> Owner | None:
    """Who holds it now; None also while the holder is still writing down who it is.

    Raises:
        StoreUnavailable: what stands in the lock's place is no file.
    """
    return read_owner(data_dir)


def latest_owner(data_dir: Path) -> Owner | None:
    """Who took it last, whether it still holds it or not.

    Raises:
        StoreUnavailable: as `present_owner`.
    """
    return last_owner(data_dir)
