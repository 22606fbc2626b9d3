"""What the command line writes: answers to stdout, remarks to stderr; the one place that does."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from vespera_exec.errors import VesperaError

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from typing import TextIO

    from vespera_exec.model.events import Json

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class CannotWrite(VesperaError):
    """Our stdout takes no more, though somebody may read it: the disk behind it is full, say."""

    code = "CANNOT_WRITE"


def prepare() -> None:
    """Makes both streams usable whatever the caller closed, and unable to fail on a character."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            # Started with the descriptor closed; the number must not fall to the next file that is opened.
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", closefd=False))
        else:
            stream.reconfigure(errors="backslashreplace")


def line(text: str = "") -> None:
    """
    Raises:
        BrokenPipeError: the reader of stdout has gone; also of everything below that writes there.
        CannotWrite: another fault; what comes after it goes nowhere.
    """
    with _writing(sys.stdout):
        sys.stdout.write(text + "\n")


def lines(texts: Sequence[str]) -> None:
    for text in texts:
        line(text)


def document(value: Json) -> None:
    """One JSON document: indented for a person, on one line for a program."""
    line(json.dumps(value, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def json_line(value: Json) -> None:
    """A line of a JSON stream, on its way at once."""
    line(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    flush()


def remark(text: str) -> None:
    """A line for the person, beside the answer. A closed stderr is nobody's loss."""
    with suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def failure(error: VesperaError) -> None:
    """`vespera-exec: <what> (<CODE>); <hint>`, on one line."""
    from vespera_exec.cli.text import shown

    hint = f"; {shown(error.hint, 500)}" if error.hint else ""
    remark(f"vespera-exec: {shown(error.message, 1000)} ({error.error_code}){hint}")


def raw(stream: TextIO, text: str) -> None:
    """The work's own output, with nothing in it escaped; it is text, in which U+FFFD stands for what was no UTF-8."""
    with _writing(stream):
        stream.flush()
        stream.buffer.write(text.encode("utf-8", "surrogatepass"))
        stream.flush()


def flush() -> None:
    """Everything written to stdout has left."""
    with _writing(sys.stdout):
        sys.stdout.flush()


def forget_stdout() -> None:
    """Nobody reads stdout any more: what is still to come goes nowhere, without complaint at the exit."""
    _forget(sys.stdout)


def leave() -> None:
    """Let go of both streams: the interpreter must find nothing that a closed terminal refuses, or exits with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _forget(stream)


def _forget(stream: TextIO) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


@contextmanager
def _writing(stream: TextIO) -> Generator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as fault:
        if stream is sys.stdout:
            forget_stdout()
        raise CannotWrite(f"cannot write the output: {fault.strerror}") from fault


def is_display(stream: TextIO) -> bool:
    """A terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def colour(text: str, name: str, stream: TextIO | None = None) -> str:
    """`text` in a colour where `stream` (stdout) shows one: a terminal, and no `NO_COLOR`."""
    if os.environ.get("NO_COLOR") or not is_display(stream or sys.stdout):
        return text
    return f"\x1b[{_COLOURS[name]}m{text}\x1b[0m"


def width() -> int | None:
    """Columns of the terminal; None where stdout is none."""
    if not sys.stdout.isatty():
        return None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except OSError:
        return None
