"""Whoever needs a daemon gets one, the same one, and a reason when there is none."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from deadlines import WITHIN
from echo_place import Place, eventually

from vespera_exec import paths
from vespera_exec.errors import DaemonUnavailable, StoreUnavailable
from vespera_exec.server.launch import accepts, daemon_command, daemon_environment, ensure_daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STARTER = """
import os, sys
from pathlib import Path
from vespera_exec.server.launch import ensure_daemon
sys.stdin.readline()
ensure_daemon(Path(sys.argv[1]), os.environ, command=sys.argv[2:])
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path / "data") as place:
        yield place


@pytest.mark.promise("many_clients")
def test_many_starters_at_once_end_with_exactly_one_daemon(place: Place) -> None:
    argv = [sys.executable, "-P", "-c", STARTER, str(place.data_dir), *place.command]
    starters = [subprocess.Popen(argv, stdin=subprocess.PIPE, env=place.environ) for _ in range(6)]
    for starter in starters:
        assert starter.stdin is not None
        starter.stdin.write(b"\n")
        starter.stdin.flush()
    for starter in starters:
        starter.communicate(timeout=WITHIN)
    assert [starter.returncode for starter in starters] == [0] * 6
    assert len(place.spawned()) == len(place.starts()) == 1
    assert accepts(place.socket_path)


def test_a_running_daemon_is_not_started_again(place: Place) -> None:
    ensure_daemon(place.data_dir, place.environ, command=place.command)
    ensure_daemon(place.data_dir, place.environ, command=["/does/not/exist"])
    assert len(place.starts()) == 1


def test_the_daemon_is_detached_and_gets_the_allowed_environment_only(place: Place, tmp_path: Path) -> None:
    place.environ |= {"VESPERA_SLA_SECONDS": "7", "AWS_SECRET_ACCESS_KEY": "hidden", "PYTHONSTARTUP": "/x.py"}
    ensure_daemon(place.data_dir, place.environ, command=place.command)
    with place.bridge() as client:
        seen = client.call("look")
    assert seen["cwd"] == "/"
    assert seen["session"] == seen["pid"]
    assert seen["environ"]["VESPERA_SLA_SECONDS"] == "7"
    assert not {"AWS_SECRET_ACCESS_KEY", "PYTHONSTARTUP"} & set(seen["environ"])
    assert os.readlink(f"/proc/{seen['pid']}/fd/0") == os.readlink(f"/proc/{seen['pid']}/fd/1") == "/dev/null"
    assert os.readlink(f"/proc/{seen['pid']}/fd/2") == str(place.data_dir / paths.DAEMON_LOG)
    assert stat.S_IMODE((place.data_dir / paths.DAEMON_LOG).stat().st_mode) == 0o600


def test_relative_entries_of_pythonpath_do_not_reach_the_daemon() -> None:
    assert daemon_environment({"PYTHONPATH": ".:/opt/lib::src"}) == {"PYTHONPATH": "/opt/lib"}
    assert daemon_environment({"PYTHONPATH": "."}) == {}


def test_the_daemon_runs_without_the_current_folder_on_its_path(tmp_path: Path) -> None:
    assert daemon_command(tmp_path)[:4] == [sys.executable, "-P", "-m", "vespera_exec.server.daemon"]


def test_a_daemon_that_dies_is_quoted_with_its_last_line_only(place: Place) -> None:
    place.data_dir.mkdir()
    (place.data_dir / paths.DAEMON_LOG).write_text("an old trouble\n")
    for last_words, expected in (
        ("print('x', file=sys.stderr); sys.exit('no space')", "no space"),
        ("", "without a word"),
    ):
        with pytest.raises(DaemonUnavailable, match=expected) as refusal:
            ensure_daemon(place.data_dir, place.environ, command=[sys.executable, "-c", f"import sys; {last_words}"])
        assert "old trouble" not in refusal.value.message
        assert paths.DAEMON_LOG in refusal.value.hint


def test_a_daemon_that_never_listens_is_given_up_at_the_deadline(place: Place) -> None:
    process = [sys.executable, "-c", "import os, sys, signal; print(os.getpid(), file=sys.stderr); signal.pause()"]
    with pytest.raises(DaemonUnavailable, match="does not answer"):
        ensure_daemon(place.data_dir, place.environ, 0.5, command=process)
    log = place.data_dir / paths.DAEMON_LOG
    assert eventually(lambda: log.read_text().endswith("\n"))
    (place.data_dir / "starts").write_text(log.read_text())  # for the fixture to end


def test_a_program_that_is_missing_is_named(place: Place) -> None:
    with pytest.raises(DaemonUnavailable, match="/does/not/exist"):
        ensure_daemon(place.data_dir, place.environ, command=["/does/not/exist"])


def test_a_long_log_is_put_aside_at_the_next_start(place: Place) -> None:
    place.data_dir.mkdir()
    log = place.data_dir / paths.DAEMON_LOG
    log.write_bytes(b"x" * (6 * 1024 * 1024))
    ensure_daemon(place.data_dir, place.environ, command=place.command)
    assert log.stat().st_size < 1000
    assert log.with_suffix(".log.1").stat().st_size == 6 * 1024 * 1024


@pytest.mark.parametrize("name", [paths.START_LOCK, paths.DAEMON_LOG])
def test_a_link_a_fifo_or_a_folder_where_our_file_belongs_is_refused_and_not_written_through(
    place: Place, tmp_path: Path, name: str
) -> None:
    place.data_dir.mkdir()
    ours, other = place.data_dir / name, tmp_path / "other"
    other.write_text("precious\n")

    def refused() -> None:
        with pytest.raises(DaemonUnavailable, match=f"{name} is a link"):
            ensure_daemon(place.data_dir, place.environ, command=place.command)

    for target in (other, tmp_path / "not-there"):
        ours.symlink_to(target)
        refused()
        ours.unlink()
    os.mkfifo(ours)
    refused()
    ours.unlink()
    ours.mkdir()
    refused()
    assert other.read_text() == "precious\n"
    assert not (tmp_path / "not-there").exists()
    assert place.starts() == []


def test_an_impossible_data_directory_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable):
        ensure_daemon(tmp_path / "file" / "data", dict(os.environ), command=["/does/not/exist"])


def test_sockets_stand_at_the_same_place_whatever_environment_a_client_was_given(tmp_path: Path) -> None:
    full = {"XDG_RUNTIME_DIR": str(tmp_path), "TMPDIR": str(tmp_path), "HOME": "/home/x"}
    assert paths.socket_paths(tmp_path, full) == paths.socket_paths(tmp_path, {})
    named = paths.socket_paths(tmp_path, {"VESPERA_RUNTIME_DIR": str(tmp_path / "run")})
    assert {path.parent for path in named} == {tmp_path / "run"}
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


def test_a_runtime_folder_that_is_a_link_is_refused_and_an_open_one_is_closed(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    assert stat.S_IMODE(paths.runtime_dir({"VESPERA_RUNTIME_DIR": str(tmp_path / "open")}).stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(PermissionError, match="not a folder of this user"):
        paths.runtime_dir({"VESPERA_RUNTIME_DIR": str(tmp_path / "link")})
