"""The forms that a question may hold: flat JSON Schemas, as MCP elicitation takes them, and what fits them.

A form is an object whose fields are of a closed set: string (with `enum`, `oneOf`, a format or lengths), number,
integer, boolean, and array of chosen strings. Whatever else JSON Schema knows is refused, not passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, Final, cast

import orjson

from vespera_exec.errors import InvalidInput
from vespera_exec.model.events import mapping
from vespera_exec.model.jsonable import exact_json

if TYPE_CHECKING:
    from vespera_exec.model.events import Json

MAX_SCHEMA_BYTES: Final = 16 * 1024
MAX_CONTENT_BYTES: Final = 16 * 1024
EMPTY: Final[Mapping[str, Json]] = {"type": "object", "properties": {}}

_ABOUT: Final = {"type", "title", "description", "default"}
_LENGTHS: Final = {"minLength", "maxLength"}
_BOUNDS: Final = {"minimum", "maximum"}
_COUNTS: Final = {"minItems", "maxItems"}
_KNOWN: Final[Mapping[str, set[str]]] = {
    "string": _ABOUT | _LENGTHS | {"format", "enum", "enumNames", "oneOf"},
    "number": _ABOUT | _BOUNDS,
    "integer": _ABOUT | _BOUNDS,
    "boolean": _ABOUT,
    "array": _ABOUT | _COUNTS | {"items"},
}
_INT_LIMIT: Final = 2**63
_NAME: Final = re.compile(r"[^\x00-\x1f]{1,64}\Z")
_EMAIL: Final = re.compile(r"[^@\s]+@[^@\s]+\Z")
_URI: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:\S+\Z")


def checked_schema(schema: object) -> dict[str, Json]:
    """A copy of `schema`, which is a form; None is the form without fields.

    Raises:
        InvalidInput: it is none; the message names the field, and what is wrong with it.
    """
    if schema is None:
        return dict(EMPTY)
    if not isinstance(schema, Mapping):
        raise InvalidInput("its schema is no object")
    form: dict[str, Json] = exact_json(cast("object", schema), "its schema")
    if (size := len(orjson.dumps(form))) > MAX_SCHEMA_BYTES:
        raise InvalidInput(f"its schema has {size:,} bytes; at most {MAX_SCHEMA_BYTES:,}")
    if form.get("type") != "object" or not isinstance(form.get("properties", {}), dict):
        raise InvalidInput("its schema is not of type object with properties")
    _only(form, {"$schema", "type", "properties", "required", "title", "description"}, "its schema")
    fields: dict[str, Json] = form.setdefault("properties", {})
    for name, field in fields.items():
        _check_field(name, field)
    required = form.get("required", [])
    if not _are_texts(required) or not set(required) <= fields.keys():
        raise InvalidInput("`required` of its schema is not a list of its fields")
    return form


def completed(schema: Mapping[str, Json], content: Mapping[str, Json] | None) -> dict[str, Json]:
    """`content`, which fits `schema`, with the defaults of what it leaves out.

    Raises:
        InvalidInput: it does not fit; the message names the field, and what is expected.
    """
    given: dict[str, Json] = exact_json(dict(content or {}), "the content")
    if (size := len(orjson.dumps(given))) > MAX_CONTENT_BYTES:
        raise InvalidInput(f"the content has {size:,} bytes; at most {MAX_CONTENT_BYTES:,}")
    fields: Mapping[str, Json] = schema.get("properties") or {}
    if unknown := [name for name in given if name not in fields]:
        known = ", ".join(fields) or "none"
        raise InvalidInput(f"there is no field {unknown[0][:64]!r}; there are: {known}")
    filled: dict[str, Json] = {}
    for name, field in fields.items():
        if name in given:
            filled[name] = _fitting(name, field, given[name])
        elif "default" in field:
            filled[name] = field["default"]
        elif name in schema.get("required", ()):
            raise InvalidInput(f"field {name!r} is missing")
    return filled


def _check_field(name: str, field: Json) -> None:
    where = f"field {name[:64]!r} of its schema"
    if not _NAME.match(name):
        raise InvalidInput(f"{where} has a name of no characters, more than 64, or control characters")
    field = mapping(field)
    kind = field.get("type")
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise InvalidInput(f"{where} is not of type {', '.join(_KNOWN)}", hint="a form is flat")
    _only(field, _KNOWN[kind], where)
    for text in ("title", "description"):
        if not isinstance(field.get(text, ""), str):
            raise InvalidInput(f"{where}: {text} is a text")
    for count in (_LENGTHS | _COUNTS) & field.keys():
        if not _is_integer(field[count]) or field[count] < 0:
            raise InvalidInput(f"{where}: {count} is an integer from 0")
    for bound in _BOUNDS & field.keys():
        if not _is_number(field[bound]):
            raise InvalidInput(f"{where}: {bound} is a number")
    _check_choices(where, kind, field)
    if field.get("format", "uri") not in _FORMATS:
        raise InvalidInput(f"{where}: format is one of {', '.join(_FORMATS)}")
    if "default" in field:
        try:
            _fitting(name, field, field["default"])
        except InvalidInput as error:
            raise InvalidInput(f"the default of its schema does not fit: {error}") from None


def _check_choices(where: str, kind: str, field: Mapping[str, Json]) -> None:
    if kind == "array":
        items = field.get("items")
        if not isinstance(items, dict):
            raise InvalidInput(f"{where}: an array needs `items`, with `enum` or `anyOf`")
        choices = cast("dict[str, Json]", items)
        _only(choices, {"type", "enum", "anyOf"}, f"{where}, items,")
        if choices.get("type", "string") != "string":
            raise InvalidInput(f"{where}: the items of an array are strings")
    elif kind == "string":
        choices = field
    else:
        return
    titled = choices.get("oneOf", choices.get("anyOf"))
    if titled is not None and not _are_titled(titled):
        raise InvalidInput(f"{where}: oneOf and anyOf list objects with `const` and `title`, both texts")
    for texts in ("enum", "enumNames"):
        if texts in choices and not _are_texts(choices[texts]):
            raise InvalidInput(f"{where}: {texts} is a list of texts")
    if (kind == "array" or "enum" in choices or titled is not None) and not _choices(field):
        raise InvalidInput(f"{where} leaves nothing to choose")


def _fitting(name: str, field: Mapping[str, Json], value: Json) -> Json:
    """`value`, an integer as one.

    Raises:
        InvalidInput: it does not fit the field.
    """
    match field["type"]:
        case "string":
            problem = _text_problem(field, value)
        case "boolean":
            problem = None if isinstance(value, bool) else "is true or false"
        case "array":
            problem = _list_problem(field, value)
        case kind:
            whole = kind == "integer"
            if not _is_number(value) or (whole and (value != int(value) or abs(value) >= _INT_LIMIT)):
                problem = "is an integer" if whole else "is a number"
            else:
                problem = _range_problem(value, field.get("minimum"), field.get("maximum"), "is")
                value = int(value) if whole else value
    if problem is not None:
        raise InvalidInput(f"field {name!r} {problem}")
    return value


def _text_problem(field: Mapping[str, Json], value: Json) -> str | None:
    if not isinstance(value, str):
        return "is a text"
    choices = _choices(field)
    if choices and value not in choices:
        return f"is one of {_shown(choices)}"
    if (wanted := field.get("format")) is not None and not _FORMATS[wanted](value):
        return f"is a text of the format {wanted}"
    return _range_problem(len(value), field.get("minLength"), field.get("maxLength"), "has characters:")


def _list_problem(field: Mapping[str, Json], value: Json) -> str | None:
    choices = _choices(field)
    if not _are_texts(value) or not set(value) <= set(choices):
        return f"is a list out of {_shown(choices)}"
    if len(set(value)) != len(value):
        return "names something twice"
    return _range_problem(len(value), field.get("minItems"), field.get("maxItems"), "has items:")


def _range_problem(value: float, least: float | None, most: float | None, what: str) -> str | None:
    if least is not None and value < least:
        return f"{what} at least {least}"
    if most is not None and value > most:
        return f"{what} at most {most}"
    return None


def _choices(field: Mapping[str, Json]) -> list[str]:
    """What a field offers; empty where any text will do."""
    choices: Mapping[str, Json] = field.get("items", field)
    titled = choices.get("oneOf", choices.get("anyOf"))
    return [each["const"] for each in titled] if titled is not None else list(choices.get("enum", ()))


def _shown(choices: Sequence[str]) -> str:
    return ", ".join(choices)[:200]


def _only(given: Mapping[str, Json], known: set[str], where: str) -> None:
    if unknown := [key for key in given if key not in known]:
        raise InvalidInput(f"{where} has {unknown[0][:64]!r}, which forms do not know")


def _are_texts(value: Json) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in cast("list[Json]", value))


def _are_titled(value: Json) -> bool:
    if not isinstance(value, list):
        return False
    for each in cast("list[Json]", value):
        if not isinstance(each, dict) or not _are_texts(list(cast("dict[str, Json]", each).values())):
            return False
        if each.keys() != {"const", "title"}:
            return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _is_stamp(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return "T" in text.upper()


_FORMATS: Final[Mapping[str, Callable[[str], bool]]] = {
    "email": lambda text: _EMAIL.match(text) is not None,
    "uri": lambda text: _URI.match(text) is not None,
    "date": _is_date,
    "date-time": _is_stamp,
}
