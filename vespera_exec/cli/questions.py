"""A question of the work on a terminal: its form, answered line by line."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from vespera_exec.cli.text import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.model.events import Json

DECLINE: Final = "/no"
LATER: Final = "/later"
_YES: Final = ("y", "yes", "true", "1")
_NO: Final = ("n", "no", "false", "0")
_SHORT_ID: Final = 8


class Form:
    """One question, as the daemon shows it. Show `prompt`, give `take` each line, until it is `over`.

    `answer` is the body that answers it; None while it is asked, and for a question that was left for later.
    """

    def __init__(self, question: Mapping[str, Json]) -> None:
        self.question = question
        self.key = str(question["key"])
        self.over = False
        self.answer: dict[str, Json] | None = None
        schema: Mapping[str, Json] = question["schema"]
        self._required: Sequence[str] = schema.get("required") or ()
        fields: Mapping[str, Mapping[str, Json]] = schema.get("properties") or {}
        self._fields = list(fields.items())
        self._decides = question["kind"] == "approval" or not self._fields
        self._content: dict[str, Json] = {}
        self.heading = [
            f"{shown(question['message'], 2000)}",
            f"({shown(self.key, 64)}; {LATER} leaves it open{'' if self._decides else f', {DECLINE} declines it'})",
        ]

    @property
    def prompt(self) -> list[str]:
        """What to show before the next line is typed."""
        if self._decides:
            return ["yes or no?"]
        name, field = self._fields[0]
        title = shown(field.get("title") or name, 100)
        about = f": {shown(field['description'], 500)}" if field.get("description") else ""
        offered = [f"  {number} {shown(each, 100)}" for number, each in enumerate(_titles(field), 1)]
        return [f"{title} ({self._kind(name, field)}){about}", *offered]

    def take(self, line: str) -> str:
        """The next line that was typed. Returns what is wrong with it; empty where it was taken."""
        text = line.strip()
        if text == LATER:
            self.over = True
        elif self._decides:
            return self._decide(text.lower())
        elif text == DECLINE:
            self._end("decline")
        else:
            return self._fill(text)
        return ""

    def _decide(self, text: str) -> str:
        if text in _NO:
            self._end("decline")
        elif text not in _YES:
            return "type yes or no"
        elif self._fields:
            self._decides = False
        else:
            self._end("accept")
        return ""

    def _fill(self, text: str) -> str:
        name, field = self._fields[0]
        if text:
            try:
                self._content[name] = value_of(field, text)
            except ValueError as error:
                return str(error)
        elif name in self._required and "default" not in field:
            return "this one is needed"
        self._fields.pop(0)
        if not self._fields:
            self._end("accept")
        return ""

    def _end(self, action: str) -> None:
        content = {"content": self._content} if action == "accept" and self._content else {}
        self.answer, self.over = {"key": self.key, "action": action, **content}, True

    def _kind(self, name: str, field: Mapping[str, Json]) -> str:
        kind = {"boolean": "yes or no", "array": "several, with commas", "string": field.get("format") or "text"}.get(
            str(field["type"]), str(field["type"])
        )
        parts = ["one of" if field["type"] == "string" and _choices(field) else kind]
        for word, least, most in (("", "minimum", "maximum"), ("characters ", "minLength", "maxLength")):
            if least in field or most in field:
                parts.append(f"{word}{field.get(least, '')} to {field.get(most, '')}".replace(" to ", "..."))
        if "default" in field:
            parts.append(f"Enter for {shown(field['default'], 100)}")
        elif name not in self._required:
            parts.append("Enter for none")
        return ", ".join(parts)


def value_of(field: Mapping[str, Json], text: str) -> Json:
    """What was typed, as a value of the field's type; a choice also by its number.

    Raises:
        ValueError: says what is expected instead.
    """
    match field["type"]:
        case "boolean":
            if text.lower() not in (*_YES, *_NO):
                raise ValueError("type yes or no")
            return text.lower() in _YES
        case "integer" | "number" as kind:
            try:
                return int(text) if kind == "integer" else float(text)
            except ValueError:
                raise ValueError("type a whole number" if kind == "integer" else "type a number") from None
        case "array":
            return [_chosen(field, each.strip()) for each in text.split(",") if each.strip()]
        case _:
            return _chosen(field, text) if _choices(field) else text


def how_to_answer(task_id: str, question: Mapping[str, Json]) -> str:
    """The command that answers it."""
    schema: Mapping[str, Json] = question["schema"]
    command = f"vespera-exec answer {task_id[:_SHORT_ID]} --key {shlex.quote(str(question['key']))}"
    if question["kind"] == "approval":
        return f"{command} --approve (or --reject)"
    fields: Mapping[str, Json] = schema.get("properties") or {}
    given = " ".join(f"--set {shlex.quote(name)}=..." for name in fields)
    return f"{command} {given or '--approve'} (or --reject)"


def asked(task_id: str, question: Mapping[str, Json]) -> str:
    """A question for somebody who is not asked in a dialog: what, and how to answer it."""
    return f"asks: {shown(question['message'], 500)}; {how_to_answer(task_id, question)}"


def _chosen(field: Mapping[str, Json], text: str) -> str:
    choices = _choices(field)
    if text in choices:
        return text
    if text.isdecimal() and 1 <= int(text) <= len(choices):
        return choices[int(text) - 1]
    raise ValueError(f"{shown(text, 40)} is none of them; type one, or its number")


def _choices(field: Mapping[str, Json]) -> list[str]:
    offered: Mapping[str, Json] = field.get("items", field)
    titled = offered.get("oneOf", offered.get("anyOf"))
    return [each["const"] for each in titled] if titled is not None else list(offered.get("enum", ()))


def _titles(field: Mapping[str, Json]) -> list[str]:
    offered: Mapping[str, Json] = field.get("items", field)
    titled = offered.get("oneOf", offered.get("anyOf"))
    if titled is not None:
        return [" ".join(dict.fromkeys((each["const"], each["title"]))) for each in titled]
    return list(offered.get("enumNames") or offered.get("enum", ()))
