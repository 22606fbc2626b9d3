"""`checkpoint`: made of a plan that runs, listed, and gone back to; `capacity`: what is shared."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from cli_harness import until

if TYPE_CHECKING:
    from cli_harness import Cli


@pytest.fixture
def held(cli: Cli) -> str:
    """The id of a plan whose first step is done and whose second runs until the file `go` is there."""
    (cli.cwd / "go").unlink(missing_ok=True)
    (cli.cwd / "held.json").write_text(
        json.dumps(
            {
                "name": "held",
                "steps": [
                    {"id": "first", "role": "command", "inputs": {"argv": ["true"]}},
                    {
                        "id": "second",
                        "role": "command",
                        "depends_on": ["first"],
                        "inputs": {"argv": ["sh", "-c", "until test -e go; do sleep 0.05; done"]},
                    },
                    {"id": "third", "role": "command", "depends_on": ["second"], "inputs": {"argv": ["true"]}},
                ],
            }
        )
    )
    task_id = str(cli.json("run", "--detach", "held.json")["task_id"])
    until(lambda: cli.steps(task_id)["second"] == "running", "the second step runs")
    return task_id


def test_a_checkpoint_is_made_with_a_note_and_listed_newest_first(cli: Cli, held: str) -> None:
    made = cli.run("checkpoint", "create", held, "--set", "why=before lunch")
    assert made.returncode == 0, made.stderr
    checkpoint_id = made.stdout.split()[1]
    listed = cli.json("checkpoint", "list", held)["checkpoints"]
    assert listed[0]["checkpoint_id"] == checkpoint_id
    assert listed[0]["metadata"]["why"] == "before lunch"
    shown = cli.run("checkpoint", "list", held).stdout.splitlines()
    assert shown[0].split() == ["CHECKPOINT", "KIND", "STEPS", "MADE", "WITH"]
    assert shown[1].startswith(checkpoint_id)
    assert "before lunch" in shown[1]
    cli.run("cancel", held)


def test_a_plan_is_put_back_while_it_runs_and_again_after_its_end(cli: Cli, held: str) -> None:
    checkpoint_id = cli.json("checkpoint", "create", held)["checkpoint_id"]
    live = cli.run("checkpoint", "restore", checkpoint_id)
    assert live.returncode == 0, live.stderr
    assert f"task {held}" in live.stdout
    until(lambda: cli.steps(held)["second"] == "running", "the second step runs again")
    (cli.cwd / "go").touch()
    until(lambda: cli.status(held) == "completed", "it ends")
    before = cli.json("status", held)["session_id"]
    after = cli.json("checkpoint", "restore", checkpoint_id)
    assert after["session_id"] != before
    until(lambda: cli.status(after["session_id"]) == "completed", "the new session ends, too")


def test_what_is_no_checkpoint_is_refused(cli: Cli) -> None:
    done = cli.run("checkpoint", "restore", "nothing")
    assert (done.returncode, done.stdout) == (125, "")
    assert cli.run("checkpoint", "list", "nothing").returncode == 125


def test_the_pools_show_who_holds_them_and_who_waits(fresh: Cli) -> None:
    assert "no pools" in fresh.run("capacity").stdout
    fresh.stop()
    fresh.environ["VESPERA_CAPACITY"] = "gpu=1,cpu=4"
    steps = [
        {"id": name, "role": "command", "capacity": {"gpu": 1}, "inputs": {"argv": ["sleep", "77"]}}
        for name in ("one", "two")
    ]
    (fresh.cwd / "gpus.json").write_text(json.dumps({"name": "gpus", "steps": steps}))
    task_id = str(fresh.json("run", "--detach", "gpus.json")["task_id"])
    until(lambda: sorted(fresh.steps(task_id).values()) == ["running", "waiting"], "one holds it, one waits")
    shown = fresh.run("capacity").stdout
    assert shown.splitlines()[0].split() == ["POOL", "TYPE", "FREE", "OF", "HELD", "BY"]
    (row,) = [line for line in shown.splitlines() if line.startswith("gpu")]
    assert row.split()[2:4] == ["0", "1"]
    assert "waits for gpu" in shown
    assert "waits for gpu" in fresh.run("steps", task_id).stdout
    fresh.run("cancel", task_id)
    free = fresh.json("capacity")
    assert {each["id"]: each["available"] for each in free["pools"]} == {"gpu": 1, "cpu": 4}
