"""The engine: queue, slots, attempts; decides what a run's end means and writes it down."""

from __future__ import annotations

import asyncio
import heapq
import logging
import shutil
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Protocol, Self

import anyio
import orjson
from anyio.abc import TaskGroup

from vespera_exec.engine.queue import WaitingQueue
from vespera_exec.engine.running import Job, Outcome, OutputSink, RunningExecution
from vespera_exec.engine.work import WorkResult
from vespera_exec.errors import CancellationException, ExecutionError, StoreError, StoreUnavailable
from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus, MessageLevel, ResourceType
from vespera_exec.model.events import Json
from vespera_exec.model.ledger import ResultRecord, Sink
from vespera_exec.model.session import ExecutionSession

_log = logging.getLogger(__name__)

S = ExecutionStatus


class Log(Sink, Protocol):
    """The journal, as the engine needs it."""

    async def sync(self) -> int:
        """Returns when everything appended before is on disk."""
        ...


class Watch(Protocol):
    def stop(self) -> object:
        """Measure a last time and let go."""
        ...


class Sampler(Protocol):
    """Measures the processes below `roots()` and says what it found."""

    def watch(self, key: str, roots: Callable[[], tuple[int, ...]], on_sample: Callable[[Sample], None]) -> Watch: ...


class Sample(Protocol):
    @property
    def values(self) -> Mapping[ResourceType, float]: ...


