"""What may be asked: the use cases that change nothing."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import anyio
import orjson

from vespera_exec.app import present, views
from vespera_exec.app.callers import require
from vespera_exec.app.capacity.capacity import Capacity
from vespera_exec.app.executions.reading import Executions
from vespera_exec.app.following import Following
from vespera_exec.app.plans.reading import PlanReading, executes_plan
from vespera_exec.app.runs import Runs
from vespera_exec.errors import Conflict, InvalidInput
from vespera_exec.model.enums import RESOURCE_UNITS, ExecutionStatus, TaskStatus
from vespera_exec.model.stays import seconds_by_phase
from vespera_exec.monitoring.eta import NaiveEstimator
from vespera_exec.store.output import read_output

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from roles.registry import RoleRegistry
    from vespera_exec.app.plans.views import StepPage
    from vespera_exec.app.starting import Starter
    from vespera_exec.app.tasks import Found, LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.model.clock import Clock
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.principal import Caller
    from vespera_exec.settings import Settings
    from vespera_exec.store.feed import StoredEvent
    from vespera_exec.store.store import Store


class Answers:
    """Tasks, executions, events, results and output, as a caller may see them."""

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        engine: Engine,
        roles: RoleRegistry,
        tasks: LiveTasks,
        starter: Starter,
        clock: Clock,
    ) -> None:
        self.settings = settings
        self.roles = roles
        self.started_at = datetime.now(UTC)
        self._store = store
        self._engine = engine
        self._clock = clock
        self._tasks = tasks
        self._starter = starter
        self._following = Following(store, engine, tasks, clock)
        self._reading = PlanReading(store, engine, tasks)
        self.executions = Executions(store, engine, tasks, self._reading, clock)
        self._runs = Runs(store, engine, tasks, settings, clock, inputs=self._reading.inputs)
        self._estimator = NaiveEstimator()
        self.capacity = Capacity(engine)

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
        require(caller, "read")
        if not 1 <= limit <= 200:
            raise InvalidInput("limit is between 1 and 200")
        await self._settled()
        found = await self._store.queries.list_tasks(
            status=_status(status), role=role, text=text, limit=limit, page_token=page, principal=caller.sees_only
        )
        rows = [
            views.TaskRow(
                task_id=row.task.task_id,
                title=row.task.title,
                role=row.task.assigned_role,
                status=row.task.status.value,
                execution_status=row.execution_status.value if row.execution_status else None,
                session_id=row.execution_id,
                percentage=present.rounded(row.percentage),
                updated_at=row.task.updated_at or self.started_at,
            )
            for row in found.items
        ]
        return views.TaskPage(tasks=rows, next_page=found.next_token, total=found.total)

    async def get_task(self, caller: Caller, any_id: str) -> views.TaskView:
        require(caller, "read")
        return present.task((await self._tasks.find(any_id, caller)).record)

    def list_roles(self, caller: Caller) -> views.RoleList:
        """The roles there are, whether this caller may use each, and the role files that are broken."""
        require(caller, "read")
        sees_all = caller.sees_only is None
        shown = [
            views.RoleView(
                name=role.name,
                description=role.description,
                runner=role.runner,
                inputs=role.input_schema(),
                allowed=self._starter.permits(caller, role),
                origin=role.source if role.source in ("builtin", "program") else "operator",
                uses=self._starter.uses(role) if sees_all else None,
            )
            for role in self.roles.all()
        ]
        return views.RoleList(roles=shown, problems=list(self.roles.problems) if sees_all else [])

    async def get_status(self, caller: Caller, any_id: str, *, detail: bool = False) -> views.Status:
        """Where it stands: the running session, else the last that ended.

        Raises:
            TaskNotFound: the id is unknown.
        """
        require(caller, "read")
        found = self._written(await self._tasks.find(any_id, caller))
        life = found.life
        inputs = self._reading.inputs(life) if life is not None else []
        if inputs:
            await self._settled()  # whoever is asked may answer after a kill, too
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
            inputs=inputs or None,
            plan=await self._reading.summary(life) if life is not None else None,
            waiting_for=self.capacity.waiting_for(life.execution_id, caller) if life is not None else None,
        )

    async def get_run(self, caller: Caller, run_id: str) -> views.Run:
        """The run as a whole: its last attempt, with its result once it is done.

        Raises:
            TaskNotFound: nothing that the caller sees has this id as its run, or it has expired.
        """
        require(caller, "read")
        run = await self._runs.get(run_id, caller)
        if run.inputs:
            await self._settled()
        return run

    async def run_changed(self, run: views.Run, *, within: float) -> None:
        """Returns when `get_run` may say something else than `run`, or after `within` seconds."""
        await self._runs.changed(run, within=within)

    async def event_after(self, caller: Caller, any_id: str, *, cursor: int, within: float) -> int | None:
        """Where to wait on from, once a task or one of its executions has an event after `cursor`; None: none came.

        Raises:
            TaskNotFound: the id is unknown.
        """
        require(caller, "read")
        task_id = (await self._tasks.find(any_id, caller)).record.task_id
        heard = await self._store.feed.wait(after=cursor, task_id=task_id, timeout=within)
        return self._store.feed.head if heard else None

    async def get_progress(self, caller: Caller, any_id: str) -> views.ProgressInfo | None:
        """Document 004's progress body, or None where none was ever recorded."""
        require(caller, "read")
        found = await self._tasks.find(any_id, caller)
        if found.life is None or found.progress is None:
            return None
        if executes_plan(found.life):
            return await self._reading.progress(found.life, found.progress)
        return present.steps(found.life, found.progress)

    async def list_steps(
        self, caller: Caller, any_id: str, *, status: str | None = None, after: int = -1, limit: int = 100
    ) -> StepPage:
        """Steps of a plan that is executed, or was; see `PlanReading.steps`."""
        require(caller, "read")
        return await self._reading.steps(any_id, caller, status=status, after=after, limit=limit)

    async def read_events(
        self, caller: Caller, any_id: str, *, cursor: int = 0, wait_ms: int = 0, max_events: int = 100
    ) -> views.EventPage:
        """Events after `cursor`, in order, without gap; waits up to `wait_ms` where there are none yet.

        For a task id: of the task and all its executions, and `done` speaks of its run. For a session id:
        of that session alone.

        Raises:
            InvalidInput: a negative cursor, or `max_events` outside 1 to 1000.
        """
        require(caller, "read")
        read = await self._following.read(any_id, caller, cursor=cursor, wait_ms=wait_ms, limit=max_events)
        return views.EventPage(
            events=[event.message() for event in read.events],
            next_cursor=read.events[-1].cursor if read.events else max(cursor, 0),
            done=read.done,
            status=read.status,
            removed_before=read.removed_before,
        )

    async def last_events(self, caller: Caller, any_id: str, *, limit: int = 50) -> views.EventPage:
        """The last `limit` events, oldest first; `next_cursor` is from where to read on.

        Raises:
            TaskNotFound: the id is unknown.
        """
        require(caller, "read")
        read = await self._following.last(any_id, caller, limit=limit)
        cursor = read.events[-1].cursor if read.events else 0
        events = [event.message() for event in read.events]
        return views.EventPage(events=events, next_cursor=cursor, done=read.done, status=read.status)

    async def follow_events(self, caller: Caller, any_id: str, *, cursor: int = 0) -> AsyncIterator[StoredEvent]:
        """History after `cursor`, then live, in order, without gap or repeat; ends when the run has ended."""
        require(caller, "read")
        done = False
        while not done:
            events, done, *_ = await self._following.read(any_id, caller, cursor=cursor, wait_ms=15_000, limit=200)
            for event in events:
                yield event
                cursor = event.cursor

    async def get_result(
        self, caller: Caller, any_id: str, *, output_offset: int | None = None, output_limit: int = 0
    ) -> views.Result:
        """The result of the last session; with `output_limit` also what the work wrote, its tail without an offset."""
        require(caller, "read")
        found = self._written(await self._tasks.find(any_id, caller))
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
        require(caller, "read")
        if stream not in ("combined", "stdout", "stderr"):
            raise InvalidInput("stream is combined, stdout or stderr")
        if offset < 0 or not 1 <= limit <= 1024 * 1024:
            raise InvalidInput("offset is at least 0 and limit between 1 and 1048576")
        deadline = self._clock.monotonic() + min(wait_ms, 25_000) / 1000
        while True:
            found = await self._tasks.find(any_id, caller)
            if found.life is None:
                raise Conflict("the task was never executed", hint="start it with execute_task")
            ended = found.life.status.is_terminal
            page = await self._output(found.life.execution_id, stream, offset, limit, ended=ended)
            if page.text or ended or self._clock.monotonic() >= deadline:
                return page
            await anyio.sleep(0.1)

    async def get_metrics(self, caller: Caller, any_id: str) -> views.Metrics:
        """Totals, rates and durations over all executions of the task, and the metrics of the run that is meant."""
        require(caller, "read")
        found = await self._tasks.find(any_id, caller)
        await self._settled()
        of_run = await self.executions.metrics(any_id, caller)
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
            execution=views.RunMetrics(**of_run.to_dict()) if of_run is not None else None,
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

    def _written(self, found: Found) -> Found:
        """What may be told of it: an end that the disk has refused so far is not told as one."""
        life = found.life
        if self._store.journal.fault is None or life is None or not life.status.is_terminal:
            return found
        if found.session is None or self._engine.run_of(found.record.task_id) is None:
            return found  # it comes from the disk, or was settled there
        return replace(found, life=present.before_its_end(life))

    async def _settled(self) -> None:
        """Wait for what has just been decided: lists and totals come from the database, questions are told after it."""
        if self._store.journal.fault is None:
            await self._store.journal.sync()


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
    return {phase.value: round(seconds, 3) for phase, seconds in seconds_by_phase(life.phases).items() if seconds}
