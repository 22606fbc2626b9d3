"""What a foreground `run` does when it is told to go: SIGTERM cancels the work, SIGHUP leaves it alone."""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING

from cli_harness import PROGRAM, marked, until
from deadlines import WITHIN

if TYPE_CHECKING:
    from cli_harness import Cli

    from vespera_exec.model.events import Json


def running(cli: Cli, marker: str) -> tuple[subprocess.Popen[str], str]:
    """A foreground run whose work has begun, and its task id."""
    process = cli.start("run", "--title", marker, "--", "sh", "-c", f"VC_MARK={marker} exec sleep 300")
    return process, begun(cli, marker)


def begun(cli: Cli, title: str) -> str:
    """The id of the task, once it runs."""
    until(lambda: bool(_running(cli, title)), "the work begins")
    (task,) = _running(cli, title)
    return str(task["task_id"])


def test_sigterm_cancels_the_work_and_exits_with_143(cli: Cli) -> None:
    process, task_id = running(cli, "told-to-go")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=WITHIN)
    assert process.returncode == 143, said
    assert cli.status(task_id) == "cancelled"
    assert marked("VC_MARK=told-to-go") == []
    assert "Traceback" not in said


def test_sigterm_before_the_run_is_accepted_cancels_it_as_well(fresh: Cli) -> None:
    # No daemon runs yet: it is started behind the signal's back.
    process = fresh.start("run", "--title", "early", "--", "sleep", "300")
    until(lambda: _catches(process.pid, signal.SIGHUP), "the signals are waited for")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=WITHIN)
    assert process.returncode == 143, said
    (task,) = fresh.json("list")["tasks"]
    assert task["execution_status"] == "cancelled"


def test_sighup_leaves_the_work_running_and_exits_with_129(cli: Cli) -> None:
    process, task_id = running(cli, "hung-up")
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=WITHIN)
    assert process.returncode == 129, said
    assert cli.status(task_id) == "running"
    until(lambda: len(marked("VC_MARK=hung-up")) > 0, "its work is there")
    cli.json("cancel", task_id)


def test_the_end_of_its_terminal_leaves_the_work_running(cli: Cli) -> None:
    with cli.terminal("run", "--title", "window", "--", "sh", "-c", "VC_MARK=window exec sleep 300") as terminal:
        task_id = begun(cli, "window")
        terminal.until("execution")
        terminal.hang_up()
        assert terminal.process.wait(timeout=WITHIN) == 129
    assert cli.status(task_id) == "running"
    cli.json("cancel", task_id)


def test_what_was_started_to_ignore_a_hangup_goes_on_watching(cli: Cli) -> None:
    argv = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", PROGRAM, "run", "-q", "--title", "nohup", "--"]
    process = subprocess.Popen([*argv, "sleep", "300"], env=cli.environ, cwd=cli.cwd, stderr=subprocess.PIPE, text=True)
    begun(cli, "nohup")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=WITHIN)
    assert process.returncode == 143, said


def _running(cli: Cli, title: str) -> list[Json]:
    return [each for each in cli.ask(f"/tasks?text={title}")["tasks"] if each["execution_status"] == "running"]


def _catches(pid: int, number: signal.Signals) -> bool:
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        caught = next(line for line in file if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) & 1 << (number - 1))