@dataclass(slots=True)
class Run:
    """One start request with its attempts, while it is active. `done` is set when its end is on disk."""

    run_id: str
    task_id: str
    session: ExecutionSession
    done: anyio.Event = field(default_factory=anyio.Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    max_concurrent: int = 4
    result_limit_bytes: int = 1024 * 1024
    read_interval: float = 0.02
    adopts_orphans: bool = False
    """The process is a subreaper: orphans of a killed shim come to it."""


class Engine:
    """Runs jobs, at most `max_concurrent` at a time. One event loop; its methods are called there."""

    def __init__(
        self,
        log: Log,
        *,
        owner: str,
        scratch_root: Path,
        open_output: Callable[[str], OutputSink],
        sampler: Sampler | None = None,
        on_done: Callable[[Job], None] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        options: EngineOptions | None = None,
    ) -> None:
        self._log = log
        self._owner = owner
        self._scratch_root = scratch_root
        self._open_output = open_output
        self._sampler = sampler
        self._clock = clock
        self._options = options or EngineOptions()
        self._on_done = on_done
        self._queue: WaitingQueue[Job] = WaitingQueue()
        self._waiting: dict[str, Job] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._withdrawn: deque[str] = deque()
        self._slots: set[str] = set()
        self._runs: dict[str, Run] = {}
        self._wake = anyio.Event()
        self._group: TaskGroup | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Self]:
        """The engine's lifetime. Leaving it ends all processes and concludes nothing: the next owner does."""
        self._loop = asyncio.get_running_loop()
        async with anyio.create_task_group() as group:
            self._group = group
            group.start_soon(self._dispatch)
            try:
                yield self
            finally:
                self._group = None
                group.cancel_scope.cancel()

    def submit(self, job: Job) -> Run:
        """Queue a job whose PENDING is on disk. Its run is active from now until its end is on disk."""
        life = job.session.lifecycle
        run = Run(life.run_id, life.task_id, job.session)
        self._runs[life.task_id] = run
        self._enqueue(job)
        return run

    def run_of(self, task_id: str) -> Run | None:
        """The active run of a task, or None."""
        return self._runs.get(task_id)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def active(self) -> int:
        return len(self._slots)

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or backs off."""
        return not self._runs

    # the queue

    def _enqueue(self, job: Job) -> None:
        life, now = job.session.lifecycle, self._clock.monotonic()
        not_before = None
        if life.not_before is not None:
            not_before = now + (life.not_before - self._clock.now()).total_seconds()
        if job.policy.wait_timeout_seconds:
            heapq.heappush(self._deadlines, (max(now, not_before or now) + job.policy.wait_timeout_seconds, job.key))
        self._waiting[job.key] = job
        self._queue.put(job.key, job, priority=life.priority, not_before=not_before)
        if job.session.cancellation_token is not None:
            job.session.cancellation_token.on_cancel(lambda _: self._withdraw(job.key))
        self._wake.set()

    def _withdraw(self, key: str) -> None:
        """Called from any thread when a token is cancelled."""
        self._withdrawn.append(key)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._rouse)

    def _rouse(self) -> None:
        self._wake.set()

    async def _dispatch(self) -> None:
        """Fill the free slots whenever something changes, or the next held job or deadline is due."""
        while (group := self._group) is not None:
            self._wake = anyio.Event()
            while self._withdrawn:
                if job := self._waiting.get(self._withdrawn.popleft()):
                    self._leave(job, group)
            now = self._clock.monotonic()
            while self._deadlines and self._deadlines[0][0] <= now:
                if job := self._waiting.get(heapq.heappop(self._deadlines)[1]):
                    job.session.time_out("Waited too long for its turn")
                    self._leave(job, group)
            while len(self._slots) < self._options.max_concurrent and (job := self._queue.pop(now)):
                del self._waiting[job.key]
                self._slots.add(job.key)
                group.start_soon(self._execute, job, group)
            due = [self._queue.next_time(), self._deadlines[0][0] if self._deadlines else None]
            times = [time for time in due if time is not None]
            with anyio.move_on_after(max(0.0, min(times) - now) if times else None):
                await self._wake.wait()

    def _leave(self, job: Job, group: TaskGroup) -> None:
        """It ended before its turn came."""
        del self._waiting[job.key]
        self._queue.discard(job.key)
        group.start_soon(self._done, job)

    # one execution

    async def _execute(self, job: Job, group: TaskGroup) -> None:
        following = None
        try:
            if job.session.lifecycle.status is S.PENDING:
                following = await self._attempt(job, group)
        except StoreUnavailable as fault:
            job.session.fail(fault)
        except StoreError:
            _log.exception("Execution %s was refused by the store and is given up", job.key)
        finally:
            shutil.rmtree(self._scratch_root / job.key, ignore_errors=True)
            self._slots.discard(job.key)
            self._wake.set()
        if following is None:
            await self._done(job)
            return
        await self._durable()
        if run := self._runs.get(job.session.task_id):
            run.session = following.session
        self._enqueue(following)

    async def _attempt(self, job: Job, group: TaskGroup) -> Job | None:
        """One execution from its start to its conclusion; the job of the next attempt, where there is one."""
        output = self._open_output(job.key)
        try:
            running = RunningExecution(
                job,
                output=output,
                scratch=self._scratch_root / job.key,
                before_ladder=self._durable,
                adopts_orphans=self._options.adopts_orphans,
                read_interval=self._options.read_interval,
            )
            job.session.start_execution()
            await self._durable()
            outcome = await self._observed(running, group)
        finally:
            output.close()
        return self._conclude(job, outcome)

    async def _observed(self, running: RunningExecution, group: TaskGroup) -> Outcome:
        if self._sampler is None:
            return await running.run(group)
        session = running.job.session

        def keep(sample: Sample) -> None:
            for kind, value in sample.values.items():
                session.record_resource_usage(kind, value)

        watch = self._sampler.watch(session.session_id, lambda: running.roots, keep)
        try:
            return await running.run(group)
        finally:
            watch.stop()

    async def _done(self, job: Job) -> None:
        await self._durable()
        run = self._runs.pop(job.session.task_id, None)
        if run is not None:
            run.done.set()
        if self._on_done is not None:
            self._on_done(job)

    async def _durable(self) -> None:
        """Wait until all that was decided is on disk, however long the disk refuses."""
        pause = 0.05
        while True:
            try:
                await self._log.sync()
            except StoreUnavailable:
                await anyio.sleep(pause)
                pause = min(pause * 2, 2.0)
            else:
                return

    # the end

    def _conclude(self, job: Job, outcome: Outcome) -> Job | None:
        """Decide what the outcome means; the next attempt, where there is one."""
        session, result, error = job.session, outcome.result, outcome.error
        details = _details(outcome)
        record = self._record(session, result)
        with job.task.ledger:
            for warning in result.warnings if result else ():
                session.note(MessageLevel.WARNING, warning)
            if isinstance(error, CancellationException) and not outcome.timed_out:
                session.request_cancellation(error.reason)
            if session.lifecycle.status is S.CANCELLING:
                session.end_cancelled(outcome=details, result=record)
            elif outcome.timed_out:
                limit = job.policy.timeout_seconds
                late = ExecutionError(f"Timed out after {limit:g} seconds of work", code="TIMEOUT")
                return self._fail(job, late, details, record, timed_out=True)
            elif error is not None:
                return self._fail(job, error, details, record)
            elif result is not None and not result.success:
                failed = ExecutionError(result.error or "Execution failed", code=result.error_code)
                return self._fail(job, failed, details, record)
            else:
                session.update_status(S.COMPLETING, "Finalizing")
                session.enter_phase(ExecutionPhase.FINALIZATION, "Finalizing")
                session.complete("Execution completed successfully", outcome=details, result=record)
        return None

    def _fail(
        self,
        job: Job,
        error: BaseException,
        details: Mapping[str, Json],
        record: ResultRecord | None,
        *,
        timed_out: bool = False,
    ) -> Job | None:
        session, rule = job.session, job.policy.retry
        code = error.failure_code if isinstance(error, ExecutionError) else type(error).__name__
        recoverable = getattr(error, "recoverable", True)
        attempt = session.lifecycle.attempt
        if rule is not None and recoverable and rule.applies(code, attempt):
            following = job.task.execution.fail_for_retry(
                error,
                retry_at=self._clock.now() + timedelta(seconds=rule.delay(attempt)),
                owner=self._owner,
                timed_out=timed_out,
                outcome=details,
                result=record,
            )
            return replace(job, session=following) if following is not None else None
        if timed_out:
            session.time_out(str(error), outcome=details, result=record)
        else:
            session.fail(error, outcome=details, result=record)
        return None

    def _record(self, session: ExecutionSession, result: WorkResult | None) -> ResultRecord | None:
        if result is None or result.output is None:
            return None
        body = orjson.dumps(result.output, option=orjson.OPT_NON_STR_KEYS, default=str)
        limit = self._options.result_limit_bytes
        if len(body) <= limit:
            return ResultRecord(execution_id=session.session_id, body=body)
        head = body[: limit // 2].decode("utf-8", "ignore")
        cut = orjson.dumps({"truncated": True, "size_bytes": len(body), "head": head})
        return ResultRecord(execution_id=session.session_id, body=cut, truncated=True)


def _details(outcome: Outcome) -> dict[str, Json]:
    details: dict[str, Json] = {}
    if outcome.rung is not None:
        details["rung"] = outcome.rung
        details["forced"] = outcome.rung not in ("token", "sigint")
    if outcome.result is not None:
        if outcome.result.returncode is not None:
            details["returncode"] = outcome.result.returncode
        if outcome.result.quality_score is not None:
            details["quality_score"] = outcome.result.quality_score
    return details
