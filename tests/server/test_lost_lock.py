"""A daemon whose lock was removed, or that another owner has replaced, makes way: no two of them, and nobody stuck."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemon_place import GONE_WITHIN, Place, call, is_alive, run
from deadlines import WITHIN
from echo_place import eventually

from vespera_exec import paths
from vespera_exec.app import doctor
from vespera_exec.errors import DataDirectoryInUse
from vespera_exec.store.lock import OwnerLock

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from vespera_exec.app.doctor import Check

LIBRARY = """
import anyio, sys
from vespera_exec import Vespera
async def main():
    async with Vespera.open(sys.argv[1]):
        pass
anyio.run(main)
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        place.set(idle_exit_seconds=0)
        yield place


def stopped(daemon: subprocess.Popen[str]) -> None:
    """It looks at nothing for a while, its lock included."""
    daemon.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, daemon.pid, os.WSTOPPED | os.WNOWAIT)


def said(daemon: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and last line."""
    _, told = daemon.communicate(timeout=WITHIN)
    assert "Traceback" not in told
    return daemon.returncode, told.splitlines()[-1]


def lock(place: Place) -> Check:
    (check,) = [each for each in doctor.surroundings(place.data_dir, place.environ) if each.name == "lock"]
    return check


def test_a_second_daemon_touches_nothing_where_the_first_has_lost_its_lock_file(place: Place) -> None:
    first = place.start()
    with place.client() as client:
        task_id = run(client, place.work())["task_id"]
        pids = place.work().pids()
        stopped(first)
        (place.data_dir / paths.LOCK).unlink()
        code, line = said(place.spawn())
        assert (code, "DATA_DIRECTORY_IN_USE" in line) == (os.EX_TEMPFAIL, True)
        assert f"process {first.pid}" in line
        assert not (place.data_dir / paths.LOCK).exists()
        assert all(is_alive(pid) for pid in pids)

        first.send_signal(signal.SIGCONT)
        code, line = said(first)
        assert (code, f"{paths.LOCK} was removed" in line) == (1, True)
        assert eventually(lambda: not any(is_alive(pid) for pid in pids), within=GONE_WITHIN)
        error = call(client, "get_task_result", task_id=task_id)["error"]
        assert error["code"] == "INTERRUPTED"
        assert place.served_by()[-1] != first.pid


def test_a_program_does_not_open_what_a_daemon_without_a_lock_serves(place: Place) -> None:
    first = place.start()
    stopped(first)
    (place.data_dir / paths.LOCK).unlink()
    program = place.spawn([sys.executable, "-P", "-c", LIBRARY, str(place.data_dir)])
    _, told = program.communicate(timeout=WITHIN)
    assert (program.returncode, DataDirectoryInUse.__name__ in told.splitlines()[-1]) == (1, True)
    assert f"process {first.pid}" in told


def test_a_daemon_that_another_owner_has_replaced_ends_itself_and_its_work(place: Place) -> None:
    first = place.start()
    with place.client() as client:
        run(client, place.work())
        pids = place.work().pids()
        with closing(sqlite3.connect(place.data_dir / paths.DATABASE)) as database, database:
            row = "('daemon:1:other', 1, 'daemon', '', '')"
            database.execute(f"INSERT INTO owners (owner, pid, purpose, version, since) VALUES {row}")
        client.request("tools/call", name="create_task", arguments={"title": "one more"})
        code, line = said(first)
        assert (code, "taken over by another owner" in line) == (1, True)
        assert eventually(lambda: not any(is_alive(pid) for pid in pids), within=GONE_WITHIN)


def test_doctor_tells_a_daemon_from_the_lock_that_it_has_lost(place: Place) -> None:
    first = place.start()
    assert lock(place).level == "ok"
    stopped(first)
    (place.data_dir / paths.LOCK).unlink()
    seen = lock(place)
    assert (seen.level, f"process {first.pid} serves, but" in seen.what) == ("error", True)
    assert f"{paths.LOCK} is missing" in seen.what
    assert "daemon stop --now" in seen.hint
    (place.data_dir / paths.LOCK).touch()
    assert "nobody holds the lock" in lock(place).what


def test_a_daemon_that_waits_for_the_lock_goes_as_soon_as_its_holder_serves(place: Place) -> None:
    serving, _ = paths.socket_paths(place.data_dir, place.environ)
    with OwnerLock.acquire(place.data_dir, purpose="daemon"), socket.socket(socket.AF_UNIX) as door:
        loser = place.spawn()
        assert eventually(lambda: looks_at(loser.pid, place.data_dir / paths.LOCK))
        door.bind(str(serving))
        door.listen()
        code, line = said(loser)
    assert (code, "DATA_DIRECTORY_IN_USE" in line) == (os.EX_TEMPFAIL, True)
    assert f"process {os.getpid()}, which serves it" in line  # and not, five seconds later, which holds the lock


def looks_at(pid: int, file: Path) -> bool:
    """The process has it open."""
    with suppress(FileNotFoundError):
        return any(each.readlink() == file for each in Path(f"/proc/{pid}/fd").iterdir())
    return False
