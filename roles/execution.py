"""Takes a task through its phases with a role: validation, setup, execution, cleanup.

With a `Work` of the engine it reports and returns; the engine concludes. Alone in memory it concludes
the task itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import anyio
import anyio.to_thread
import orjson

from roles.context import Cancelled, Context, TaskInfo
from roles.definition import ProgressCallback, Role, TaskLike
from roles.reports import Intake
from roles.runners import process, python
from vespera_exec.engine.work import InputNeeded, Tracking, Work, WorkResult
from vespera_exec.errors import (
    CancellationException,
    ExecutionError,
    InvalidInput,
    InvalidProgress,
    InvalidTransitionError,
    PermissionDenied,
    VesperaError,
)
from vespera_exec.model.cancellation import CancellationToken
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus, MessageLevel
from vespera_exec.model.events import ExecutionEvent, Json
from vespera_exec.model.inputs import MAX_MESSAGE_CHARACTERS, Question
from vespera_exec.model.principal import Caller
from vespera_exec.model.progress import ProgressReport

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.model.task import Task

CLEANUP_SECONDS: Final = 2.0
APPROVAL: Final = "approval"
"""The key of the question that a role's `approval` asks."""

ExecutionResult = WorkResult

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ValidationResult:
    valid: bool
    error: str | None = None
    code: str = "INVALID_INPUT"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionEnvironment:
    """What setup made and cleanup removes. `context` is what an in-memory callable is given."""

    inputs: Mapping[str, Json] = field(default_factory=dict[str, Json])
    scratch: Path | None = None
    context: Context | None = None


class RoleLike(Protocol):
    """Whatever executes a task: a `Role`, or an embedding program's own object with these two."""

    @property
    def name(self) -> str: ...

    async def execute_task(self, task: Any, context: Any, progress_callback: ProgressCallback) -> Any: ...


