"""Trees of processes read from /proc through descriptors that stay open (Linux)."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vespera_exec.monitoring.trees import BORN_WITH_THE_WATCH_SECONDS, Footprint, Tree

if TYPE_CHECKING:
    from collections.abc import Iterable

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_FORGET_EVERY = 60


class _Stat(NamedTuple):
    zombie: bool
    parent: int
    own_ticks: int
    reaped_ticks: int
    """CPU of the children that it has waited for, and of theirs."""
    start_ticks: int
    """Since boot."""
    vms_bytes: int
    rss_bytes: int


class _Io(NamedTuple):
    read: int
    written: int


_GONE = (ProcessLookupError, FileNotFoundError)
_NO_IO = _Io(0, 0)
_NO_STAT = _Stat(zombie=False, parent=0, own_ticks=0, reaped_ticks=0, start_ticks=0, vms_bytes=0, rss_bytes=0)
_IDLE_LOOKS = 5


class _Budget:
    """How many more files may stay open."""

    __slots__ = ("free",)

    def __init__(self, free: int) -> None:
        self.free = free


class _Reader:
    """One process through its /proc files; an open one stays bound to it even when its pid is used again."""

    __slots__ = ("_budget", "_io", "_line", "_seen", "_stat", "_unchanged", "_used", "pid")

    def __init__(self, pid: int, budget: _Budget) -> None:
        self.pid = pid
        self._budget = budget
        self._stat = -1
        self._io = -1
        self._line = b""
        self._seen = _NO_STAT
        self._used: _Io | None = None
        self._unchanged = 0

    def look(self) -> tuple[_Stat, _Io | None]:
        """What it has used, and its I/O, None where this user may not see it. Keeps the files open.

        Raises:
            ProcessLookupError, FileNotFoundError: it is gone.
        """
        if self._stat >= 0:
            line = os.pread(self._stat, 1024, 0)
        else:
            self._stat, line = self._read("stat")
        if line == self._line and self._unchanged < _IDLE_LOOKS:
            # It has not run since the last look, so there is nothing new to parse, nor I/O worth a system call.
            self._unchanged += 1
            return self._seen, self._used
        self._unchanged = 0
        self._line, self._seen = line, _parse_stat(line)
        try:
            if self._io >= 0:
                text = os.pread(self._io, 512, 0)
            else:
                self._io, text = self._read("io")
            self._used = _parse_io(text)
        except PermissionError:
            self._used = None
        return self._seen, self._used

    def glance(self) -> _Stat:
        """Its stat alone, without keeping anything open. Raises like `look`."""
        descriptor = os.open(f"/proc/{self.pid}/stat", os.O_RDONLY)
        try:
            return _parse_stat(os.pread(descriptor, 1024, 0))
        finally:
            os.close(descriptor)

    def close(self) -> None:
        for descriptor in (self._stat, self._io):
            if descriptor >= 0:
                os.close(descriptor)
                self._budget.free += 1
        self._stat = self._io = -1

    def _read(self, name: str) -> tuple[int, bytes]:
        """The file's descriptor, or -1 where it may not stay open, and its text."""
        descriptor = os.open(f"/proc/{self.pid}/{name}", os.O_RDONLY)
        keep = self._budget.free > 0
        try:
            text = os.pread(descriptor, 1024, 0)
        except OSError:
            keep = False
            raise
        finally:
            if not keep:
                os.close(descriptor)
        if not keep:
            return -1, text
        self._budget.free -= 1
        return descriptor, text


@dataclass(slots=True, eq=False)
class _Root:
    """A root, its living descendants (parents before children), and the sums of the last look at them."""

    tree: Tree
    reader: _Reader
    start_ticks: int
    members: dict[int, _Reader] = field(default_factory=dict[int, _Reader])
    oldest_ticks: int | None = None
    alive: bool = True
    unread: bool = True
    """What it has waited for may have changed since it was read."""
    reaped_ticks: int = 0
    reaped_io: _Io = _NO_IO
    ticks: int = 0
    read: int = 0
    written: int = 0


@dataclass(slots=True)
class _Sums:
    ticks: int
    read: int
    written: int
    processes: int = 0
    rss: int = 0
    vms: int = 0
    io_known: bool = False
    lost: bool = False
    """A member was gone: its parent may hold its counters by now, so the sums are not of one moment."""


