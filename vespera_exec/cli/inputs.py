"""`--input name=value`, read with what the role says of its inputs."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, cast

from vespera_exec.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vespera_exec.model.events import Json

_PAIR = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_-]*)(?P<how>:?=)(?P<value>.*)", re.DOTALL)
_HINT = "write name=value, name=@file, or name:=JSON"


def parse_inputs(given: Iterable[str], schema: Mapping[str, Json] | None = None) -> dict[str, Json]:
    """The inputs as the role takes them. `schema` is the JSON Schema of its inputs, None where it is unknown.

    `name:=JSON` is taken as it is. `name=value` is text for an input of type string; for other types, and
    where the type is unknown, it is JSON if it reads as JSON that is no string. A list may be given item
    by item. `name=@file` takes the value from a file, `name=@-` from stdin.

    Raises:
        InvalidInput: one is no pair, names a file that cannot be read, is no JSON, or is given twice.
    """
    properties: dict[str, Json] = dict((schema or {}).get("properties") or {})
    inputs: dict[str, Json] = {}
    for each in given:
        found = _PAIR.fullmatch(each)
        if found is None:
            raise InvalidInput(f"not an input: {each[:80]!r}", hint=_HINT)
        name, value = found["name"], found["value"]
        spec: dict[str, Json] = properties.get(name) or {}
        read = _json(name, value) if found["how"] == ":=" else _typed(_text(name, value), spec)
        if name not in inputs:
            inputs[name] = read
        elif spec.get("type") == "array" and found["how"] == "=":
            inputs[name] = [*inputs[name], *read]
        else:
            raise InvalidInput(f"input {name!r} is given twice", hint="only a list may be given item by item")
    return inputs


def _text(name: str, value: str) -> str:
    if not value.startswith("@"):
        return value
    try:
        if value == "@-":
            return sys.stdin.read()
        with open(value[1:], encoding="utf-8") as file:
            return file.read()
    except OSError as fault:
        raise InvalidInput(
            f"input {name!r}: cannot read {value[1:]!r}: {fault.strerror}",
            hint=f'name:="{value}" is the text itself',
        ) from fault
    except UnicodeDecodeError as fault:
        raise InvalidInput(f"input {name!r}: {value[1:]!r} is not UTF-8 text") from fault


def _typed(text: str, spec: Mapping[str, Json]) -> Json:
    match spec.get("type"):
        case "string":
            return text
        case "array":
            read = _maybe_json(text)
            items = cast("Mapping[str, Json]", spec.get("items") or {})
            return cast("Json", read) if isinstance(read, list) else [_typed(text, items)]
        case _:
            read = _maybe_json(text)
            return text if read is None or isinstance(read, str) else read


def _maybe_json(text: str) -> Json:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None


def _json(name: str, text: str) -> Json:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as fault:
        raise InvalidInput(f"input {name!r}: not JSON: {fault}", hint=_HINT) from None


def _refuse_constant(name: str) -> Json:
    raise ValueError(f"{name} is no JSON")
