"""A tree of processes, what it has used and what it holds, and what a reader of trees can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

MEGABYTE = 1024 * 1024

BORN_WITH_THE_WATCH_SECONDS = 1.0
"""A process at most this much older than its tree is counted from its birth, an older one from first sight."""


@dataclass(slots=True, eq=False)
class Tree:
    """The descendants of `roots`, without the roots themselves, and what they have used so far.

    A process counts for the nearest root above it. The totals only grow: what a process used stays in
    them when it exits, and what it used between the last look and its exit is known where its parent
    (or the root) waited for it. `roots` may be changed at any time.
    """

    roots: tuple[int, ...] = ()
    cpu_seconds: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0
    io_known: bool = False
    """False while no member's I/O counters could be read."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a tree holds at this moment. `age_seconds` is that of its oldest member counted from birth."""

    processes: int
    rss_bytes: int
    vms_bytes: int
    age_seconds: float


class ProcessTrees(Protocol):
    """Reads trees. Not for use from several threads at once."""

    def add(self, tree: Tree) -> None: ...

    def refresh(self, trees: Iterable[Tree]) -> None:
        """Look for processes that came since the last time; one pass over the process table for all."""
        ...

    def measure(self, tree: Tree) -> Footprint | None:
        """Bring the totals of `tree` up to date. None when nothing in it lives."""
        ...

    def remove(self, tree: Tree) -> None: ...