class RoleExecutor:
    """Executes tasks with roles. The three hooks may be overridden.

    `allowed_roots` are the folders that token principals' path inputs must lie in.
    """

    def __init__(self, *, allowed_roots: tuple[Path, ...] = (), cleanup_seconds: float = CLEANUP_SECONDS) -> None:
        self._allowed_roots = allowed_roots
        self._cleanup_seconds = cleanup_seconds

    async def execute_task_with_tracking(self, task: Task | Work, role: RoleLike, work: Work | None = None) -> Any:
        """The result of the work: a `WorkResult`, or in memory whatever the role returned.

        With `work` nothing is concluded here. Without, the task ends COMPLETED, FAILED or CANCELLED, and
        a result whose `success` is False is a failure.

        Raises:
            CancellationException: it was asked to stop.
            ExecutionError: it could not be started, or (in memory) any error of the role's own.
        """
        if work is not None:
            return await self._execute(work, cast("Role", role))
        return await _InMemory(self, cast("Task", task), role).run()

    async def validate_task_for_role(self, task: TaskLike, role: RoleLike) -> ValidationResult:
        """Whether the role takes the task's inputs."""
        if not isinstance(role, Role):
            return ValidationResult(True)
        try:
            role.validate_inputs(task.inputs)
        except InvalidInput as error:
            return ValidationResult(False, error.message, error.code)
        return ValidationResult(True)

    async def setup_execution_environment(self, task: TaskLike, role: RoleLike) -> ExecutionEnvironment:
        """The inputs, completed, and a scratch folder; of a callable in the loop, its `Context` makes that."""
        inputs = role.validate_inputs(task.inputs) if isinstance(role, Role) else dict(task.inputs)
        if isinstance(task, Work):
            if isinstance(role, Role):
                inputs = role.resolve_paths(inputs, task.caller, self._allowed_roots)
            if not isinstance(role, Role) or not role.in_loop:
                await anyio.to_thread.run_sync(partial(task.scratch.mkdir, mode=0o700, parents=True, exist_ok=True))
            return ExecutionEnvironment(inputs=inputs, scratch=task.scratch)
        if isinstance(role, Role):
            inputs = role.resolve_paths(inputs, Caller(), ())
        scratch = Path(await anyio.to_thread.run_sync(partial(tempfile.mkdtemp, prefix="vespera-")))
        return ExecutionEnvironment(inputs=inputs, scratch=scratch)

    async def cleanup_execution_environment(self, context: ExecutionEnvironment | None) -> None:
        """Remove what setup made; `context` is None where setup did not get that far."""
        # A thread would cost more than the look.
        if context is not None and context.scratch is not None and os.path.lexists(context.scratch):  # noqa: ASYNC240
            await anyio.to_thread.run_sync(partial(_remove, context.scratch), abandon_on_cancel=True)

    async def _execute(self, work: Work, role: Role) -> WorkResult:
        tracking, token = work.tracking, work.token
        made: ExecutionEnvironment | None = None
        done = False
        warnings: list[str] = []
        try:
            tracking.enter_phase(ExecutionPhase.INITIALIZATION, f"Role {role.name}, attempt {work.attempt}")
            token.throw_if_cancelled()
            await self._validate(work, role)
            _check_approved(work, role)
            token.throw_if_cancelled()
            tracking.enter_phase(ExecutionPhase.SETUP, "Setting up execution environment")
            made = await self._set_up(work, role)
            tracking.milestone(25, "Setting up execution environment")
            await work.gate.passed()
            token.throw_if_cancelled()
            tracking.enter_phase(ExecutionPhase.EXECUTION, "Beginning task execution")
            tracking.milestone(30, "Beginning task execution")
            result = await _RUNNERS[role.runner](role, replace(work, inputs=made.inputs))
            token.throw_if_cancelled()
            if not result.success:
                tracking.enter_phase(ExecutionPhase.ERROR_HANDLING, result.error or "The work reports a failure")
            done = result.success
        except VesperaError as error:
            if not token.is_cancelled:
                tracking.enter_phase(ExecutionPhase.ERROR_HANDLING, error.message)
            raise
        finally:
            # Bounded, and the scratch folder of an execution that is over helps nobody.
            with anyio.CancelScope(shield=True):
                warnings.extend(await self.clean_up(made or ExecutionEnvironment(scratch=work.scratch), tracking))
        if done:
            tracking.milestone(95, "Cleaning up")
        return replace(result, warnings=(*result.warnings, *warnings)) if warnings else result

    async def _validate(self, work: Work, role: Role) -> None:
        work.tracking.enter_phase(ExecutionPhase.VALIDATION, "Validating task requirements")
        checked = await self.validate_task_for_role(work, role)
        if not checked.valid:
            raise ExecutionError(
                checked.error or "The task does not fit the role", code=checked.code, recoverable=False
            )
        work.tracking.milestone(10, "Validating task requirements")

    async def _set_up(self, work: Work, role: Role) -> ExecutionEnvironment:
        try:
            return await self.setup_execution_environment(work, role)
        except (InvalidInput, PermissionDenied) as error:
            raise ExecutionError(error.message, code=error.code, recoverable=False, hint=error.hint) from error
        except OSError as error:
            raise ExecutionError(f"The scratch folder cannot be made: {error}", code="SETUP_FAILED") from error

    async def clean_up(self, made: ExecutionEnvironment | None, tracking: Tracking) -> list[str]:
        """Enter CLEANUP and do it, within the deadline. What went wrong is a warning, never a failure."""
        problem: str | None = None
        told: Tracking | None = tracking
        try:
            tracking.enter_phase(ExecutionPhase.CLEANUP, "Cleaning up")
        except (InvalidTransitionError, CancellationException):
            told = None  # it has ended meanwhile; what setup made goes all the same
        try:
            with anyio.move_on_after(self._cleanup_seconds) as scope:
                await self.cleanup_execution_environment(made)
            if scope.cancelled_caught:
                problem = f"Cleanup did not end within {self._cleanup_seconds:g} s"
        # The boundary of the cleanup hook: its error never overturns a result.
        except Exception as error:  # noqa: BLE001
            problem = f"Cleanup failed: {error}"
        if problem is not None and told is not None:
            told.log(MessageLevel.WARNING, problem)
        return [problem] if problem is not None else []


_RUNNERS: Final = {"python": python.run, "process": process.run}


