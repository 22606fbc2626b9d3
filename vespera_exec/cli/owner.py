"""The daemon as a process: asking and stopping it."""

from __future__ import annotations

import os
import select
import signal
import time
from typing import TYPE_CHECKING

from vespera_exec import paths
from vespera_exec.app.owning import latest_owner, listener, present_owner
from vespera_exec.cli.client import Daemon, DaemonError, DaemonSilent
from vespera_exec.errors import DaemonUnavailable

if TYPE_CHECKING:
    from pathlib import Path

    from vespera_exec.model.events import Json

_STOP_SECONDS = 15.0
_KILL_SECONDS = 5.0
_ANSWER_SECONDS = 5.0  # for one that is starting, or in its last moments
_LOOK_SECONDS = 0.05


def running(data_dir: Path) -> Json:
    """What the daemon says of itself (`GET /daemon`); None when none runs. Starts nothing.

    Raises:
        DaemonSilent: a daemon holds the directory or its socket, and does not answer within 5 s.
        DaemonError: another program holds the directory.
        StoreUnavailable: what stands in the place of the lock is no file.
    """
    deadline = time.monotonic() + _ANSWER_SECONDS
    while (view := _asked(data_dir)) is None:
        owner = present_owner(data_dir)
        pid = _listener(data_dir) if owner is None else owner.pid
        if pid is None:
            return None
        if owner is not None and owner.purpose != "daemon":
            raise DaemonError(
                "DATA_DIRECTORY_IN_USE",
                f"no daemon: process {owner.pid} ({owner.purpose}, since {owner.since}) holds {data_dir}",
                "`vespera-exec doctor` says more",
            )
        if time.monotonic() >= deadline:
            raise DaemonSilent(data_dir, pid)
        time.sleep(_LOOK_SECONDS)
    return view


def stop(data_dir: Path, *, now: bool = False) -> Json:
    """Ends the daemon and waits until it is gone; what it said of itself before, or None when none ran.

    With `now` also one that has work or does not answer, and by SIGKILL where 15 s were not enough. Of one that does
    not answer only `pid`, `version` and `work` (unknown: None) are told.

    Raises:
        DaemonError: it has work, cannot be told from another process, or does not end.
        DaemonSilent, StoreUnavailable: as `running`.
    """
    view: dict[str, Json] | None
    try:
        view = running(data_dir)
    except DaemonSilent as silent:
        if not now:
            raise
        owner = latest_owner(data_dir)
        version = owner.version if owner is not None and owner.pid == silent.pid else "unknown"
        view = {"pid": silent.pid, "version": version, "work": None, "queued": None}
    if view is None:
        return None
    try:
        process = os.pidfd_open(view["pid"])
    except ProcessLookupError:
        return view
    try:
        # Asked with the descriptor in hand: it cannot be of a later process with that pid.
        if not _is_daemon(data_dir, view["pid"]):
            what = f"process {view['pid']} is said to serve {data_dir}, but has neither its lock nor its socket"
            raise DaemonError("OWNER_UNCLEAR", what, "`vespera-exec doctor` says who has them")
        busy = [each for each in view["work"] or () if not each.get("kept")]
        if busy and not now:
            titles = ", ".join(f"{each['title'][:60]!r} ({each['task_id'][:8]})" for each in busy[:5])
            raise DaemonError(
                "DAEMON_BUSY", f"it would interrupt {titles}", "wait for them, cancel them, or give --now"
            )
        _end(process, view["pid"], data_dir, kill=now)
    except ProcessLookupError:
        pass  # it went by itself
    finally:
        os.close(process)
    return view


def _is_daemon(data_dir: Path, pid: int) -> bool:
    """By the lock, or where that was removed or changed, by the kernel's word on who listens on its socket."""
    owner = latest_owner(data_dir)
    return (owner is not None and owner.pid == pid and owner.is_alive) or _listener(data_dir) == pid


def _listener(data_dir: Path) -> int | None:
    try:
        _, path = paths.socket_paths(data_dir, os.environ)
    except OSError:
        return None
    return listener(path)


def _asked(data_dir: Path) -> Json:
    with Daemon(data_dir, cwd="/", start=False, patience=_ANSWER_SECONDS) as daemon:
        try:
            return daemon.get("/daemon")
        except DaemonUnavailable:
            return None


def _end(process: int, pid: int, data_dir: Path, *, kill: bool) -> None:
    signal.pidfd_send_signal(process, signal.SIGTERM)
    if kill:
        signal.pidfd_send_signal(process, signal.SIGCONT)  # one that was stopped may yet end in order
    if select.select([process], [], [], _STOP_SECONDS)[0]:
        return
    if kill:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        if select.select([process], [], [], _KILL_SECONDS)[0]:
            return
    hint = f"see {data_dir / paths.DAEMON_LOG}" if kill else "give --now to kill it"
    raise DaemonError("DAEMON_STUCK", f"process {pid} has not ended", hint)
