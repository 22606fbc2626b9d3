"""What a role asks of a person while it works, and what was answered: folded from the log."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

from vespera_exec.errors import InvalidInput
from vespera_exec.model.enums import EventType
from vespera_exec.model.events import ExecutionEvent, Json, mapping
from vespera_exec.model.forms import EMPTY, checked_schema, completed
from vespera_exec.model.jsonable import clean_text
from vespera_exec.model.rows import iso, stamp

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

MAX_QUESTIONS: Final = 32
"""In one run, the answered ones included."""
MAX_MESSAGE_CHARACTERS: Final = 2000

Kind = Literal["approval", "form"]
Action = Literal["accept", "decline"]

_KEY: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a question. `content` fits the question's form, where it was accepted; else it is None."""

    action: Action
    content: Mapping[str, Json] | None = None
    by: str = "local"
    """The principal who answered."""
    at: datetime | None = None

    @property
    def accepted(self) -> bool:
        return self.action == "accept"

    def told(self) -> dict[str, Json]:
        """As the work is told: what was answered, not by whom."""
        return {"action": self.action, "content": None if self.content is None else dict(self.content)}

    def to_dict(self) -> dict[str, Json]:
        return {**self.told(), "by": self.by, "at": iso(self.at)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> Answer:
        at = stamp(data["at"]) if data.get("at") else None
        return cls(action=data["action"], content=data.get("content"), by=data.get("by") or "", at=at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of a run. `key` is the role's own name for it; asked again, it is the same question.

    An approval that is not given ends the run; a form that is declined is the role's own business.
    """

    key: str
    kind: Kind = "form"
    message: str = ""
    schema: Mapping[str, Json] = field(default_factory=lambda: EMPTY)
    """A form: see `vespera_exec.model.forms`."""
    asked_at: datetime | None = None
    answer: Answer | None = None

    @classmethod
    def made(cls, key: object, message: object, *, kind: object = "form", schema: object = None) -> Question:
        """A question that may be asked.

        Raises:
            InvalidInput: why it may not.
        """
        if not isinstance(key, str) or not _KEY.match(key):
            shown = str(key)[:80]
            raise InvalidInput(f"{shown!r} is no name of a question: 1 to 64 letters, digits, '_', '.' or '-'")
        if kind not in ("approval", "form"):
            raise InvalidInput(f"question {key}: it is of the kind approval or form, not {str(kind)[:40]!r}")
        if not isinstance(message, str) or not 0 < len(message) <= MAX_MESSAGE_CHARACTERS:
            raise InvalidInput(f"question {key}: its message is a text of 1 to {MAX_MESSAGE_CHARACTERS} characters")
        try:
            form = checked_schema(schema)
        except InvalidInput as error:
            raise InvalidInput(f"question {key}: {error.message}", hint=error.hint) from None
        return cls(key=key, kind=kind, message=clean_text(message), schema=form)

    def checked(self, answer: Answer) -> Answer:
        """The answer with its content complete.

        Raises:
            InvalidInput: the content does not fit the form; names the question and the field.
        """
        if not answer.accepted:
            return replace(answer, content=None)
        try:
            return replace(answer, content=completed(self.schema, answer.content))
        except InvalidInput as error:
            raise InvalidInput(f"the answer to {self.key}: {error.message}", hint=error.hint) from None

    def is_rejected_by(self, answer: Answer) -> bool:
        """It asked whether the run may go on, and it may not."""
        return self.kind == "approval" and not answer.accepted

    def details(self) -> dict[str, Json]:
        """Of the event that asks it."""
        return {"key": self.key, "kind": self.kind, "message": self.message, "schema": dict(self.schema)}

    def to_dict(self) -> dict[str, Json]:
        answer = self.answer.to_dict() if self.answer is not None else None
        return {**self.details(), "asked_at": iso(self.asked_at), "answer": answer}

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> Question:
        return cls(
            key=data["key"],
            kind=data.get("kind") or "form",
            message=data.get("message") or "",
            schema=data.get("schema") or EMPTY,
            asked_at=stamp(data["asked_at"]) if data.get("asked_at") else None,
            answer=Answer.from_dict(data["answer"]) if data.get("answer") else None,
        )


def questions(stored: Iterable[Mapping[str, Json]]) -> tuple[Question, ...]:
    return tuple(Question.from_dict(each) for each in stored)


def folded(inputs: tuple[Question, ...], event: ExecutionEvent) -> tuple[Question, ...]:
    """The questions after an `approval_*` event; the same ones, where it speaks of none or comes too late."""
    details = event.details
    key = details.get("key")
    known = {each.key: each for each in inputs}
    if event.event_type is EventType.APPROVAL_REQUESTED:
        if not isinstance(key, str) or key in known:
            return inputs
        return (*inputs, replace(Question.from_dict({**details, "answer": None}), asked_at=event.timestamp))
    if key not in known or known[key].answer is not None:
        return inputs
    content = mapping(details["content"]) if details.get("content") is not None else None
    answer = Answer(action=details["action"], content=content, by=details.get("by") or "", at=event.timestamp)
    return tuple(replace(each, answer=answer) if each.key == key else each for each in inputs)
