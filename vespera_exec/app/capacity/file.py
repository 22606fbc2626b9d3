"""The setting `VESPERA_CAPACITY`: pools in one line, or in a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from roles.yamlfile import Limits, Where, YamlFile
from vespera_exec.errors import InvalidInput
from vespera_exec.model.capacity import Pool, checked_amount, checked_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.model.events import Json

MAX_POOLS: Final = 256
_LIMITS: Final = Limits(bytes=64 * 1024, values=8000)
_KEYS: Final = ("type", "capacity", "cost_per_unit_hour", "attributes", "window_seconds")
_MOST: Final = 1e9
_HINT: Final = "write VESPERA_CAPACITY=cpu=4,gpu=1, or the absolute path of a YAML file; see docs/plans.md"


def configured_pools(setting: str) -> list[Pool]:
    """The pools that the setting names: `cpu=4,gpu=1`, or a path that begins with / or ~; none, where it is empty.

    Raises:
        InvalidInput: what is wrong, and in a file at which line.
    """
    text = setting.strip()
    if not text:
        return []
    if text.startswith(("/", "~")):
        return _of_file(Path(text))
    pools = [_of_pair(part.strip()) for part in text.split(",")]
    if len({each.id for each in pools}) < len(pools):
        raise InvalidInput(f"VESPERA_CAPACITY={setting!r} names a pool twice", hint=_HINT)
    return pools


def _of_pair(part: str) -> Pool:
    name, equals, amount = part.partition("=")
    try:
        number = float(amount) if equals else None
    except ValueError:
        number = None
    if number is None:
        raise InvalidInput(f"VESPERA_CAPACITY: {part[:80]!r} is not TYPE=AMOUNT", hint=_HINT)
    try:
        kind = checked_name(name.strip(), "a type")
        return Pool(id=kind, type=kind, capacity=checked_amount(number, f"the capacity of {kind}"))
    except InvalidInput as error:
        raise InvalidInput(f"VESPERA_CAPACITY: {error.message}", hint=_HINT) from None


def _of_file(path: Path) -> list[Pool]:
    try:
        file = path.expanduser()
        with file.open("rb") as opened:
            data = opened.read(_LIMITS.bytes + 1)
    except (OSError, RuntimeError) as error:
        raise InvalidInput(f"VESPERA_CAPACITY: {path} cannot be read: {error}", hint=_HINT) from None
    document = YamlFile(str(file), data, kind="capacity file", limits=_LIMITS, error=InvalidInput)
    for key in document.root:
        if key != "pools":
            document.fail((key,), f"unknown key {key[:64]!r}; there is only `pools`")
    pools = document.root.get("pools")
    if not isinstance(pools, dict) or not 0 < len(cast("dict[str, Json]", pools)) <= MAX_POOLS:
        document.fail(("pools",), f"pools is a mapping of 1 to {MAX_POOLS} names to what each has")
    return [_of_entry(document, name, given) for name, given in cast("dict[str, Json]", pools).items()]


def _of_entry(document: YamlFile, name: str, given: Json) -> Pool:
    where = ("pools", name)
    if not isinstance(given, dict):
        document.fail(where, f"pool {name[:64]} is a mapping with `capacity`")
    entry = cast("dict[str, Json]", given)
    for key in entry:
        if key not in _KEYS:
            document.fail((*where, key), f"unknown key {key[:64]!r}; a pool has {', '.join(_KEYS)}")
    try:
        return Pool(
            id=checked_name(name, "the name of a pool"),
            type=checked_name(entry.get("type", name), f"the type of pool {name}"),
            capacity=checked_amount(entry.get("capacity"), f"the capacity of pool {name}"),
            cost_per_unit_hour=_number(document, where, entry, "cost_per_unit_hour"),
            attributes=_attributes(document, where, entry.get("attributes")),
            window_seconds=_number(document, where, entry, "window_seconds"),
        )
    except InvalidInput as error:
        if error.message.startswith(document.file):
            raise
        document.fail(where, error.message)


def _number(document: YamlFile, where: Where, entry: Mapping[str, Json], key: str) -> float:
    value = entry.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
        document.fail((*where, key), f"{key} is a number from 0 to {_MOST:g}")
    return value


def _attributes(document: YamlFile, where: Where, given: Json) -> dict[str, Json]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        document.fail((*where, "attributes"), "attributes is a mapping")
    attributes = cast("dict[str, Json]", given)
    for key, value in attributes.items():
        if not isinstance(value, str | int | float):
            document.fail((*where, "attributes", key), f"the attribute {key[:64]} is a text, a number, true or false")
    return attributes
