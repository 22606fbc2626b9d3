"""The line of progress below the work's output, on a terminal whose screen is read back."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios
from typing import TYPE_CHECKING

import pytest
from cli_harness import Screen

from vespera_exec.cli.render import Footer, cursor_column
from vespera_exec.cli.state import Shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

COLUMNS = 60


class Window:
    """A pseudo-terminal: what is written to `stream` is on `screen`."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, COLUMNS, 0, 0))
        self.stream: TextIO = os.fdopen(slave, "w", encoding="utf-8")
        self._screen = Screen(COLUMNS)

    def lines(self) -> list[str]:
        while select.select([self._master], [], [], 0.05)[0]:
            self._screen.feed(os.read(self._master, 65536).decode())
        return self._screen.text()

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)


@pytest.fixture
def window() -> Iterator[Window]:
    made = Window()
    yield made
    made.close()


def running(message: str = "Reading files") -> Shown:
    return Shown("t", status="running", phase="execution", percentage=42.0, message=message, usage="cpu 9 %, 5 MB")


def test_the_bar_stands_below_the_output_and_the_output_is_whole(window: Window) -> None:
    footer = Footer(window.stream)
    footer.update(running())
    footer.output(window.stream, "first\n")
    footer.update(running())
    footer.output(window.stream, "second\n")
    footer.update(running())
    lines = window.lines()
    assert lines[:2] == ["first", "second"]
    assert "execution" in lines[2]
    assert "42 %" in lines[2]
    footer.close()
    assert window.lines() == ["first", "second", ""]


def test_a_line_that_comes_in_pieces_is_not_torn_by_the_bar(window: Window) -> None:
    footer = Footer(window.stream)
    for piece in ("par", "tial", " line"):
        footer.output(window.stream, piece)
        footer.update(running())
        footer.update(running("Still reading"))
    lines = window.lines()
    assert lines[0] == "partial line"
    assert "42 %" in lines[1]
    footer.output(window.stream, " ends\n")
    footer.close()
    assert window.lines() == ["partial line ends", ""]


def test_our_own_lines_stand_above_the_bar(window: Window, capfd: pytest.CaptureFixture[str]) -> None:
    footer = Footer(window.stream)
    footer.output(window.stream, "half")
    footer.update(running())
    footer.say("vespera-exec: cancelling")
    assert capfd.readouterr().err == "vespera-exec: cancelling\n"
    assert window.lines() == ["half", ""]


def test_the_bar_goes_with_the_end(window: Window) -> None:
    footer = Footer(window.stream)
    footer.update(running())
    footer.update(Shown("t", status="completed", percentage=100.0))
    assert window.lines() == [""]


@pytest.mark.parametrize(
    "message", ["x" * 500, "漢" * 100, "\x1b[2J\x07" * 20, ""], ids=["long", "wide", "hostile", "none"]
)
def test_the_bar_stays_on_one_line_whatever_the_message(window: Window, message: str) -> None:
    footer = Footer(window.stream)
    footer.update(running(message))
    lines = window.lines()
    assert len(lines) == 1
    assert "execution" in lines[0]
    assert "42 %" in lines[0]


def test_unknown_progress_shows_a_bar_without_a_number(window: Window) -> None:
    Footer(window.stream).update(Shown("t", status="running", phase="execution"))
    assert "%" not in window.lines()[0]
    assert "━" in window.lines()[0]


@pytest.mark.parametrize(
    ("tail", "column"),
    [
        ("", 0),
        ("abc", 3),
        ("\x1b[31mabc\x1b[0m", 3),
        ("漢字", 4),
        ("x" * 25, 5),
        ("old\rnew line", 8),
        ("x" * 20, None),
        ("\x1b[2J", None),
        ("tab\there", None),
    ],
)
def test_the_cursor_is_where_the_text_left_it_or_unknown(tail: str, column: int | None) -> None:
    assert cursor_column(tail, 20) == column
