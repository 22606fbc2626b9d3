"""`run plan.yaml`, `plan`, `steps`, and what `status`, `cancel`, `pause` and `resume` do with a plan."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from cli_harness import Cli, marked, until

EXAMPLES = Path(__file__).parents[2] / "examples"


def sh(name: str, script: str, *needs: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "role": "command", "inputs": {"argv": ["sh", "-c", script]}, "depends_on": list(needs)} | more


def plan_file(cli: Cli, name: str, *steps: dict[str, Any], **more: Any) -> str:
    (cli.cwd / f"{name}.json").write_text(json.dumps({"name": name, "steps": steps} | more))
    return f"{name}.json"


def detached(cli: Cli, *arguments: str) -> str:
    return str(cli.json("run", "--detach", *arguments)["task_id"])


def test_the_example_runs_and_prints_its_output(cli: Cli) -> None:
    (cli.cwd / "some.txt").write_text("one\ntwo\n")
    done = cli.run("run", str(EXAMPLES / "plan.yaml"), "--set", "folder=.")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["largest"]
    lines = done.stderr.splitlines()
    assert "vespera-exec: 0/4 survey started (survey)" in lines
    assert lines.index("vespera-exec: 1/4 survey completed") < lines.index("vespera-exec: 4/4 report completed")
    assert lines[-1].startswith("vespera-exec: completed in ")
    assert "steps: 4 completed" in lines[-1]


def test_the_release_asks_in_the_terminal_retries_falls_back_and_goes_on(cli: Cli) -> None:
    with cli.terminal("run", str(EXAMPLES / "release.yaml"), "--set", "version=1.4.0") as terminal:
        terminal.until("Shall it be published?")
        terminal.until("yes or no?")
        task_id = cli.json("list", "--text", "release")["tasks"][0]["task_id"]
        upload = next(each for each in cli.json("steps", task_id)["steps"] if each["id"] == "upload")
        assert (upload["status"], upload["is_fallback"]) == ("completed", True)
        terminal.type("yes\n")
        assert terminal.finish() == 0
        text = "\n".join(terminal.screen.text())
        assert "failed: spelling: " in text
        assert '"version": "1.4.0"' in text
        assert "completed in" in text


def test_a_failed_step_stops_only_what_needs_it_and_the_end_says_so(cli: Cli) -> None:
    path = plan_file(
        cli, "branches",
        sh("bad", "exit 3"), sh("after", "true", "bad"), sh("last", "true", "after"), sh("other", "true"),
    )  # fmt: skip
    done = cli.run("run", path)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert any(line.startswith("vespera-exec: failed: bad: ") and "(EXIT_NONZERO)" in line for line in said)
    assert any(line.startswith("vespera-exec: skipped: after: needs bad") for line in said)
    assert any(line.startswith("vespera-exec: skipped: last: needs ") for line in said)
    assert any(line.startswith("vespera-exec: failed after ") and "STEP_FAILED" in line for line in said)
    assert any("other completed" in line for line in said)
    document = cli.run("run", path, "--json")
    assert document.returncode == 1
    ended = json.loads(document.stdout)
    assert (ended["exit_code"], ended["error"]["code"]) == (1, "STEP_FAILED")
    assert [each["step"] for each in ended["result"]["skipped"]] == ["after", "last"]


def test_a_plan_that_is_refused_names_every_problem_with_its_step_and_starts_nothing(fresh: Cli) -> None:
    path = plan_file(
        fresh, "wrong",
        sh("a", "true", "b"), sh("b", "true", "a"), sh("c", "true", "nowhere"), {"id": "d", "role": "no-such-role"},
    )  # fmt: skip
    checked = fresh.run("plan", "check", path)
    assert (checked.returncode, checked.stderr) == (1, "")
    assert "wrong.json: step c: " in checked.stdout
    assert "nowhere" in checked.stdout
    offline = json.loads(fresh.run("plan", "check", "--offline", "--json", path).stdout)
    assert offline["valid"] is False
    assert {each["step"] for each in offline["problems"]} >= {"c"}
    refused = fresh.run("run", path)
    assert (refused.returncode, refused.stdout) == (125, "")
    assert "vespera-exec: wrong.json: step c: " in refused.stderr
    assert "(INVALID_PLAN)" in refused.stderr
    assert fresh.json("list")["tasks"] == []


def test_a_file_that_cannot_be_read_as_a_plan_is_told_with_its_line_once(fresh: Cli) -> None:
    (fresh.cwd / "plans").mkdir()
    (fresh.cwd / "plans" / "twice.yaml").write_text("name: a\nname: b\n")
    (fresh.cwd / "endless.yaml").write_text("steps:\n- {id: a, role: command, inputs: {argv: [x]}, weight: .inf}\n")
    assert (
        fresh.run("plan", "check", "plans/twice.yaml").stdout
        == "plans/twice.yaml:2: the key 'name' stands here twice\n"
    )
    assert fresh.run("plan", "check", "endless.yaml").stdout == "endless.yaml:2: '.inf' is no number of JSON\n"
    for given in ((), ("--set", "a=b")):
        missing = fresh.run("run", "mising.yaml", *given)
        assert missing.returncode == 125
        assert missing.stderr.startswith("vespera-exec: cannot read mising.yaml: No such file")


def test_a_check_counts_the_levels_of_a_long_plan(cli: Cli) -> None:
    chain = [sh(f"s{at}", "true", *([f"s{at - 1}"] if at else [])) for at in range(250)]
    long, one = plan_file(cli, "long", *chain), plan_file(cli, "one", chain[0])
    for offline in ((), ("--offline",)):
        assert "long.json: 250 steps in 250 levels, at most 1 beside" in cli.run("plan", "check", long, *offline).stdout
        assert "one.json: 1 step in 1 level, at most 1 beside" in cli.run("plan", "check", one, *offline).stdout


def test_an_unknown_role_is_found_by_the_daemon_and_not_offline(cli: Cli) -> None:
    path = plan_file(cli, "roles", sh("a", "true"), {"id": "d", "role": "no-such-role", "depends_on": ["a"]})
    offline = cli.run("plan", "check", "--offline", path)
    assert (offline.returncode, offline.stdout) == (
        0, "roles.json: 2 steps in 2 levels, at most 1 beside each other (roles were not looked up)\n",
    )  # fmt: skip
    checked = cli.run("plan", "check", path)
    assert checked.returncode == 1
    assert "roles.json: step d: " in checked.stdout
    assert "no-such-role" in checked.stdout
    good = cli.run("plan", "check", str(EXAMPLES / "release.yaml"))
    assert (good.returncode, good.stderr) == (0, "")
    assert "6 steps in 5 levels, at most 2 beside each other" in good.stdout


def test_a_plan_is_drawn_from_its_file_and_from_where_it_stands(cli: Cli) -> None:
    path = plan_file(cli, "drawn", sh("one", "true"), sh("two", "exit 1", "one"), sh("three", "true", "two"))
    text = cli.run("plan", "show", path).stdout.splitlines()
    assert [line.split() for line in text] == [
        ["1", "one", "command"], ["↓"], ["2", "two", "command", "←", "one"], ["↓"],
        ["3", "three", "command", "←", "two"],
    ]  # fmt: skip
    assert cli.run("plan", "show", "--mermaid", path).stdout.startswith("flowchart LR\n")
    assert cli.run("plan", "show", "--dot", path).stdout.startswith("digraph plan {\n")
    ended = json.loads(cli.run("run", path, "--json").stdout)
    shown = cli.run("plan", "show", ended["task_id"]).stdout
    assert "✓ one" in shown
    assert "✗ two" in shown
    assert "» three" in shown


def test_the_schema_describes_the_examples(cli: Cli) -> None:
    schema = json.loads(cli.run("plan", "schema").stdout)
    assert "steps" in schema["properties"]
    for example in ("plan.yaml", "release.yaml"):
        assert cli.run("plan", "check", "--offline", str(EXAMPLES / example)).returncode == 0


def test_a_detached_plan_is_seen_step_by_step_and_the_same_key_starts_it_once(cli: Cli) -> None:
    path = plan_file(cli, "seen", sh("first", "true"), sh("hold", "sleep 71", "first"), sh("then", "true", "hold"))
    task_id = detached(cli, path, "--key", "k-seen", "--title", "Seen")
    assert detached(cli, path, "--key", "k-seen", "--title", "Seen") == task_id
    until(lambda: cli.steps(task_id).get("hold") == "running", "the second step runs")
    assert cli.steps(task_id) == {"first": "completed", "hold": "running", "then": "pending"}
    shown = cli.run("status", task_id).stdout
    assert "Seen" in shown
    assert "1 completed" in shown
    assert "1 running" in shown
    assert "hold: running" in shown
    assert [each["id"] for each in cli.json("steps", task_id, "--status", "running")["steps"]] == ["hold"]
    happened = cli.run("events", task_id).stdout
    assert "step_completed        first:" in happened
    assert "step_started          hold:" in happened
    rows = cli.run("steps", task_id).stdout.splitlines()
    assert rows[0].split() == ["STEP", "STATUS", "DONE", "ROLE", "RUN", "TOOK", "TASK", "NOTE"]
    assert [row.split()[:2] for row in rows[1:]] == [["first", "completed"], ["hold", "running"], ["then", "pending"]]
    assert [each["title"] for each in cli.json("list", "--text", "seen")["tasks"]] == ["Seen"]
    cli.run("cancel", task_id)


def test_one_step_is_paused_resumed_and_cancelled(cli: Cli) -> None:
    path = plan_file(cli, "steered", sh("hold", "sleep 72"), sh("then", "true", "hold"), sh("free", "sleep 73"))
    task_id = detached(cli, path)
    until(lambda: bool(marked("sleep\x0072")), "its process runs")
    assert cli.run("pause", task_id, "--step", "hold").returncode == 0
    until(lambda: "T" in {state_of(pid) for pid in marked("sleep\x0072")}, "its process is stopped")
    assert cli.run("resume", task_id, "--step", "hold").returncode == 0
    until(lambda: "T" not in {state_of(pid) for pid in marked("sleep\x0072")}, "its process goes on")
    assert cli.run("cancel", task_id, "--step", "hold").returncode == 0
    until(lambda: cli.steps(task_id)["then"] == "skipped", "what needs it is skipped")
    assert cli.steps(task_id) == {"hold": "cancelled", "then": "skipped", "free": "running"}
    missing = cli.run("cancel", task_id, "--step", "nowhere")
    assert missing.returncode == 125
    assert "nowhere" in missing.stderr
    cli.run("cancel", task_id)


def test_ctrl_c_cancels_the_whole_plan_and_leaves_no_process(cli: Cli) -> None:
    path = plan_file(cli, "ended", sh("a", "sleep 74"), sh("b", "sleep 75"), sh("c", "true", "a", "b"))
    with cli.terminal("run", path) as terminal:
        terminal.until(lambda _: len(marked("sleep\x0074")) > 0)
        terminal.until("0/3 steps")
        terminal.type("\x03")
        assert terminal.finish() == 130
        assert "cancelling; Ctrl-C again leaves at once" in terminal.raw
    assert marked("sleep\x0074") == marked("sleep\x0075") == []


def test_a_watched_plan_shows_its_steps_and_is_left_alone(cli: Cli) -> None:
    task_id = detached(cli, plan_file(cli, "watched", sh("held", "sleep 76")))
    until(lambda: cli.steps(task_id)["held"] == "running", "it runs")
    with cli.terminal("status", "--watch", task_id) as terminal:
        terminal.until("0/1 steps")
        assert any("held" in line and "running" in line for line in terminal.screen.text())
        terminal.type("\x03")
        assert terminal.finish() == 130
    assert cli.status(task_id) == "running"
    cli.run("cancel", task_id)


def test_the_plans_of_the_readme_do_what_they_say(cli: Cli) -> None:
    readme = EXAMPLES.parent / "README.md"
    section = readme.read_text().partition("## Plans")[2].partition("\n## ")[0]
    plan, commands = re.findall(r"```(?:yaml|sh)\n(.*?)```", section, re.DOTALL)[:2]
    (cli.cwd / "readme.yaml").write_text(plan)
    assert json.loads(cli.run("run", "readme.yaml").stdout)["files"] > 0
    here = Cli(cli.environ, EXAMPLES.parent)
    for line in commands.splitlines():
        arguments = shlex.split(line, comments=True)[1:]
        # It asks: test_the_release_asks_in_the_terminal_retries_falls_back_and_goes_on
        if "examples/release.yaml" not in arguments:
            done = here.run(*arguments)
            assert (done.returncode, bool(done.stdout)) == (0, True), (line, done.stderr)


def test_a_plan_takes_variables_and_nothing_of_a_role(cli: Cli) -> None:
    path = plan_file(
        cli, "variables",
        {"id": "say", "role": "command", "inputs": {"argv": ["echo", "${variables.what}"]}},
        variables={"what": "nothing", "many": 1}, output={"what": "${variables.what}", "many": "${variables.many}"},
    )  # fmt: skip
    (cli.cwd / "what.txt").write_text("from a file")
    done = cli.run("run", "--plan", path, "--set", "what=@what.txt", "--set", "many:=[1, 2]")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"what": "from a file", "many": [1, 2]}
    for arguments in ((path, "--role", "survey", "--plan", path), ("--plan", path, "--", "true")):
        assert cli.run("run", *arguments).returncode == 2
    assert cli.run("run", "--role", "survey", "--set", "a=b").returncode == 2


def test_a_step_that_is_put_back_asks_again(cli: Cli) -> None:
    path = plan_file(cli, "twice", sh("gate", "sleep 78", approval="Shall it begin?"))
    with cli.terminal("run", path) as terminal:
        terminal.until("yes or no?")
        terminal.type("yes\n")
        terminal.until("Answered; it goes on")
        task_id = cli.json("list", "--text", "twice")["tasks"][0]["task_id"]
        until(lambda: cli.steps(task_id)["gate"] == "running", "it goes on")
        checkpoint = cli.json("checkpoint", "create", task_id)["checkpoint_id"]
        cli.json("checkpoint", "restore", checkpoint)
        terminal.until(lambda shown: sum("Shall it begin?" in line for line in shown.screen.text()) == 2)
        terminal.type("no\n")
        assert terminal.finish() == 1
    assert cli.steps(task_id) == {"gate": "failed"}


def test_a_plan_that_waits_for_an_answer_goes_on_under_the_next_daemon(fresh: Cli) -> None:
    path = plan_file(
        fresh, "asks",
        sh("once", "echo x >> once"), sh("gate", "true", "once", approval="Go on?"), sh("last", "true", "gate"),
    )  # fmt: skip
    task_id = detached(fresh, path)
    until(lambda: fresh.steps(task_id)["gate"] == "waiting", "it asks")
    assert "waits for an answer" in fresh.run("steps", task_id).stdout
    stopped = fresh.run("daemon", "stop")
    assert stopped.returncode == 0, stopped.stderr
    assert "interrupted: gate" not in stopped.stdout
    until(lambda: bool(fresh.json("answer", task_id)["inputs"]), "it asks the next daemon's callers, too")
    assert fresh.run("answer", task_id, "--approve").returncode == 0
    until(lambda: fresh.status(task_id) == "completed", "it goes on")
    assert (fresh.cwd / "once").read_text() == "x\n"


def test_a_daemon_that_is_stopped_keeps_the_plan_and_names_the_step_that_it_interrupts(fresh: Cli) -> None:
    task_id = detached(fresh, plan_file(fresh, "stays", sh("held", "sleep 79")))
    until(lambda: fresh.steps(task_id)["held"] == "running", "it runs")
    refused = fresh.run("daemon", "stop")
    assert refused.returncode != 0
    stopped = fresh.run("daemon", "stop", "--now").stdout
    assert "kept for the next start, running: stays" in stopped
    assert "interrupted: held" in stopped


def test_a_hostile_name_is_shown_and_not_obeyed(cli: Cli) -> None:
    script = r"printf '\033[31mred\033]0;owned\007' >&2; exit 1"
    path = plan_file(cli, "hostile", sh("a", script), sh("b", "true", "a"))
    done = cli.run("run", path)
    assert done.returncode == 1
    assert "red" in done.stderr
    task_id = cli.json("list", "--text", "hostile")["tasks"][0]["task_id"]
    for command in (["status", task_id], ["steps", task_id], ["plan", "show", task_id]):
        assert "\x1b" not in cli.run(*command).stdout
    assert "\x1b" not in done.stderr


def test_a_plan_is_started_without_the_weight_of_the_server(cli: Cli) -> None:
    path = plan_file(cli, "light", sh("a", "true"))
    script = (
        "import sys; from vespera_exec.cli.app import main; code = main(sys.argv[1:]);"
        "print(code, [name for name in ('mcp', 'pydantic', 'uvicorn') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "run", "-q", path], env=cli.environ, cwd=cli.cwd, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_the_metrics_of_a_plan_count_its_steps_and_are_null_where_nothing_is_known(cli: Cli) -> None:
    path = plan_file(cli, "measured", sh("good", "true"), sh("bad", "exit 3"), sh("fine", "true"))
    ended = json.loads(cli.run("run", path, "--json").stdout)
    seen = cli.json("metrics", str(ended["task_id"]))
    of_run = seen["execution"]
    assert (seen["total_executions"], seen["failed"]) == (1, 1)
    assert of_run["success_rate"] == of_run["error_rate"] * 2 == 2 / 3
    assert of_run["total_duration"] >= of_run["effective_duration"] > 0
    unknown = ("total_cost", "resource_efficiency", "quality_score")
    assert [of_run[name] for name in unknown] == [None, None, None]
    lines = cli.run("metrics", str(ended["task_id"])).stdout.splitlines()
    assert "runs        1: 1 failed" in lines
    assert "completed   67%" in lines
    assert not [line for line in lines if line.startswith(("cost", "quality"))]
