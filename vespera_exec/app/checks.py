"""What a request may say, before anything is decided."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from vespera_exec.errors import Conflict, InvalidInput
from vespera_exec.model.jsonable import CONTROL_IN_LINE, CONTROL_IN_TEXT, clean_text, exact_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.app.views import Request
    from vespera_exec.model.events import Json
    from vespera_exec.settings import Settings

_DEEPEST = 64


def title(text: str, settings: Settings) -> str:
    """The title, stripped.

    Raises:
        InvalidInput: empty, too long, or with control characters.
    """
    stripped = text.strip()
    if not stripped:
        raise InvalidInput("the title is empty", hint="say in one line what the task is")
    if len(stripped) > settings.title_limit:
        raise InvalidInput(
            f"the title has {len(stripped):,} characters; at most {settings.title_limit}",
            hint="put the rest into the description",
        )
    if CONTROL_IN_LINE.search(stripped):
        raise InvalidInput("the title has control characters", hint="use plain text in one line")
    return stripped


def description(text: str, settings: Settings) -> str:
    if len(text) > settings.description_limit:
        raise InvalidInput(f"the description has {len(text):,} characters; at most {settings.description_limit:,}")
    if CONTROL_IN_TEXT.search(text):
        raise InvalidInput("the description has control characters")
    return text


def room(queued: int, settings: Settings) -> None:
    """
    Raises:
        Conflict: as many wait already as may.
    """
    if queued >= settings.max_queued:
        raise Conflict(f"the queue is full ({queued} wait)", hint="try again later")


def inputs(given: Mapping[str, Json], settings: Settings) -> dict[str, Json]:
    """Inputs that can be stored: JSON of a bounded size."""
    exact = exact_json(dict(given), "inputs")
    size = len(orjson.dumps(exact))
    if size > settings.inputs_limit_bytes:
        raise InvalidInput(f"the inputs have {size:,} bytes; at most {settings.inputs_limit_bytes:,}")
    return exact


def plain(given: Json, what: str) -> None:
    """Depth, numbers and strings of JSON that came through a door.

    Raises:
        InvalidInput: `what` is nested more than 64 deep, or has a number that is not finite, a NUL, or half a
            surrogate pair, in a key too.
    """
    level: list[Json] = [given]
    texts: list[str] = []
    depth = 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise InvalidInput(f"{what}: nested more than {_DEEPEST} deep")
        below: list[Json] = []
        for each in level:
            if isinstance(each, str):
                texts.append(each)
            elif isinstance(each, dict):
                below += each
                below += each.values()
            elif isinstance(each, list):
                below += each
            elif isinstance(each, float) and not math.isfinite(each):
                raise InvalidInput(f"{what}: a number is not finite", hint="JSON has no NaN and no Infinity")
        level = below
    _check_text("".join(texts), what)


def request_digest(request: Request) -> bytes:
    """What tells this request from others: SHA-256 of what it asks for, not of how long its caller waits.

    Raises:
        InvalidInput: a value is no JSON.
    """
    asked = request.model_dump(exclude={"idempotency_key", "wait_ms"})
    if asked.get("capacity") is None:
        asked.pop("capacity", None)  # or a key that an older version has kept would stand for another request
    exact = {name: exact_json(value, name) for name, value in asked.items()}
    return hashlib.sha256(orjson.dumps(exact, option=orjson.OPT_SORT_KEYS)).digest()


def reason(text: str) -> str:
    """The reason of a cancel, pause or resume, made safe to show: never a cause to refuse it."""
    return CONTROL_IN_TEXT.sub("\ufffd", text)[:500]


def _check_text(text: str, what: str) -> None:
    if "\0" in text:
        raise InvalidInput(f"{what}: a string has a NUL")
    if clean_text(text) is not text:
        raise InvalidInput(f"{what}: a string has half a surrogate pair", hint="give text in Unicode")


def absolute_path(text: str) -> Path:
    """
    Raises:
        InvalidInput: it depends on where somebody stands, or cannot be a path.
    """
    path = Path(text)
    if "\0" in text or not path.is_absolute():
        raise InvalidInput("path must be absolute")
    return path
