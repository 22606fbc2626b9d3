"""Where a run that is followed is shown: one moving line of a terminal, or lines."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

from vespera_exec.cli import output
from vespera_exec.cli.state import ENDED, Shown

if TYPE_CHECKING:
    from typing import TextIO

_STEP_PERCENT = 5


class Display(Protocol):
    """Where progress is shown, beside the work's own output. A `moving` one wants to be updated all the time."""

    @property
    def moving(self) -> bool: ...
    def update(self, state: Shown) -> None: ...
    def output(self, stream: TextIO, text: str) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class Lines:
    """Progress as lines on stderr: one per status, phase and 5 %; none when `quiet`."""

    moving = False

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._said: tuple[str, str | None, int] | None = None

    def update(self, state: Shown) -> None:
        if self._quiet or state.status in ENDED:
            return
        step = -1 if state.percentage is None else int(state.percentage // _STEP_PERCENT)
        now = (state.status, state.phase, step)
        if now != self._said:
            self._said = now
            output.remark(f"vespera-exec: {state.line()}")

    def output(self, stream: TextIO, text: str) -> None:
        output.raw(stream, text)

    def say(self, text: str) -> None:
        if not self._quiet:
            output.remark(text)

    def close(self) -> None:
        pass


def display(*, quiet: bool = False) -> Display:
    """A moving line where stderr is a terminal, else lines."""
    if quiet or not output.is_display(sys.stderr):
        return Lines(quiet=quiet)
    from vespera_exec.cli.render import Footer

    return Footer()
