"""`vespera-exec report`: lets a program that we run say how far it is; standard library only.

Writes one line to the descriptor that `VESPERA_PROGRESS_FD` names, in one piece.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import select
import stat
import sys
from pathlib import Path
from typing import Any, Final, NoReturn

REFUSED: Final = 125
"""The exit code of a report that was not made; the program's own codes are below it."""
_LEVELS: Final = ("debug", "info", "warning", "error")


class Refused(Exception):
    """The report cannot be made; the argument says why."""


def main(argv: list[str]) -> int:
    """0 when the report is on its way, else 125 with one line on stderr."""
    try:
        _send(_message(_parser().parse_args(argv)))
    except Refused as error:
        sys.stderr.write(f"vespera-exec report: {error}\n")
        return REFUSED
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vespera-exec report", description="Report progress from inside an execution.")
    parser.add_argument("--progress", type=_number, metavar="PERCENT", help="0 to 100")
    parser.add_argument("--done", type=_number, help="units done")
    parser.add_argument("--total", type=_number, help="units in all")
    parser.add_argument("--unit", help="what is counted, e.g. files")
    parser.add_argument("-m", "--message", help="what it is doing")
    parser.add_argument("--metric", help="report a measure of this name beside the progress")
    parser.add_argument("--reset", action="store_true", help="the value may go back")
    parser.add_argument("--checkpoint", type=_json, metavar="JSON", help="a state that the work can go on from")
    parser.add_argument("--result", type=_json, metavar="JSON", help="the result of the work")
    parser.add_argument("--error", metavar="CODE", help="why the program is about to fail; -m says it in words")
    parser.add_argument("--ask", metavar="NAME", help="ask for an answer to -m; the program then exits")
    parser.add_argument("--approve", metavar="NAME", help="ask for an approval of -m; the program then exits")
    parser.add_argument("--schema", type=_json, metavar="JSON", help="the form of --ask: a flat JSON Schema")
    parser.add_argument("--log", metavar="TEXT", help="a line for the log")
    parser.add_argument("--level", choices=_LEVELS, default="info", help="the level of --log")
    return parser


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number from 0")
    return value


def _json(text: str) -> tuple[Any]:
    try:
        return (json.loads(text, parse_constant=_number),)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None


def _message(given: argparse.Namespace) -> dict[str, Any]:
    if given.progress is not None and given.done is not None:
        raise Refused("give --progress or --done, not both")
    if given.progress is not None and given.progress > 100:
        raise Refused(f"a percentage is at most 100, not {given.progress:g}")
    if given.done is None and (given.total is not None or given.unit is not None):
        raise Refused("--total and --unit go with --done")
    if given.metric is not None and given.progress is None and given.done is None:
        raise Refused("--metric needs a value: --progress or --done")
    if given.ask is not None or given.approve is not None:
        return {"ask": _question(given)}
    if given.schema is not None:
        raise Refused("--schema goes with --ask")
    message = _told(given)
    if not message:
        raise Refused("nothing to report; give --progress, --done, -m, --checkpoint, --result, --error or --log")
    return message


def _told(given: argparse.Namespace) -> dict[str, Any]:
    names = ("progress", "done", "total", "unit", "message", "metric")
    message = {name: value for name in names if (value := getattr(given, name)) is not None}
    for name in ("checkpoint", "result"):
        if (value := getattr(given, name)) is not None:
            message[name] = value[0]
    if given.error is not None:
        message["error"] = {"code": given.error, "message": message.pop("message", given.error)}
    if given.reset:
        message["reset"] = True
    if given.log is not None:
        message |= {"log": given.log, "level": given.level}
    return message


def _question(given: argparse.Namespace) -> dict[str, Any]:
    if given.ask is not None and given.approve is not None:
        raise Refused("give --ask or --approve, not both")
    others = ("progress", "done", "metric", "checkpoint", "result", "error", "log")
    if not given.message or any(getattr(given, name) is not None for name in others):
        raise Refused("--ask and --approve take -m, the question, and no other report")
    if given.approve is not None and given.schema is not None:
        raise Refused("--schema goes with --ask")
    kind = "form" if given.approve is None else "approval"
    question = {"key": given.ask or given.approve, "kind": kind, "message": given.message}
    return question if given.schema is None else {**question, "schema": given.schema[0]}


def _send(message: dict[str, Any]) -> None:
    line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(line) > select.PIPE_BUF:
        # A longer one could be torn apart by another process that reports at the same time.
        raise Refused(f"the report has {len(line)} bytes; at most {select.PIPE_BUF} are written in one piece")
    descriptor = _descriptor()
    try:
        os.write(descriptor, line)
    except BlockingIOError:
        select.select([], [descriptor], [])
        os.write(descriptor, line)
    except OSError as error:
        raise Refused(f"nobody listens: {os.strerror(error.errno or errno.EPIPE)}") from None


def _descriptor() -> int:
    named = os.environ.get("VESPERA_PROGRESS_FD")
    if named is None:
        raise Refused("not inside an execution (VESPERA_PROGRESS_FD is not set)")
    number = int(named) if named.isascii() and named.isdigit() and len(named) < 7 else -1
    # Where a parent has closed it, the number may belong to a file of the program's own.
    if number > 2 and _is_channel(f"/dev/fd/{number}"):
        return number
    if number > 2 and (opened := _of_the_program(number)) is not None:
        return opened
    raise Refused(f"the progress descriptor {named!r} was not passed on to this process")


def _of_the_program(number: int) -> int | None:
    """The channel of the program that the execution runs, for a child that was not handed it; Linux only.

    Python's `subprocess`, for one, closes what it is not told to pass on.
    """
    mark = os.fsencode(f"VESPERA_EXECUTION_ID={os.environ.get('VESPERA_EXECUTION_ID', '')}")
    pid, program = os.getppid(), None
    try:
        while mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            program = pid
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        pass  # the shim, which nobody may look into, or no /proc
    path = f"/proc/{program}/fd/{number}"
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC) if program and _is_channel(path) else None
    except OSError:
        return None


def _is_channel(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
