"""The daemon as its user sees it: how it is, its end, its log, and the unit that keeps it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cli_harness import Cli, until
from deadlines import WITHIN

from vespera_exec import __version__
from vespera_exec.cli import logfile
from vespera_exec.cli.client import DaemonError
from vespera_exec.cli.unit import systemd_unit
from vespera_exec.server import launch
from vespera_exec.store.lock import OwnerLock

if TYPE_CHECKING:
    from collections.abc import Generator


@pytest.fixture
def stopped(fresh: Cli) -> Generator[tuple[Cli, int]]:
    """A daemon that does not answer, because it does not run: SIGSTOP. Its pid, too."""
    pid = fresh.json("daemon", "start")["daemon"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    yield fresh, pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_status_says_what_runs_where_since_when_and_who_was_before(fresh: Cli) -> None:
    first = fresh.json("daemon", "start")["daemon"]
    os.kill(first["pid"], signal.SIGKILL)
    task_id = fresh.task("--title", "a long one", "--", "sleep", "60")
    until(lambda: fresh.status(task_id) == "running", "it runs")
    seen = fresh.json("daemon", "status")
    assert seen["daemon"]["pid"] != first["pid"]
    assert [each["title"] for each in seen["daemon"]["work"]] == ["a long one"]
    assert (seen["installed_version"], seen["uptime_seconds"] >= 0) == (__version__, True)
    assert all(Path(path).is_socket() for path in seen["sockets"].values())
    assert Path(seen["log"]).is_file()
    now, before = seen["daemon"]["owners"]
    assert (now["generation"], now["pid"], now["ended"]) == (2, seen["daemon"]["pid"], None)
    assert (before["generation"], before["pid"], before["ended"]) == (1, first["pid"], "dead")
    assert now["owner"] == f"daemon:{now['pid']}:{now['owner'][-8:]}"
    told = fresh.run("daemon", "status").stdout
    assert "a long one" in told
    assert f"process {first['pid']} (daemon), for" in told
    assert "found dead" in told


def test_stop_names_what_it_would_interrupt_and_with_now_what_it_did(fresh: Cli) -> None:
    task_id = fresh.task("--title", "precious", "--", "sleep", "60")
    until(lambda: fresh.status(task_id) == "running", "it runs")
    refused = fresh.run("daemon", "stop")
    assert refused.returncode == 125
    assert f"'precious' ({task_id[:8]}) (DAEMON_BUSY)" in refused.stderr
    done = fresh.run("daemon", "stop", "--now")
    assert done.returncode == 0
    assert f"interrupted: precious (task {task_id})" in done.stdout
    down = fresh.run("daemon", "status")
    assert (down.returncode, "the last to own it was process" in down.stdout) == (3, True)
    assert fresh.json("daemon", "start")["daemon"]["owners"][1]["ended"] == "clean"


def test_a_daemon_that_does_not_answer_is_named_and_ended_with_now(stopped: tuple[Cli, int]) -> None:
    cli, pid = stopped
    refused = cli.run("daemon", "stop")
    assert (refused.returncode, "(DAEMON_SILENT)" in refused.stderr) == (125, True)
    assert f"process {pid} " in refused.stderr
    assert cli.json("daemon", "stop", "--now")["stopped"] is True
    assert cli.run("daemon", "status").returncode == 3


def test_another_program_that_holds_the_directory_is_not_taken_for_a_daemon(fresh: Cli) -> None:
    with OwnerLock.acquire(fresh.data_dir, purpose="library"):
        for command in ("status", "stop"):
            refused = fresh.run("daemon", command)
            assert refused.returncode == 125
            assert f"process {os.getpid()} (library" in refused.stderr


def test_the_log_is_shown_from_its_end_and_followed(fresh: Cli) -> None:
    fresh.run("daemon", "start")
    (line,) = fresh.run("daemon", "logs", "-n", "1").stdout.splitlines()
    assert "ready" in line
    assert json.loads(fresh.run("daemon", "logs", "-n", "1", "--json").stdout)["event"] == "ready"
    following = fresh.start("daemon", "logs", "-f", "-n", "1", "--json")
    assert following.stdout is not None
    assert json.loads(following.stdout.readline())["event"] == "ready"
    fresh.run("daemon", "stop")
    assert json.loads(following.stdout.readline())["event"] == "stopping on SIGTERM"
    following.send_signal(signal.SIGINT)
    assert following.wait(WITHIN) == 130
    following.communicate()


def test_lines_come_from_the_replaced_log_too_and_nothing_in_them_moves_the_cursor(tmp_path: Path) -> None:
    log = tmp_path / "daemon.log"
    assert list(logfile.lines(log, last=5, follow=False)) == []
    log.with_suffix(".log.1").write_text("one\ntwo\n")
    log.write_text("three\nfour")
    assert list(logfile.lines(log, last=2, follow=False)) == ["two", "three", "four"]
    assert list(logfile.lines(log, last=0, follow=False)) == ["four"]
    record = {"timestamp": "2026-01-02T03:04:05.678Z", "level": "error", "event": "a\x1b[2J", "exception": "A\nB: \x07"}
    assert logfile.readable(json.dumps(record)).splitlines()[1:] == ["    A", "    B: \\x07"]
    assert "\x1b" not in logfile.readable(json.dumps(record)) + logfile.readable("\x1b no record")


def test_a_log_that_is_replaced_while_it_is_followed_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "daemon.log"
    log.write_text("one\n")
    followed = logfile.lines(log, last=9, follow=True)
    assert next(followed) == "one"
    log.rename(log.with_suffix(".log.1"))
    log.write_text("two\n")
    assert next(followed) == "two"
    followed.close()


def test_the_unit_has_absolute_paths_the_settings_and_leaves_the_ladder_to_the_daemon(fresh: Cli) -> None:
    roots = {"VESPERA_ROLES_DIR": "our/roles", "VESPERA_ALLOWED_ROOTS": "a:/b"}
    printed = fresh.run("daemon", "unit", VESPERA_MAX_CONCURRENT="7", **roots)
    assert printed.returncode == 0
    lines = printed.stdout.splitlines()
    (command,) = [line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart=")]
    python, rest = command.split(" ", 1)
    assert os.access(python.strip('"'), os.X_OK)
    assert rest == " ".join(f'"{part}"' for part in launch.daemon_command(fresh.data_dir)[1:])
    assert {
        "KillMode=mixed",
        "Restart=always",
        "RestartSec=10",
        "StartLimitIntervalSec=0",
        'Environment="VESPERA_MAX_CONCURRENT=7"',
    } <= set(lines)
    assert 'Environment="VESPERA_IDLE_EXIT_SECONDS=0"' in lines
    assert f'Environment="VESPERA_ROLES_DIR={fresh.cwd}/our/roles"' in lines
    assert f'Environment="VESPERA_ALLOWED_ROOTS={fresh.cwd}/a:/b"' in lines
    assert "systemctl --user enable --now vespera-exec-" in printed.stderr
    assert "the unit waits" in printed.stderr


def test_the_unit_quotes_what_systemd_would_read_as_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = systemd_unit(Path('/a b/100%/"x"/$HOME'), {"VESPERA_ROLES_DIR": "/50%"})
    assert '"/a b/100%%/\\"x\\"/$$HOME"' in text
    assert 'Environment="VESPERA_ROLES_DIR=/50%%"' in text
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(DaemonError, match="no unit for darwin"):
        systemd_unit(tmp_path, {})


def test_many_starts_at_once_find_one_daemon(fresh: Cli) -> None:
    starts = [fresh.start("daemon", "start", "--json") for _ in range(4)]
    said = [start.communicate(timeout=WITHIN)[0] for start in starts]
    assert [start.returncode for start in starts] == [0] * 4
    assert len({json.loads(each)["daemon"]["pid"] for each in said}) == 1


def test_a_backup_is_made_with_and_without_a_daemon_and_can_be_used(fresh: Cli, tmp_path: Path) -> None:
    task_id = fresh.task("--title", "kept", "--", "true")
    until(lambda: fresh.status(task_id) == "completed", "it ended")
    with_daemon, without = tmp_path / "one" / "vespera.db", tmp_path / "two" / "vespera.db"
    for target in (with_daemon, without):
        target.parent.mkdir(mode=0o700)
    assert fresh.json("backup", str(with_daemon))["size_bytes"] == with_daemon.stat().st_size
    refused = fresh.run("backup", str(with_daemon))
    assert (refused.returncode, "(CONFLICT)" in refused.stderr) == (125, True)
    assert fresh.run("backup", "--force", str(with_daemon)).returncode == 0
    fresh.stop()
    assert fresh.run("backup", os.path.relpath(without, fresh.cwd)).returncode == 0
    assert fresh.run("daemon", "status").returncode == 3
    for target in (with_daemon, without):
        listed = fresh.run("--data-dir", str(target.parent), "list", "--json")
        assert [each["title"] for each in json.loads(listed.stdout)["tasks"]] == ["kept"]
        assert fresh.run("--data-dir", str(target.parent), "daemon", "stop").returncode == 0


def test_nothing_is_backed_up_from_where_nothing_is(fresh: Cli, tmp_path: Path) -> None:
    refused = fresh.run("backup", str(tmp_path / "b.db"))
    assert (refused.returncode, "(STORE_UNAVAILABLE)" in refused.stderr) == (125, True)
    assert not fresh.data_dir.exists()
    assert not list(tmp_path.iterdir())


def test_a_command_that_only_looks_loads_no_heavy_library(fresh: Cli) -> None:
    script = (
        "import sys; from vespera_exec.cli.entry import main\n"
        "sys.argv = ['vespera-exec', 'daemon', sys.argv[1]]; main()\n"
        "heavy = {'mcp', 'pydantic', 'uvicorn', 'starlette', 'rich', 'asyncio', 'anyio'}\n"
        "loaded = heavy & set(sys.modules); sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    for command in ("status", "logs", "stop"):
        done = subprocess.run(
            [launch.daemon_command(fresh.data_dir)[0], "-c", script, command],
            env=fresh.environ,
            cwd=fresh.cwd,
            capture_output=True,
            text=True,
            timeout=WITHIN,
        )
        assert done.returncode == 0, done.stderr
