"""The daemon as a process: starting, asking, stopping it."""

from __future__ import annotations

import json
import os
import select
import signal
from typing import TYPE_CHECKING

from vespera_exec import paths
from vespera_exec.cli.client import Daemon, DaemonError
from vespera_exec.errors import DaemonUnavailable

if TYPE_CHECKING:
    from pathlib import Path

    from vespera_exec.model.events import Json

_STOP_SECONDS = 15.0


def running(data_dir: Path) -> Json:
    """What the daemon says of itself (`GET /daemon`); None when none runs. Starts nothing."""
    with Daemon(data_dir, cwd="/", start=False) as daemon:
        try:
            return daemon.get("/daemon")
        except DaemonUnavailable:
            return None


def stop(data_dir: Path, *, force: bool = False) -> Json:
    """Ends the daemon and waits until it is gone; what it said of itself before, or None when none ran.

    Raises:
        DaemonError: it has work and `force` is not set, it is not the directory's owner, or it does not end.
    """
    with Daemon(data_dir, cwd="/", start=False) as daemon:
        try:
            view = daemon.get("/daemon")
            process = os.pidfd_open(view["pid"])
        except (DaemonUnavailable, ProcessLookupError):
            return None
        try:
            # Asked again with the descriptor in hand: who answers now cannot be an earlier holder of the pid.
            if daemon.get("/daemon")["pid"] != view["pid"] or _lock_holder(data_dir) != view["pid"]:
                raise DaemonError(
                    "OWNER_UNCLEAR",
                    f"process {view['pid']} answers for {data_dir} but does not hold its lock",
                    "try again",
                )
            if view["running"] and not force:
                raise DaemonError(
                    "DAEMON_BUSY",
                    f"{view['running']} executions are running; they would be interrupted",
                    "wait for them, cancel them, or give --force",
                )
            signal.pidfd_send_signal(process, signal.SIGTERM)
            ended, _, _ = select.select([process], [], [], _STOP_SECONDS)
            if not ended:
                raise DaemonError(
                    "DAEMON_STUCK", f"process {view['pid']} has not ended", f"see {data_dir / paths.DAEMON_LOG}"
                )
        except ProcessLookupError:
            pass  # it went by itself
        finally:
            os.close(process)
    return view


def _lock_holder(data_dir: Path) -> int | None:
    try:
        return json.loads((data_dir / paths.LOCK).read_bytes())["pid"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