def _check_approved(work: Work, role: Role) -> None:
    """
    Raises:
        InputNeeded: the role wants an approval first, and nobody has given it yet.
    """
    if role.approval and APPROVAL not in work.answers:
        asked = f"Role {role.name} is to work on: {work.title}" if role.approval is True else role.approval
        raise InputNeeded([Question.made(APPROVAL, asked[:MAX_MESSAGE_CHARACTERS], kind="approval")])


class _InMemory:
    """One execution of a task that has no engine: the session is driven and concluded here."""

    def __init__(self, executor: RoleExecutor, task: Task, role: RoleLike) -> None:
        self._executor = executor
        self._task = task
        self._role = role
        self._session = task.start_execution(role.name)
        self._tracking = _SessionTracking(self._session)
        self._token = self._session.cancellation_token or CancellationToken()
        self._intake = Intake(self._tracking, interval=0)

    async def run(self) -> Any:
        try:
            result = await self._phases()
        except CancellationException as error:
            self._cancelled(error.reason)
            raise
        except asyncio.CancelledError:
            self._cancelled("The caller was cancelled")
            raise
        # The boundary of the role: its error is recorded on the task, and goes on to the caller.
        except Exception as error:
            try:
                self._session.fail(error)
            except VesperaError:
                _log.exception("The failure of %s could not be recorded", self._session.session_id)
            raise
        self._conclude(result)
        return result

    async def _phases(self) -> Any:
        seen = _Seen(self._task.id, self._task.title, self._task.description, self._task.inputs)
        made: ExecutionEnvironment | None = None
        failed = True
        try:
            self._enter(ExecutionPhase.INITIALIZATION, f"Role {self._role.name}")
            self._enter(ExecutionPhase.VALIDATION, "Validating task requirements", ExecutionStatus.VALIDATING)
            checked = await self._executor.validate_task_for_role(seen, self._role)
            if not checked.valid:
                raise ExecutionError(checked.error or "The task does not fit the role", code=checked.code)
            if isinstance(self._role, Role) and self._role.approval:
                raise ExecutionError("An approval needs the engine", code="NEEDS_ENGINE", recoverable=False)
            self._tracking.milestone(10, "Validating task requirements")
            self._enter(ExecutionPhase.SETUP, "Setting up execution environment")
            made = await self._executor.setup_execution_environment(seen, self._role)
            self._tracking.milestone(25, "Setting up execution environment")
            await self.passed()
            self._enter(ExecutionPhase.EXECUTION, "Beginning task execution", ExecutionStatus.RUNNING)
            self._tracking.milestone(30, "Beginning task execution")
            result = await self._execute(seen, made)
            self._token.throw_if_cancelled()
            failed = getattr(result, "success", True) is False
            return result
        finally:
            if failed and not self._token.is_cancelled and not self._session.status.is_terminal:
                self._tracking.enter_phase(ExecutionPhase.ERROR_HANDLING, "The execution failed")
            # Bounded, and also for a half-done setup.
            with anyio.CancelScope(shield=True):
                await self._executor.clean_up(made, self._tracking)
            if not failed and not self._session.status.is_terminal:
                self._tracking.milestone(95, "Cleaning up")

    async def _execute(self, seen: _Seen, made: ExecutionEnvironment) -> Any:
        told: Any = replace(seen, inputs=made.inputs)
        context = Context(
            TaskInfo(seen.task_id, seen.title, seen.description, made.inputs),
            emit=lambda message: self._intake.line(orjson.dumps(message)),
            is_cancelled=self._token.is_cancellation_requested,
            scratch=made.scratch or Path(tempfile.gettempdir()),
            execution_id=self._session.session_id,
            attempt=self._session.attempt,
            passed=self.passed,
        )
        grace = self._role.grace_seconds if isinstance(self._role, Role) else 3.0
        given: Any = told if isinstance(self._role, Role) else self._task
        result: Any = None
        try:
            with _cancelled_after(self._token, grace):
                result = await self._role.execute_task(given, context, self._progress)
        except Cancelled:
            raise CancellationException(self._token.cancellation_reason) from None
        return result if result is None or hasattr(result, "output") else WorkResult(output=result)

    def _progress(self, progress: float, message: str = "") -> None:
        """From any thread; outside 0 to 100 it is cut off, backwards it is passed over."""
        try:
            clamped = min(100.0, max(0.0, float(progress)))
            self._tracking.progress(ProgressReport.percentage(clamped, str(message)))
        except (InvalidProgress, TypeError, ValueError) as error:
            self._intake.problem(str(error))

    async def passed(self) -> None:
        """Wait while the session is paused."""
        resumed = anyio.Event()
        loop = asyncio.get_running_loop()

        def heard(event: ExecutionEvent) -> None:
            if event.event_type is EventType.STATUS_CHANGE:
                loop.call_soon_threadsafe(resumed.set)

        while self._session.status is ExecutionStatus.PAUSED:
            subscription = self._session.add_event_callback(heard)
            try:
                if self._session.status is ExecutionStatus.PAUSED:
                    await resumed.wait()
            finally:
                subscription.unsubscribe()
            resumed = anyio.Event()
        self._token.throw_if_cancelled()

    def _enter(self, phase: ExecutionPhase, message: str, status: ExecutionStatus | None = None) -> None:
        self._token.throw_if_cancelled()
        try:
            self._tracking.enter_phase(phase, message)
            if status is not None and self._session.status is not ExecutionStatus.PAUSED:
                self._session.update_status(status, message)
        except InvalidTransitionError:
            # A cancel from another thread came between the question and the step.
            self._token.throw_if_cancelled()
            raise

    def _conclude(self, result: Any) -> None:
        output = getattr(result, "output", None)
        if getattr(result, "success", True) is False:
            error = getattr(result, "error", None) or "The role reports a failure"
            code = getattr(result, "error_code", None)
            self._session.fail(ExecutionError(str(error), code=code, task_id=self._task.id))
            return
        text = output if isinstance(output, str) else "" if output is None else _shown(output)
        self._task.complete_execution(True, text)

    def _cancelled(self, reason: str) -> None:
        if self._token.timed_out:
            self._session.time_out(reason)
        elif not self._session.status.is_terminal:
            self._session.request_cancellation(reason)
            self._session.end_cancelled()


