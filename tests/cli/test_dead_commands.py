"""`dead`: what has failed for good is listed, put back and taken off the list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cli_harness import until

if TYPE_CHECKING:
    from cli_harness import Cli


NEEDY = r"""name: needy
runner: process
argv: [sh, -c, 'printf "\\033[31mno \\007%s" "$0" >&2; test -e "$0"', "{inputs.file}"]
inputs: {file: {type: string}}
retry: {max_retries: 9, retry_on: [EXIT_NONZERO], backoff_seconds: 0}
"""
"""Fails until its file is there; its task has used up its retries then."""


def failed(cli: Cli, title: str, needs: str) -> str:
    """The id of a task that has failed for good, for want of a file."""
    roles = Path(cli.environ["VESPERA_ROLES_DIR"])
    roles.mkdir(exist_ok=True)
    (roles / "needy.yaml").write_text(NEEDY)
    file = str(cli.cwd / needs)
    done = cli.run("run", "--json", "--role", "needy", "--input", f"file={file}", "--title", title)
    assert done.returncode != 0
    return str(json.loads(done.stdout)["task_id"])


def listed(cli: Cli) -> list[str]:
    return [each["task_id"] for each in cli.json("dead", "list", "--limit", "200")["dead_letters"]]


def test_an_empty_list_says_so(fresh: Cli) -> None:
    assert fresh.run("dead", "list").stdout == "nothing has failed for good\n"
    assert fresh.json("dead", "list")["dead_letters"] == []
    none = fresh.run("dead", "requeue", "--all")
    assert (none.returncode, none.stdout) == (0, "")
    assert "nothing was requeued" in none.stderr


def test_a_task_that_failed_is_listed_with_its_error(cli: Cli) -> None:
    task_id = failed(cli, "Broken", "never")
    shown = cli.run("dead", "list").stdout
    assert shown.splitlines()[0].split() == ["TASK", "TRIES", "ROLE", "FAILED", "TITLE", "ERROR"]
    (row,) = [line for line in shown.splitlines() if line.startswith(task_id[:8])]
    assert row.split()[1:3] == ["3", "needy"]
    assert "(EXIT_NONZERO)" in row
    assert "\x1b" not in shown


def test_one_is_put_back_and_is_gone_from_the_list(cli: Cli) -> None:
    task_id = failed(cli, "mended", "mended")
    (cli.cwd / "mended").touch()
    done = cli.run("dead", "requeue", task_id)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"task {task_id} session ")
    until(lambda: cli.status(task_id) == "completed", "it succeeds this time")
    assert task_id not in listed(cli)


def test_many_are_put_back_at_once(fresh: Cli) -> None:
    ids = [failed(fresh, f"one of many {number}", "all-mended") for number in range(3)]
    (fresh.cwd / "all-mended").touch()
    answer = fresh.json("dead", "requeue", "--all")
    assert sorted(each["task_id"] for each in answer["requeued"]) == sorted(ids)
    until(lambda: all(fresh.status(each) == "completed" for each in ids), "all succeed this time")
    assert listed(fresh) == []


def test_one_is_taken_off_the_list_and_what_is_known_of_it_stays(cli: Cli) -> None:
    task_id = failed(cli, "given up", "never")
    assert cli.run("dead", "discard", task_id).stdout == f"task {task_id}\n"
    assert task_id not in listed(cli)
    assert "given up" in cli.run("status", task_id).stdout
    assert cli.status(task_id) == "failed"


def test_what_is_not_in_the_list_is_refused_by_name_and_the_exit_code_says_so(cli: Cli) -> None:
    fine = cli.task("--", "true")
    until(lambda: cli.status(fine) == "completed", "it ends")
    done = cli.run("dead", "requeue", fine)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"not requeued: {fine}: " in done.stderr
    assert cli.run("dead", "requeue").returncode == 125
    assert cli.run("dead", "discard", "--all", fine).returncode == 125


def test_a_plan_that_failed_is_put_back_where_it_stood(cli: Cli) -> None:
    steps = [
        {"id": "once", "role": "command", "inputs": {"argv": ["sh", "-c", "echo x >> once"]}},
        {
            "id": "later", "role": "command", "depends_on": ["once"],
            "inputs": {"argv": ["test", "-e", "plan-mended"]},
        },
    ]  # fmt: skip
    (cli.cwd / "dead.json").write_text(json.dumps({"name": "dead", "steps": steps}))
    ended = json.loads(cli.run("run", "dead.json", "--json").stdout)
    assert ended["exit_code"] == 1
    (cli.cwd / "plan-mended").touch()
    done = cli.run("dead", "requeue", ended["task_id"])
    assert done.returncode == 0, done.stderr
    until(lambda: cli.status(ended["task_id"]) == "completed", "it goes on and succeeds")
    assert (cli.cwd / "once").read_text() == "x\n"
