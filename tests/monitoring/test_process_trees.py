"""What the readers of process trees count, on real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from deadlines import WITHIN

from vespera_exec.monitoring.proc_trees import ProcTrees
from vespera_exec.monitoring.psutil_trees import PsutilTrees
from vespera_exec.monitoring.trees import BORN_WITH_THE_WATCH_SECONDS, ProcessTrees, Tree

if TYPE_CHECKING:
    from pathlib import Path

MEGABYTE = 1024 * 1024
Reader = Callable[[], ProcessTrees]
READERS: list[Reader] = [PsutilTrees]
if sys.platform == "linux":
    READERS.append(ProcTrees)
Watched = Callable[[ProcessTrees, int], Tree]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Each program is a root: what counts is its children. A line on stdin lets it go on.
BURN = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
BURN_WHEN_TOLD = f"sys.stdin.readline(); exec({BURN!r})"
SAY = "def say(word): os.write(1, word.encode() + b'\\n')"
FORKS = f"import os, sys, time\n{SAY}\nif os.fork() == 0:\n    {{child}}\n    os._exit(0)\n{{parent}}"

AFTER = "os.wait(); say('done'); time.sleep(60)"
QUIT = "sys.stdin.readline(); os._exit(0)"


@contextmanager
def root(program: str) -> Generator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    with process:
        try:
            yield process
        finally:
            os.killpg(process.pid, 9)


def line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def said(process: subprocess.Popen[bytes], word: bytes) -> bool:
    return line(process) == word


def go_on(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


@pytest.fixture
def watched() -> Generator[Watched]:
    """A tree under one root, refreshed once; removed at the end."""
    made: list[tuple[ProcessTrees, Tree]] = []

    def watch(trees: ProcessTrees, pid: int) -> Tree:
        tree = Tree(roots=(pid,))
        trees.add(tree)
        made.append((trees, tree))
        trees.refresh([tree])
        return tree

    yield watch
    for trees, tree in made:
        trees.remove(tree)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("reader", READERS)
def test_the_root_itself_is_not_counted(reader: Reader, watched: Watched) -> None:
    trees = reader()
    with root("print('up', flush=True); input()") as process:
        assert said(process, b"up")
        assert trees.measure(watched(trees, process.pid)) is None


@pytest.mark.parametrize("reader", READERS)
def test_memory_of_all_descendants_is_summed(reader: Reader, watched: Watched) -> None:
    hold = "held = b'x' * 30_000_000; say('held'); time.sleep(60)"
    program = FORKS.format(child=f"os.fork(); {hold}", parent="time.sleep(60)")
    trees = reader()
    with root(program) as process:
        assert said(process, b"held")
        assert said(process, b"held")
        footprint = trees.measure(watched(trees, process.pid))
        assert footprint is not None
        assert footprint.processes == 2
        assert footprint.rss_bytes >= 60_000_000
        assert footprint.vms_bytes >= footprint.rss_bytes


@pytest.mark.parametrize("reader", READERS)
def test_a_process_that_came_later_is_found(reader: Reader, watched: Watched) -> None:
    program = "input()\n" + FORKS.format(child="time.sleep(60)", parent="say('up'); input()")
    trees = reader()
    with root(program) as process:
        tree = watched(trees, process.pid)
        assert trees.measure(tree) is None
        go_on(process)
        assert said(process, b"up")
        trees.refresh([tree])
        footprint = trees.measure(tree)
        assert footprint is not None
        assert footprint.processes == 1


@linux
def test_a_root_that_appears_after_its_children_were_seen_gets_them(watched: Watched) -> None:
    trees = ProcTrees()
    with root("print('up', flush=True); input()") as first:
        assert said(first, b"up")
        known = watched(trees, first.pid)
        with root(FORKS.format(child="time.sleep(60)", parent="say('up'); input()")) as second:
            assert said(second, b"up")
            trees.refresh([known])
            tree = watched(trees, second.pid)
            footprint = trees.measure(tree)
            assert footprint is not None
            assert footprint.processes == 1


@linux
def test_a_process_counts_for_the_nearest_root_above_it(watched: Watched) -> None:
    trees = ProcTrees()
    with root(FORKS.format(child="time.sleep(60)", parent="say('up'); input()")) as inner:
        assert said(inner, b"up")
        outer_tree = watched(trees, os.getpid())
        before = trees.measure(outer_tree)
        assert before is not None
        assert before.processes == 2
        inner_tree = watched(trees, inner.pid)
        trees.refresh([outer_tree])
        footprint = trees.measure(inner_tree)
        assert footprint is not None
        assert footprint.processes == 1
        assert trees.measure(outer_tree) is None


@linux
def test_orphans_of_a_subreaper_stay_in_its_tree(watched: Watched) -> None:
    adopt = "import ctypes; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)\n"
    orphan = "os.setsid()\n    if os.fork(): os._exit(0)\n    say('orphan'); time.sleep(60)"
    program = adopt + FORKS.format(child=orphan, parent="os.wait(); say('alone'); time.sleep(60)")
    trees = ProcTrees()
    with root(program) as process:
        assert {line(process), line(process)} == {b"alone", b"orphan"}
        tree = watched(trees, process.pid)
        footprint = trees.measure(tree)
        assert footprint is not None
        assert footprint.processes == 1
        for pid in os.listdir("/proc"):
            if pid.isdigit() and _parent(int(pid)) == process.pid:
                os.kill(int(pid), 9)


def _parent(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[1])
    except OSError:
        return None


@linux
def test_cpu_of_children_that_came_and_went_unseen_is_counted(watched: Watched) -> None:
    burner = f"if os.fork() == 0:\n        exec({BURN!r})\n        os._exit(0)\n    {AFTER}"
    program = FORKS.format(child=f"say('up'); sys.stdin.readline()\n    {burner}", parent="time.sleep(60)")
    trees = ProcTrees()
    with root(program) as process:
        assert said(process, b"up")
        tree = watched(trees, process.pid)
        trees.measure(tree)
        before = tree.cpu_seconds
        go_on(process)
        assert said(process, b"done")
        trees.measure(tree)
        assert 0.25 <= tree.cpu_seconds - before <= 0.6


@linux
def test_a_child_that_is_seen_and_then_waited_for_is_not_counted_twice(watched: Watched) -> None:
    burner = f"if os.fork() == 0:\n        exec({BURN!r})\n        say('burnt'); {QUIT}\n    {AFTER}"
    program = FORKS.format(child=f"say('up'); sys.stdin.readline()\n    {burner}", parent="time.sleep(60)")
    trees = ProcTrees()
    with root(program) as process:
        assert said(process, b"up")
        tree = watched(trees, process.pid)
        go_on(process)
        assert said(process, b"burnt")
        trees.refresh([tree])
        trees.measure(tree)
        seen = tree.cpu_seconds
        assert seen >= 0.25
        go_on(process)
        assert said(process, b"done")
        trees.measure(tree)
        assert tree.cpu_seconds - seen <= 0.1


@linux
def test_a_child_that_its_root_waited_for_is_not_counted_twice(watched: Watched) -> None:
    program = FORKS.format(child=f"say('up'); {BURN_WHEN_TOLD}; say('burnt'); {QUIT}", parent=AFTER)
    trees = ProcTrees()
    with root(program) as process:
        assert said(process, b"up")
        tree = watched(trees, process.pid)
        go_on(process)
        assert said(process, b"burnt")
        trees.measure(tree)
        seen = tree.cpu_seconds
        go_on(process)
        assert said(process, b"done")
        for _ in range(2):
            assert trees.measure(tree) is None
        assert seen >= 0.25
        assert tree.cpu_seconds - seen <= 0.1


@linux
def test_cpu_that_the_root_spent_itself_is_left_out(watched: Watched) -> None:
    program = FORKS.format(child="time.sleep(60)", parent=f"exec({BURN!r}); say('burnt'); input()")
    trees = ProcTrees()
    with root(program) as process:
        assert said(process, b"burnt")
        tree = watched(trees, process.pid)
        assert trees.measure(tree) is not None
        assert tree.cpu_seconds <= 0.05


def _disk_writes_are_counted(folder: Path) -> bool:
    before = _own_written()
    with open(folder / "probe", "wb") as probe:
        probe.write(b"x" * MEGABYTE)
        probe.flush()
        os.fsync(probe.fileno())
    return _own_written() - before >= MEGABYTE


def _own_written() -> int:
    with open("/proc/self/io", "rb") as counters:
        return int(counters.read().split(b"\nwrite_bytes: ")[1].split()[0])


@linux
def test_disk_traffic_of_an_exited_child_stays_in_the_sum(tmp_path: Path, watched: Watched) -> None:
    if not _disk_writes_are_counted(tmp_path):
        pytest.skip("this file system does not count writes per process")
    write = f"f = open({str(tmp_path / 'out')!r}, 'wb'); f.write(b'x' * (4 << 20)); f.flush(); os.fsync(f.fileno())"
    writer = f"if os.fork() == 0:\n        {write}; os._exit(0)\n    {AFTER}"
    program = FORKS.format(child=f"say('up'); sys.stdin.readline()\n    {writer}", parent="time.sleep(60)")
    trees = ProcTrees()
    with root(program) as process:
        assert said(process, b"up")
        tree = watched(trees, process.pid)
        trees.measure(tree)
        assert tree.io_known
        assert tree.written_bytes < MEGABYTE
        go_on(process)
        assert said(process, b"done")
        trees.measure(tree)
        assert 4 * MEGABYTE <= tree.written_bytes < 5 * MEGABYTE


@pytest.mark.parametrize("reader", READERS)
def test_what_an_older_process_used_before_the_watch_is_not_credited(reader: Reader, watched: Watched) -> None:
    program = FORKS.format(child=f"exec({BURN!r}); say('burnt'); time.sleep(60)", parent="time.sleep(60)")
    trees = reader()
    born = time.monotonic()
    with root(program) as process:
        assert said(process, b"burnt")
        threading.Event().wait(max(0.0, born + BORN_WITH_THE_WATCH_SECONDS + 0.7 - time.monotonic()))
        tree = watched(trees, process.pid)
        footprint = trees.measure(tree)
        assert footprint is not None
        assert tree.cpu_seconds <= 0.05
        assert footprint.age_seconds == 0.0


@linux
@pytest.mark.parametrize("name", ["s) R 1 (", "(((", "a b\n) S 4"])
def test_a_hostile_process_name_confuses_nothing(name: str, tmp_path: Path, watched: Watched) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    hostile = tmp_path / name
    hostile.symlink_to(sleep)
    program = FORKS.format(child=f"os.execv({str(hostile)!r}, ['sleep', '60'])", parent="say('up'); input()")
    trees = ProcTrees()
    with root(program) as process:
        assert said(process, b"up")
        footprint = trees.measure(watched(trees, process.pid))
        assert footprint is not None
        assert footprint.processes == 1


@linux
def test_a_bound_on_descriptors_changes_no_figure(watched: Watched) -> None:
    program = FORKS.format(child="os.fork(); os.fork(); say('up'); time.sleep(60)", parent="time.sleep(60)")
    with root(program) as process:
        assert all(said(process, b"up") for _ in range(4))
        before = open_descriptors()
        for bound, expected in ((0, 0), (3, 3), (100, 8)):
            trees = ProcTrees(max_descriptors=bound)
            tree = watched(trees, process.pid)
            footprint = trees.measure(tree)
            assert footprint is not None
            assert footprint.processes == 4
            assert tree.io_known
            assert open_descriptors() - before == expected
            trees.remove(tree)
            assert open_descriptors() == before


@linux
def test_a_tree_that_dies_leaves_no_descriptor_open(watched: Watched) -> None:
    trees = ProcTrees()
    before = open_descriptors()
    with root(FORKS.format(child="say('up'); time.sleep(60)", parent="time.sleep(60)")) as process:
        assert said(process, b"up")
        tree = watched(trees, process.pid)
        assert trees.measure(tree) is not None
    deadline = time.monotonic() + WITHIN
    # Its members are gone only when whoever adopted them has waited for them.
    while open_descriptors() != before and time.monotonic() < deadline:
        trees.refresh([tree])
        trees.measure(tree)
    assert open_descriptors() == before
    assert trees.measure(tree) is None
