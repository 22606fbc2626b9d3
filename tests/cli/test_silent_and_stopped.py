"""A daemon that does not answer is told from one that was stopped, and neither leaves anybody waiting or wondering."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cli_harness import PROGRAM, until
from deadlines import WITHIN

if TYPE_CHECKING:
    from collections.abc import Generator

    from cli_harness import Cli

HELLO = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}},
}
RESUMES = """
name: {name}
description: Waits
runner: process
argv: [sleep, "300"]
on_interrupt: {on_interrupt}
"""


@pytest.fixture
def stuck(fresh: Cli) -> Generator[tuple[Cli, int]]:
    """A daemon that does not run: SIGSTOP. Its pid, too."""
    pid = fresh.json("daemon", "start")["daemon"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    yield fresh, pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def bridge(cli: Cli) -> subprocess.Popen[str]:
    """The server of an MCP client that says hello."""
    process = subprocess.Popen(
        [PROGRAM], env=cli.environ, cwd=cli.cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=-1, text=True
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(HELLO) + "\n")
    process.stdin.flush()
    return process


def roles(cli: Cli) -> None:
    folder = Path(cli.environ["VESPERA_ROLES_DIR"])
    folder.mkdir(mode=0o700)
    for name, on_interrupt in (("patient", "resume"), ("brittle", "fail")):
        (folder / f"{name}.yaml").write_text(RESUMES.format(name=name, on_interrupt=on_interrupt))


@pytest.mark.full
def test_whoever_meets_a_daemon_that_does_not_answer_is_soon_told_how_to_end_it(
    stuck: tuple[Cli, int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cli, pid = stuck
    began = time.monotonic()
    started: list[subprocess.Popen[str]] = []
    request.addfinalizer(lambda: [process.kill() for process in started])  # none may start a daemon afterwards
    commands = ("list", "status abcdef", "cancel abcdef", "daemon start", "daemon status", f"backup {tmp_path}/b.db")
    asked = [cli.start(*command.split()) for command in commands]
    checking, client = cli.start("doctor"), bridge(cli)
    started += [*asked, checking, client]
    for process in asked:
        _, told = process.communicate(timeout=WITHIN)
        assert process.returncode == 125
        assert "(DAEMON_SILENT)" in told
        assert f"process {pid} " in told
        assert "daemon stop --now" in told
    found, _ = checking.communicate(timeout=WITHIN)
    assert checking.returncode == 1
    *_, line, hint = found.splitlines()
    assert line.startswith("error   daemon")
    assert "daemon stop --now" in hint
    assert {"disk", "token", "lock"} <= {each[8:24].strip() for each in found.splitlines()}
    assert client.stdout is not None
    answer = json.loads(client.stdout.readline())["error"]
    assert answer["data"] == {"error_code": "DAEMON_SILENT", "retriable": True}
    assert "daemon stop --now" in answer["message"]
    client.communicate(timeout=WITHIN)
    assert time.monotonic() - began < 30  # promised are ten seconds


@pytest.mark.full
def test_a_daemon_that_is_stuck_and_has_lost_its_lock_is_ended_with_now(stuck: tuple[Cli, int]) -> None:
    cli, pid = stuck
    (cli.data_dir / "owner.lock").unlink()
    assert cli.json("daemon", "stop", "--now")["daemon"]["pid"] == pid
    assert cli.run("daemon", "status").returncode == 3
    assert cli.json("daemon", "start")["daemon"]["owners"][1]["ended"] == "clean"  # it was let go on for its end


@pytest.mark.parametrize("make", [pytest.param(os.mkfifo, marks=pytest.mark.full), os.mkdir])
def test_what_stands_in_the_place_of_the_lock_is_named(fresh: Cli, make: type) -> None:
    fresh.data_dir.mkdir(mode=0o700)
    make(fresh.data_dir / "owner.lock")
    for command in ("doctor", "daemon status", "daemon stop", "daemon start"):
        done = fresh.run(*command.split())
        assert done.returncode != 0
        assert "not a lock file" in done.stdout + done.stderr


def test_whoever_watches_does_not_start_a_daemon_that_was_stopped(fresh: Cli) -> None:
    running = fresh.start("run", "--title", "watched", "--", "sh", "-c", "echo begun; sleep 300")
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n"
    ((task_id, session),) = [
        (row["task_id"], row["session_id"]) for row in fresh.json("daemon", "status")["daemon"]["work"]
    ]
    logs, events, status = others = [
        fresh.start(*watch.split(), task_id) for watch in ("logs -f", "events -f", "status -w --json")
    ]
    for shown in (logs.stdout, events.stdout, status.stdout):
        assert shown is not None
        assert shown.readline()
    until(lambda: fresh.json("daemon", "status")["daemon"]["connections"] >= 6, "all watch")
    assert fresh.run("daemon", "stop", "--now").returncode == 0
    for watcher in (running, *others):
        _, told = watcher.communicate(timeout=WITHIN)
        assert watcher.returncode == 125
        assert "was stopped (DAEMON_STOPPED)" in told
        assert "vespera-exec status" in told
    assert fresh.run("daemon", "status").returncode == 3
    assert fresh.status(session) == "failed"


def test_a_watcher_goes_on_over_a_crash(fresh: Cli) -> None:
    task_id = fresh.task("--", "sh", "-c", "echo begun; sleep 300")
    watching = fresh.start("logs", "-f", task_id)
    assert watching.stdout is not None
    assert watching.stdout.readline() == "begun\n"
    os.kill(fresh.json("daemon", "status")["daemon"]["pid"], signal.SIGKILL)
    _, told = watching.communicate(timeout=WITHIN)
    assert (watching.returncode, told) == (0, "")
    assert fresh.status(task_id) == "failed"


def test_stop_refuses_for_what_it_would_interrupt_and_lists_what_is_kept(fresh: Cli) -> None:
    roles(fresh)
    kept = fresh.task("--role", "patient", "--title", "kept")
    until(lambda: fresh.status(kept) == "running", "it runs")
    assert "(DAEMON_BUSY)" in fresh.run("daemon", "stop").stderr
    fresh.json("pause", kept)
    done = fresh.run("daemon", "stop")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"kept for the next start, paused: kept (task {kept})" in done.stdout
    assert fresh.status(kept) == "paused"

    lost = fresh.task("--role", "brittle", "--title", "lost")
    until(lambda: fresh.status(lost) == "running", "it runs")
    fresh.json("pause", lost)
    refused = fresh.run("daemon", "stop")
    assert (refused.returncode, "'lost'" in refused.stderr, "'kept'" in refused.stderr) == (125, True, False)
    done = fresh.run("daemon", "stop", "--now")
    assert f"interrupted: lost (task {lost})" in done.stdout
    assert fresh.status(lost) == "failed"
    assert fresh.status(kept) == "paused"
