"""Progress read from the output of tools that do not know us: pytest, cargo, ninja, make, pip, tqdm, own expressions.

The first tool that is recognised owns the bar: from then on bare `42%` and `3/10` in the output are not
progress any more. The percentage never goes back.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from roles.regex import MAX_SUBJECT
from vespera_exec.model.enums import ProgressType
from vespera_exec.model.progress import ProgressReport

LINE_BYTES: Final = 4096
"""Of a longer line only the last so many bytes are looked at."""
_SLOW_SECONDS: Final = 0.05

_ANSI: Final = re.compile(r"\x1b\[[0-9;?]{0,32}[ -/]{0,4}[@-~]")
_HINT: Final = re.compile(rb"\d(?: |\x1b\[[0-9;]{0,8}m)?[%/]|collected \d|Progress \d")
"""Every built-in pattern has one of these; most output has none, and is passed over at the speed of a search."""
_BREAKS: Final = re.compile(rb"[\r\n\x08]")
_SIZES: Final = {
    "bytes": 1,
    "B": 1,
    "kB": 1e3,
    "KB": 1e3,
    "KiB": 1024,
    "MB": 1e6,
    "MiB": 1024**2,
    "GB": 1e9,
    "GiB": 1024**3,
}


class OwnPattern(Protocol):
    @property
    def regex(self) -> str: ...


Reader = Callable[[str], ProgressReport | None]


@dataclass(slots=True)
class PatternReader:
    """Reads one stream of output, in chunks as they come.

    `builtin` False reads the role's own expressions alone. Own expressions come first.
    """

    builtin: bool = True
    own: tuple[OwnPattern, ...] = ()
    _pending: bytes = b""
    _best: float = -1.0
    _owner: str | None = None
    _pytest: _Pytest = field(default_factory=lambda: _Pytest())
    _own: list[re.Pattern[str]] = field(default_factory=list[re.Pattern[str]])

    def __post_init__(self) -> None:
        self._own = [re.compile(each.regex) for each in self.own]

    def feed(self, chunk: bytes) -> list[ProgressReport]:
        """What the lines that are complete with this chunk say; each report is further than the one before."""
        data = self._pending + chunk
        if not self._own and not self._pytest.total and _HINT.search(data) is None:
            self._pending = data[-LINE_BYTES:][_end_of_lines(data[-LINE_BYTES:]) :]
            return []
        *lines, rest = _BREAKS.split(data)
        self._pending = rest[-LINE_BYTES:]
        reports = [report for line in lines if line and (report := self._line(line)) is not None]
        if (
            self.builtin
            and self._pytest.total
            and rest
            and (report := self._further(self._pytest.partial(_text(rest))))
        ):
            reports.append(report)
        return reports

    @property
    def pending(self) -> int:
        """Bytes of the unfinished line that are kept."""
        return len(self._pending)

    def finish(self) -> list[ProgressReport]:
        """What the last line says, which has no end."""
        rest, self._pending = self._pending, b""
        report = self._line(rest) if rest else None
        return [report] if report is not None else []

    def _line(self, raw: bytes) -> ProgressReport | None:
        if not self._own and not self._pytest.total and _HINT.search(raw) is None:
            return None
        line = _text(raw)
        for pattern in tuple(self._own):
            if (report := self._own_report(pattern, line)) is not None:
                return self._further(report)
        if not self.builtin:
            return None
        for name, reader in (("pytest", self._pytest.line), *_TOOLS):
            if self._owner in (None, name) and (report := reader(line)) is not None:
                self._owner = name
                return self._further(report)
        if self._owner is None and self._pytest.total == 0:
            for reader in _BARE:
                if (report := reader(line)) is not None:
                    return self._further(report)
        return None

    def _further(self, report: ProgressReport | None) -> ProgressReport | None:
        if report is None or report.current is None:
            return None
        percentage = report.current if report.total is None else 100.0 * report.current / report.total
        if not self._best < percentage <= 100:
            return None
        self._best = percentage
        return report

    def _own_report(self, pattern: re.Pattern[str], line: str) -> ProgressReport | None:
        started = time.thread_time()
        found = pattern.search(line[-MAX_SUBJECT:])
        if time.thread_time() - started > _SLOW_SECONDS and len(self._own) > 0:
            self._own.remove(pattern)  # it would hold up the event loop again with every such line
        if found is None:
            return None
        groups = found.groupdict()
        try:
            if groups.get("percent") is not None:
                return _percent(groups["percent"])
            return _steps(groups["done"], groups["total"])
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(slots=True)
class _Pytest:
    """Counts outcomes against `collected N items`, and reads the percentage at the end of a line."""

    total: int = 0
    _done: int = 0

    _COLLECTED = re.compile(r"^collected (\d{1,9}) items?\b")
    _PERCENT = re.compile(
        r"(?:^|[.FEsxXR]|PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)[^\[\]]{0,80}\[ {0,2}(\d{1,3})%\] *$"
    )
    _DOTS = re.compile(r"^(?:\S{1,400}\.(?:py|txt|rst|md|yaml) )?([.FEsxXR]+)")

    def line(self, line: str) -> ProgressReport | None:
        if (found := self._COLLECTED.match(line)) is not None:
            self.total, self._done = int(found[1]), 0
            return None
        if self.total:
            if (done := self._dots(line)) is not None:
                self._done += done
                return self._report(self._done)
        elif len(line) > 3000:
            return None
        if (found := self._PERCENT.search(line)) is not None:
            return _percent(found[1])
        return None

    def partial(self, line: str) -> ProgressReport | None:
        done = self._dots(line)
        return None if done is None else self._report(self._done + done)

    def _dots(self, line: str) -> int | None:
        found = self._DOTS.match(line)
        if found is None or line[found.end() :].strip(" ").strip("[]0123456789%/ "):
            return None
        return len(found[1])

    def _report(self, done: int) -> ProgressReport | None:
        if done > self.total:
            return None
        return ProgressReport(progress_type=ProgressType.ITEMS, current=done, total=self.total, unit="tests")


def _tqdm(line: str) -> ProgressReport | None:
    found = re.search(r"(\d{1,3})%\|[^|]{0,400}\| {0,20}(\d{1,12})/(\d{1,12}) \[", line)
    if found is not None and int(found[3]) > 0:
        return ProgressReport(
            progress_type=ProgressType.ITEMS, current=int(found[2]), total=int(found[3]), unit="items"
        )
    found = re.search(r"(\d{1,3})%\|[^|]{0,400}\| {0,20}[\d.]{1,12}\w{0,2}/[\d.]{1,12}\w{0,2} \[", line)
    return _percent(found[1]) if found is not None else None


def _ninja(line: str) -> ProgressReport | None:
    found = re.match(r"\s{0,20}\[(\d{1,9})/(\d{1,9})\]", line)
    return _steps(found[1], found[2]) if found is not None else None


def _make(line: str) -> ProgressReport | None:
    found = re.match(r"\s{0,20}\[ {0,2}(\d{1,3})%\]", line)
    return _percent(found[1]) if found is not None else None


def _cargo(line: str) -> ProgressReport | None:
    found = re.match(
        r"\s{0,20}(?:Building|Compiling|Checking|Downloading|Updating)\b[^/]{0,400}?\b(\d{1,9})/(\d{1,9})\b", line
    )
    return _steps(found[1], found[2]) if found is not None else None


def _pip(line: str) -> ProgressReport | None:
    found = re.search(r"[━╸╺]{3,400} {1,8}([\d.]{1,12})/([\d.]{1,12}) (bytes|[kKMG]i?B)\b", line)
    if found is not None:
        return _bytes(found[1], found[2], _SIZES.get(found[3], 1))
    found = re.match(r"Progress (\d{1,15}) of (\d{1,15})$", line)
    return _bytes(found[1], found[2], 1) if found is not None else None


def _bare_percent(line: str) -> ProgressReport | None:
    found = re.search(r"(?<![\w.,/-])(\d{1,3}(?:\.\d{1,6})?) ?%(?![\w%])", line)
    return _percent(found[1]) if found is not None else None


def _bare_steps(line: str) -> ProgressReport | None:
    found = re.search(r"(?<![\w./:-])(\d{1,9}) ?/ ?(\d{1,9})(?![\w/:%-]|\.\d)", line)
    return _steps(found[1], found[2]) if found is not None and int(found[2]) > 1 else None


_TOOLS: Final[tuple[tuple[str, Reader], ...]] = (
    ("tqdm", _tqdm),
    ("pip", _pip),
    ("ninja", _ninja),
    ("make", _make),
    ("cargo", _cargo),
)
_BARE: Final[tuple[Reader, ...]] = (_bare_percent, _bare_steps)


def _percent(text: str) -> ProgressReport | None:
    value = float(text)
    return ProgressReport.percentage(value) if 0 <= value <= 100 else None


def _steps(done: str, total: str) -> ProgressReport | None:
    current, most = float(done), float(total)
    return ProgressReport.steps(current, most) if 0 <= current <= most and most > 0 else None


def _bytes(done: str, total: str, unit: float) -> ProgressReport | None:
    try:
        current, most = float(done) * unit, float(total) * unit
    except ValueError:
        return None
    if not 0 <= current <= most or most == 0:
        return None
    return ProgressReport(progress_type=ProgressType.BYTES, current=current, total=most, unit="bytes")


def _end_of_lines(data: bytes) -> int:
    return max(data.rfind(b"\n"), data.rfind(b"\r"), data.rfind(b"\x08")) + 1


def _text(raw: bytes) -> str:
    return _ANSI.sub("", raw[-LINE_BYTES:].decode("utf-8", "replace"))
