"""The inputs of a role: what it takes, and whether what was given fits."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from roles.regex import MAX_SUBJECT, compile_bounded

if TYPE_CHECKING:
    from vespera_exec.model.events import Json

TYPES: Final = ("string", "integer", "number", "boolean", "path", "list", "object")
MAX_STRING: Final = 100_000
MAX_PATH: Final = 4096
MAX_ITEMS: Final = 10_000
MAX_INPUTS: Final = 64
NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")

Path = tuple[str | int, ...]
Fail = Callable[[Path, str], NoReturn]

_KEYS: Final = (
    "type", "default", "description", "required", "min", "max", "max_length", "choices", "pattern", "of",
)  # fmt: skip
_FITS: Final = {
    "min": ("integer", "number"),
    "max": ("integer", "number"),
    "max_length": ("string", "path", "list"),
    "choices": ("string", "integer", "number"),
    "pattern": ("string",),
    "of": ("list",),
}
_TEXTS: Final = ("string", "path")
_JSON_TYPE: Final = {"path": "string", "list": "array"}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One input. `required` inputs have no default; others that are not given take `default`, or are left out."""

    type: str
    description: str = ""
    required: bool = False
    default: Json = None
    min: float | None = None
    max: float | None = None
    max_length: int | None = None
    choices: tuple[Json, ...] = ()
    pattern: str | None = None
    of: str = "string"

    def problem(self, value: Json) -> str | None:
        """What is wrong with `value`, None when it fits."""
        kind = self.type
        if (wrong := _wrong_type(kind, value)) is not None:
            return wrong
        if self.choices and value not in self.choices:
            return f"expected one of {', '.join(map(repr, self.choices))}, got {_shown(value)}"
        match kind:
            case "integer" | "number":
                return self._out_of_range(value)
            case "string" | "path":
                return self._bad_text(value)
            case "list":
                return self._bad_items(value)
            case _:
                return None

    def json_schema(self) -> dict[str, Json]:
        schema: dict[str, Json] = {"type": _JSON_TYPE.get(self.type, self.type)}
        if self.type == "path":
            schema["format"] = "path"
        if self.type == "list":
            schema["items"] = {"type": _JSON_TYPE.get(self.of, self.of)}
        named = {
            "description": self.description or None,
            "default": self.default,
            "minimum": self.min,
            "maximum": self.max,
            "maxItems" if self.type == "list" else "maxLength": self.max_length,
            "enum": list(self.choices) or None,
            "pattern": f"^(?:{self.pattern})$" if self.pattern else None,
        }
        return schema | {key: value for key, value in named.items() if value is not None}

    def _out_of_range(self, value: float) -> str | None:
        if self.min is not None and value < self.min:
            return f"must be at least {self.min:g}, got {value}"
        if self.max is not None and value > self.max:
            return f"must be at most {self.max:g}, got {value}"
        return None

    def _bad_text(self, value: str) -> str | None:
        most = self.max_length or (MAX_PATH if self.type == "path" else MAX_SUBJECT if self.pattern else MAX_STRING)
        if len(value) > most:
            return f"has {len(value)} characters; at most {most} are allowed"
        if self.pattern is not None and not re.fullmatch(self.pattern, value):
            return f"does not match {self.pattern!r}"
        return None

    def _bad_items(self, items: list[Json]) -> str | None:
        if len(items) > (self.max_length or MAX_ITEMS):
            return f"has {len(items)} items; at most {self.max_length or MAX_ITEMS} are allowed"
        item = InputSpec(type=self.of)
        for index, each in enumerate(items):
            if (wrong := item.problem(each)) is not None:
                return f"item {index}: {wrong}"
        return None


_EXPLAINED = 5


def read_specs(raw: Mapping[Any, Any], fail: Fail) -> dict[str, InputSpec]:
    """The specs of an `inputs` mapping as a role file has it; `fail(path, message)` raises."""
    if len(raw) > MAX_INPUTS:
        fail((), f"at most {MAX_INPUTS} inputs are allowed")
    specs: dict[str, InputSpec] = {}
    for name, given in raw.items():
        if not isinstance(name, str) or not NAME.match(name):
            fail((name,), f"{name!r} is no input name: a lower-case letter, then letters, digits and _")
        if isinstance(given, str):
            given = {"type": given}
        if not isinstance(given, Mapping):
            fail((name,), "an input is a mapping with a `type`")
        specs[name] = _read_spec(name, cast("Mapping[str, Any]", given), fail)
    return specs