class ProcTrees:
    """`ProcessTrees` for Linux.

    A sum over the living plus what each of them has waited for never loses an exited child, so short-lived
    processes count although no look ever met them. At most `max_descriptors` files stay open; processes
    beyond that are opened at each look.
    """

    def __init__(self, *, max_descriptors: int | None = None) -> None:
        if max_descriptors is None:
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            max_descriptors = 1024 if soft == resource.RLIM_INFINITY else min(1024, soft // 4)
        self._budget = _Budget(max_descriptors)
        self._trees: dict[Tree, dict[int, _Root]] = {}
        self._dead_roots: dict[Tree, set[int]] = {}
        self._since_ticks: dict[Tree, int] = {}
        self._owners: dict[int, _Root] = {}
        # Everybody else's processes, with their start: never read again, unless a root appears that is older.
        self._strangers: dict[int, int] = {}
        self._unplaced: set[int] = set()
        self._refreshes = 0

    def add(self, tree: Tree) -> None:
        self._trees[tree] = {}
        self._dead_roots[tree] = set()
        self._since_ticks[tree] = _now_ticks() - int(BORN_WITH_THE_WATCH_SECONDS * _TICKS)

    def remove(self, tree: Tree) -> None:
        for root in list(self._trees.pop(tree, {}).values()):
            for pid in list(root.members):
                self._drop_member(root, pid)
            self._drop_root(root)
        self._dead_roots.pop(tree, None)
        self._since_ticks.pop(tree, None)

    def refresh(self, trees: Iterable[Tree]) -> None:
        self._refreshes += 1
        if self._refreshes % _FORGET_EVERY == 0:
            # A pid that was used again between two looks would stay a stranger for ever; so below, where nobody looks.
            self._strangers.clear()
        for tree in trees:
            for pid in tree.roots:
                if pid not in self._trees[tree] and pid not in self._dead_roots[tree]:
                    self._add_root(tree, pid)
        if not self._owners:
            self._strangers.clear()
            return
        listing = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        for pid in self._strangers.keys() - listing:
            del self._strangers[pid]
        self._place(listing - self._strangers.keys() - self._owners.keys(), listing)

    def measure(self, tree: Tree) -> Footprint | None:
        processes = rss = vms = 0
        oldest: int | None = None
        for root in list(self._trees[tree].values()):
            sums = self._look(root)
            for _ in range(3):
                if not sums.lost:
                    break
                sums = self._look(root)
            # A difference below zero is an exit that nobody waited for.
            tree.cpu_seconds += max(0, sums.ticks - root.ticks) / _TICKS
            tree.read_bytes += max(0, sums.read - root.read)
            tree.written_bytes += max(0, sums.written - root.written)
            tree.io_known |= sums.io_known
            root.ticks, root.read, root.written = sums.ticks, sums.read, sums.written
            processes += sums.processes
            rss += sums.rss
            vms += sums.vms
            if root.oldest_ticks is not None and (oldest is None or root.oldest_ticks < oldest):
                oldest = root.oldest_ticks
            if not root.alive and not root.members:
                self._drop_root(root)
        if not processes:
            return None
        age = 0.0 if oldest is None else max(0, _now_ticks() - oldest) / _TICKS
        return Footprint(processes=processes, rss_bytes=rss, vms_bytes=vms, age_seconds=age)

    def _add_root(self, tree: Tree, pid: int) -> None:
        reader = _Reader(pid, _Budget(0))
        try:
            seen = reader.glance()
        except _GONE:
            self._dead_roots[tree].add(pid)
            return
        root = _Root(tree=tree, reader=reader, start_ticks=seen.start_ticks)
        outer = self._owners.get(pid)
        if outer is not None and pid in outer.members:
            for member in list(outer.members):
                self._drop_member(outer, member)
        self._owners[pid] = self._trees[tree][pid] = root
        if seen.start_ticks < self._since_ticks[tree]:
            root.ticks = seen.reaped_ticks
        if not seen.reaped_ticks:
            # It has waited for nobody yet, so what it has read and written is its own.
            try:
                root.read, root.written = reader.look()[1] or _NO_IO
            except _GONE:
                root.alive = False
        for stranger in [p for p, start in self._strangers.items() if start >= seen.start_ticks]:
            del self._strangers[stranger]

    def _place(self, new: set[int], listing: set[int]) -> None:
        """Find out whose the new processes are."""
        pending: dict[int, tuple[_Reader, _Stat]] = {}
        for pid in new:
            reader = _Reader(pid, self._budget)
            try:
                pending[pid] = reader, reader.glance()
            except _GONE:
                continue
        placed = True
        while placed:
            placed = False
            for pid, (reader, seen) in list(pending.items()):
                root = self._owners.get(seen.parent)
                if root is not None:
                    self._adopt(root, reader, seen)
                elif seen.parent != 0 and seen.parent not in self._strangers and pid not in self._unplaced:
                    continue
                else:
                    self._strangers[pid] = seen.start_ticks
                del pending[pid]
                placed = True
        # The parent of these exited while we read: next time they show whose they have become. Those whose
        # parent we may never see (hidepid) are strangers by then.
        self._unplaced = pending.keys() & listing

    def _adopt(self, root: _Root, reader: _Reader, seen: _Stat) -> None:
        root.members[reader.pid] = reader
        self._owners[reader.pid] = root
        if seen.start_ticks >= self._since_ticks[root.tree]:
            if root.oldest_ticks is None or seen.start_ticks < root.oldest_ticks:
                root.oldest_ticks = seen.start_ticks
            return
        root.ticks += seen.own_ticks + seen.reaped_ticks
        try:
            _, used = reader.look()
        except _GONE:
            return
        if used is not None:
            root.read += used.read
            root.written += used.written

    def _look(self, root: _Root) -> _Sums:
        if root.unread and root.alive:
            # Before its members: a child that exits in between is then missed, not counted twice.
            self._read_root(root)
        sums = _Sums(root.reaped_ticks, root.reaped_io.read, root.reaped_io.written)
        for pid, reader in list(root.members.items()):
            try:
                seen, used = reader.look()
            except _GONE:
                self._drop_member(root, pid)
                sums.lost = root.unread = True
                continue
            sums.ticks += seen.own_ticks + seen.reaped_ticks
            if used is not None:
                sums.io_known = True
                sums.read += used.read
                sums.written += used.written
            if not seen.zombie:
                sums.processes += 1
                sums.rss += seen.rss_bytes
                sums.vms += seen.vms_bytes
        if not root.members:
            # Whoever lives here next may come and go between two looks.
            root.unread = True
        return sums

    def _read_root(self, root: _Root) -> None:
        try:
            seen, used = root.reader.look()
            root.reaped_ticks, root.reaped_io = seen.reaped_ticks, used or _NO_IO
        except _GONE:
            root.alive = False
        root.unread = False

    def _drop_member(self, root: _Root, pid: int) -> None:
        reader = root.members.pop(pid)
        self._owners.pop(pid, None)
        reader.close()

    def _drop_root(self, root: _Root) -> None:
        pid = root.reader.pid
        root.reader.close()
        if self._owners.get(pid) is root:
            del self._owners[pid]
        if root.tree in self._trees:
            self._trees[root.tree].pop(pid, None)
            self._dead_roots[root.tree].add(pid)


def _now_ticks() -> int:
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS)


def _parse_stat(line: bytes) -> _Stat:
    # The name in parentheses may hold anything, also parentheses; it ends at the last one.
    end = line.rfind(b")")
    if end < 0:
        raise ProcessLookupError
    fields = line[end + 2 :].split(b" ", 22)
    return _Stat(
        zombie=fields[0] in (b"Z", b"X"),
        parent=int(fields[1]),
        own_ticks=int(fields[11]) + int(fields[12]),
        reaped_ticks=int(fields[13]) + int(fields[14]),
        start_ticks=int(fields[19]),
        vms_bytes=int(fields[20]),
        rss_bytes=int(fields[21]) * _PAGE,
    )


def _parse_io(text: bytes) -> _Io:
    if not text:
        raise ProcessLookupError
    read = text.index(b"\nread_bytes: ") + 13
    read_end = text.index(b"\n", read)
    written = read_end + 14
    return _Io(int(text[read:read_end]), int(text[written : text.index(b"\n", written)]))
