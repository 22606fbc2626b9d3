"""Words for people: durations, sizes and ages, and text of the work made safe to show on one line."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def shown(text: object, limit: int = 200) -> str:
    """`text` on one line: whatever a terminal would obey is escaped, what is too long ends in `…`."""
    source = str(text)
    plain = source[:limit]
    if not plain.isprintable():
        plain = "".join(each if each.isprintable() else _escaped(each) for each in plain)
    return plain if len(source) <= limit and len(plain) <= limit else plain[: limit - 1] + "…"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for unit, name, below, small in ((60, "min", 1, "s"), (3600, "h", 60, "min"), (86400, "d", 3600, "h")):
        if whole < unit * (60 if unit < 3600 else 24) or name == "d":
            rest = whole % unit // below
            return f"{whole // unit} {name}" + (f" {rest} {small}" if rest else "")
    raise AssertionError("the last unit takes all")


def size(count: float) -> str:
    """Bytes as `512 B`, `1.5 KB`, `20 MB` (powers of 1024)."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" and count < 10 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def age(stamp: str, now: datetime | None = None) -> str:
    """How long ago an ISO 8601 time was, as `12 s ago`; the text itself where it is no time."""
    try:
        then = datetime.fromisoformat(stamp)
    except ValueError:
        return shown(stamp, 40)
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    return "now" if seconds < 1 else f"{duration(seconds // 1 if seconds < 60 else seconds)} ago".replace(".0 s", " s")


def percent(value: float | None) -> str:
    return "" if value is None else f"{int(value)} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Lines of aligned columns; the last column takes what `width` leaves of the line."""
    widths = [max(cells(row[at]) for row in (header, *rows)) for at in range(len(header) - 1)]
    room = max(width - sum(widths) - 2 * len(widths), 10) if width else 10_000
    lines: list[str] = []
    for row in (header, *rows):
        parts = [f"{cell}{' ' * (wide - cells(cell))}" for cell, wide in zip(row, widths, strict=False)]
        lines.append("  ".join([*parts, fit(row[-1], room)]).rstrip())
    return lines


def cells(text: str) -> int:
    """The columns that printable text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF") for each in text)


def fit(text: str, width: int) -> str:
    """`text` cut to `width` columns."""
    if cells(text) <= width:
        return text
    used, kept = 0, ""
    for each in text:
        used += cells(each)
        if used >= width:
            break
        kept += each
    return kept + "…"


def _escaped(character: str) -> str:
    named = {"\n": "\\n", "\r": "\\r", "\t": " "}.get(character)
    return named or character.encode("unicode_escape").decode("ascii")
