"""References in a plan: `${steps.build.output.files[0]}`, and what they stand for. Nothing is evaluated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from vespera_exec.errors import InvalidReference, MissingReference

if TYPE_CHECKING:
    from vespera_exec.model.events import Json
    from vespera_exec.model.plans.steps import StepState

MAX_CHARACTERS: Final = 500
"""Of one reference."""
MAX_PATH: Final = 32
MAX_REFERENCES: Final = 1000
"""In one value, each place counted."""
MAX_TEXT: Final = 1_000_000
"""Characters of a text when its references have been replaced."""
MAX_REPLACED: Final = 8 * 1024 * 1024
"""Characters of what the references of one value stand for, each place counted."""
MAX_DEPTH: Final = 64

NULL: Final = object()
"""What a lookup gives for a base that stands for null, whatever path follows."""

Lookup = Callable[["Reference"], Any]
"""Gives what a reference names before its path: a step's whole output, its status, its error, a variable; or `NULL`.

Raises `MissingReference` where there is none.
"""

_PLACE: Final = re.compile(r"\$\$\{|\$\{([^{}]*)\}|\$\{")
_WORD: Final = r"[A-Za-z][A-Za-z0-9_-]{0,63}"
_BODY: Final = re.compile(
    rf"(?:steps\.(?P<step>{_WORD})\.(?:(?P<what>output|status)|error\.(?P<error>code|message))"
    rf"|variables\.(?P<variable>{_WORD}))"
    r"(?P<path>(?:\.[\w-]+|\[[0-9]{1,9}\])*)(?P<optional>\?)?\Z"
)
_PART: Final = re.compile(r"\.([\w-]+)|\[([0-9]+)\]")
_FORMS: Final = (
    "a reference is ${steps.ID.output}, ${steps.ID.status}, ${steps.ID.error.code}, ${steps.ID.error.message} "
    "or ${variables.NAME}, then .name or [0], then ? where null will do; the text ${ itself is written $${"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """One reference. Written out (`str`), it is read as itself again."""

    kind: Literal["output", "status", "error", "variable"]
    name: str
    """The id of a step, or the name of a variable."""
    path: tuple[str | int, ...] = ()
    """Keys and indexes to follow; of an "error" it is `("code",)` or `("message",)`."""
    optional: bool = False

    @property
    def step(self) -> str | None:
        """The step that it depends on."""
        return None if self.kind == "variable" else self.name

    @property
    def base(self) -> str:
        """What it names before its path."""
        return f"variables.{self.name}" if self.kind == "variable" else f"steps.{self.name}.{self.kind}"

    def __str__(self) -> str:
        path = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in self.path)
        return f"${{{self.base}{path}{'?' if self.optional else ''}}}"


def references(value: Json) -> tuple[Reference, ...]:
    """The references in the texts of `value`, each once, in order. Keys of objects are plain text.

    Raises:
        InvalidReference: a `${` begins something else; or they are too many, or too deep.
    """
    found: dict[Reference, None] = {}
    places = 0
    for text in _texts(value, 0):
        for place in _PLACE.finditer(text):
            if place[0] != "$${":
                found[_read(text, place)] = None
                places += 1
                if places > MAX_REFERENCES:
                    raise InvalidReference(f"more than {MAX_REFERENCES} references in one value", hint="")
    return tuple(found)


def resolve(value: Json, lookup: Lookup) -> Json:
    """A copy of `value` with its references replaced; what they stand for is not looked through again.

    A text that is one reference becomes the value itself, in longer text it stands as text: a text as it is, others
    as compact JSON. What `references` would refuse stays as it is written.

    Raises:
        MissingReference: what one names is not there, and it has no `?`; or a text would have more than a million
            characters; or all that is put in has more than eight million.
    """
    return _Resolving(lookup).value(value, 0)


def lookup_in(states: Mapping[str, StepState], variables: Mapping[str, Json], outputs: Mapping[str, Json]) -> Lookup:
    """What references find in a plan: its steps as they stand, its variables, the outputs of its completed steps.

    The output of a step that was skipped, failed or cancelled is null where the plan goes on all the same.
    """

    def look(reference: Reference) -> Any:
        name = reference.name
        if reference.kind == "variable":
            if name not in variables:
                raise MissingReference(f"{reference}: there is no variable {name!r}; {_known(variables)}")
            return variables[name]
        state = states.get(name)
        if state is None:
            raise MissingReference(f"{reference}: there is no step {name!r}")
        if reference.kind == "status":
            return state.status.value
        if reference.kind == "error":
            return state.error or NULL
        if name in outputs:
            return outputs[name]
        if state.lets_on:
            return NULL
        raise MissingReference(f"{reference}: step {name} is {state.status.value} and has no output")

    return look


def _read(text: str, place: re.Match[str]) -> Reference:
    body: str | None = place[1]
    if body is None:
        shown = text[place.start() : place.start() + 40]
        raise InvalidReference(f"{shown!r} is no reference: it has no end; {_FORMS}")
    reference = _parsed(body)
    if reference is None:
        raise InvalidReference(f"{place[0][:80]!r} is no reference; {_FORMS}")
    return reference


def _parsed(body: str) -> Reference | None:
    if len(body) > MAX_CHARACTERS or (read := _BODY.match(body)) is None:
        return None
    path = tuple(int(each[2]) if each[2] else str(each[1]) for each in _PART.finditer(read["path"]))
    optional = read["optional"] is not None
    if len(path) > MAX_PATH:
        return None
    if read["variable"]:
        return Reference(kind="variable", name=read["variable"], path=path, optional=optional)
    if read["what"] == "output":
        return Reference(kind="output", name=read["step"], path=path, optional=optional)
    if path:
        return None
    if read["what"] == "status":
        return Reference(kind="status", name=read["step"], optional=optional)
    return Reference(kind="error", name=read["step"], path=(read["error"],), optional=optional)


def _texts(value: Json, depth: int) -> list[str]:
    if isinstance(value, str):
        return [value] if "${" in value else []
    if not isinstance(value, Mapping | list | tuple):
        return []
    if depth >= MAX_DEPTH:
        raise InvalidReference(f"nested deeper than {MAX_DEPTH} levels", hint="make it flatter")
    inner = cast("Any", value)
    return [
        text for each in (inner.values() if isinstance(value, Mapping) else inner) for text in _texts(each, depth + 1)
    ]


class _Resolving:
    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._sizes: dict[Reference, int] = {}
        self._size = 0

    def value(self, value: Json, depth: int) -> Json:
        if isinstance(value, str):
            return self._replaced(value) if "${" in value else value
        if depth >= MAX_DEPTH:
            return value
        if isinstance(value, Mapping):
            pairs = cast("Mapping[str, Json]", value).items()
            return {key: self.value(each, depth + 1) for key, each in pairs}
        if isinstance(value, list | tuple):
            return [self.value(each, depth + 1) for each in cast("list[Json]", value)]
        return value

    def _replaced(self, text: str) -> Json:
        whole = _PLACE.fullmatch(text)
        if whole is not None and whole[1] is not None and (reference := _parsed(whole[1])) is not None:
            return self._whole(reference)
        pieces: list[str] = []
        at = size = 0
        for place in _PLACE.finditer(text):
            pieces += (text[at : place.start()], self._as_text(place))
            size += len(pieces[-1])
            if size > MAX_TEXT:
                raise MissingReference(f"{place[0][:80]}: the text would have more than {MAX_TEXT:,} characters")
            at = place.end()
        return "".join((*pieces, text[at:]))

    def _whole(self, reference: Reference) -> Json:
        value = _found(reference, self._lookup)
        if reference not in self._sizes:
            self._sizes[reference] = _size(reference, value)
        self._count(reference, self._sizes[reference])
        return value

    def _as_text(self, place: re.Match[str]) -> str:
        if place[0] == "$${":
            return "${"
        reference = _parsed(place[1]) if place[1] is not None else None
        if reference is None:
            return place[0]
        value = _found(reference, self._lookup)
        text = value if isinstance(value, str) else _written(reference, value)
        self._count(reference, len(text))
        return text

    def _count(self, reference: Reference, size: int) -> None:
        self._size += size
        if self._size > MAX_REPLACED:
            raise MissingReference(f"{reference}: what is put in has together more than {MAX_REPLACED:,} characters")


def _size(reference: Reference, value: Json) -> int:
    """In characters of JSON, more or less."""
    if isinstance(value, str):
        return len(value)
    return len(_written(reference, value)) if isinstance(value, Mapping | list) else 0


def _written(reference: Reference, value: Json) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    except (ValueError, RecursionError):
        raise MissingReference(f"{reference}: it cannot be written as text") from None


def _found(reference: Reference, lookup: Lookup) -> Json:
    try:
        value = lookup(reference)
        return None if value is NULL else _followed(reference, value)
    except MissingReference:
        if reference.optional:
            return None
        raise


def _followed(reference: Reference, value: Json) -> Json:
    for reached, part in enumerate(reference.path):
        if isinstance(value, Mapping) and isinstance(part, str) and part in value:
            value = cast("Mapping[str, Json]", value)[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(cast("list[Json]", value)):
            value = cast("list[Json]", value)[part]
        else:
            there = Reference(kind=reference.kind, name=reference.name, path=reference.path[:reached])
            wanted = f"[{part}]" if isinstance(part, int) else repr(part)
            raise MissingReference(f"{reference}: {wanted} is not there; {there} {_described(value)}")
    return value


def _described(value: Json) -> str:
    if isinstance(value, Mapping):
        return f"is an object; {_known(cast('Mapping[str, Json]', value))}"
    if isinstance(value, list):
        return f"is a list of {len(cast('list[Json]', value))}"
    if value is None:
        return "is null"
    return f"is a {'text' if isinstance(value, str) else 'truth value' if isinstance(value, bool) else 'number'}"


def _known(there: Mapping[str, Json]) -> str:
    names = sorted(str(name)[:64] for name in there)
    if not names:
        return "there is nothing"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"there is {', '.join(names[:20])}{more}"
