"""`answer`, and a `run` in the foreground that meets a question."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from cli_harness import until
from deadlines import WITHIN

from vespera_exec.cli.questions import Form

if TYPE_CHECKING:
    from pathlib import Path

    from cli_harness import Cli

FORM = {
    "type": "object",
    "properties": {
        "target": {"type": "string", "enum": ["staging", "production"], "title": "Where"},
        "copies": {"type": "integer", "maximum": 5, "default": 1},
        "force": {"type": "boolean"},
    },
    "required": ["target"],
}

# Asks for an approval, then fills the form; says what it was told.
_WORK = """
import json, os
task = json.load(open(os.environ["VESPERA_TASK_FILE"]))
out = os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w")
told = task["answers"]
if "sure" not in told:
    ask = {"key": "sure", "kind": "approval", "message": "Are you sure?"}
elif "where" not in told:
    ask = {"key": "where", "message": "Where to?", "schema": FORM}
else:
    print(json.dumps(told["where"]))
    ask = None
if ask:
    out.write(json.dumps({"ask": ask}) + "\\n")
"""


@pytest.fixture
def asker(cli: Cli, place: Path) -> str:
    folder = place / "roles"
    if not folder.exists():
        folder.mkdir()
        (folder / "work.py").write_text(f"FORM = {FORM!r}\n{_WORK}")
        argv = json.dumps([sys.executable, "-S", str(folder / "work.py")])
        (folder / "asker.yaml").write_text(f"name: asker\nrunner: process\nargv: {argv}\n")
    return "asker"


def asking(cli: Cli, role: str) -> str:
    """The id of a task whose work waits for its approval."""
    task_id = cli.task("--role", role, "It asks")
    asks(cli, task_id, "sure")
    return task_id


def asks(cli: Cli, task_id: str, key: str) -> None:
    def open_keys() -> list[str]:
        return [each["key"] for each in cli.ask(f"/tasks/{task_id}")["inputs"] or ()]

    until(lambda: open_keys() == [key], f"it asks {key}")


def test_answers_by_flags_take_a_run_to_its_end(cli: Cli, asker: str) -> None:
    task_id = asking(cli, asker)
    listed = cli.run("answer")
    assert (listed.returncode, "Are you sure?" in listed.stdout, task_id[:8] in listed.stdout) == (0, True, True)
    (row,) = [each for each in cli.json("answer")["inputs"] if each["task_id"] == task_id]
    assert row["input"]["schema"] == {"type": "object", "properties": {}}
    shown = cli.run("status", task_id).stdout
    assert f"vespera-exec answer {task_id[:8]} --key sure --approve (or --reject)" in shown
    assert cli.run("answer", task_id).stdout.startswith("asks: Are you sure?; vespera-exec answer")
    approved = cli.run("answer", task_id, "--approve")
    assert (approved.returncode, approved.stdout.partition(":")[0]) == (0, "running"), approved
    asks(cli, task_id, "where")
    answered = cli.json("answer", task_id, "--key", "where", "--set", "target=production", "--set", "copies=2")
    assert (answered["accepted"], answered["open"]) == (["where"], [])
    until(lambda: cli.status(task_id) == "completed", "it has ended")
    said = json.loads(cli.run("logs", task_id).stdout)
    assert said == {"action": "accept", "content": {"target": "production", "copies": 2}}


def test_a_rejected_approval_ends_the_run(cli: Cli, asker: str) -> None:
    task_id = asking(cli, asker)
    cli.run("answer", task_id, "--reject")
    until(lambda: cli.status(task_id) == "failed", "it has ended")
    assert "APPROVAL_REJECTED" in cli.run("result", task_id).stderr


@pytest.mark.parametrize(
    ("flags", "code", "why"),
    [
        (["--set", "target=nowhere"], "INVALID_INPUT", "'target' is one of staging, production"),
        (["--set", "copies=2"], "INVALID_INPUT", "'target' is missing"),
        (["--content", "[1]"], "INVALID_INPUT", "--content is not a JSON object"),
        (["--content", "{}", "--set", "a=1"], "INVALID_INPUT", "say the same thing"),
        (["--reject", "--approve"], "INVALID_INPUT", "--reject takes no answer"),
        (["--key", "sure", "--approve"], "NOT_ANSWERED", "it asks where"),
        (["--key", "whence", "--approve"], "NOT_ANSWERED", "it asks where"),
    ],
)
def test_what_is_no_answer_is_refused_and_the_question_stays(
    cli: Cli, at_the_form: str, flags: list[str], code: str, why: str
) -> None:
    refused = cli.run("answer", at_the_form, *flags)
    assert (refused.returncode, refused.stdout) == (125, "")
    assert why in refused.stderr
    assert f"({code})" in refused.stderr
    asks(cli, at_the_form, "where")


@pytest.fixture(scope="module")
def _form_of(cli: Cli) -> dict[str, str]:
    return {}


@pytest.fixture
def at_the_form(cli: Cli, asker: str, _form_of: dict[str, str]) -> str:
    """The id of a task that waits for its form; the same for all tests that leave it so."""
    if not _form_of:
        _form_of["task_id"] = asking(cli, asker)
        cli.run("answer", _form_of["task_id"], "--approve")
        asks(cli, _form_of["task_id"], "where")
    return _form_of["task_id"]


def test_a_task_that_asks_nothing_says_so(cli: Cli, asker: str) -> None:
    task_id = cli.task("--", "true")
    until(lambda: cli.status(task_id) == "completed", "it has ended")
    assert cli.run("answer", task_id).stdout == "it asks nothing (completed)\n"
    late = cli.run("answer", task_id, "--approve")
    assert (late.returncode, "no question is open (CONFLICT)" in late.stderr) == (125, True)
    assert cli.run("answer", "--approve").returncode == 125
    assert cli.json("answer", task_id)["inputs"] == []


def test_in_a_terminal_it_asks_field_by_field(cli: Cli, at_the_form: str) -> None:
    with cli.terminal("answer", at_the_form) as terminal:
        terminal.until("Where (one of)")
        terminal.type("the moon\n")
        terminal.until("the moon is none of them")
        terminal.type("2\n")
        terminal.until("copies (integer")
        terminal.type("9\n")
        terminal.until("force (yes or no, Enter for none)")
        terminal.type("\n")
        terminal.until("'copies' is at most 5")
        terminal.type("/later\n")
        assert terminal.finish() == 0
    asks(cli, at_the_form, "where")


def test_a_run_in_a_terminal_asks_and_goes_on(cli: Cli, asker: str) -> None:
    with cli.terminal("run", "--role", asker, "It asks") as terminal:
        terminal.until("yes or no?")
        terminal.type("perhaps\n")
        terminal.until("type yes or no")
        terminal.type("yes\n")
        terminal.until("Where (one of)")
        terminal.type("staging\n")
        terminal.until("Enter for 1")
        terminal.type("\n")
        terminal.until("force (")
        terminal.type("no\n")
        terminal.until("completed in")
        assert terminal.finish() == 0
        shown = "".join(terminal.screen.text())
    while_typed = terminal.raw.partition("yes or no?")[2].partition("type yes or no")[0]
    assert "paused" not in while_typed  # nothing is drawn where somebody types
    assert '"content": {"target": "staging", "copies": 1, "force": false}' in shown


def test_what_was_typed_before_the_question_is_no_answer_to_it(cli: Cli, asker: str) -> None:
    with cli.terminal("run", "--role", asker, "It asks") as terminal:
        terminal.type("yes\n")
        terminal.until("yes or no?")
        task_id = newest(cli)
        terminal.type("perhaps\n")
        terminal.until("type yes or no")
        asks(cli, task_id, "sure")
        terminal.type("no\n")
        assert terminal.finish() == 1


def test_a_question_in_a_terminal_that_is_answered_elsewhere_is_taken_back(cli: Cli, asker: str) -> None:
    with cli.terminal("run", "--role", asker, "--key", "elsewhere", "It asks") as terminal:
        terminal.until("yes or no?")
        task_id = newest(cli)
        assert cli.run("answer", task_id, "--approve").returncode == 0
        terminal.until("answered elsewhere")
        terminal.until("Where (one of)")
        terminal.type("\x03")
        assert terminal.finish() == 130
    assert cli.status(task_id) == "cancelled"


def test_without_a_terminal_a_run_says_how_it_is_answered_and_waits(cli: Cli, asker: str) -> None:
    process = cli.start("run", "--quiet", "--role", asker, "It asks")
    assert process.stderr is not None
    told = process.stderr.readline()
    assert told.startswith("vespera-exec: asks: Are you sure?; vespera-exec answer ")
    cli.run("answer", told.partition("vespera-exec answer ")[2].split()[0], "--approve")
    told = process.stderr.readline()
    assert "Where to?" in told
    assert "--set target=... --set copies=... --set force=..." in told
    cli.run("answer", newest(cli), "--reject")
    out, _ = process.communicate(timeout=WITHIN)
    assert (process.returncode, json.loads(out)["action"]) == (0, "decline")


def newest(cli: Cli) -> str:
    return str(cli.json("answer")["inputs"][-1]["task_id"])


def test_a_form_takes_every_type_and_leaves_out_what_was_not_typed() -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "title": "Your name", "description": "As it is shown"},
            "age": {"type": "integer", "minimum": 1},
            "share": {"type": "number"},
            "colour": {"type": "string", "oneOf": [{"const": "r", "title": "Red"}, {"const": "b", "title": "Blue"}]},
            "tags": {"type": "array", "items": {"type": "string", "enum": ["x", "y", "z"]}},
            "ok": {"type": "boolean"},
            "note": {"type": "string"},
        },
        "required": ["name"],
    }
    form = Form({"key": "all", "kind": "form", "message": "Tell me", "schema": schema})
    assert form.prompt == ["Your name (text): As it is shown"]
    typed = [
        ("", "this one is needed"), ("Ada", ""), ("old", "type a whole number"), ("36", ""), ("x", "type a number"),
        ("0.5", ""), ("3", "3 is none of them; type one, or its number"), ("2", ""), ("x, 3", ""),
        ("maybe", "type yes or no"), ("Y", ""), ("", ""),
    ]  # fmt: skip
    for line, problem in typed:
        assert form.take(f"{line}\n") == problem
    assert form.over
    content = {"name": "Ada", "age": 36, "share": 0.5, "colour": "b", "tags": ["x", "z"], "ok": True}
    assert form.answer == {"key": "all", "action": "accept", "content": content}


@pytest.mark.parametrize(
    ("kind", "typed", "answer"),
    [
        ("form", "/no", {"key": "k", "action": "decline"}),
        ("form", "/later", None),
        ("approval", "/later", None),
        ("approval", "n", {"key": "k", "action": "decline"}),
    ],
)
def test_a_question_is_declined_or_left_open(kind: str, typed: str, answer: dict[str, str] | None) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    form = Form({"key": "k", "kind": kind, "message": "?", "schema": schema})
    assert form.take(typed) == ""
    assert (form.over, form.answer) == (True, answer)
