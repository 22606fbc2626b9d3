"""The JSON Schemas that `tools/list` shows, small enough to be read on every turn, and the check of what comes in."""

from __future__ import annotations

import difflib
import json
from datetime import datetime
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, cast, get_args, get_origin

from pydantic import ValidationError

from vespera_exec.app import checks
from vespera_exec.app.views import Request, View
from vespera_exec.errors import InvalidInput
from vespera_exec.server.incoming import MOST_VALUES, has_too_many_values

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.app.views import Json

Arguments = TypeVar("Arguments", bound=Request)

_NOISE = ("title", "default", "additionalProperties", "format")
_COMPLAINTS = 5
_KINDS = (
    (bool, "boolean"),
    (int, "integer"),
    (float, "number"),
    ((str, datetime), "string"),
    (list, "array"),
    ((dict, View), "object"),
)
"""Python's types by JSON's; the first that fits counts."""


def input_schema(arguments: type[Request], described: Mapping[str, str]) -> dict[str, Json]:
    """The arguments, without what a caller does not need. `described` adds to the descriptions, or replaces them."""
    shown = {
        name: _argument(schema, described.get(name)) for name, schema in _properties(arguments.model_json_schema())
    }
    required = [name for name, field in arguments.model_fields.items() if field.is_required()]
    return {
        "type": "object",
        "properties": shown,
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def output_schema(
    answer: type[View], *, untyped: tuple[str, ...] = (), nullable: tuple[str, ...] = ()
) -> dict[str, Json]:
    """The keys of an answer with their types, one level deep.

    Nothing is required and nothing is forbidden: some clients hold errors, too, against this schema.
    `untyped` names the keys which have another type in an error, `nullable` those which are sent when they are null.
    """
    shown = {
        name: {} if name in untyped else _shallow(field.annotation, nullable=name in nullable)
        for name, field in answer.model_fields.items()
    }
    return {"type": "object", "properties": shown}


def check(arguments: type[Arguments], given: dict[str, Json]) -> Arguments:
    """The arguments as they are meant.

    Raises:
        InvalidInput: names what is wrong in each, and what is expected.
    """
    try:
        if len(given) > _MOST_ARGUMENTS:
            raise InvalidInput(
                f"{len(given)} arguments; at most {len(arguments.model_fields)}", hint=_expected(arguments)
            )
        unpacked = _unpacked(arguments, given)
        checks.plain(unpacked, "the arguments")
        return arguments.model_validate(unpacked)
    except ValidationError as error:
        raise InvalidInput(_complaint(arguments, error), hint=_expected(arguments)) from None


_MOST_ARGUMENTS = 100


def _properties(schema: dict[str, Json]) -> list[tuple[str, dict[str, Json]]]:
    return list(cast("dict[str, dict[str, Json]]", schema.get("properties", {})).items())


def _not_null(schema: dict[str, Json]) -> dict[str, Json]:
    """The schema without its null; empty where that leaves several."""
    kinds = cast("list[dict[str, Json]]", schema.get("anyOf", [schema]))
    real = [kind for kind in kinds if kind.get("type") != "null"]
    return real[0] if len(real) == 1 else {}


def _argument(schema: dict[str, Json], description: str | None) -> dict[str, Json]:
    kind = _not_null(schema)
    shown = {key: value for key, value in kind.items() if key not in _NOISE}
    if schema.get("default") not in (None, "", {}):
        shown["default"] = schema["default"]
    said = description or schema.get("description")
    return {**shown, "description": said} if said else shown


def _shallow(annotation: object, *, nullable: bool) -> dict[str, Json]:
    """Told from the type itself: pydantic would work out what is below it, too, a twentieth of a daemon's start."""
    kinds = [each for each in get_args(annotation) if each is not NoneType] if _is_union(annotation) else [annotation]
    kind = get_origin(kinds[0]) or kinds[0]
    name = next((name for known, name in _KINDS if isinstance(kind, type) and issubclass(kind, known)), None)
    if name is None or len(kinds) > 1:
        return {}
    return {"type": [name, "null"] if nullable else name}


def _is_union(annotation: object) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _unpacked(arguments: type[Request], given: dict[str, Json]) -> dict[str, Json]:
    """Some clients send an object as the text of its JSON: it is meant as the object."""
    unpacked = dict(given)
    for name, kind in _kinds(arguments).items():
        value = given.get(name)
        if kind == "object" and isinstance(value, str):
            if has_too_many_values(value.encode(errors="replace")):
                raise InvalidInput(f"{name}: holds more than {MOST_VALUES} values")
            try:
                parsed: Any = json.loads(value)
            except (ValueError, RecursionError):
                continue
            if isinstance(parsed, dict):
                unpacked[name] = parsed
    return unpacked


def _complaint(arguments: type[Request], error: ValidationError) -> str:
    said: list[str] = []
    for fault in error.errors(include_url=False, include_input=False, include_context=False):
        name = ".".join(str(part) for part in fault["loc"])[:100]
        if len(said) >= _COMPLAINTS:
            said.append("")  # counted only: looking for what was meant takes time
        elif fault["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, arguments.model_fields, n=1)
            said.append(f"{name!r} is no argument" + (f"; did you mean {close[0]}?" if close else ""))
        elif fault["type"] == "missing":
            said.append(f"{name} is missing")
        else:
            said.append(f"{name}: {fault['msg'].removeprefix('Input ')}")
    more = len(said) - _COMPLAINTS
    return ", ".join(said[:_COMPLAINTS]) + (f" and {more} more" if more > 0 else "")


def _expected(arguments: type[Request]) -> str:
    names = [
        f"{name} ({kind}, required)" if arguments.model_fields[name].is_required() else f"{name} ({kind})"
        for name, kind in _kinds(arguments).items()
    ]
    return "arguments: " + (", ".join(names) or "none")


@cache
def _kinds(arguments: type[Request]) -> dict[str, str]:
    return {
        name: str(_not_null(schema).get("type", "any")) for name, schema in _properties(arguments.model_json_schema())
    }
