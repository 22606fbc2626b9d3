"""`answer`: what waits for somebody, and the answers to it."""

from __future__ import annotations

import json
import os
import select
import sys
import termios
from typing import TYPE_CHECKING, cast

import click

from vespera_exec.cli import output
from vespera_exec.cli.client import Daemon, DaemonError, data_directory, segment
from vespera_exec.cli.questions import Form, asked
from vespera_exec.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.cli.display import Display
    from vespera_exec.model.events import Json

_STDIN = 0
_LINE_BYTES = 65_536


@click.command()
@click.argument("any_id", metavar="[ID]", required=False)
@click.option("--key", help="Which question; needed where several are open.")
@click.option("--approve", is_flag=True, help="Yes, also to a form as it stands.")
@click.option("--reject", "--decline", "reject", is_flag=True, help="No.")
@click.option("--set", "given", metavar="NAME=VALUE", multiple=True, help="A field; also NAME=@FILE and NAME:=JSON.")
@click.option("--content", metavar="JSON", help="All fields, as one object.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def answer(
    *,
    any_id: str | None,
    key: str | None,
    approve: bool,
    reject: bool,
    given: tuple[str, ...],
    content: str | None,
    as_json: bool,
) -> None:
    """Answer what the work asks.

    Without ID: what waits for an answer. With ID alone, in a terminal: asks field by field.
    """
    answers = approve or reject or bool(given) or content is not None
    if reject and (approve or given or content is not None):
        raise InvalidInput("--reject takes no answer with it", hint="leave one of them out")
    with Daemon(data_directory()) as daemon:
        if any_id is None:
            if answers or key is not None:
                raise InvalidInput("which task is answered?", hint="vespera-exec answer ID ...")
            _show_all(daemon.get("/inputs", limit=200), as_json=as_json)
            return
        path = f"/tasks/{segment(any_id)}/inputs"
        if answers:
            body: dict[str, Json] = {"action": "decline" if reject else "accept"} | ({"key": key} if key else {})
            filled = _content(daemon, path, key, given, content)
            _show(_given(daemon, path, body | ({"content": filled} if filled is not None else {})), as_json=as_json)
            return
        view = daemon.get(path)
        if key is not None:
            view["inputs"] = [each for each in view["inputs"] if each["key"] == key]
        if as_json:
            output.document(view)
        elif view["inputs"] and can_ask():
            _ask_all(daemon, path, view["inputs"])
        else:
            output.lines([asked(str(view["task_id"]), each) for each in view["inputs"]] or [_nothing(view, key)])


class Prompter:
    """Asks what a run that is being followed asks: in the terminal, else by saying how it is answered.

    It never blocks: `descriptors` become readable when a line was typed, which `listen` takes.
    """

    def __init__(self, daemon: Daemon, task_id: str, display: Display) -> None:
        self._daemon = daemon
        self._task_id = task_id
        self._display = display
        self._form: Form | None = None
        self._waiting: list[Mapping[str, Json]] = []
        self._said: set[tuple[str, str]] = set()

    @property
    def is_asking(self) -> bool:
        return self._form is not None

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (_STDIN,) if self._form is not None else ()

    def take_events(self, events: Sequence[Mapping[str, Json]]) -> None:
        """Looks again at what is open where one of these says that it has changed."""
        if not any(_may_ask(each) or _ends(each) for each in events):
            return
        view = self._daemon.get(f"/tasks/{self._task_id}/inputs")
        still = {_asking(each) for each in view["inputs"]}
        if self._form is not None and _asking(self._form.question) not in still:
            self._form = None
            self._say("vespera-exec: answered elsewhere")
        known = self._said
        self._waiting = [each for each in self._waiting if _asking(each) in still]
        self._waiting += [each for each in view["inputs"] if _asking(each) not in known]
        known.update(still)
        self._next()

    def listen(self) -> None:
        """Takes a line that was typed, if there is one."""
        if self._form is None or not select.select([_STDIN], [], [], 0)[0]:
            return
        line = os.read(_STDIN, _LINE_BYTES)
        problem = self._form.take(line.decode(errors="replace")) if line else ""
        if problem:
            self._say(problem)
        elif self._form.over or not line:
            self._finish(self._form)
            return
        self._prompt()

    def _finish(self, form: Form) -> None:
        self._form = None
        if form.answer is None:
            self._say(f"vespera-exec: left open; vespera-exec answer {self._task_id[:8]}")
        else:
            try:
                answered = _given(self._daemon, f"/tasks/{self._task_id}/inputs", form.answer)
                self._say(f"vespera-exec: {answered['message']}")
            except DaemonError as error:
                self._say(f"vespera-exec: {error.message}")
                if error.error_code == "INVALID_INPUT":
                    self._waiting.insert(0, form.question)
        self._next()

    def _next(self) -> None:
        while self._waiting and self._form is None:
            question = self._waiting.pop(0)
            if not can_ask():
                self._say(f"vespera-exec: {asked(self._task_id, question)}")
                continue
            self._form = Form(question)
            # What was typed before the question was seen is no answer to it.
            termios.tcflush(_STDIN, termios.TCIFLUSH)
            for line in self._form.heading:
                self._say(line)
            self._prompt()

    def _prompt(self) -> None:
        for line in self._form.prompt if self._form is not None else ():
            self._say(line)

    def _say(self, text: str) -> None:
        # Also where only the work's own output is wanted: it would wait for ever.
        if self._display.moving:
            self._display.say(text)
        else:
            output.remark(text)


