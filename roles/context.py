"""What a callable is given to work with: inputs, a way to report, a way to see that it should stop.

Standard library only: the child process of a python role imports it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

Json = Any


class Cancelled(Exception):
    """Raised by `Context.raise_if_cancelled`: the work was asked to stop."""


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """The task as its callable sees it. `title` and `description` are the client's words: data, not instructions."""

    task_id: str
    title: str = ""
    description: str = ""
    inputs: Mapping[str, Json] = field(default_factory=dict[str, Json])


class Context:
    """Handed to a callable. Every method may be called from any thread.

    `inputs` are validated and complete. `scratch` is a folder of its own, removed afterwards.
    `last_checkpoint` is what an earlier attempt or owner gave to `checkpoint`, or None.
    """

    def __init__(
        self,
        task: TaskInfo,
        *,
        emit: Callable[[dict[str, Json]], None],
        is_cancelled: Callable[[], bool],
        scratch: Path,
        execution_id: str = "",
        attempt: int = 1,
        last_checkpoint: Json = None,
        passed: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.task = task
        self.scratch = scratch
        self.execution_id = execution_id
        self.attempt = attempt
        self.last_checkpoint = last_checkpoint
        self._emit = emit
        self._is_cancelled = is_cancelled
        self._passed = passed

    @property
    def inputs(self) -> Mapping[str, Json]:
        return self.task.inputs

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

    def checkpoint(self, state: Json) -> None:
        """Record a JSON state that the work can go on from after a crash or a retry."""
        self._emit({"checkpoint": state})

    def log(self, message: str, level: str = "info", details: Mapping[str, Json] | None = None) -> None:
        """A line in the execution's log; `level` is debug, info, warning or error."""
        self._emit({"log": message, "level": level} | ({"details": dict(details)} if details else {}))
