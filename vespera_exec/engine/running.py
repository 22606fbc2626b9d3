"""One execution while it runs: its work, its processes, the ladder that ends it, and its outcome."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import anyio
from anyio.abc import TaskGroup

from vespera_exec.engine.processes import ProcessLauncher
from vespera_exec.engine.tracking import Gate, SessionTracking
from vespera_exec.engine.work import Process, ProcessSpec, RetryRule, Work, WorkResult
from vespera_exec.errors import CancellationException, ExecutionError
from vespera_exec.model.cancellation import CancellationToken
from vespera_exec.model.principal import Caller
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.task import Task

CANCEL_SECONDS = 5.0
"""From the request to the terminal event, whatever the work does."""

_log = logging.getLogger(__name__)


class OutputSink(Protocol):
    """Where what the work writes is kept."""

    def write(self, stream: str, data: bytes) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The limits of one run, from its role and its request. Seconds; 0 means none."""

    timeout_seconds: float = 0.0
    wait_timeout_seconds: float = 0.0
    grace_seconds: float = 3.0
    retry: RetryRule | None = None
    max_attempts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the engine is asked to run. `run` is the role's executor, bound to task and role."""

    task: Task
    session: ExecutionSession
    run: Callable[[Work], Awaitable[WorkResult]]
    policy: Policy = field(default_factory=Policy)
    caller: Caller = field(default_factory=Caller)

    @property
    def key(self) -> str:
        return self.session.session_id


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the work ended, before anything is decided about it. Exactly one of the first two is set."""

    result: WorkResult | None = None
    error: BaseException | None = None
    rung: str | None = None
    timed_out: bool = False


class RunningExecution:
    """Runs one job to its outcome."""

    def __init__(
        self,
        job: Job,
        *,
        output: OutputSink,
        scratch: Path,
        before_ladder: Callable[[], Awaitable[object]],
        adopts_orphans: bool = False,
        read_interval: float = 0.02,
    ) -> None:
        self.job = job
        self._scratch = scratch
        self._before_ladder = before_ladder
        self._tracking = SessionTracking(job.session)
        self._launcher = ProcessLauncher(
            execution_id=job.session.session_id,
            python=sys.executable,
            adopts_orphans=adopts_orphans,
            read_interval=read_interval,
        )
        self._recorded = _RecordingLauncher(self._launcher, output)
        self._scope = anyio.CancelScope()
        self._cancelled = anyio.Event()
        self._ended = anyio.Event()
        self._decided = anyio.Event()
        self._outcome = Outcome(error=CancellationException("cancelled"))
        self._timed_out = False
        self._on_the_ladder = False
        self._rung: str | None = None

    @property
    def roots(self) -> tuple[int, ...]:
        """Pids of the shims, for the usage sampler."""
        return self._launcher.roots

    async def run(self, group: TaskGroup) -> Outcome:
        """The outcome, with nothing of the work left behind.

        The work itself is a task of `group`: an asynchronous callable that swallows its cancellation
        cannot be ended, and is left there, fenced off (`abandoned`). Cancelled itself, `run` ends all
        processes and concludes nothing: that is how an owner goes.
        """
        loop = asyncio.get_running_loop()
        requested = self.job.session.cancellation_token or CancellationToken()
        # The work's own token: a timeout cancels the work, but it is no request to cancel the execution.
        token = requested.child()
        
        def wake(_: CancellationToken) -> None:
            loop.call_soon_threadsafe(self._cancelled.set)

        undo = requested.on_cancel(wake)
        try:
            async with self._launcher:
                group.start_soon(self._run_work, self._work(token))
                async with anyio.create_task_group() as watching:
                    watching.start_soon(self._watch, token)
                    await self._decided.wait()
                    watching.cancel_scope.cancel()
        finally:
            undo()
            if not self._ended.is_set():
                self._tracking.fence()
                self._scope.cancel()
        return replace(self._outcome, rung=self._rung, timed_out=self._timed_out)

    def _work(self, token: CancellationToken) -> Work:
        record, life = self.job.task.record, self.job.session.lifecycle
        return Work(
            task_id=record.task_id,
            execution_id=life.execution_id,
            title=record.title,
            description=record.description,
            inputs=record.inputs,
            token=token,
            tracking=self._tracking,
            gate=Gate(),
            launcher=self._recorded,
            scratch=self._scratch,
            caller=self.job.caller,
            attempt=life.attempt,
            checkpoint=life.checkpoint,
        )

    async def _run_work(self, work: Work) -> None:
        try:
            with self._scope:
                self._outcome = Outcome(result=await self.job.run(work))
        except (CancellationException, ExecutionError) as error:
            self._outcome = Outcome(error=error)
        except Exception as error:  # noqa: BLE001 - the boundary to the role's code: its fault is its outcome
            self._outcome = Outcome(error=error)
        finally:
            self._ended.set()
            if not self._on_the_ladder:
                self._decided.set()

    async def _watch(self, token: CancellationToken) -> None:
        """Waits for a cancel or the timeout, then goes down the ladder until the work has ended."""
        await self._until_stopped()
        self._on_the_ladder = True  # from here on only the ladder says when it is over, and by which rung
        await self._before_ladder()
        if self._timed_out:
            token.cancel(f"Timeout after {self.job.policy.timeout_seconds:g} seconds of work")
        with anyio.move_on_after(CANCEL_SECONDS) as in_all:
            grace = self.job.policy.grace_seconds
            self._rung = await self._launcher.cancel(grace) or "token"
            with anyio.move_on_after(grace):
                await self._ended.wait()
            if not self._ended.is_set():
                self._rung = "scope"
                self._scope.cancel()
                await self._ended.wait()
        if in_all.cancelled_caught and not self._ended.is_set():
            self._rung = "abandoned"
            _log.warning("Work of %s will not stop; it is fenced off and abandoned", self.job.key)
        self._decided.set()

    async def _until_stopped(self) -> None:
        limit = self.job.policy.timeout_seconds
        while not self._cancelled.is_set():
            left = limit - self.job.session.elapsed_seconds if limit else None
            if left is not None and left <= 0:
                self._timed_out = True
                return
            with anyio.move_on_after(left):
                await self._cancelled.wait()


class _RecordingLauncher:
    """`Launcher` that keeps what the processes write, before the runner sees it."""

    def __init__(self, launcher: ProcessLauncher, output: OutputSink) -> None:
        self._launcher = launcher
        self._output = output

    async def launch(self, spec: ProcessSpec) -> Process:
        seen = spec.on_output

        def record(stream: str, data: bytes) -> None:
            self._output.write(stream, data)
            if seen is not None:
                seen(stream, data)

        return await self._launcher.launch(replace(spec, on_output=record))
