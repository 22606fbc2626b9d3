"""What may stand in an event: plain JSON, copied from what the caller keeps and may change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import date, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, cast

from vespera_exec.errors import InvalidInput

if TYPE_CHECKING:
    from vespera_exec.model.events import Json

DEEPEST = 32
"""Objects and lists in each other that are kept."""
_INT_LIMIT = 2**63


def clean_text(text: str) -> str:
    """`text` without lone surrogates, which no UTF-8 and so no log can hold."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def jsonable(value: object) -> Json:
    """A copy of `value` in JSON: stamps as ISO 8601, durations as seconds, anything strange as its text.

    Never fails. Not-a-number and the infinities become None; below 32 levels only text is left.
    """
    return _copied(value, 0, strict=False, cut=True)


def whole_json(value: object, name: str) -> Json:
    """`jsonable`, for what must not be cut.

    Raises:
        InvalidInput: it is deeper than 32 levels; `name` says what.
    """
    try:
        return _copied(value, 0, strict=False, cut=False)
    except _TooDeep as fault:
        raise InvalidInput(f"{name}: {fault}", hint="make it flatter") from None


def details_of(value: Mapping[str, object] | None) -> dict[str, Json]:
    """`jsonable` for the details of an event; none is an empty object."""
    return {clean_text(str(key)): jsonable(each) for key, each in value.items()} if value else {}


def exact_json(value: object, name: str) -> Json:
    """A copy of `value`, which is JSON already: for what must come back as it was given.

    Raises:
        InvalidInput: it holds something that JSON does not, or is deeper than 32 levels; `name` says what.
    """
    try:
        return _copied(value, 0, strict=True, cut=False)
    except _TooDeep as fault:
        raise InvalidInput(f"{name}: {fault}", hint="make it flatter") from None
    except ValueError as fault:
        raise InvalidInput(f"{name} is not JSON: {fault}") from None


class _TooDeep(ValueError):
    def __init__(self) -> None:
        super().__init__(f"objects and lists stand in each other more than {DEEPEST} levels deep")


def _copied(value: object, depth: int, *, strict: bool, cut: bool) -> Json:
    match value:
        case None | bool():
            return value
        case Enum():
            return _copied(value.value, depth + 1, strict=strict, cut=cut)
        case str():
            return clean_text(value)
        case int():
            return value if -_INT_LIMIT <= value < _INT_LIMIT else _strange(value, strict=strict)
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
        raise _TooDeep
    return "..."


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
