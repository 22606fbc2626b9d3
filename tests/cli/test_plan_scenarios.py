"""Plans as a user meets them, on a real daemon that may be killed: speed, recovery, going back, shared capacity."""

from __future__ import annotations

import json
import os
import signal
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from cli_harness import PROGRAM, until

if TYPE_CHECKING:
    from cli_harness import Cli


def sh(name: str, script: str, *needs: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "role": "command", "inputs": {"argv": ["sh", "-c", script]}, "depends_on": list(needs)} | more


def plan_file(cli: Cli, name: str, *steps: dict[str, Any], **more: Any) -> str:
    (cli.cwd / f"{name}.json").write_text(json.dumps({"name": name, "steps": steps} | more))
    return f"{name}.json"


def detached(cli: Cli, path: str) -> str:
    return str(cli.json("run", "--detach", path)["task_id"])


def noted(cli: Cli, file: str) -> list[str]:
    path = cli.cwd / file
    return path.read_text().split() if path.exists() else []


def kill_the_daemon(cli: Cli) -> None:
    os.kill(cli.json("daemon", "status")["daemon"]["pid"], signal.SIGKILL)


def events(cli: Cli, task_id: str) -> list[dict[str, Any]]:
    return list(cli.json("events", task_id)["events"])


# F-047


def test_two_branches_run_beside_each_other_and_the_order_is_kept(cli: Cli) -> None:
    path = plan_file(
        cli, "branches",
        sh("first", "true"), sh("left", "sleep 1", "first"), sh("right", "sleep 1", "first"),
        sh("last", "true", "left", "right"),
    )  # fmt: skip
    ended = cli.json("run", path)
    at = {
        (each["step_id"], each["type"]): datetime.fromisoformat(each["timestamp"])
        for each in events(cli, ended["task_id"])
    }
    began = [at[step, "step_started"] for step in ("first", "left", "right", "last")]
    assert began == sorted(began)
    assert at["first", "step_completed"] <= at["left", "step_started"]
    assert max(at["left", "step_completed"], at["right", "step_completed"]) <= at["last", "step_started"]
    assert max(at["left", "step_started"], at["right", "step_started"]) < min(
        at["left", "step_completed"], at["right", "step_completed"]
    )
    assert (at["last", "step_started"] - at["left", "step_started"]).total_seconds() >= 1.0


# F-049


def test_after_a_kill_at_step_four_the_last_periodic_checkpoint_repeats_nothing_before_it(fresh: Cli) -> None:
    steps = [sh("s1", "echo s1 >> did")]
    for before, name in pairwise(("s1", "s2", "s3", "s4", "s5")):
        waits = "until test -e go; do sleep 0.02; done" if name == "s4" else "true"
        steps.append(sh(name, f"echo {name} >> did; {waits}", before))
    variables = {"seen": {"pages": [1, 2, {"deep": None}], "ü": 2**53 + 1}, "share": 0.1}
    path = plan_file(
        fresh, "killed", *steps,
        variables=variables, output="${variables.seen}", checkpoint_interval_seconds=0.1, step_checkpoints=False,
    )  # fmt: skip
    task_id = detached(fresh, path)
    until(lambda: noted(fresh, "did") == ["s1", "s2", "s3", "s4"], "step four is at work")

    def checkpoints() -> list[dict[str, Any]]:
        return list(fresh.json("checkpoint", "list", task_id)["checkpoints"])

    until(lambda: any(each["completed_steps"] == 3 for each in checkpoints()), "a checkpoint is made")
    first = fresh.json("status", task_id)["session_id"]
    kill_the_daemon(fresh)
    until(lambda: fresh.status(task_id) == "failed", "the next daemon names what was interrupted")
    assert fresh.steps(task_id) == {
        "s1": "completed", "s2": "completed", "s3": "completed", "s4": "failed", "s5": "skipped",
    }  # fmt: skip
    newest = checkpoints()[0]
    assert (newest["kind"], newest["completed_steps"]) == ("interval", 3)

    (fresh.cwd / "go").touch()
    again = fresh.json("checkpoint", "restore", newest["checkpoint_id"])
    assert again["session_id"] != first
    until(lambda: fresh.status(task_id) == "completed", "it goes on")
    assert noted(fresh, "did") == ["s1", "s2", "s3", "s4", "s4", "s5"]
    assert fresh.json("result", task_id)["result"]["output"] == variables["seen"]


# F-050


