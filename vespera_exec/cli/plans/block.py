"""A plan on a terminal: a block of lines that moves, one per step that is of interest, below them the whole."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final, cast

from rich.console import Console, Group
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from vespera_exec.cli import output
from vespera_exec.cli.render import bar
from vespera_exec.cli.state import ENDED
from vespera_exec.cli.text import cells, duration, fit, percent, shown

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import RenderableType

    from vespera_exec.cli.plans.state import PlanShown, StepShown
    from vespera_exec.cli.state import Shown

MOST_LINES: Final = 10
_STYLES: Final = {"running": "cyan", "waiting": "yellow", "pending": "yellow", "failed": "red"}
_ID_WIDTH: Final = 24
_STATUS_WIDTH: Final = 7
_BAR_WIDTH: Final = 12
_GAPS: Final = 4


class Block:
    """Draws the block where the cursor stands, and takes it away before anything else is written.

    The cursor rests in the first column of its first line.
    """

    moving = True

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream, force_terminal=True, highlight=False)
        self._spinner = Spinner("dots", style="cyan")
        self._height = 0

    def update(self, state: Shown) -> None:
        plan = cast("PlanShown", state)
        plan.news.clear()
        if plan.status in ENDED:
            self._clear()
            return
        self._draw(self.render(plan))

    def output(self, stream: TextIO, text: str) -> None:
        self._clear()
        output.raw(stream, text)

    def say(self, text: str) -> None:
        self._clear()
        output.remark(text)

    def close(self) -> None:
        self._clear()

    def render(self, plan: PlanShown) -> list[str]:
        """The lines of the block."""
        columns, rows = self._size
        width = self._console.width = columns - 1  # the last column would make the terminal wrap
        notable = plan.notable
        most = max(min(MOST_LINES, rows - 3), 1)
        drawn: list[RenderableType] = [_step(each, width) for each in notable[:most]]
        if len(notable) > most:
            drawn.append(Text(f"  … and {len(notable) - most} more", style="dim"))
        drawn.append(_whole(plan, self._spinner, width))
        with self._console.capture() as captured:
            self._console.print(Group(*drawn), end="", crop=True, no_wrap=True)
        return captured.get().rstrip("\n").split("\n")

    @property
    def _size(self) -> tuple[int, int]:
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except OSError:
            return 80, 24
        return max(size.columns, 30), max(size.lines, 4)

    def _draw(self, lines: list[str]) -> None:
        height = max(self._height, len(lines))
        padded = lines + [""] * (height - len(lines))
        self._write("\r" + "\n".join(f"\x1b[2K{line}\r" for line in padded) + _up(height - 1))
        self._height = len(lines)

    def _clear(self) -> None:
        if self._height:
            self._draw([])

    def _write(self, text: str) -> None:
        with suppress(OSError):  # the terminal may have gone
            self._stream.write(text)
            self._stream.flush()


def _step(step: StepShown, width: int) -> Table:
    grid = _grid(4)
    name = fit(shown(step.id, 64), _ID_WIDTH)
    room = width - _ID_WIDTH - _STATUS_WIDTH - _BAR_WIDTH - len("100 %") - 2 - _GAPS
    grid.add_row(
        Text(f"  {name}{' ' * (_ID_WIDTH - cells(name))}"),
        Text(f"{step.status:<{_STATUS_WIDTH}}", style=_STYLES.get(step.status, "")),
        bar(step.percentage or 0, width=_BAR_WIDTH),
        Text(f"{percent(step.percentage):>5} {fit(shown(step.says), room) if room > 0 else ''}"),
    )
    return grid


def _whole(plan: PlanShown, spinner: Spinner, width: int) -> Table:
    grid = _grid(5)
    eta = f"ETA {plan.eta}" if plan.eta else ""
    tail = " · ".join(part for part in (plan.summary(), eta, duration(plan.elapsed)) if part)
    room = width - 2 - cells(plan.status) - _BAR_WIDTH - len("100 %") - _GAPS
    grid.add_row(
        spinner,
        Text(plan.status, style="cyan"),
        bar(plan.percentage or 0, width=_BAR_WIDTH),
        Text(percent(plan.percentage) or "0 %", style="bold"),
        Text(fit(tail, room) if room > 0 else ""),
    )
    return grid


def _grid(columns: int) -> Table:
    grid = Table.grid(padding=(0, 1))
    for _ in range(columns):
        grid.add_column(no_wrap=True, overflow="crop")
    return grid


def _up(lines: int) -> str:
    return f"\x1b[{lines}A" if lines else ""
