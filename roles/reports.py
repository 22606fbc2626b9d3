"""What a child process says of itself: one JSON object per line of its progress descriptor.

    {"progress": 40, "message": "half way"}           a percentage
    {"done": 3, "total": 10, "unit": "files"}         items; steps with unit "steps"
    {"bytes": 1048576, "total": 4194304}              bytes
    {"message": "linking"}                            a new message, the value stays
    {"checkpoint": ...} {"log": "text", "level": "info"} {"result": ...} {"error": {"code", "message", "recoverable"}}
    {"ask": {"key": "name", "message": "Who?", "schema": ..., "kind": "form"}}    a question, see docs/roles.md

`message`, `details`, `metric`, `type` and `reset` go with any report. One line may carry several of these.
Where a text is expected, only a string will do.
"""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

from roles.coalescing import INTERVAL_SECONDS, Coalescer
from roles.losses import Losses
from vespera_exec.engine.work import MAX_REPORT_BYTES, InputNeeded
from vespera_exec.errors import CancellationException, ExecutionError, InvalidInput, InvalidProgress, VesperaError
from vespera_exec.model.enums import MessageLevel, ProgressType
from vespera_exec.model.events import Json, mapping
from vespera_exec.model.inputs import Question
from vespera_exec.model.jsonable import parsed_json
from vespera_exec.model.progress import ProgressReport

if TYPE_CHECKING:
    from collections.abc import Generator

    from vespera_exec.engine.work import Tracking, Work

