"""`pause` and `resume`, and what a `run` in the foreground shows of them."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from cli_harness import until
from deadlines import WITHIN

from vespera_exec.cli.state import Shown

if TYPE_CHECKING:
    from cli_harness import Cli


def test_pause_and_resume_say_what_became_of_it_and_exit_as_cancel_does(cli: Cli) -> None:
    task_id = cli.task("--", "sleep", "60")
    until(lambda: cli.status(task_id) == "running", "it runs")
    paused = cli.run("pause", task_id, "--reason", "Lunch")
    assert paused.returncode == 0
    assert paused.stdout.startswith("paused: Paused (session ")
    assert cli.status(task_id) == "paused"
    assert cli.json("pause", task_id)["already"] is True
    assert cli.json("resume", task_id)["status"] == "running"
    assert cli.run("resume", task_id).stdout.startswith("running: It is not paused")
    cli.run("cancel", task_id)
    for verb, code in (("pause", "NOT_PAUSED"), ("resume", "NOT_RESUMED")):
        late = cli.run(verb, task_id)
        assert (late.returncode, late.stdout) == (125, "")
        assert f"it has ended (cancelled) ({code})" in late.stderr
        refused = cli.run(verb, task_id, "--json")
        assert (refused.returncode, json.loads(refused.stdout)["success"]) == (125, False)


def test_a_run_in_the_foreground_shows_that_it_is_paused(cli: Cli) -> None:
    with cli.terminal("run", "--title", "A sleeper", "--", "sleep", "60") as terminal:
        terminal.until("execution")
        (row,) = cli.json("list", "--status", "running")["tasks"]
        cli.run("pause", row["task_id"])
        terminal.until("paused")
        cli.run("resume", row["task_id"])
        terminal.until(lambda shown: not any("paused" in line for line in shown.screen.text()))
        cli.run("cancel", row["task_id"])
        assert terminal.finish() == 130


def test_without_a_terminal_the_pause_is_a_line(cli: Cli) -> None:
    process = cli.start("run", "--", "sleep", "60")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("vespera-exec: running"):
            break
    (row,) = cli.json("list", "--status", "running")["tasks"]
    cli.run("pause", row["task_id"])
    assert any(line.startswith("vespera-exec: paused") for line in process.stderr)
    cli.run("cancel", row["task_id"])
    process.communicate(timeout=WITHIN)
    assert process.returncode == 130


def test_the_clock_that_is_shown_stands_while_it_is_paused_and_goes_on_from_there() -> None:
    def change(new: str, **clock: float) -> dict[str, Any]:
        return {
            "execution_id": "s", "type": "status_change", "status": {"new": new}, "details": {"clock": clock},
        }  # fmt: skip

    state = Shown("t", began=time.monotonic() - 100)
    state.take_event(change("running"))
    state.take_event(change("paused", active=3.0))
    assert (state.status, state.elapsed, state.eta) == ("paused", 3.0, "")
    state.take_event(change("running", paused=50.0))
    assert 3.0 <= state.elapsed < 10.0
    state.take_event(change("completed", active=9.0))
    assert state.elapsed == 9.0
