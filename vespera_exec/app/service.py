"""The use cases, each once: what every door shows a skin of."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import anyio
import orjson

from vespera_exec import __version__
from vespera_exec.app import checks, present, views
from vespera_exec.app.following import Following
from vespera_exec.errors import (
    Conflict,
    InvalidInput,
    PermissionDenied,
    StoreUnavailable,
    TaskNotFound,
)
from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.enums import RESOURCE_UNITS, ExecutionStatus, TaskStatus
from vespera_exec.monitoring.eta import NaiveEstimator
from vespera_exec.store.output import read_output

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from roles.registry import RoleRegistry
    from vespera_exec.app.opening import Purpose
    from vespera_exec.app.starting import Starter
    from vespera_exec.app.tasks import Found, LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.model.ledger import IdempotencyRecord
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.principal import Caller
    from vespera_exec.model.progress import Progress
    from vespera_exec.settings import Settings
    from vespera_exec.store.feed import StoredEvent
    from vespera_exec.store.store import Store


class Vespera:
    """Tasks, executions, events and results of one data directory.

    Made by `Vespera.open`. Every use case takes the caller first; an id is a task id, a session id or a
    unique prefix (six characters at least) of either.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        engine: Engine,
        roles: RoleRegistry,
        tasks: LiveTasks,
        starter: Starter,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.settings = settings
        self.roles = roles
        self.started_at = datetime.now(UTC)
        self.version = __version__
        self._store = store
        self._engine = engine
        self._clock = clock
        self._tasks = tasks
        self._starter = starter
        self._following = Following(store, engine, tasks, clock)
        self._estimator = NaiveEstimator()

    @classmethod
    def open(
        cls, path: str | Path | None = None, *, settings: Settings | None = None, purpose: Purpose = "library"
    ) -> AbstractAsyncContextManager[Vespera]:
        """Own a data directory for as long as the context lasts.

        Raises:
            DataDirectoryInUse: a daemon or another program owns it.
            StoreUnavailable, StoreTooNew, StoreDamaged: it cannot be opened; the hint says what to do.
        """
        from vespera_exec.app.opening import opened

        return opened(path, settings=settings, purpose=purpose)

    # making and starting

    async def create_task(self, caller: Caller, new: views.NewTask) -> views.TaskView:
        """A task that waits to be executed; on disk when this returns.

        Raises:
            InvalidInput: title, description or inputs are refused.
            RoleNotFound, PermissionDenied: the role named is unknown, or not this caller's.
            StoreUnavailable: nothing new can be written now.
        """
        _require(caller, "operate")
        self._store.journal.check_writable()
        async with self._starter.once(caller, "create", new.idempotency_key) as known:
            if known is not None:
                return present.task(await self._tasks.record(known.task_id), repeated=True)
            task = self._starter.new_task(caller, new)
            if new.idempotency_key is not None:
                with task.ledger:
                    task.remember_key(caller.principal, "create", new.idempotency_key)
            await self._store.journal.sync()
        return present.task(task.record)

    async def execute_task(self, caller: Caller, request: views.Execute) -> views.Handle:
        """Queue a run; its acceptance is on disk when this returns, or its end, within `wait_ms`.

        Raises:
            InvalidInput: neither or both of `task_id` and `title`, or values that the role refuses.
            TaskNotFound, RoleNotFound, PermissionDenied.
            AlreadyExecuting: the task runs.
            Conflict: the queue is full.
            StoreUnavailable: nothing new can be written now.
        """
        _require(caller, "operate")
        self._store.journal.check_writable()
        async with self._starter.once(caller, "execute", request.idempotency_key) as known:
            if known is not None:
                return await self._repeated(known)
            if self._engine.queued >= self.settings.max_queued:
                raise Conflict(f"the queue is full ({self._engine.queued} wait)", hint="try again later")
            cursor = self._store.journal.head
            job = await self._starter.start(caller, request)
            # It is decided, so the engine has it before anything can come between, a client that goes included.
            # The engine starts nothing before PENDING is on disk.
            self._tasks.hold(job.task)
            run = self._engine.submit(job)
            try:
                await self._store.journal.sync()
            except StoreUnavailable:
                job.session.request_cancellation("Its acceptance could not be written")
                raise
        if request.wait_ms:
            with anyio.move_on_after(request.wait_ms / 1000):
                await run.done.wait()
        return self._handle(run.session.lifecycle, cursor, done=run.done.is_set())

    async def cancel(
        self, caller: Caller, any_id: str, *, reason: str = "User requested", wait_ms: int = 0
    ) -> views.Cancelled:
        """Ask the running execution to stop; on disk when this returns, and over, within `wait_ms`.

        Refused (`success` False, with the reason) where nothing runs or it is already completing.

        Raises:
            TaskNotFound: the id is unknown.
        """
        _require(caller, "operate")
        found = await self._tasks.find(any_id)
        run = self._engine.run_of(found.record.task_id)
        session = found.session
        if run is not None and found.life is not None and found.life.run_id == run.run_id:
            session = run.session  # the id of an earlier attempt means the run
        if session is None or session.lifecycle.status.is_terminal:
            life = found.life
            why = f"it has ended ({life.status.value})" if life else "it was never executed"
            return views.Cancelled(
                success=False,
                message="Cancellation not possible",
                reason=why,
                status=life.status.value if life else ExecutionStatus.IDLE.value,
                session_id=life.execution_id if life else None,
            )
        before = session.lifecycle.status
        accepted = session.request_cancellation(checks.reason(reason))
        if not accepted:
            return views.Cancelled(
                success=False,
                message="Cancellation not possible",
                reason=f"it is {session.lifecycle.status.value} already",
                status=session.lifecycle.status.value,
                session_id=session.session_id,
            )
        if wait_ms and run is not None:
            with anyio.move_on_after(wait_ms / 1000):
                await run.done.wait()
        elif self._store.journal.fault is None:
            await self._store.journal.sync()
        found = self._written(await self._tasks.find(session.session_id))
        life = found.life or session.lifecycle
        return views.Cancelled(
            success=True,
            message="Cancellation requested",
            status=life.status.value,
            session_id=life.execution_id,
            already_requested=before is ExecutionStatus.CANCELLING,
            rung=life.outcome.get("rung"),
        )

    # asking

    async def list_tasks(
        self,
        caller: Caller,
        *,
        status: str | None = None,
        role: str | None = None,
        text: str | None = None,
        limit: int = 20,
        page: str | None = None,
    ) -> views.TaskPage:
        """Tasks, newest change first. `status` is a task's or an execution's; `page` comes from the last page.

        Raises:
            InvalidInput: an unknown status, a limit outside 1 to 200, a page token that is not ours.
        """
        _require(caller, "read")
        if not 1 <= limit <= 200:
            raise InvalidInput("limit is between 1 and 200")
        await self._settled()
        found = await self._store.queries.list_tasks(
            status=_status(status), role=role, text=text, limit=limit, page_token=page
        )
        rows = [
            views.TaskRow(
                task_id=row.task.task_id,
                title=row.task.title,
                role=row.task.assigned_role,
                status=row.task.status.value,
                execution_status=row.execution_status.value if row.execution_status else None,
                session_id=row.execution_id,
                percentage=row.percentage,
                updated_at=row.task.updated_at or self.started_at,
            )
            for row in found.items
        ]
        return views.TaskPage(tasks=rows, next_page=found.next_token, total=found.total)

    async def get_task(self, caller: Caller, any_id: str) -> views.TaskView:
        _require(caller, "read")
        return present.task((await self._tasks.find(any_id)).record)

    def list_roles(self, caller: Caller) -> views.RoleList:
        """The roles there are, whether this caller may use each, and the role files that are broken."""
        _require(caller, "read")
        shown = [
            views.RoleView(
                name=role.name,
                description=role.description,
                runner=role.runner,
                inputs=role.input_schema(),
                allowed=self._starter.permits(caller, role),
                origin=role.source if role.source in ("builtin", "program") else "operator",
            )
            for role in self.roles.all()
        ]
        return views.RoleList(roles=shown, problems=list(self.roles.problems))

    async def get_status(self, caller: Caller, any_id: str, *, detail: bool = False) -> views.Status:
        """Where it stands: the running session, else the last that ended.

        Raises:
            TaskNotFound: the id is unknown.
        """
        _require(caller, "read")
        found = self._written(await self._tasks.find(any_id))
        life = found.life
        status = life.status if life is not None else ExecutionStatus.IDLE
        recent = None
        if detail:
            head = self._store.journal.head
            events = await self._store.feed.recent(task_id=found.record.task_id, limit=5) if head else []
            recent = [event.message() for event in events]
        return views.Status(
            executing=status.is_active,
            status=status.value,
            lifecycle=status.lifecycle,
            session_id=life.execution_id if life else None,
            task_id=found.record.task_id,
            title=found.record.title,
            task_status=found.record.status.value,
            done=self._following.is_done(found),
            cursor=self._store.journal.head,
            session=self._summary(found, detail=detail) if life is not None else None,
            legacy_compatibility=present.legacy(found.record),
            recent_events=recent,
        )

    async def get_progress(self, caller: Caller, any_id: str) -> views.ProgressInfo | None:
        """Document 004's progress body, or None where none was ever recorded."""
        _require(caller, "read")
        found = await self._tasks.find(any_id)
        if found.life is None or found.progress is None:
            return None
        return present.steps(found.life, found.progress)

    async def read_events(
        self, caller: Caller, any_id: str, *, cursor: int = 0, wait_ms: int = 0, max_events: int = 100
    ) -> views.EventPage:
        """Events after `cursor`, in order, without gap; waits up to `wait_ms` where there are none yet.

        For a task id: of the task and all its executions, and `done` speaks of its run. For a session id:
        of that session alone.

        Raises:
            InvalidInput: a negative cursor, or `max_events` outside 1 to 1000.
        """
        _require(caller, "read")
        events, done, status = await self._following.read(any_id, cursor=cursor, wait_ms=wait_ms, limit=max_events)
        return views.EventPage(
            events=[event.message() for event in events],
            next_cursor=events[-1].cursor if events else max(cursor, 0),
            done=done,
            status=status,
        )

    async def follow_events(self, caller: Caller, any_id: str, *, cursor: int = 0) -> AsyncIterator[StoredEvent]:
        """History after `cursor`, then live, in order, without gap or repeat; ends when the run has ended."""
        _require(caller, "read")
        done = False
        while not done:
            events, done, _ = await self._following.read(any_id, cursor=cursor, wait_ms=15_000, limit=200)
            for event in events:
                yield event
                cursor = event.cursor

    async def get_result(
        self, caller: Caller, any_id: str, *, output_offset: int | None = None, output_limit: int = 0
    ) -> views.Result:
        """The result of the last session; with `output_limit` also what the work wrote, its tail without an offset."""
        _require(caller, "read")
        found = self._written(await self._tasks.find(any_id))
        life = found.life
        if life is None:
            raise Conflict("the task was never executed", hint="start it with execute_task")
        done = self._following.is_done(found)
        record = await self._store.queries.get_result(life.execution_id) if life.status.is_terminal else None
        output = None
        if output_limit:
            output = await self._output(
                life.execution_id, "combined", output_offset, output_limit, ended=life.status.is_terminal
            )
        return views.Result(
            task_id=life.task_id,
            run_id=life.run_id,
            session_id=life.execution_id,
            status=life.status.value,
            done=done,
            result=orjson.loads(record.body) if record else None,
            result_truncated=bool(record and record.truncated),
            error=present.error(life) if life.status.is_terminal else None,
            output=output,
        )

    async def read_output(
        self,
        caller: Caller,
        any_id: str,
        *,
        stream: str = "combined",
        offset: int = 0,
        limit: int = 65_536,
        wait_ms: int = 0,
    ) -> views.OutputPage:
        """What the work wrote, from `offset` on; waits up to `wait_ms` for more while it runs.

        Raises:
            InvalidInput: an unknown stream, a negative offset, a limit outside 1 to 1 MiB.
        """
        _require(caller, "read")
        if stream not in ("combined", "stdout", "stderr"):
            raise InvalidInput("stream is combined, stdout or stderr")
        if offset < 0 or not 1 <= limit <= 1024 * 1024:
            raise InvalidInput("offset is at least 0 and limit between 1 and 1048576")
        deadline = self._clock.monotonic() + min(wait_ms, 25_000) / 1000
        while True:
            found = await self._tasks.find(any_id)
            if found.life is None:
                raise Conflict("the task was never executed", hint="start it with execute_task")
            ended = found.life.status.is_terminal
            page = await self._output(found.life.execution_id, stream, offset, limit, ended=ended)
            if page.text or ended or self._clock.monotonic() >= deadline:
                return page
            await anyio.sleep(0.1)

    async def get_metrics(self, caller: Caller, any_id: str) -> views.Metrics:
        """Totals, rates and durations over all executions of the task."""
        _require(caller, "read")
        found = await self._tasks.find(any_id)
        await self._settled()
        record = found.record
        seen = await self._store.queries.task_statistics(record.task_id)
        judged = seen.completed + seen.failed + seen.timed_out
        rate = seen.completed / judged if judged else None
        return views.Metrics(
            task_id=record.task_id,
            total_executions=judged + seen.cancelled,
            completed=seen.completed,
            failed=seen.failed,
            cancelled=seen.cancelled,
            timed_out=seen.timed_out,
            success_rate=rate,
            success_rate_percent=rate * 100 if rate is not None else None,
            average_duration_seconds=seen.average_seconds,
            min_duration_seconds=seen.min_seconds,
            max_duration_seconds=seen.max_seconds,
            p50_duration_seconds=seen.p50_seconds,
            p95_duration_seconds=seen.p95_seconds,
            p99_duration_seconds=seen.p99_seconds,
            retry_count=record.retry_count,
            last_error=record.last_error,
            phase_seconds=_phase_seconds(found.life),
        )

    @property
    def is_idle(self) -> bool:
        """Nothing runs, waits or backs off."""
        return self._engine.idle

    def describe(
        self, *, url: str | None = None, tcp_problem: str | None = None, connections: int = 0
    ) -> views.DaemonView:
        fault = self._store.journal.fault
        return views.DaemonView(
            version=self.version,
            pid=os.getpid(),
            started_at=self.started_at,
            data_dir=str(self.settings.data_dir),
            url=url,
            tcp_problem=tcp_problem,
            running=self._engine.active,
            queued=self._engine.queued,
            head=self._store.journal.head,
            connections=connections,
            store_fault=str(fault) if fault else None,
        )

    def _summary(self, found: Found, *, detail: bool) -> views.Summary:
        assert found.life is not None
        assert found.progress is not None
        life, session = found.life, found.session
        usage = present.peaks(life) if detail else {}
        if detail and session is not None and not life.status.is_terminal:
            peaks = session.peak_resource_usage
            usage = {
                kind.value: views.UsageView(
                    current=round(samples[-1][1], 2), peak=round(peaks[kind], 2), unit=RESOURCE_UNITS[kind]
                )
                for kind, samples in session.resource_metrics.items()
            }
        return present.summary(
            life,
            found.progress,
            elapsed=session.elapsed_seconds if session is not None else life.active_seconds,
            usage=usage,
            estimator=self._estimator,
            clock=self._clock,
            detail=detail,
        )

    async def _output(
        self, execution_id: str, stream: str, offset: int | None, limit: int, *, ended: bool
    ) -> views.OutputPage:
        page = await anyio.to_thread.run_sync(
            lambda: read_output(
                self.settings.data_dir, execution_id, stream=stream, offset=offset or 0, limit=limit,
                tail=offset is None,
            )
        )  # fmt: skip
        return views.OutputPage(
            text=page.text,
            offset=page.offset,
            next_offset=page.next_offset,
            total_bytes=page.total,
            dropped_bytes=page.dropped,
            eof=ended and page.next_offset >= page.end,
        )

    async def take_over(self, lifecycle: Lifecycle, progress: Progress, *, trusted: bool) -> None:
        """Take over an execution that a dead owner left. For the composition root, at the start.

        Nothing is run that comes out of a directory which this user did not make here.
        """
        record = await self._tasks.record(lifecycle.task_id)
        task = self._tasks.adopt(record, lifecycle, progress)
        job = await self._starter.take_over(task, lifecycle, trusted=trusted)
        if job is not None:
            self._tasks.hold(task)
            self._engine.submit(job)

    async def _repeated(self, known: IdempotencyRecord) -> views.Handle:
        run = self._engine.run_of(known.task_id)
        if run is not None and run.run_id == known.run_id:
            life, done = run.session.lifecycle, run.done.is_set()
        else:
            attempts = await self._store.queries.attempts_of(known.run_id or "")
            if not attempts:
                raise TaskNotFound(known.task_id)
            life, done = attempts[-1][0], True
        return self._handle(life, 0, done=done).model_copy(update={"repeated": True})

    def _handle(self, life: Lifecycle, cursor: int, *, done: bool) -> views.Handle:
        error = present.error(life) if done else None
        return views.Handle(
            task_id=life.task_id,
            run_id=life.run_id,
            session_id=life.execution_id,
            status=life.status.value,
            cursor=cursor,
            done=done,
            error=error["message"] if error else None,
        )

    def _written(self, found: Found) -> Found:
        """What may be told of it: an end that the disk has refused so far is not told as one."""
        life, run = found.life, self._engine.run_of(found.record.task_id)
        if self._store.journal.fault is None or life is None or not life.status.is_terminal:
            return found
        if run is None or run.session.session_id != life.execution_id:
            return found
        cancelled = life.status is ExecutionStatus.CANCELLED
        status = ExecutionStatus.CANCELLING if cancelled else ExecutionStatus.COMPLETING
        return replace(found, life=replace(life, status=status, completed_at=None, outcome={}))

    async def _settled(self) -> None:
        """Lists and totals come from the database: wait for what has just been decided."""
        if self._store.journal.fault is None:
            await self._store.journal.sync()


def _require(caller: Caller, scope: str) -> None:
    if scope not in caller.scopes:
        raise PermissionDenied(f"{caller.principal} lacks the scope {scope}", hint="use a token that has it")


def _status(status: str | None) -> TaskStatus | ExecutionStatus | None:
    """A task's status, or an execution's; where both have the name, the task's."""
    if status is None:
        return None
    for kind in (TaskStatus, ExecutionStatus):
        if status in {each.value for each in kind}:
            return kind(status)
    names = ", ".join(dict.fromkeys([*TaskStatus, *ExecutionStatus]))
    raise InvalidInput(f"unknown status {status[:50]!r}; one of {names}")


def _phase_seconds(life: Lifecycle | None) -> dict[str, float] | None:
    if life is None:
        return None
    return {each.phase.value: round(each.duration_seconds, 3) for each in life.phases if each.duration_seconds}
