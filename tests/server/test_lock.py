"""One owner per data directory, known by name, for exactly as long as it lives."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from deadlines import WITHIN

from vespera_exec import __version__, paths
from vespera_exec.errors import DataDirectoryInUse, StoreUnavailable
from vespera_exec.store.lock import OwnerLock, holds, last_owner, read_owner

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HOLD = """
import sys
from pathlib import Path
from vespera_exec.store.lock import OwnerLock
with OwnerLock.acquire(Path(sys.argv[1]), purpose="backup"):
    print("held", flush=True)
    sys.stdin.read()
"""

# The parent holds the lock and dies; the child that it forked lives until its stdin ends.
FORK = """
import os, sys
from pathlib import Path
from vespera_exec.store.lock import OwnerLock
lock = OwnerLock.acquire(Path(sys.argv[1]), purpose="library")
if os.fork() == 0:
    print("forked", flush=True)
    sys.stdin.read()
    os._exit(0)
os.waitpid(-1, 0)
"""


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def start(script: str, data_dir: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", script, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() in ("held", "forked")
    return process


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=WITHIN)


def test_a_second_owner_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    try:
        with pytest.raises(DataDirectoryInUse, match=rf"process {holder.pid} \(backup, since ") as refusal:
            OwnerLock.acquire(tmp_path, purpose="daemon")
        assert refusal.value.hint == "wait until the backup has ended"
    finally:
        finish(holder)


def test_the_owner_can_be_read_by_anybody_and_is_nobody_after_release(tmp_path: Path) -> None:
    assert read_owner(tmp_path / "missing") is None
    with OwnerLock.acquire(tmp_path, purpose="in-process") as lock:
        owner = read_owner(tmp_path)
        assert owner == lock.owner
        assert owner is not None
        assert (owner.pid, owner.purpose, owner.version) == (os.getpid(), "in-process", __version__)
        assert owner.start_ticks is not None
        assert owner.start_ticks > 0
        assert owner.boot_id
    assert (tmp_path / paths.LOCK).exists()
    assert read_owner(tmp_path) is None


def test_what_a_killed_owner_left_is_taken_over(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    holder.send_signal(signal.SIGKILL)
    finish(holder)
    assert f'"pid": {holder.pid}' in (tmp_path / paths.LOCK).read_text()
    with OwnerLock.acquire(tmp_path, purpose="daemon"):
        owner = read_owner(tmp_path)
    assert owner is not None
    assert owner.pid == os.getpid()


def test_a_successor_waits_for_an_owner_that_is_leaving(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    leaving = threading.Timer(0.2, finish, [holder])
    leaving.start()
    with OwnerLock.acquire(tmp_path, purpose="daemon", wait_seconds=WITHIN) as lock:
        assert lock.owner.pid == os.getpid()
    leaving.join()


def test_looking_never_costs_an_owner_its_lock(tmp_path: Path) -> None:
    OwnerLock.acquire(tmp_path, purpose="doctor").release()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            read_owner(tmp_path)

    onlooker = threading.Thread(target=look)
    onlooker.start()
    try:
        for _ in range(200):
            OwnerLock.acquire(tmp_path, purpose="doctor").release()
    finally:
        done.set()
        onlooker.join()


def test_a_forked_child_does_not_keep_the_lock_of_a_dead_parent(tmp_path: Path) -> None:
    parent = start(FORK, tmp_path)
    assert read_owner(tmp_path) is not None
    parent.send_signal(signal.SIGKILL)
    parent.wait(timeout=WITHIN)
    try:
        with OwnerLock.acquire(tmp_path, purpose="daemon") as lock:
            assert lock.owner.pid == os.getpid()
    finally:
        finish(parent)  # closing stdin ends the child


def test_a_started_program_does_not_inherit_the_lock(tmp_path: Path) -> None:
    lock = OwnerLock.acquire(tmp_path, purpose="daemon")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False, text=True)
    lock.release()
    try:
        OwnerLock.acquire(tmp_path, purpose="daemon").release()
    finally:
        child.communicate("\n", timeout=WITHIN)


def test_releasing_twice_does_not_close_somebody_elses_descriptor(tmp_path: Path) -> None:
    lock = OwnerLock.acquire(tmp_path, purpose="daemon")
    lock.release()
    reader, writer = os.pipe()
    lock.release()
    assert os.write(writer, b"x") == 1
    os.close(reader)
    os.close(writer)


def test_a_new_data_directory_is_private_and_ignored_by_git(tmp_path: Path) -> None:
    data_dir = tmp_path / "repository" / ".vespera"
    with OwnerLock.acquire(data_dir, purpose="daemon"):
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((data_dir / paths.LOCK).stat().st_mode) == 0o600
        assert (data_dir / ".gitignore").read_text() == "*\n"


def test_a_folder_that_was_there_gets_no_gitignore(tmp_path: Path) -> None:
    with OwnerLock.acquire(tmp_path, purpose="daemon"):
        assert not (tmp_path / ".gitignore").exists()


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_place_of_the_data_directory_is_said_so(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable) as refusal:
        OwnerLock.acquire(tmp_path / "file" / below, purpose="daemon")
    assert "VESPERA_DATA_DIR" in refusal.value.hint


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / paths.LOCK).symlink_to(elsewhere)
    with pytest.raises(StoreUnavailable):
        OwnerLock.acquire(data_dir, purpose="daemon")
    assert elsewhere.read_text() == "precious"


@pytest.mark.parametrize(("kind", "make"), [("fifo", os.mkfifo), ("folder", os.mkdir), ("link", dangling)])
def test_what_is_no_lock_file_is_named_and_keeps_nobody_waiting(
    tmp_path: Path, kind: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / paths.LOCK)
    for look in (read_owner, last_owner):
        with pytest.raises(StoreUnavailable, match=f"is a {kind}, not a lock file"):
            look(tmp_path)
    with pytest.raises(StoreUnavailable, match=f"is a {kind}, not a lock file"):
        OwnerLock.acquire(tmp_path, purpose="daemon")


def test_a_lock_that_was_removed_or_replaced_is_no_longer_held(tmp_path: Path) -> None:
    with OwnerLock.acquire(tmp_path, purpose="library"):
        assert holds(tmp_path)
        (tmp_path / paths.LOCK).unlink()
        assert not holds(tmp_path)
        start(HOLD, tmp_path).communicate(timeout=WITHIN)
        assert not holds(tmp_path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    data_dir = tmp_path / "theirs"
    data_dir.mkdir()
    os.chown(data_dir, 12345, -1)
    with pytest.raises(StoreUnavailable, match="another user"):
        OwnerLock.acquire(data_dir, purpose="daemon")


def test_a_half_written_row_names_nobody_but_still_refuses(tmp_path: Path) -> None:
    with OwnerLock.acquire(tmp_path, purpose="daemon"):
        (tmp_path / paths.LOCK).write_text('{"pid": ')
        with pytest.raises(DataDirectoryInUse, match="another process"):
            OwnerLock.acquire(tmp_path, purpose="daemon")


def test_an_owner_is_alive_until_it_ends_even_where_nobody_has_reaped_it(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    owner = read_owner(tmp_path)
    assert owner is not None
    assert owner == last_owner(tmp_path)
    assert owner.id.startswith(f"backup:{holder.pid}:")
    assert owner.is_alive
    assert not replace(owner, start_ticks=1).is_alive  # a later process with that pid
    assert holder.stdin is not None
    holder.stdin.close()
    assert os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT) is not None
    assert not owner.is_alive
    assert last_owner(tmp_path) == owner
    assert read_owner(tmp_path) is None
    holder.wait(WITHIN)
    assert holder.stdout is not None
    holder.stdout.close()