@dataclass(frozen=True, slots=True)
class _Seen:
    """The task as hooks and callables see it."""

    task_id: str
    title: str
    description: str
    inputs: Mapping[str, Json]

    @property
    def id(self) -> str:
        return self.task_id


class _SessionTracking:
    """`Tracking` over a session in memory, whose lock makes it safe from any thread."""

    def __init__(self, session: ExecutionSession) -> None:
        self._session = session

    def enter_phase(self, phase: ExecutionPhase, message: str = "") -> None:
        self._session.enter_phase(phase, message)

    def milestone(self, percentage: float, message: str = "") -> None:
        self._session.milestone(percentage, message)

    def progress(self, report: ProgressReport) -> None:
        self._session.report(report, None if report.metric is not None else ExecutionPhase.EXECUTION)

    def log(self, level: MessageLevel, message: str, details: Mapping[str, Json] | None = None) -> None:
        self._session.note(level, message, details)

    def checkpoint(self, state: Json) -> None:
        self._session.record_checkpoint(state)


@contextmanager
def _cancelled_after(token: CancellationToken, grace_seconds: float) -> Generator[None]:
    """Cancels its body once the token has been cancelled for `grace_seconds`, and then leaves quietly.

    The token may be cancelled from any thread; its deadline, which has no thread, is judged by a timer.
    """
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []
    over = False

    def asked() -> None:
        if not over:
            timers.append(loop.call_later(grace_seconds, scope.cancel))

    def tell(_: CancellationToken) -> None:
        loop.call_soon_threadsafe(asked)

    def judge() -> None:
        if token.deadline is not None and not token.is_cancellation_requested():
            left = max(0.005, token.deadline - time.monotonic())
            timers.append(loop.call_later(left, judge))

    with anyio.CancelScope() as scope:
        undo = token.on_cancel(tell)
        judge()
        try:
            yield
        finally:
            over = True
            undo()
            for timer in timers:
                timer.cancel()


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=False)


def _shown(output: Json) -> str:
    try:
        return orjson.dumps(output).decode()
    except TypeError:
        return str(output)
