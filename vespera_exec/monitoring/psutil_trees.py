"""Trees of processes read with psutil, for systems without /proc."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import psutil

from vespera_exec.monitoring.trees import BORN_WITH_THE_WATCH_SECONDS, Footprint, Tree

if TYPE_CHECKING:
    from collections.abc import Iterable

_UNREADABLE = (psutil.Error, OSError, AttributeError)  # AttributeError: a system without io_counters


class Memory(NamedTuple):
    rss_bytes: int
    vms_bytes: int


class Io(NamedTuple):
    read_bytes: int
    written_bytes: int


def read_cpu_seconds(process: psutil.Process) -> float | None:
    """CPU seconds since its start, user and system. None where it cannot be read; so for the other two."""
    try:
        times = process.cpu_times()
    except _UNREADABLE:
        return None
    return times.user + times.system


def read_memory(process: psutil.Process) -> Memory | None:
    try:
        info = process.memory_info()
    except _UNREADABLE:
        return None
    return Memory(info.rss, info.vms)


def read_io(process: psutil.Process) -> Io | None:
    """Bytes that went to and came from the disk since its start."""
    try:
        counters = process.io_counters()
    except _UNREADABLE:
        return None
    return Io(counters.read_bytes, counters.write_bytes)


@dataclass(slots=True)
class _Member:
    process: psutil.Process
    born: float
    young: bool
    cpu_seconds: float
    io: Io | None


@dataclass(slots=True)
class _State:
    since: float
    members: dict[int, _Member] = field(default_factory=dict[int, _Member])


class PsutilTrees:
    """`ProcessTrees` by psutil. What a process used after the last look at it is lost when it exits."""

    def __init__(self) -> None:
        self._trees: dict[Tree, _State] = {}

    def add(self, tree: Tree) -> None:
        self._trees[tree] = _State(since=time.time() - BORN_WITH_THE_WATCH_SECONDS)

    def remove(self, tree: Tree) -> None:
        self._trees.pop(tree, None)

    def refresh(self, trees: Iterable[Tree]) -> None:
        owners = {pid: tree for tree in trees for pid in tree.roots}
        if not owners:
            return
        processes = {process.pid: process for process in psutil.process_iter()}
        parents: dict[int, int] = {}
        for pid, process in processes.items():
            try:
                parents[pid] = process.ppid()
            except _UNREADABLE:
                continue
        for pid in parents:
            tree = _owner(pid, parents, owners)
            if tree is not None and pid not in self._trees[tree].members:
                self._adopt(self._trees[tree], processes[pid])

    def measure(self, tree: Tree) -> Footprint | None:
        state = self._trees[tree]
        count = rss = vms = 0
        for pid, member in list(state.members.items()):
            memory = read_memory(member.process) if _lives(member.process) else None
            if memory is None:
                del state.members[pid]
                continue
            count += 1
            rss += memory.rss_bytes
            vms += memory.vms_bytes
            _count(tree, member)
        if not count:
            return None
        born = [member.born for member in state.members.values() if member.young]
        age = max(0.0, time.time() - min(born)) if born else 0.0
        return Footprint(processes=count, rss_bytes=rss, vms_bytes=vms, age_seconds=age)

    def _adopt(self, state: _State, process: psutil.Process) -> None:
        try:
            born = process.create_time()
        except _UNREADABLE:
            return
        young = born >= state.since
        state.members[process.pid] = _Member(
            process=process,
            born=born,
            young=young,
            cpu_seconds=0.0 if young else read_cpu_seconds(process) or 0.0,
            io=Io(0, 0) if young else read_io(process),
        )


def _owner(pid: int, parents: dict[int, int], owners: dict[int, Tree]) -> Tree | None:
    """The tree of the nearest root above `pid`; None also for a root."""
    if pid in owners:
        return None
    above = parents.get(pid)
    for _ in range(len(parents)):
        if above is None or above == parents.get(above):
            return None
        if above in owners:
            return owners[above]
        above = parents.get(above)
    return None


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except _UNREADABLE:
        return False


def _count(tree: Tree, member: _Member) -> None:
    cpu = read_cpu_seconds(member.process)
    if cpu is not None:
        tree.cpu_seconds += max(0.0, cpu - member.cpu_seconds)
        member.cpu_seconds = cpu
    used = read_io(member.process)
    if used is None:
        return
    tree.io_known = True
    if member.io is not None:
        tree.read_bytes += max(0, used.read_bytes - member.io.read_bytes)
        tree.written_bytes += max(0, used.written_bytes - member.io.written_bytes)
    member.io = used
