"""What the command line refuses before anything is decided, and output that cannot be written."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from cli_harness import PROGRAM
from deadlines import WITHIN

if TYPE_CHECKING:
    from cli_harness import Cli


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--", ""], "there is no command after --"),
        (["--", "", "argument"], "there is no command after --"),
        (["--key", "", "--", "true"], "the key is empty"),
        (["--title", "", "--", "true"], "the title is empty"),
        (["--title", " ", "--", "true"], "the title is empty"),
        (["--role", "survey", "--title", "", "Some", "words"], "the title is empty"),
        (["--role", "survey", ""], "the title is empty"),
    ],
)
def test_what_is_empty_is_refused_and_leaves_no_task(cli: Cli, arguments: list[str], complaint: str) -> None:
    before = cli.json("list")["total"]
    done = cli.run("run", *arguments)
    assert (done.returncode, done.stdout) == (125, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vespera-exec: {complaint} (INVALID_INPUT)")
    assert cli.json("list")["total"] == before


@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "--json"], ["roles"], ["run", "-q", "--", "echo", "something"]]
)
def test_a_full_disk_behind_stdout_is_named_with_exit_code_125(cli: Cli, arguments: list[str]) -> None:
    cli.run("run", "-q", "--", "true")
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [PROGRAM, *arguments], env=cli.environ, cwd=cli.cwd, stdout=full, stderr=subprocess.PIPE, timeout=WITHIN
        )
    assert done.returncode == 125
    said = done.stderr.decode().splitlines()
    assert [line for line in said if "lost sight" not in line] == [
        "vespera-exec: cannot write the output: No space left on device (CANNOT_WRITE)"
    ]


def test_a_key_with_another_request_is_a_conflict(cli: Cli) -> None:
    given = ("--key", "stands-for-true", "--", "true")
    assert cli.task(*given) == cli.task(*given)
    done = cli.run("run", "--key", "stands-for-true", "--", "false")
    assert (done.returncode, done.stdout) == (125, "")
    (line,) = done.stderr.splitlines()
    assert "(CONFLICT)" in line
    assert "use another key" in line