def test_five_faults_get_the_five_recovery_actions(cli: Cli) -> None:
    def breaks(name: str, times: int, *needs: str, **more: Any) -> dict[str, Any]:
        script = f"echo x >> {name}; test $(wc -l < {name}) -gt {times}"
        return sh(name, script, *needs, **more)

    path = plan_file(
        cli, "faults",
        breaks("again", 1, recovery=["retry_once"]),
        breaks("without", 9, "again", recovery=["skip"]),
        breaks("spare", 9, "without", recovery=["fallback"],
               fallback={"role": "command", "inputs": {"argv": ["true"]}}),
        breaks("back", 1, "spare", recovery=["restore_last_checkpoint"]),
        breaks("over", 9, "back", recovery=["abort"]),
        sh("beside", "sleep 80", "back"),
    )  # fmt: skip
    done = cli.run("run", path, "--json")
    assert done.returncode == 1
    ended = json.loads(done.stdout)
    assert ended["error"]["message"].startswith("End the plan")
    assert [
        (each["step_id"], each["details"]["action"])
        for each in events(cli, ended["task_id"])
        if each["type"] == "recovery_initiated" and "strategy" in each["details"]
    ] == [
        ("again", "retry"), ("without", "skip"), ("spare", "fallback"), ("back", "checkpoint_restore"),
        ("over", "abort"),
    ]  # fmt: skip
    steps = {each["id"]: each for each in cli.json("steps", ended["task_id"])["steps"]}
    assert {name: (each["status"], each["recoveries"]) for name, each in steps.items()} == {
        "again": ("completed", 1), "without": ("skipped", 0), "spare": ("completed", 0), "back": ("completed", 1),
        "over": ("failed", 0), "beside": ("cancelled", 0),
    }  # fmt: skip
    assert steps["spare"]["is_fallback"]
    assert {name: len(noted(cli, name)) for name in ("again", "without", "spare", "back", "over")} == {
        "again": 2, "without": 1, "spare": 1, "back": 2, "over": 1,
    }  # fmt: skip


def test_a_command_says_its_own_failure_code_and_the_strategy_for_it_decides(cli: Cli) -> None:
    reports = f"{PROGRAM} report --error CONNECTION_REFUSED -m 'nobody is there'"
    script = f"echo x >> lines; test $(wc -l < lines) -gt 1 || {{ {reports}; exit 1; }}"
    done = cli.run("run", plan_file(cli, "refused", sh("call", script)), "--json")
    assert done.returncode == 0, done.stderr
    decided = [each for each in events(cli, json.loads(done.stdout)["task_id"]) if each["type"] == "recovery_initiated"]
    assert [each["details"].get("strategy") for each in decided] == ["network_timeout_recovery"]


# F-052


def test_two_plans_share_a_pool_by_priority_and_a_killed_daemon_holds_nothing(fresh: Cli) -> None:
    fresh.environ["VESPERA_CAPACITY"] = "seat=2"

    def takes(amount: float, priority: int) -> dict[str, Any]:
        return {"capacity": [{"type": "seat", "amount": amount, "priority": priority}]}

    held = "echo held >> sat; until test -e go; do sleep 0.02; done"
    one = detached(
        fresh, plan_file(fresh, "one", sh("held", held, **takes(2, 5)), sh("low", "echo low >> sat", **takes(2, 1)))
    )
    until(lambda: noted(fresh, "sat") == ["held"], "the first plan holds all seats")
    two = detached(
        fresh,
        plan_file(
            fresh, "two", sh("mid", "echo mid >> sat", **takes(2, 4)), sh("high", "echo high >> sat", **takes(2, 9))
        ),
    )
    until(lambda: fresh.json("capacity")["waiting_total"] == 3, "three steps of two plans wait")
    until(
        lambda: {each["waiting_for"] for each in fresh.json("steps", two)["steps"]} == {"capacity"},
        "its steps say what they wait for",
    )
    (fresh.cwd / "go").touch()
    until(lambda: len(noted(fresh, "sat")) == 4, "all have had their seats")
    assert noted(fresh, "sat") == ["held", "high", "mid", "low"]
    until(lambda: fresh.status(one) == fresh.status(two) == "completed", "both plans are done")

    (fresh.cwd / "go").unlink()
    (fresh.cwd / "sat").unlink()
    three = detached(
        fresh, plan_file(fresh, "three", sh("held", held, **takes(2, 5)), sh("next", "echo next >> sat", **takes(2, 1)))
    )
    until(lambda: noted(fresh, "sat") == ["held"], "it holds all seats")
    assert [each["available"] for each in fresh.json("capacity")["pools"]] == [0]
    kill_the_daemon(fresh)
    until(lambda: fresh.status(three) == "failed", "the next daemon ends it")
    assert noted(fresh, "sat") == ["held", "next"]
    pools = fresh.json("capacity")
    assert ([each["available"] for each in pools["pools"]], pools["waiting_total"]) == ([2], 0)
