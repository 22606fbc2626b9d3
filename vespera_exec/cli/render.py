"""Progress on a terminal: one line of rich's below what the work writes, and never in its way."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from vespera_exec.cli import output
from vespera_exec.cli.state import ENDED
from vespera_exec.cli.text import cells, duration, fit, percent, shown

if TYPE_CHECKING:
    from typing import TextIO

    from vespera_exec.cli.state import Shown

_COLOUR_SEQUENCE = re.compile(r"\x1b\[[0-9;]*m")
_KEPT = 4096
_COLUMNS = 6
_LEAST_MESSAGE = 16


class Footer:
    """Shows progress on the line below the work's output, which passes through unchanged.

    While the output stands in mid-line at a column that is known, the footer hangs one line lower; where
    the column cannot be known, it waits for the next line.
    """

    moving = True

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream, force_terminal=True, highlight=False)
        self._spinner = Spinner("dots", style="cyan")
        self._tail = ""
        self._drawn_at: int | None = None

    def update(self, state: Shown) -> None:
        column = cursor_column(self._tail, self._width)
        if state.status in ENDED:
            self._clear()
            return
        if column is None:
            return
        text = self.render(state)
        if column == 0:
            self._write(f"\r\x1b[2K{text}\r")
        else:
            self._write(f"\n\x1b[2K{text}\r\x1b[1A\x1b[{column}C")
        self._drawn_at = column

    def output(self, stream: TextIO, text: str) -> None:
        self._clear()
        output.raw(stream, text)
        if stream.isatty():
            self._tail = (self._tail + text).rpartition("\n")[2][-_KEPT:]

    def say(self, text: str) -> None:
        """A line of our own, above the footer."""
        self._clear()
        if self._tail:
            self._write("\n")
            self._tail = ""
        output.remark(text)

    def close(self) -> None:
        self._clear()
        if self._tail:
            self._write("\n")
            self._tail = ""

    def render(self, state: Shown) -> str:
        """The footer as a line of text."""
        width = self._console.width = self._width - 1  # the last column would make the terminal wrap
        with self._console.capture() as captured:
            self._console.print(_line(state, self._spinner, width), end="", crop=True, no_wrap=True)
        return captured.get().rstrip("\n").split("\n")[0]

    @property
    def _width(self) -> int:
        try:
            return max(os.get_terminal_size(self._stream.fileno()).columns, 20)
        except OSError:
            return 80

    def _clear(self) -> None:
        if self._drawn_at is None:
            return
        if self._drawn_at == 0:
            self._write("\r\x1b[2K")
        else:
            self._write(f"\n\x1b[2K\x1b[1A\x1b[{self._drawn_at}C")
        self._drawn_at = None

    def _write(self, text: str) -> None:
        with suppress(OSError):  # the terminal may have gone
            self._stream.write(text)
            self._stream.flush()


def cursor_column(tail: str, width: int) -> int | None:
    """Where the cursor stands after `tail` was written from column 0; None where that cannot be told."""
    plain = _COLOUR_SEQUENCE.sub("", tail).rpartition("\r")[2]
    if not plain.isprintable() or len(tail) >= _KEPT:
        return None
    used = cells(plain)
    if used and used % width == 0:
        return None  # some terminals stand in the last column now, others in the first of the next line
    return used % width


def bar(percentage: float | None, *, width: int) -> ProgressBar:
    """Moving where the percentage is unknown."""
    return ProgressBar(total=100, completed=percentage or 0, width=width, pulse=percentage is None)


def _line(state: Shown, spinner: Spinner, width: int) -> Table:
    grid = Table.grid(padding=(0, 1))
    what = state.phase if state.status == "running" and state.phase else state.status
    spare = width - len(what) - len("100 %") - 1 - _COLUMNS + 1  # 1 for the spinner, 1 between two columns
    bar_width = max(min(30, spare // 4), 6)
    tail = _tail(state, spare - bar_width - min(cells(state.message), _LEAST_MESSAGE))
    room = spare - bar_width - len(tail)
    for _ in range(_COLUMNS):
        grid.add_column(no_wrap=True, overflow="crop")
    grid.add_row(
        spinner,
        Text(what, style="cyan"),
        bar(state.percentage, width=bar_width),
        Text(percent(state.percentage) or "  ", style="bold"),
        Text(fit(shown(state.message), room) if room > 0 else ""),
        Text(tail, style="dim"),
    )
    return grid


def _tail(state: Shown, room: int) -> str:
    """As much of usage, ETA and elapsed time as there is room for; the ETA goes last."""
    eta = f"ETA {state.eta}" if state.eta else ""
    for parts in ((state.usage, eta, duration(state.elapsed)), (state.usage, eta), (eta,)):
        if len(tail := " · ".join(part for part in parts if part)) <= room:
            return tail
    return ""
