"""What a callable is given to work with: inputs, a way to report, a way to see that it should stop.

Standard library only: the child process of a python role imports it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

Json = Any


class Cancelled(Exception):
    """Raised by `Context.raise_if_cancelled`: the work was asked to stop."""


class Unanswered(BaseException):
    """Ends the callable, which is called again when its questions are answered. Let it through."""


def is_unanswered(error: BaseException) -> bool:
    """Whether it is `Unanswered`, or a group that has it in it."""
    if isinstance(error, BaseExceptionGroup):
        return any(is_unanswered(each) for each in cast("BaseExceptionGroup[BaseException]", error).exceptions)
    return isinstance(error, Unanswered)


class Rejected(Exception):
    """What needs an approval was asked under the same name as a form, and declined."""

    failure_code = "APPROVAL_REJECTED"
    recoverable = False


class NoScratch(OSError):
    """The scratch folder cannot be made."""

    failure_code = "SETUP_FAILED"


@dataclass(frozen=True, slots=True)
class Answer:
    """To a question. `content` fits its form where `action` is "accept"; else it is None."""

    action: str
    content: Mapping[str, Json] | None = None

    @property
    def accepted(self) -> bool:
        return self.action == "accept"


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """The task as its callable sees it. `title` and `description` are the client's words: data, not instructions."""

    task_id: str
    title: str = ""
    description: str = ""
    inputs: Mapping[str, Json] = field(default_factory=dict[str, Json])


class Context:
    """Handed to a callable. Every method may be called from any thread.

    `inputs` are validated and complete. `last_checkpoint` is what an earlier attempt or owner gave to `checkpoint`,
    or None. `answers` are those to the questions of this run so far, as `{key: {"action", "content"}}`; None where
    nobody can be asked.
    """

    def __init__(
        self,
        task: TaskInfo,
        *,
        emit: Callable[[dict[str, Json]], None],
        is_cancelled: Callable[[], bool],
        scratch: Path,
        scratch_is_made: bool = True,
        execution_id: str = "",
        attempt: int = 1,
        last_checkpoint: Json = None,
        answers: Mapping[str, Mapping[str, Json]] | None = None,
        passed: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.task = task
        self._scratch = scratch
        self._scratch_is_made = scratch_is_made
        self.execution_id = execution_id
        self.attempt = attempt
        self.last_checkpoint = last_checkpoint
        self._emit = emit
        self._is_cancelled = is_cancelled
        self._answers = answers
        self._passed = passed

    @property
    def inputs(self) -> Mapping[str, Json]:
        return self.task.inputs

    @property
    def scratch(self) -> Path:
        """A folder of its own, removed afterwards. In the engine's own loop it is made when it is first asked for.

        Raises:
            NoScratch: it cannot be made.
        """
        if not self._scratch_is_made:
            try:
                self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise NoScratch(f"The scratch folder cannot be made: {error}") from error
            self._scratch_is_made = True
        return self._scratch

    def leave_scratch(self) -> None:
        """For the runner, when the callable has ended: a thread that it left behind makes no folder any more."""
        self._scratch_is_made = True

    @property
    def cancelled(self) -> bool:
        """It was asked to stop: save what should be saved, and return or raise."""
        return self._is_cancelled()

    def raise_if_cancelled(self) -> None:
        """
        Raises:
            Cancelled: it was asked to stop.
        """
        if self._is_cancelled():
            raise Cancelled

    async def pause_point(self) -> None:
        """Where async work in the engine's own loop stops while it is paused. A child process is stopped as a whole.

        Raises:
            Cancelled: it was asked to stop, before or while it was paused.
        """
        self.raise_if_cancelled()
        if self._passed is not None:
            await self._passed()
            self.raise_if_cancelled()

    def progress(self, percentage: float, message: str = "") -> None:
        """0 to 100, not backwards."""
        self.report(percentage, message=message)

    def steps(self, done: float, total: float | None = None, message: str = "") -> None:
        self.report(done=done, total=total, unit="steps", message=message)

    def items(self, done: float, total: float | None = None, message: str = "", *, unit: str = "items") -> None:
        self.report(done=done, total=total, unit=unit, type="items", message=message)

    def report(
        self,
        percentage: float | None = None,
        *,
        message: str = "",
        done: float | None = None,
        total: float | None = None,
        unit: str = "",
        type: str = "",
        details: Mapping[str, Json] | None = None,
        metric: str | None = None,
        reset: bool = False,
    ) -> None:
        """One report: a percentage, or `done` of `total` in `unit`, or a message alone.

        `metric` names a custom measure beside the work's own; `reset` allows the value to go back.
        A report that is refused costs nothing but a warning in the log.
        """
        for number in (percentage, done, total):
            if number is not None and not math.isfinite(number):
                self.log(f"A progress report was refused: {number} is not finite", "warning")
                return
        given = {
            "progress": percentage,
            "done": done,
            "total": total,
            "unit": unit,
            "type": type,
            "message": message,
            "details": details and dict(details),
            "metric": metric,
            "reset": reset,
        }
        self._emit({key: value for key, value in given.items() if value or (value == 0 and value is not False)})

    def ask(self, name: str, message: str, *, schema: Mapping[str, Json] | None = None) -> Answer:
        """What somebody answered to the question `name` of this run; see `ask_all`."""
        return self.ask_all({name: (message, schema)})[name]

    def approve(self, name: str, message: str) -> None:
        """Returns once somebody has approved; where it is rejected, the run ends and this is never called again.

        Raises:
            Unanswered: as `ask_all`.
        """
        self._ask({name: (message, None)}, "approval")
        if not self._answered(name).accepted:
            raise Rejected(f"not approved: {name}")

    def ask_all(self, questions: Mapping[str, tuple[str, Mapping[str, Json] | None]]) -> dict[str, Answer]:
        """The answers to several questions that are asked together, each a message and the schema of its form.

        Not all answered yet: the callable ends here, and is called again from its beginning when they are; then this
        returns at once. So save what should not be done twice in a checkpoint, or do it after the question.

        Raises:
            Unanswered: which ends the callable; it is no `Exception`.
            ExecutionError: code NEEDS_ENGINE, in memory there is nobody to ask.
        """
        self._ask(questions, "form")
        return {name: self._answered(name) for name in questions}

    def checkpoint(self, state: Json) -> None:
        """Record a JSON state that the work can go on from after a crash or a retry."""
        self._emit({"checkpoint": state})

    def log(self, message: str, level: str = "info", details: Mapping[str, Json] | None = None) -> None:
        """A line in the execution's log; `level` is debug, info, warning or error."""
        self._emit({"log": message, "level": level} | ({"details": dict(details)} if details else {}))

    def _ask(self, questions: Mapping[str, tuple[str, Mapping[str, Json] | None]], kind: str) -> None:
        if self._answers is None:
            from vespera_exec.errors import ExecutionError

            raise ExecutionError(
                "A question needs the engine, which keeps it until it is answered",
                code="NEEDS_ENGINE",
                recoverable=False,
                hint="run it through the server",
            )
        unanswered = {name: asked for name, asked in questions.items() if name not in self._answers}
        for name, (message, schema) in unanswered.items():
            question = {"key": name, "kind": kind, "message": message}
            self._emit({"ask": question | ({} if schema is None else {"schema": dict(schema)})})
        if unanswered:
            raise Unanswered

    def _answered(self, name: str) -> Answer:
        given = (self._answers or {})[name]
        return Answer(given["action"], given.get("content"))
