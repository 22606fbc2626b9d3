"""Reading stored values back, also those that an older version wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from vespera_exec.model.events import Json

Readers = Mapping[str, Callable[[Json], Any]]


def stamp(text: str) -> datetime:
    return datetime.fromisoformat(text)


def iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment is not None else None


def present(data: Mapping[str, Json], names: Iterable[str], readers: Readers) -> dict[str, Any]:
    """Constructor arguments for what `data` says; a key that is missing or null takes the field's default."""
    given: dict[str, Any] = {}
    for name in names:
        value = data.get(name)
        if value is not None:
            reader = readers.get(name)
            given[name] = value if reader is None else reader(value)
    return given
