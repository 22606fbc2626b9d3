"""A plan file as JSON: bounded YAML, or JSON. Whether it is a plan is for `app.plans.files` to say."""

from __future__ import annotations

import json
import math
import re
import stat
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from roles.yamlfile import Limits, YamlFile
from vespera_exec.errors import InvalidInput, InvalidPlan

if TYPE_CHECKING:
    from pathlib import Path

    from vespera_exec.model.events import Json

MAX_BYTES: Final = 4 * 1024 * 1024
_LIMITS: Final = Limits(bytes=MAX_BYTES, values=1_000_000)
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def read_plan_file(path: Path) -> Json:
    """What the file holds: `.json` is read as JSON, anything else as YAML without anchors, aliases and tags.

    Raises:
        InvalidInput: it cannot be read.
        InvalidPlan: it has more than 4 MiB, is nested deeper than 32 levels, has a key twice, or is no mapping.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidInput(f"{path} is no file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    return plan_data(data, file=path.name)


def plan_data(data: bytes, *, file: str) -> Json:
    """What the text of a plan file holds. `file` is its name for messages; see `read_plan_file`."""
    if file.endswith(".json"):
        return _json(data, file)
    return YamlFile(file, data, kind="plan file", limits=_LIMITS, error=_refusal).root


def _refusal(message: str) -> InvalidPlan:
    return InvalidPlan([(None, message)])


def _json(data: bytes, file: str) -> Json:
    if len(data) > MAX_BYTES:
        raise _refusal(f"{file}: the file has {len(data)} bytes; at most {MAX_BYTES} are allowed")
    try:
        value = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_number, parse_float=_number
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _refusal(f"{file}:{error.lineno}: {error.msg}") from None
    except RecursionError:
        raise _refusal(f"{file}: nested too deeply") from None
    except UnicodeEncodeError:
        raise _refusal(f"{file}: a text has half a surrogate pair") from None
    except ValueError as error:  # also a text that is no UTF-8
        raise _refusal(f"{file}: {error}") from None
    if not isinstance(value, dict):
        raise _refusal(f"{file}: a plan file is a mapping of keys to values")
    return cast("dict[str, Json]", value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:80]!r} stands here twice")
        found[name] = value
    return found


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is no number")