def complete(specs: Mapping[str, InputSpec], given: Mapping[str, Json]) -> tuple[dict[str, Json], list[str]]:
    """`(inputs with defaults filled in, problems)`, each problem naming its input."""
    unknown = [name for name in given if name not in specs]
    # Looking for what was meant takes time, so only for the first few.
    problems = [f"{name[:64]}: unknown input{near(name, specs)}" for name in unknown[:_EXPLAINED]]
    if len(unknown) > _EXPLAINED:
        problems.append(f"{len(unknown) - _EXPLAINED} more unknown inputs")
    inputs: dict[str, Json] = {}
    for name, spec in specs.items():
        value = given.get(name)
        if value is None:
            if spec.required:
                problems.append(f"{name}: required, expected a {spec.type}")
            elif spec.default is not None:
                inputs[name] = spec.default
        elif (wrong := spec.problem(value)) is not None:
            problems.append(f"{name}: {wrong}")
        else:
            inputs[name] = int(value) if spec.type == "integer" else value
    return inputs, problems


def as_texts(specs: Mapping[str, InputSpec] | None, given: Mapping[str, Json]) -> dict[str, Json]:
    """`given`, with the JSON text of numbers and truth values where a text, or a list of texts, is wanted."""
    made = dict(given)
    for name, spec in (specs or {}).items():
        value = made.get(name)
        if spec.type in _TEXTS:
            made[name] = _as_text(value)
        elif spec.type == "list" and spec.of in _TEXTS and isinstance(value, list):
            made[name] = [_as_text(each) for each in cast("list[Json]", value)]
    return made


def _as_text(value: Json) -> Json:
    return json.dumps(value) if isinstance(value, int | float) else value


def text_problem(text: str) -> str | None:
    """Why a string can be no input, None when it can: it goes into argv, files and the log."""
    if "\0" in text:
        return "contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "contains half a surrogate pair"
    return None


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or what there is, or nothing."""
    names = list(known)
    if close := difflib.get_close_matches(name[:64], names, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(names)}" if names else "; none is known"


def _wrong_type(kind: str, value: Json) -> str | None:
    match kind:
        case "string" | "path":
            fits = isinstance(value, str) and (kind == "string" or value != "")
            if fits and (wrong := text_problem(value)) is not None:
                return wrong
        case "boolean":
            fits = isinstance(value, bool)
        case "integer":
            whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
            fits = whole or (isinstance(value, int) and not isinstance(value, bool))
        case "number":
            fits = not isinstance(value, bool) and (
                isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
            )
        case "list":
            fits = isinstance(value, list)
        case _:
            fits = isinstance(value, dict)
    return None if fits else f"expected a {kind}, got {_shown(value)}"


def _shown(value: Json) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _read_spec(name: str, given: Mapping[str, Any], fail: Fail) -> InputSpec:
    for key in given:
        if key not in _KEYS:
            fail((name, key), f"unknown key {key!r}{near(str(key), _KEYS)}")
    kind = given.get("type")
    if kind not in TYPES:
        fail((name, "type"), f"type must be one of {', '.join(TYPES)}")
    for key, kinds in _FITS.items():
        if key in given and kind not in kinds:
            fail((name, key), f"{key} does not fit the type {kind}")
    spec = InputSpec(
        type=kind,
        description=_of_type(given, "description", str, "", name, fail),
        required=_of_type(given, "required", bool, False, name, fail),
        default=given.get("default"),
        min=_number(given, "min", name, fail),
        max=_number(given, "max", name, fail),
        max_length=_of_type(given, "max_length", int, None, name, fail),
        choices=tuple(_of_type(given, "choices", list, [], name, fail)),
        pattern=_of_type(given, "pattern", str, None, name, fail),
        of=_of_type(given, "of", str, "string", name, fail),
    )
    _check_spec(name, spec, fail)
    return spec


def _check_spec(name: str, spec: InputSpec, fail: Fail) -> None:
    if spec.of not in TYPES[:5]:
        fail((name, "of"), f"of must be one of {', '.join(TYPES[:5])}")
    if spec.max_length is not None and spec.max_length < 1:
        fail((name, "max_length"), "max_length must be at least 1")
    if spec.pattern is not None:
        try:
            compile_bounded(spec.pattern)
        except ValueError as error:
            fail((name, "pattern"), str(error))
    for choice in spec.choices:
        if (wrong := _wrong_type(spec.type, choice)) is not None:
            fail((name, "choices"), wrong)
    if spec.required and spec.default is not None:
        fail((name, "default"), "a required input has no default")
    if spec.default is not None and (wrong := spec.problem(spec.default)) is not None:
        fail((name, "default"), f"the default does not fit: {wrong}")


def _of_type(given: Mapping[str, Any], key: str, kind: type, default: Any, name: str, fail: Fail) -> Any:
    value = given.get(key, default)
    if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        fail((name, key), f"{key} must be a {kind.__name__}")
    return value


def _number(given: Mapping[str, Any], key: str, name: str, fail: Fail) -> float | None:
    value = given.get(key)
    if value is not None and _wrong_type("number", value) is not None:
        fail((name, key), f"{key} must be a number")
    return value