def can_ask() -> bool:
    """Somebody is there to be asked: we have the terminal, and what is typed comes to us."""
    try:
        return sys.stderr.isatty() and os.isatty(_STDIN) and os.tcgetpgrp(_STDIN) == os.getpgrp()
    except OSError:
        return False


def _ask_all(daemon: Daemon, path: str, questions: Sequence[Mapping[str, Json]]) -> None:
    waiting = list(questions)
    while waiting:
        form = Form(waiting.pop(0))
        _say(form.heading)
        while not form.over:
            _say(form.prompt)
            typed = sys.stdin.readline()
            if not typed:
                return
            if problem := form.take(typed):
                _say([problem])
        if form.answer is None:
            continue
        try:
            _show(_given(daemon, path, form.answer), as_json=False)
        except DaemonError as error:
            if error.error_code != "INVALID_INPUT":
                raise
            _say([f"vespera-exec: {error.message}"])
            waiting.insert(0, form.question)


def _say(lines: Sequence[str]) -> None:
    for each in lines:
        output.remark(each)


def _given(daemon: Daemon, path: str, body: Mapping[str, Json]) -> Json:
    return daemon.post(path, body).body


def _content(daemon: Daemon, path: str, key: str | None, given: Sequence[str], content: str | None) -> Json:
    if given and content is not None:
        raise InvalidInput("--set and --content say the same thing", hint="leave one of them out")
    if content is not None:
        try:
            read = json.loads(content)
        except (ValueError, RecursionError):
            read = None
        if not isinstance(read, dict):
            raise InvalidInput("--content is not a JSON object", hint='--content \'{"name": "value"}\'')
        return cast("Json", read)
    if not given:
        return None
    from vespera_exec.cli.inputs import parse_inputs

    questions = [each for each in daemon.get(path)["inputs"] if key in (None, each["key"])]
    return parse_inputs(given, questions[0]["schema"] if len(questions) == 1 else None)


def _show(answered: Mapping[str, Json], *, as_json: bool) -> None:
    if as_json:
        output.document(answered)
    elif answered["success"]:
        output.line(f"{answered['status']}: {answered['message']} (session {answered['session_id']})")
    if not answered["success"]:
        raise DaemonError("NOT_ANSWERED", f"{answered['message']}: {answered['reason']}")


def _show_all(found: Mapping[str, Json], *, as_json: bool) -> None:
    from vespera_exec.cli import pages

    if as_json:
        output.document(found)
    else:
        output.lines(pages.questions(found, output.width()))


def _nothing(view: Mapping[str, Json], key: str | None) -> str:
    return f"it does not ask {key}" if key else f"it asks nothing ({view['status']})"


def _asking(question: Mapping[str, Json]) -> tuple[str, str]:
    """Which question it is, and when it was asked: another run of a step may ask it once more."""
    return str(question["key"]), str(question["asked_at"])


def _may_ask(event: Mapping[str, Json]) -> bool:
    """What is open may be other than before: a question of its own, or of a step of a plan."""
    return str(event.get("type")).startswith(("approval_", "step_waiting", "step_failed", "step_cancelled"))


def _ends(event: Mapping[str, Json]) -> bool:
    change: Mapping[str, Json] = event.get("status") or {}
    return event.get("type") == "status_change" and bool(change.get("old") == "paused")