MESSAGE_CHARACTERS: Final = 2000
_log = logging.getLogger(__name__)
RESULT_CHARACTERS: Final = 16 * 1024 * 1024
_KNOWN: Final = frozenset(
    {
        "progress", "done", "total", "bytes", "unit", "message", "details", "metric", "type", "reset",
        "checkpoint", "log", "level", "result", "result_part", "result_end", "error", "cancelled", "ask",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Held:
    """A JSON value that may itself be null."""

    value: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One line, read. `problem` says why it was not understood, `lost` why it would not have been kept as it was."""

    progress: ProgressReport | None = None
    checkpoint: Held | None = None
    log: tuple[MessageLevel, str, dict[str, Json]] | None = None
    result: Held | None = None
    result_part: str = ""
    result_end: dict[str, Json] | None = None
    error: dict[str, Json] | None = None
    cancelled: bool = False
    question: Question | None = None
    bad_question: str | None = None
    problem: str | None = None
    lost: str | None = None

    @property
    def says_more(self) -> bool:
        """It carries something that progress must not be overtaken by."""
        return (
            self.log is not None
            or self.checkpoint is not None
            or self.result is not None
            or self.result_end is not None
            or self.error is not None
            or self.cancelled
        )


def parse_report(line: bytes) -> Report:
    """Total: whatever the bytes are, a report comes back."""
    try:
        message: Any = parsed_json(line)
    except json.JSONDecodeError as error:
        return Report(problem=f"not JSON ({error}): {clean(line[:80].decode('utf-8', 'replace'))!r}")
    except ValueError as error:
        return Report(lost=f"A report was dropped: {error}")
    if not isinstance(message, dict):
        return Report(problem=f"not an object: {clean(line[:80].decode('utf-8', 'replace'))!r}")
    return read_report(cast("dict[str, Json]", message))


def read_report(message: dict[str, Json]) -> Report:
    """The same for a message that is an object already."""
    if not _KNOWN.intersection(message):
        return Report(problem=f"nothing known in it: {clean(repr(sorted(message))[:80])}")
    try:
        progress = _progress(message)
        log = _line_of_log(message) if "log" in message else None
        part = _text(message, "result_part")
    except (InvalidProgress, ValueError) as error:
        return Report(problem=clean(str(error))[:200])
    question, bad_question = _question(message["ask"]) if "ask" in message else (None, None)
    return Report(
        progress=progress,
        checkpoint=Held(message["checkpoint"]) if "checkpoint" in message else None,
        log=log,
        result=Held(message["result"]) if "result" in message else None,
        result_part=part,
        result_end=mapping(message["result_end"]) if "result_end" in message else None,
        error=_error(message["error"]) if "error" in message else None,
        cancelled=message.get("cancelled") is True,
        question=question,
        bad_question=bad_question,
    )


@dataclass(slots=True)
class Intake:
    """Takes the reports of one child, hands them to the log, and keeps its outcome.

    A line that is not understood, or a report that is refused, is counted; the first is logged. A line that is
    too long, and a checkpoint that is refused, is in the log too, in a flood with the others of 5 s.
    Progress waits for at most `interval` seconds within `flushing`, and never behind anything else of its child.
    """

    tracking: Tracking
    interval: float = INTERVAL_SECONDS
    problems: int = 0
    last_problem: str = ""
    result: Held | None = None
    about: dict[str, Json] = field(default_factory=dict[str, Json])
    error: dict[str, Json] | None = None
    cancelled: bool = False
    asked: dict[str, Question] = field(default_factory=dict[str, Question])
    """By key, the first of each. They count when the child has ended: see `check_answered`."""
    bad_question: str | None = None
    """Why one of them cannot be asked."""
    _parts: list[str] = field(default_factory=list[str])
    _size: int = 0
    _progress: Coalescer = field(init=False)
    _losses: Losses = field(init=False)

    def __post_init__(self) -> None:
        self._losses = Losses(self.tracking)
        self._progress = Coalescer(self.tracking.progress, self.problem, self.interval)

    @contextmanager
    def flushing(self) -> Generator[None]:
        """While the child runs: what is held back is recorded in time on this loop, and all of it at the end."""
        try:
            with self._progress.on_time(self.finish):
                yield
        finally:
            self._losses.tell()

    def line(self, line: bytes) -> None:
        """A line of a child. Never raises: what is refused, because the execution has ended, say, is a problem."""
        if not line.strip():
            return
        try:
            self.take(parse_report(line))
        except InvalidInput as error:
            self._losses.add(f"A checkpoint was refused: {error}")
        except (VesperaError, CancellationException, RecursionError) as error:
            self.problem(str(error)[:200])

    def dropped(self) -> None:
        """A line was longer than what is read. Never raises."""
        self._losses.add(f"A report of more than {MAX_REPORT_BYTES // 1024} KiB was dropped")

    def guess(self, report: ProgressReport) -> None:
        """Progress read from a child's output; passed over where it is refused. Never raises."""
        try:
            self._progress.offer(report)
        except (VesperaError, CancellationException) as error:
            _log.debug("A guess was refused: %s", error)

    def finish(self) -> None:
        """Record what is held back. Never raises: what is refused is a problem."""
        try:
            self._progress.flush()
        except (VesperaError, CancellationException, RecursionError) as error:
            self.problem(str(error)[:200])

    def message(self, message: dict[str, Json]) -> None:
        """A report of a callable in our own loop; raises as `take` does."""
        self.take(read_report(message))

    def take(self, report: Report) -> None:
        """
        Raises:
            VesperaError: the log refused a checkpoint or a line.
            CancellationException: the execution has ended, and this work was left behind.
        """
        if report.problem is not None:
            self.problem(report.problem)
            return
        if report.lost is not None:
            self._losses.add(report.lost)
            return
        if report.progress is not None:
            self.offer(report.progress)
        if report.says_more:
            self._progress.flush()
        if report.log is not None:
            self.tracking.log(*report.log)
        self._outcome(report)
        if report.checkpoint is not None:
            self.tracking.checkpoint(report.checkpoint.value)

    def problem(self, what: str) -> None:
        """Count it, and log the first. Never raises."""
        self.problems += 1
        self.last_problem = what
        if self.problems == 1:
            try:
                self.tracking.log(MessageLevel.WARNING, f"A progress report was not understood: {what}")
            except (VesperaError, CancellationException) as error:
                _log.debug("A problem could not be logged: %s", error)

    def offer(self, report: ProgressReport) -> None:
        """Take progress alone; one that is refused is a problem.

        Raises:
            CancellationException: the execution has ended, and this work was left behind.
        """
        try:
            self._progress.offer(report)
        except InvalidProgress as error:
            self.problem(str(error)[:200])

    def _outcome(self, report: Report) -> None:
        if report.result is not None:
            self.result = report.result
        if report.result_part:
            self._size += len(report.result_part)
            if self._size <= RESULT_CHARACTERS:
                self._parts.append(report.result_part)
        if report.result_end is not None:
            try:
                self.result = Held(parsed_json("".join(self._parts)))
                self.about = report.result_end
            except json.JSONDecodeError as error:
                self.problem(f"the result came in damaged: {error}")
            except ValueError as error:
                self.error = _error({"code": "RESULT_NOT_JSON", "message": f"the result is no JSON: {error}"})
            self._parts, self._size = [], 0
        if report.error is not None:
            self.error = report.error
        self.cancelled = self.cancelled or report.cancelled
        if report.question is not None:
            self.asked.setdefault(report.question.key, report.question)
        self.bad_question = self.bad_question or report.bad_question


def check_answered(work: Work, intake: Intake) -> None:
    """Whatever else the work said, and however it ended: a question of it that nobody has answered comes first.

    Raises:
        InputNeeded: with those questions.
        ExecutionError: code BAD_QUESTION, one cannot be asked.
    """
    if intake.bad_question is not None:
        raise ExecutionError(intake.bad_question, code="BAD_QUESTION", recoverable=False)
    if waiting := [each for key, each in intake.asked.items() if key not in work.answers]:
        raise InputNeeded(waiting)


def told_answers(work: Work) -> dict[str, Json]:
    """`{key: {"action", "content"}}`, as the work is told."""
    return {key: each.told() for key, each in work.answers.items()}


def _question(given: Json) -> tuple[Question | None, str | None]:
    """The question, or why it is none."""
    asked = mapping(given)
    try:
        return Question.made(
            asked.get("key"), asked.get("message"), kind=asked.get("kind", "form"), schema=asked.get("schema")
        ), None
    except InvalidInput as error:
        return None, error.message


def _progress(message: dict[str, Json]) -> ProgressReport | None:
    text = message.get("message")
    said: dict[str, Any] = {
        "message": _text(message, "message")[:MESSAGE_CHARACTERS],
        "details": mapping(message.get("details")),
        "metric": _text(message, "metric")[:64] or None,
        "reset": message.get("reset") is True,
    }
    total = _number(message, "total")
    if (percentage := _number(message, "progress")) is not None:
        return ProgressReport(current=percentage, **said)
    if (done := _number(message, "bytes")) is not None:
        return ProgressReport(progress_type=ProgressType.BYTES, current=done, total=total, unit="bytes", **said)
    if (done := _number(message, "done")) is not None:
        unit = _text(message, "unit")[:32]
        kind = _text(message, "type") or ("steps" if unit in ("", "steps") else "items")
        return ProgressReport(progress_type=ProgressType(kind), current=done, total=total, unit=unit or kind, **said)
    return ProgressReport(**said) if text is not None and "log" not in message else None


def _line_of_log(message: dict[str, Json]) -> tuple[MessageLevel, str, dict[str, Json]]:
    level = MessageLevel(_text(message, "level") or "info")
    return level, _text(message, "log")[:MESSAGE_CHARACTERS], mapping(message.get("details"))


def _text(message: dict[str, Json], key: str) -> str:
    """A string of the message, cleaned unless it is a part of a result; empty where it has none."""
    value = message.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidProgress(f"{key} must be text, not {type(value).__name__}")
    return value if key == "result_part" else clean(value)


def _number(message: dict[str, Json], key: str) -> float | None:
    value = message.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidProgress(f"{key} must be a number, not {type(value).__name__}")
    return value


def _error(given: Json) -> dict[str, Json]:
    error = mapping(given)
    code, message, trace = (error.get(key) for key in ("code", "message", "traceback"))
    return {
        "code": clean(code)[:128] if isinstance(code, str) and code else "EXECUTION_FAILED",
        "message": clean(_told(given if message is None else message))[:MESSAGE_CHARACTERS],
        "traceback": clean(trace)[-16_384:] if isinstance(trace, str) else "",
        "recoverable": error.get("recoverable") is not False,
        **({"context": context} if (context := mapping(error.get("context"))) else {}),
    }


def _told(value: Json) -> str:
    try:
        return str(value)
    except RecursionError:
        return "the error is nested too deeply to be shown"


def clean(text: str) -> str:
    """Without the characters that upset a terminal or a database, and of bounded length."""
    bounded = text[:16_384] if len(text) > 16_384 else text
    if not bounded.isprintable():
        bounded = "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in bounded)
    return bounded
