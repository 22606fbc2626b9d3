"""What a role's runner may know and do: the whole interface between the engine and the roles.

Implementations live in the engine (durable) and in `roles.execution` (alone in memory).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from vespera_exec.errors import CancellationException
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from vespera_exec.model.cancellation import CancellationToken
    from vespera_exec.model.enums import ExecutionPhase, MessageLevel
    from vespera_exec.model.events import Json
    from vespera_exec.model.inputs import Answer, Question
    from vespera_exec.model.progress import ProgressReport


MAX_REPORT_BYTES: Final = 512 * 1024
"""Of one line on the progress descriptor: the largest checkpoint fits in, with what goes with it."""


class Tracking(Protocol):
    """The only way from the work back into the log. Every method may be called from any thread, never blocks."""

    def enter_phase(self, phase: ExecutionPhase, message: str = "") -> None: ...

    def milestone(self, percentage: float, message: str = "") -> None:
        """Set the overall percentage that is shown (the RoleExecutor's 10, 25, 30, 95)."""
        ...

    def progress(self, report: ProgressReport) -> None:
        """Record the work's own progress; the overall percentage follows from it.

        Raises:
            InvalidProgress: the report was refused; nothing was recorded.
        """
        ...

    def log(self, level: MessageLevel, message: str, details: Mapping[str, Json] | None = None) -> None: ...

    def checkpoint(self, state: Json) -> None:
        """Record a state that the work can go on from."""
        ...


class PauseGate(Protocol):
    """Where cooperative work stops while it is paused."""

    async def passed(self) -> None:
        """Returns at once unless paused; else when resumed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """A process to run under a shim. `argv[0]` is looked up in `env["PATH"]`; never a shell.

    `env` is the complete environment; the launcher adds the execution's marker and, where `reports`
    is set, `VESPERA_PROGRESS_FD`. The callbacks run on the event loop, in order of arrival.
    """

    argv: tuple[str, ...]
    cwd: Path
    env: Mapping[str, str]
    stdin: bytes = b""
    on_output: Callable[[str, bytes], None] | None = None
    """`(stream, chunk)`: "stdout" or "stderr", a chunk as it came."""
    on_report: Callable[[bytes], None] | None = None
    """One line written to the progress descriptor, without its newline; at most `MAX_REPORT_BYTES`."""
    on_report_dropped: Callable[[], None] | None = None
    """Called in the place of a longer line, which is dropped."""
    grace_seconds: float = 3.0
    """From the first signal of a cancellation to SIGKILL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessExit:
    """How a process ended; its whole tree is gone when this exists.

    `returncode` is negative for a signal, as in `subprocess`. `rung` is None when it ended by itself, else
    the rung of the ladder that ended it: "sigint", "sigterm", "sigkill" or "sweep". `leftover` counts the
    descendants that had to be ended after the process itself had gone.
    """

    returncode: int
    rung: str | None = None
    leftover: int = 0


class Process(Protocol):
    @property
    def pid(self) -> int: ...

    async def wait(self) -> ProcessExit:
        """When it and everything it started is gone. Cancelling the wait does not end the process."""
        ...


class Launcher(Protocol):
    """Starts the processes of one execution; the engine's ladder reaches everything it started."""

    async def launch(self, spec: ProcessSpec) -> Process:
        """
        Raises:
            ExecutionError: code PROGRAM_NOT_FOUND, NOT_EXECUTABLE or BAD_WORKING_DIRECTORY, with what to do.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All that a runner knows of one execution."""

    task_id: str
    execution_id: str
    title: str
    description: str
    inputs: Mapping[str, Json]
    token: CancellationToken
    tracking: Tracking
    gate: PauseGate
    launcher: Launcher
    scratch: Path
    """A folder of its own, removed by the cleanup phase."""
    caller: Caller = field(default_factory=Caller)
    step: str = "main"
    attempt: int = 1
    checkpoint: Json = None
    """The last checkpoint of an earlier owner or attempt, or None."""
    answers: Mapping[str, Answer] = field(default_factory=dict[str, "Answer"])
    """What was answered in this run so far, by key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkResult:
    """What the work returned. `output` is JSON; `success` False records FAILED with `error`."""

    output: Json = None
    success: bool = True
    error: str | None = None
    error_code: str = "EXECUTION_FAILED"
    recoverable: bool = True
    """Whether another attempt can help, where it failed."""
    error_context: Mapping[str, Json] = field(default_factory=dict[str, "Json"])
    """What is kept with the error, as the `context` of an `ExecutionError`."""
    returncode: int | None = None
    quality_score: float | None = None
    warnings: tuple[str, ...] = ()


class Stopped(CancellationException):
    """The work was asked to stop, and has; `reached` is what it returns of what it had done by then."""

    def __init__(self, reason: str, reached: WorkResult) -> None:
        super().__init__(reason)
        self.reached = reached


class Parked(Exception):
    """The work has ended for now and holds no slot; the engine keeps the job, and calls it again when it may go on.

    Raised by a runner once nothing of the work is left. The argument says what it waits for.
    """


class InputNeeded(Parked):
    """It goes on when these questions are answered; `Work.answers` has the answers then."""

    def __init__(self, questions: Sequence[Question]) -> None:
        super().__init__(", ".join(each.key for each in questions))
        self.questions = tuple(questions)


class WorkerNeeded(Parked):
    """Its worker is gone; another may claim it, and goes on from the last checkpoint."""


class RetryRule(Protocol):
    """When a failed attempt is followed by another."""

    def applies(self, error_code: str, failed_attempts: int) -> bool:
        """Whether the run goes on after its `failed_attempts`-th failure (1 for the first)."""
        ...

    def delay(self, failed_attempts: int) -> float:
        """Seconds to wait before the next attempt."""
        ...
