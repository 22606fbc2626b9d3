"""The built-in role `survey`: what a folder holds, by language, size and content."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import stat
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from roles.builtin.languages import BY_NAME, BY_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from roles.context import Context

SKIPPED: Final = frozenset(
    {
        ".git", ".hg", ".svn", "node_modules", ".venv", "venv", "__pycache__", ".tox", ".nox", ".mypy_cache",
        ".ruff_cache", ".pytest_cache", ".vespera", ".hypothesis",
    }
)  # fmt: skip
CAPS: Final = {
    "languages": 40,
    "largest": 20,
    "duplicate_groups": 15,
    "paths_per_group": 5,
    "unreadable": 25,
    "path_characters": 160,
    "file_bytes": 256 * 1024 * 1024,
}
BLOCK: Final = 256 * 1024
SNIFFED: Final = 8192
_REPORT_SECONDS: Final = 0.1


class NotAFolder(Exception):
    failure_code = "NOT_A_FOLDER"


@dataclass(slots=True)
class _Sums:
    files: int = 0
    lines: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Content:
    lines: int
    is_binary: bool
    digest: bytes | None


@dataclass(slots=True)
class _Found:
    """What the counting pass found: `(relative path, bytes)` in order, and what it left out."""

    files: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    folders: int = 0
    skipped: Counter[str] = field(default_factory=Counter[str])
    unreadable: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    truncated: bool = False


def survey(context: Context) -> dict[str, Any]:
    """Files, lines and bytes in all and per language, the largest, the duplicates, the unreadable.

    The same tree gives the same result; `caps` says how much of each list is shown.
    """
    root = str(context.inputs.get("path") or ".")
    if not os.path.isdir(root):
        raise NotAFolder(f"{root} is not a folder")
    found = _count(root, context)
    languages, duplicates = _read(root, found, context)
    return _result(root, found, languages, duplicates)


def _count(root: str, context: Context) -> _Found:
    found = _Found()
    most = int(context.inputs.get("max_files") or 100_000)
    exclude = [str(each) for each in context.inputs.get("exclude") or ()]
    pace = _Pace()
    for path, size in _walk(root, exclude, found):
        context.raise_if_cancelled()
        if len(found.files) >= most:
            found.truncated = True
            break
        found.files.append((path, size))
        if pace.due():
            context.items(len(found.files), message="Counting files", unit="files")
    return found


def _walk(root: str, exclude: list[str], found: _Found) -> Iterator[tuple[str, int]]:
    """Regular files below `root`, in order of their names, as `(relative path, bytes)`."""
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            found.unreadable.append(_unreadable(folder or ".", error))
            continue
        found.folders += 1
        below: list[str] = []
        for entry in ordered:
            path = os.path.join(folder, entry.name)
            if any(fnmatch.fnmatchcase(entry.name, each) or fnmatch.fnmatchcase(path, each) for each in exclude):
                found.skipped["excluded"] += 1
                continue
            try:
                info = entry.stat(follow_symlinks=False)
            except OSError as error:
                found.unreadable.append(_unreadable(path, error))
                continue
            if stat.S_ISDIR(info.st_mode):
                if entry.name in SKIPPED:
                    found.skipped[entry.name] += 1
                else:
                    below.append(path)
            elif stat.S_ISREG(info.st_mode):
                yield path, info.st_size
            else:
                found.skipped["symbolic links" if stat.S_ISLNK(info.st_mode) else "special files"] += 1
        pending.extend(reversed(below))


def _read(root: str, found: _Found, context: Context) -> tuple[dict[str, _Sums], list[dict[str, Any]]]:
    sizes = Counter(size for _, size in found.files if size > 0)
    languages: dict[str, _Sums] = {}
    same: dict[tuple[int, bytes], list[str]] = {}
    pace, total = _Pace(), len(found.files)
    for done, (path, size) in enumerate(found.files):
        context.raise_if_cancelled()
        if pace.due():
            context.items(done, total, "Reading files", unit="files")
        try:
            content = _content(os.path.join(root, path), size, needs_digest=sizes[size] > 1)
        except OSError as error:
            found.unreadable.append(_unreadable(path, error))
            content = _Content(0, is_binary=False, digest=None)
        sums = languages.setdefault("Binary" if content.is_binary else _language(path), _Sums())
        sums.files += 1
        sums.lines += content.lines
        sums.bytes += size
        if content.digest is not None:
            same.setdefault((size, content.digest), []).append(path)
    context.items(total, total, "Reading files", unit="files")
    groups = [
        {"bytes": size, "count": len(paths), "paths": [_shown(each) for each in paths[: CAPS["paths_per_group"]]]}
        for (size, _), paths in same.items()
        if len(paths) > 1
    ]
    return languages, sorted(groups, key=lambda group: (-group["bytes"] * (group["count"] - 1), group["paths"]))


def _content(path: str, size: int, *, needs_digest: bool) -> _Content:
    """Lines of a text, whether it is one, and its digest where asked; a file above the cap is not read."""
    if size > CAPS["file_bytes"]:
        return _Content(0, is_binary=True, digest=None)
    # It may have become a link or a FIFO since it was counted.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        block = os.read(descriptor, BLOCK)
        is_binary = b"\0" in block[:SNIFFED]
        digest = hashlib.blake2b(digest_size=16) if needs_digest else None
        lines, last, read = 0, b"", 0
        while block and read <= CAPS["file_bytes"]:
            read += len(block)
            last = block
            if not is_binary:
                lines += block.count(b"\n")
            if digest is not None:
                digest.update(block)
            if is_binary and digest is None:
                break
            block = os.read(descriptor, BLOCK)
    finally:
        os.close(descriptor)
    unfinished = not is_binary and last != b"" and not last.endswith(b"\n")
    return _Content(lines + unfinished, is_binary, digest.digest() if digest is not None else None)


def _result(root: str, found: _Found, languages: dict[str, _Sums], duplicates: list[dict[str, Any]]) -> dict[str, Any]:
    ranked = sorted(languages.items(), key=lambda item: (-item[1].bytes, item[0]))
    largest = sorted(found.files, key=lambda item: (-item[1], item[0]))[: CAPS["largest"]]
    return {
        "path": _shown(root),
        "files": len(found.files),
        "folders": found.folders,
        "lines": sum(sums.lines for sums in languages.values()),
        "bytes": sum(size for _, size in found.files),
        "languages": [
            {"language": name, "files": sums.files, "lines": sums.lines, "bytes": sums.bytes}
            for name, sums in ranked[: CAPS["languages"]]
        ],
        "largest": [{"path": _shown(path), "bytes": size} for path, size in largest],
        "duplicates": {
            "groups": len(duplicates),
            "wasted_bytes": sum(group["bytes"] * (group["count"] - 1) for group in duplicates),
            "listed": duplicates[: CAPS["duplicate_groups"]],
        },
        "unreadable": {
            "count": len(found.unreadable),
            "listed": sorted(found.unreadable, key=lambda each: each["path"])[: CAPS["unreadable"]],
        },
        "skipped": dict(sorted(found.skipped.items())),
        "truncated": found.truncated,
        "caps": CAPS,
    }


def _language(path: str) -> str:
    name = os.path.basename(path).lower()
    return BY_NAME.get(name) or BY_SUFFIX.get(os.path.splitext(name)[1]) or "Other"


def _unreadable(path: str, error: OSError) -> dict[str, str]:
    return {"path": _shown(path), "reason": error.strerror or type(error).__name__}


def _shown(path: str) -> str:
    """The path as text: without the bytes that are none, and only the end of a very long one."""
    text = os.fsencode(path).decode("utf-8", "replace")
    if not text.isprintable():
        text = "".join(each if each.isprintable() else "\ufffd" for each in text)
    most = CAPS["path_characters"]
    return text if len(text) <= most else "…" + text[-(most - 1) :]


class _Pace:
    """Lets a report through every tenth of a second."""

    def __init__(self) -> None:
        self._next = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _REPORT_SECONDS
        return True
