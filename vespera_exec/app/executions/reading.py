"""Executions in the words of document 003: where one stands, how it ended, what happens in it as it goes on."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import anyio
import orjson

from vespera_exec.app import present
from vespera_exec.app.executions import metrics as execution_metrics
from vespera_exec.app.executions.result import (
    ExecutionMessage,
    ExecutionMetrics,
    ExecutionProgress,
    ExecutionResult,
    ExecutionUpdate,
    ResourceUsage,
)
from vespera_exec.app.executions.subscriptions import UpdateSubscriptions
from vespera_exec.app.plans.apart import apart
from vespera_exec.app.plans.reading import executes_plan
from vespera_exec.errors import Conflict, ExecutionError, ExecutionNotFound, TaskNotFound
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus, StepStatus
from vespera_exec.model.events import mapping
from vespera_exec.monitoring.eta import NaiveEstimator

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from datetime import datetime

    from vespera_exec.app.plans.reading import PlanReading
    from vespera_exec.app.plans.views import PlanSummary
    from vespera_exec.app.tasks import LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.model.clock import Clock
    from vespera_exec.model.events import ExecutionEvent, Json
    from vespera_exec.model.ledger import ResultRecord
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.principal import Caller
    from vespera_exec.model.progress import Progress
    from vespera_exec.store.feed import StoredEvent
    from vespera_exec.store.store import Store

S = ExecutionStatus

COALESCED_SECONDS: Final = 0.1
"""Between two updates, at least: what happens meanwhile is one update."""
_RECENT = 50
_PAGE = 500
_QUIET_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class _Run:
    """What an id stands for: a run of a task. `run_id` is None where the task was never executed."""

    task_id: str
    title: str
    run_id: str | None


@dataclass(frozen=True, slots=True)
class _Seen:
    """A run at one moment: its attempts, the progress of the last, and whether its end is decided, and on disk."""

    lives: tuple[Lifecycle, ...]
    progress: Progress
    is_ending: bool = False
    is_over: bool = False

    @property
    def life(self) -> Lifecycle:
        return self.lives[-1]

    @property
    def sessions(self) -> frozenset[str]:
        return frozenset(life.execution_id for life in self.lives)


class Executions:
    """An execution here is a run, with its automatic attempts: all their ids, and that of the task, stand for it."""

    def __init__(self, store: Store, engine: Engine, tasks: LiveTasks, reading: PlanReading, clock: Clock) -> None:
        self._store = store
        self._engine = engine
        self._tasks = tasks
        self._reading = reading
        self._clock = clock
        self._estimator = NaiveEstimator()
        self.subscriptions = UpdateSubscriptions(self.updates)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """The lifetime of the subscriptions."""
        async with self.subscriptions.running():
            yield

    async def status(self, any_id: str, caller: Caller) -> ExecutionStatus:
        """IDLE where the task was never executed.

        Raises:
            ExecutionNotFound: the id is unknown.
        """
        run = await self._named(any_id, caller)
        return S.IDLE if run.run_id is None else (await self._look(run.run_id)).life.status

    async def ended(self, any_id: str, caller: Caller) -> None:
        """Returns when its end is on disk.

        Raises:
            ExecutionNotFound: the id is unknown.
        """
        run_id = (await self._named(any_id, caller)).run_id
        active = self._engine.run(run_id) if run_id is not None else None
        if active is not None:
            await active.done.wait()

    async def result(self, any_id: str, caller: Caller) -> ExecutionResult | None:
        """How it ended; None where it has not.

        Raises:
            ExecutionNotFound: the id is unknown.
        """
        run = await self._named(any_id, caller)
        if run.run_id is None:
            return None
        seen = await self._look(run.run_id)
        if not seen.is_over:
            return None
        timeline = [event for life in seen.lives for event in await self._log(life.execution_id)]
        record = await self._store.queries.get_result(seen.life.execution_id)
        summary = await self._reading.summary(seen.life)
        usage = await apart(len(timeline), lambda: _usage(seen, timeline))
        return ExecutionResult(
            execution_id=run.run_id,
            plan_id=summary.plan_id if summary is not None else run.task_id,
            task_id=run.task_id,
            status=seen.life.status,
            started_at=next((life.started_at for life in seen.lives if life.started_at is not None), None),
            completed_at=seen.life.completed_at,
            result=orjson.loads(record.body) if record is not None else None,
            result_truncated=record is not None and record.truncated,
            error=_error(seen.life),
            metrics=await self._final(seen, summary, usage, timeline, record),
            resource_usage=usage,
            timeline=tuple(timeline),
        )

    async def metrics(self, any_id: str, caller: Caller) -> ExecutionMetrics | None:
        """Of the run that is meant, so far or in all; None where there was none, or its end could not be written.

        Raises:
            ExecutionNotFound: the id is unknown.
        """
        run = await self._named(any_id, caller)
        if run.run_id is None:
            return None
        try:
            seen = await self._look(run.run_id)
        except Conflict:
            return None
        return await self._metrics(seen, await self._reading.summary(seen.life))

    async def updates(self, any_id: str, caller: Caller) -> AsyncGenerator[ExecutionUpdate]:
        """Where it stands now, then what happens, at most one update in 0.1 s, the last when it has ended.

        Each event is in one update; those before the first are left out, but for the last 50. Exactly one update has
        a status that is terminal, and its metrics are complete. An execution that has ended has this one alone. Close
        it (`contextlib.aclosing`) when leaving early.

        Raises:
            ExecutionNotFound: the id is unknown, or nothing was ever executed.
            Conflict: its end was refused by the disk: the next owner of the data directory decides about it.
        """
        run = await self._named(any_id, caller)
        if run.run_id is None:
            raise ExecutionNotFound(any_id)
        cursor = self._store.feed.head
        seen = await self._look(run.run_id)
        held, is_first, shown_at = await self._recent(seen, until=cursor), True, -COALESCED_SECONDS
        while not seen.is_over:
            # An end that is decided, but not settled, is told with the settled state, or with the next attempt.
            if (is_first or held) and not seen.is_ending:
                yield await self._update(run, seen, held)
                held, is_first, shown_at = [], False, self._clock.monotonic()
            await self._news(run, after=cursor)
            await anyio.sleep(max(0.0, shown_at + COALESCED_SECONDS - self._clock.monotonic()))
            page = await self._store.feed.read(after=cursor, task_id=run.task_id, limit=_PAGE)
            cursor = page[-1].cursor if page else cursor
            seen = await self._look(run.run_id)
            held += _of(seen, page)
        while page := await self._store.feed.read(after=cursor, task_id=run.task_id, limit=_PAGE):
            cursor = page[-1].cursor
            held += _of(seen, page)
        yield await self._update(run, seen, held)

    async def _named(self, any_id: str, caller: Caller) -> _Run:
        try:
            found = await self._tasks.find(any_id, caller)
        except TaskNotFound:
            raise ExecutionNotFound(any_id) from None
        return _Run(found.record.task_id, found.record.title, found.life.run_id if found.life is not None else None)

    async def _look(self, run_id: str) -> _Seen:
        active = self._engine.run(run_id)
        if active is None:
            attempts = await self._store.queries.attempts_of(run_id)
            if not attempts:
                raise ExecutionNotFound(run_id)
            if not attempts[-1][0].status.is_terminal:
                raise Conflict(f"the end of {run_id} could not be written", hint="the next owner decides about it")
            return _Seen(tuple(life for life, _ in attempts), attempts[-1][1], is_over=True)
        life, progress, earlier = active.session.lifecycle, active.session.progress, ()
        is_ending = life.status.is_terminal
        if is_ending:
            life = present.before_its_end(life)
        if life.attempt > 1:
            known = await self._store.queries.attempts_of(run_id)
            earlier = tuple(each for each, _ in known if each.attempt < life.attempt)
        return _Seen((*earlier, life), progress, is_ending=is_ending)

    async def _news(self, run: _Run, *, after: int) -> None:
        """Returns when there is an event, or the run is over, or nothing has happened for a while."""
        active, feed = self._engine.run(run.run_id or ""), self._store.feed
        if active is None:
            return
        with active.done.calling(lambda: feed.nudge(task_id=run.task_id)):
            await feed.wait(after=after, task_id=run.task_id, timeout=_QUIET_SECONDS)

    async def _recent(self, seen: _Seen, *, until: int) -> list[ExecutionEvent]:
        events = await self._store.feed.recent(execution_id=seen.life.execution_id, limit=_RECENT)
        return [each.event() for each in events if each.cursor <= until]

    async def _log(self, execution_id: str) -> list[ExecutionEvent]:
        """All events of one session, in order."""
        events: list[ExecutionEvent] = []
        cursor = 0
        while page := await self._store.queries.events_after(cursor, execution_id=execution_id, limit=_PAGE):
            cursor = page[-1].cursor
            events += [each.event() for each in page]
        return events

    async def _update(self, run: _Run, seen: _Seen, events: Sequence[ExecutionEvent]) -> ExecutionUpdate:
        now = self._clock.now()
        summary = await self._reading.summary(seen.life)
        metrics = await self._metrics(seen, summary)
        messages = [message for event in events if (message := ExecutionMessage.of(event)) is not None]
        return ExecutionUpdate(
            execution_id=run.run_id or run.task_id,
            timestamp=now,
            status=seen.life.status,
            progress=self._progress(seen, summary, metrics),
            current_task=_current(run, seen, summary),
            metrics=metrics,
            events=tuple(events),
            messages=tuple(messages),
        )

    async def _metrics(self, seen: _Seen, summary: PlanSummary | None) -> ExecutionMetrics:
        if not seen.is_over:
            return execution_metrics.metrics(_measured(seen, summary, now=self._clock.now()))
        timeline = await self._log(seen.life.execution_id) if summary is not None else []
        record = await self._store.queries.get_result(seen.life.execution_id)
        usage = await apart(len(timeline), lambda: _usage(seen, timeline))
        return await self._final(seen, summary, usage, timeline, record)

    def _progress(self, seen: _Seen, summary: PlanSummary | None, metrics: ExecutionMetrics) -> ExecutionProgress:
        life, progress = seen.life, seen.progress
        work = progress.phases.get(ExecutionPhase.EXECUTION) if summary is None else None
        percentage = work.get_percentage() if work is not None else progress.percentage
        remaining = None
        if life.status in (S.PREPARING, S.VALIDATING, S.RUNNING) and metrics.total_duration is not None:
            elapsed = execution_metrics.clocks([life], now=self._clock.now()).active
            estimate = self._estimator.estimate(
                role=life.role_name,
                elapsed_seconds=elapsed,
                fraction=percentage / 100 if percentage is not None else None,
                phase=life.current_phase,
            )
            remaining = round(estimate.remaining_seconds * 1000, 1) if estimate is not None else None
        return ExecutionProgress(
            percentage=present.rounded(progress.percentage) or 0.0,
            completed_tasks=_steps(seen, summary).completed,
            total_tasks=summary.steps if summary is not None else 1,
            estimated_time_remaining=remaining,
            current_phase=(life.current_phase or life.status).value,
        )

    async def _final(
        self,
        seen: _Seen,
        summary: PlanSummary | None,
        usage: Sequence[ResourceUsage],
        timeline: Sequence[ExecutionEvent],
        record: ResultRecord | None,
    ) -> ExecutionMetrics:
        """The metrics of what has ended. `timeline` is needed of a plan."""
        output: Json = orjson.loads(record.body) if record is not None and not record.truncated else None
        measured = replace(_measured(seen, summary, now=self._clock.now()), usage=usage, result=output)
        if summary is None:
            return execution_metrics.metrics(measured)
        children = await self._store.queries.children(seen.life.execution_id)
        attempts = execution_metrics.Counted(
            sum(each.completed for each in children), sum(each.failed + each.timed_out for each in children)
        )
        return execution_metrics.metrics(
            replace(
                measured,
                effective=await apart(len(timeline), lambda: execution_metrics.seconds_at_work(timeline)),
                attempts=attempts,
                result=mapping(output).get("output"),
            )
        )


def _measured(seen: _Seen, summary: PlanSummary | None, *, now: datetime) -> execution_metrics.Measured:
    """What is known while it goes on. Of a plan its log would have to be read for the time at work."""
    is_plan = summary is not None
    clocks = execution_metrics.clocks(seen.lives, now=now)
    return execution_metrics.Measured(
        clocks=clocks,
        effective=None if is_plan else clocks.active,
        steps=_steps(seen, summary),
        attempts=None if is_plan else execution_metrics.attempts(seen.lives),
        usage=_usage(seen, ()),
    )


def _steps(seen: _Seen, summary: PlanSummary | None) -> execution_metrics.Counted:
    """Steps that completed, and that failed; a plain task is one step, whatever its attempts."""
    if summary is None:
        return execution_metrics.attempts([seen.life])
    counts = summary.counts
    return execution_metrics.Counted(counts.get(StepStatus.COMPLETED, 0), counts.get(StepStatus.FAILED, 0))


def _usage(seen: _Seen, timeline: Sequence[ExecutionEvent]) -> tuple[ResourceUsage, ...]:
    """A plan's log tells what its steps were given; a plain execution has it in its own state."""
    if executes_plan(seen.life):
        return execution_metrics.usage(timeline)
    return tuple(ResourceUsage.of(use) for life in seen.lives for use in life.capacity)


def _current(run: _Run, seen: _Seen, summary: PlanSummary | None) -> str | None:
    if seen.life.status.is_terminal:
        return None
    if summary is None:
        return run.title if seen.life.started_at is not None else None
    at_work = [each.step for each in summary.current if each.status == StepStatus.RUNNING]
    return next(iter(at_work or [each.step for each in summary.current]), None)


def _of(seen: _Seen, page: Sequence[StoredEvent]) -> list[ExecutionEvent]:
    sessions = seen.sessions
    return [each.event() for each in page if each.execution_id in sessions]


def _error(life: Lifecycle) -> ExecutionError | None:
    told = present.error(life)
    if told is None:
        return None
    context = mapping(told.get("context"))
    first = next(iter(context.get("failed") or ()), None)
    return ExecutionError(
        told["message"],
        code=told["code"],
        task_id=mapping(first).get("step") or (None if executes_plan(life) else life.task_id),
        recoverable=told.get("recoverable", life.status is not S.CANCELLED),
        context=context,
        timestamp=life.completed_at,
    )
