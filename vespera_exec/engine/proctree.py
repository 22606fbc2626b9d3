"""Processes that no living shim takes care of: found by what is known of them, and ended."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from vespera_exec.engine import shim

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

starting = threading.Lock()
"""Held while a guardian is started and put into `guardians`."""
guardians: set[int] = set()
"""The children of this process that have a shim below them (or are one), of whatever launcher; its other children in
sessions of their own are orphans that it has adopted."""
_STRAY_SECONDS = 1.0
PROC = "/proc/self/stat"


def become_subreaper() -> bool:
    """Make this process the parent of every orphan below it, so that a killed shim loses none of its tree.

    For the daemon, once, at start. A child that this process starts in a session of its own by other means than a
    launcher would then be taken for such an orphan. False where the system has no such thing.
    """
    return shim.become_subreaper()


def can_see() -> bool:
    """Whether this system shows its processes, without which no tree can be found or stopped."""
    return os.path.exists(PROC)


def sweep(execution_ids: Iterable[str], *, seconds: float = 3.0) -> int:
    """End all processes of these executions, wherever they are, with their shims; how many there were.

    For boot, with the executions of a dead owner. Finds them by the marker in their environment, takes what is
    below them too, never this process. Blocks for at most about `seconds`.
    """
    entries = [entry for execution_id in execution_ids for entry in _entries(execution_id)]
    if not entries:
        return 0
    return shim.end(shim.Marked(entries), seconds=seconds)


def _entries(execution_id: str) -> tuple[bytes, bytes]:
    """In the environment of its work, and of its shims with their guardians."""
    name = os.fsencode(execution_id)
    return shim.MARKER + name, shim.SHIM_MARKER + name


def _known_guardians() -> set[int]:
    """Among them every guardian in a table that was made before, also one that is just being started."""
    with starting:
        return set(guardians)


class Orphans(shim.Tree):
    """What a killed shim or guardian has left, by everything that is known of it."""

    def __init__(self, execution_id: str, pid: int, start_time: int, *, guardian: int, adopts: bool) -> None:
        """`pid` and `start_time` are of the work, 0 where it is not known to have started."""
        super().__init__()
        self.status: int | None = None
        """How the work ended, where this process could see it."""
        self._pid = pid
        self._start = start_time
        self._entries = _entries(execution_id)
        self._guardian = guardian
        self._adopts = adopts

    def members(self, seen: Mapping[int, shim.Row]) -> list[int]:
        others = _known_guardians() - {self._guardian}
        safe = {*others, *shim.descendants(seen, others)}
        roots = dict.fromkeys((*self._known(seen), *shim.marked(self._entries), *self._adopted(seen)))
        reached = [pid for pid in roots if pid in seen and pid not in safe]
        return reached + shim.descendants(seen, reached, avoid=(os.getpid(), *safe))

    def _known(self, seen: Mapping[int, shim.Row]) -> list[int]:
        """The work and what stayed in its session. While a member lives its number is given to nobody else."""
        leader = seen.get(self._pid)
        if not self._pid or (leader is not None and leader[3] != self._start):
            return []
        return [pid for pid, row in seen.items() if row[2] == self._pid]

    def _adopted(self, seen: Mapping[int, shim.Row]) -> list[int]:
        if not self._adopts:
            return []
        known = _known_guardians()
        me, session = os.getpid(), os.getsid(0)
        return [pid for pid, row in seen.items() if row[0] == me and row[2] != session and pid not in known]

    def end(self, seconds: float) -> None:
        """Kill all of it, then reap what this process has adopted."""
        deadline = time.monotonic() + seconds
        while True:
            shim.end(self, seconds=max(0.0, deadline - time.monotonic()))
            adopted = self._adopted(shim.table())
            for pid in adopted:
                self._reap(pid)
            if not adopted or time.monotonic() > deadline:
                return

    def _reap(self, pid: int) -> None:
        try:
            reaped, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return
        if reaped and reaped == self._pid:
            self.status = os.waitstatus_to_exitcode(status)


class Strays:
    """Sweeps for executions that end at the same time with one look at all processes. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: set[str] = set()
        self._found: set[str] = set()

    def end(self, execution_id: str) -> bool:
        """Whether there was anything that still carried the marker of this execution. Blocks while it looks."""
        self._wanted.add(execution_id)
        with self._lock:
            if execution_id in self._wanted:
                wanted, self._wanted = self._wanted, set()
                self._look(wanted)
            found = execution_id in self._found
            self._found.discard(execution_id)
            return found

    def _look(self, wanted: set[str]) -> None:
        entries = {execution_id: shim.MARKER + os.fsencode(execution_id) for execution_id in wanted}
        if not any(True for _ in shim.marked(entries.values())):
            return
        for execution_id, entry in entries.items():
            if shim.end(shim.Marked((entry,)), seconds=_STRAY_SECONDS):
                self._found.add(execution_id)


strays = Strays()
