"""The daemon's log as lines: its end, what comes after it, and each record for a person to read."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from datetime import datetime
from typing import TYPE_CHECKING, BinaryIO

from vespera_exec.cli.text import shown

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from vespera_exec.model.events import Json

_LOOK_SECONDS = 0.2
_TAIL_BYTES = 1024 * 1024
_SHOWN_APART = ("timestamp", "level", "event", "exception", "logger")


def lines(path: Path, *, last: int, follow: bool) -> Generator[str]:
    """The last lines of a log and of the one that it replaced; with `follow` those to come, over replacements."""
    with ExitStack() as opened:
        file = _opened(path, opened)
        before = _opened(path.with_suffix(f"{path.suffix}.1"), opened)
        *whole, rest = (_tail(before) + _tail(file)).split(b"\n")
        yield from _decoded(whole[max(len(whole) - last, 0) :])
        while follow:
            # Asked before it is read: what is read then is all that a replaced file will ever hold.
            replaced = file is None or _replaced(path, file)
            more = file.read() if file is not None else b""
            *whole, rest = (rest + more).split(b"\n")
            yield from _decoded(whole)
            if more:
                continue
            if replaced:
                file, rest = _opened(path, opened), b""
            time.sleep(_LOOK_SECONDS)
        if rest:
            yield from _decoded([rest])


def readable(line: str) -> str:
    """`13:02:11.123 warning no TCP door, url=None`, safe for a terminal; what is no record of ours as it is."""
    try:
        record: Json = json.loads(line)
        at = datetime.fromisoformat(record["timestamp"]).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        level, event = str(record["level"]), str(record["event"])
    except (ValueError, KeyError, TypeError):
        return shown(line, 2000)
    more = [f"{name}={value}" for name, value in record.items() if name not in _SHOWN_APART]
    told = shown(", ".join([event, *more]), 2000)
    fault = [f"    {shown(each, 500)}" for each in str(record.get("exception", "")).splitlines()]
    return "\n".join([f"{at} {level:<7} {told}", *fault])


def _opened(path: Path, opened: ExitStack) -> BinaryIO | None:
    try:
        return opened.enter_context(path.open("rb"))
    except FileNotFoundError:
        return None


def _tail(file: BinaryIO | None) -> bytes:
    """What a file ends with, from the beginning of a line on; nothing of one that is not there."""
    if file is None:
        return b""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    data = file.read()
    return data if size <= _TAIL_BYTES else data.partition(b"\n")[2]


def _replaced(path: Path, file: BinaryIO) -> bool:
    try:
        return not os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _decoded(whole: list[bytes]) -> Iterator[str]:
    return (line.decode("utf-8", "replace") for line in whole)
