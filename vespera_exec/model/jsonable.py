"""What may stand in an event: plain JSON, copied from what the caller keeps and may change."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, cast

import orjson

from vespera_exec.errors import InvalidInput

if TYPE_CHECKING:
    from vespera_exec.model.events import Json

DEEPEST = 32
"""Objects and lists in each other that are kept."""
CONTROL_IN_LINE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What a text of one line, such as a title, may not have."""
CONTROL_IN_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""What a text of many lines, such as a description, may not have."""
_INT_LIMIT = 2**63
_PARSED_INT_LIMIT = 2**64
_SHOWN_BITS = 4096  # Python refuses to write longer ones in decimal
_MANY_DIGITS = re.compile(rb"[0-9]{19}")  # twice as fast, and mostly enough
_LONG_NUMBER = re.compile(rb"-[0-9]{19}|[0-9]{20}")


def clean_text(text: str) -> str:
    """`text` without lone surrogates, which no UTF-8 and so no log can hold."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def parsed_json(text: bytes | str) -> Json:
    """What the text says, its integers as they are.

    Raises:
        json.JSONDecodeError: it is no JSON in UTF-8.
        ValueError: it has an integer of more than 64 bits, which would come back rounded.
    """
    value = orjson.loads(text)
    data = text.encode() if isinstance(text, str) else text
    if _MANY_DIGITS.search(data) and _LONG_NUMBER.search(data):
        try:
            json.loads(data, parse_int=_kept_int)
        except RecursionError:
            raise _Lossy("it is nested too deeply", "make it flatter") from None
    return value


def jsonable(value: object) -> Json:
    """A copy of `value` in JSON: stamps as ISO 8601, durations as seconds, anything strange as its text.

    Never fails. Not-a-number and the infinities become None; below 32 levels only text is left.
    """
    if type(value) is str and value.isascii():
        return value
    return _copied(value, 0, strict=False, cut=True)


def whole_json(value: object, name: str) -> Json:
    """`jsonable`, for what must not be cut.

    Raises:
        InvalidInput: it is deeper than 32 levels, or has an integer of more than 64 bits; `name` says what.
    """
    try:
        return _copied(value, 0, strict=False, cut=False)
    except _Lossy as fault:
        raise InvalidInput(f"{name}: {fault}", hint=fault.hint) from None


def details_of(value: Mapping[str, object] | None) -> dict[str, Json]:
    """`jsonable` for the details of an event; none is an empty object."""
    return {clean_text(str(key)): jsonable(each) for key, each in value.items()} if value else {}


def exact_json(value: object, name: str) -> Json:
    """A copy of `value`, which is JSON already: for what must come back as it was given.

    Raises:
        InvalidInput: it holds something that JSON does not, is deeper than 32 levels, or has an integer of more
            than 64 bits; `name` says what.
    """
    try:
        return _copied(value, 0, strict=True, cut=False)
    except _Lossy as fault:
        raise InvalidInput(f"{name}: {fault}", hint=fault.hint) from None
    except ValueError as fault:
        raise InvalidInput(f"{name} is not JSON: {fault}") from None


class _Lossy(ValueError):
    """It would not come back whole. `hint` says what to do."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


def _copied(value: object, depth: int, *, strict: bool, cut: bool) -> Json:
    match value:
        case None | bool():
            return value
        case Enum():
            return _copied(value.value, depth + 1, strict=strict, cut=cut)
        case str():
            return clean_text(value)
        case int():
            return value if -_INT_LIMIT <= value < _INT_LIMIT else _too_large(value, cut=cut)
        case float():
            return value if math.isfinite(value) else _unsaid(value, strict=strict)
        case Mapping() | list() | tuple() if depth >= DEEPEST:
            return _too_deep(cut=cut)
        case Mapping():
            pairs = cast("Mapping[object, object]", value).items()
            return {_key(key, strict=strict): _copied(each, depth + 1, strict=strict, cut=cut) for key, each in pairs}
        case list() | tuple() | set() | frozenset() if not strict or isinstance(value, (list, tuple)):
            return [_copied(each, depth + 1, strict=strict, cut=cut) for each in cast("Iterable[object]", value)]
        case datetime() | date() if not strict:
            return value.isoformat()
        case timedelta() if not strict:
            return value.total_seconds()
        case bytes() if not strict:
            return value.decode(errors="replace")
        case _:
            return _strange(value, strict=strict)


def _too_deep(*, cut: bool) -> str:
    if not cut:
        raise _Lossy(f"objects and lists stand in each other more than {DEEPEST} levels deep", "make it flatter")
    return "..."


def _too_large(value: int, *, cut: bool) -> str:
    if not cut:
        raise _large_int()
    return str(value) if value.bit_length() < _SHOWN_BITS else hex(value)


def _kept_int(text: str) -> int:
    if len(text) > 20 or not -_INT_LIMIT <= (value := int(text)) < _PARSED_INT_LIMIT:
        raise _large_int()
    return value


def _large_int() -> _Lossy:
    return _Lossy("an integer does not fit into 64 bits", "give it as text")


def _key(key: object, *, strict: bool) -> str:
    if strict and not isinstance(key, str):
        raise ValueError(f"a key is a {type(key).__name__}")
    return clean_text(str(key.value if isinstance(key, Enum) else key))


def _strange(value: object, *, strict: bool) -> str:
    if strict:
        raise ValueError(f"{type(value).__name__} {str(value)[:40]!r}")
    return clean_text(str(value))


def _unsaid(value: float, *, strict: bool) -> None:
    if strict:
        raise ValueError(f"the number {value}")
