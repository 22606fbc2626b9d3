"""What a request may say, before anything is decided."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import orjson

from vespera_exec.errors import InvalidInput
from vespera_exec.model.jsonable import exact_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.model.events import Json
    from vespera_exec.settings import Settings

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_CONTROL_IN_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


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
    if _CONTROL.search(stripped):
        raise InvalidInput("the title has control characters", hint="use plain text in one line")
    return stripped


def description(text: str, settings: Settings) -> str:
    if len(text) > settings.description_limit:
        raise InvalidInput(f"the description has {len(text):,} characters; at most {settings.description_limit:,}")
    if _CONTROL_IN_TEXT.search(text):
        raise InvalidInput("the description has control characters")
    return text


def inputs(given: Mapping[str, Json], settings: Settings) -> dict[str, Json]:
    """Inputs that can be stored: JSON of a bounded size."""
    exact = exact_json(dict(given), "inputs")
    size = len(orjson.dumps(exact))
    if size > settings.inputs_limit_bytes:
        raise InvalidInput(f"the inputs have {size:,} bytes; at most {settings.inputs_limit_bytes:,}")
    return exact


def reason(text: str) -> str:
    """A cancel's reason, made safe to show: never a cause to refuse the cancel."""
    return _CONTROL_IN_TEXT.sub("\ufffd", text)[:500]
