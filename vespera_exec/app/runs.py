"""A run as a whole, from its start request to the end of its last attempt: what an MCP task is a view of."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import orjson

from vespera_exec.app import present, views
from vespera_exec.errors import RunExpired, TaskNotFound
from vespera_exec.model.enums import ExecutionStatus

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from vespera_exec.app.tasks import LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.engine.jobs import Run
    from vespera_exec.model.clock import Clock
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.principal import Caller
    from vespera_exec.model.progress import Progress
    from vespera_exec.settings import Settings
    from vespera_exec.store.queries import KnownRun
    from vespera_exec.store.store import Store

S = ExecutionStatus

_LONGEST_ID = 100
_SETTLING_SECONDS = 1.0
_SECONDS_PER_DAY = 86_400


class Runs:
    """Looks at runs by their id: those that are active in memory, the others in the database."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        tasks: LiveTasks,
        settings: Settings,
        clock: Clock,
        *,
        inputs: Callable[[Lifecycle], list[views.InputView]],
    ) -> None:
        """`inputs` says what waits for an answer in a run that is active."""
        self._store = store
        self._engine = engine
        self._tasks = tasks
        self._clock = clock
        self._inputs = inputs
        kept = (settings.mcp_task_ttl_seconds, settings.retention_days * _SECONDS_PER_DAY)
        self._kept_seconds = min((seconds for seconds in kept if seconds), default=None)

    async def get(self, run_id: str, caller: Caller) -> views.Run:
        """The run; `done` once its end is on disk.

        Raises:
            TaskNotFound: nothing that `caller` sees has this id as its run.
            RunExpired: it ended longer ago than the settings keep its handle.
        """
        # Before the state is looked at: an event that comes in between is told twice rather than never.
        head = self._store.journal.head
        active = self._engine.run(run_id)
        if active is not None:
            record = await self._tasks.record(active.task_id)
            if caller.sees(record.principal):
                return await self._active(active, head)
        elif run_id.isascii() and len(run_id) <= _LONGEST_ID:
            known = await self._store.queries.get_run(run_id)
            if known is not None and caller.sees(known.principal):
                return self._stored(known)
        raise TaskNotFound(run_id[:_LONGEST_ID].encode("ascii", "backslashreplace").decode())

    async def changed(self, run: views.Run, *, within: float) -> None:
        """Returns when the run may be another than `run` says, or after `within` seconds."""
        active = self._engine.run(run.run_id)
        if active is None:
            known = await self._store.queries.get_run(run.run_id)
            if known is not None and not known.lifecycle.status.is_terminal:
                await anyio.sleep(within)  # the store has refused its end: the next owner writes one
            return
        if active.session.lifecycle.status.is_terminal:
            # Its end, or the next attempt, is decided: it is settled a moment after its last event.
            with anyio.move_on_after(min(within, _SETTLING_SECONDS)):
                await active.done.wait()
            return
        await self._store.feed.wait(after=run.cursor, task_id=run.task_id, timeout=within)

    async def _active(self, active: Run, head: int) -> views.Run:
        session = active.session
        life = session.lifecycle
        created = life.created_at
        if life.attempt > 1 and (known := await self._store.queries.get_run(active.run_id)) is not None:
            created = known.created_at
        if life.status.is_terminal:
            life = present.before_its_end(life)
        return _view(life, session.progress, created=created, cursor=head, inputs=self._inputs(life))

    def _stored(self, known: KnownRun) -> views.Run:
        life, expires = known.lifecycle, None
        if self._kept_seconds is not None and life.completed_at is not None:
            expires = life.completed_at + timedelta(seconds=self._kept_seconds)
            if expires <= self._clock.now():
                raise RunExpired(life.run_id)
        inputs = present.open_inputs(life)
        seen = _view(life, known.progress, created=known.created_at, cursor=known.cursor, inputs=inputs)
        if known.result is None:
            return seen.model_copy(update={"expires_at": expires})
        result = {"result": orjson.loads(known.result.body), "result_truncated": known.result.truncated}
        return seen.model_copy(update={"expires_at": expires, **result})


def _view(
    life: Lifecycle, progress: Progress, *, created: datetime | None, cursor: int, inputs: list[views.InputView]
) -> views.Run:
    done = life.status.is_terminal
    updated = max(progress.updated_at, life.clock_read_at or progress.updated_at)
    return views.Run(
        run_id=life.run_id,
        task_id=life.task_id,
        session_id=life.execution_id,
        role=life.role_name,
        status=life.status.value,
        lifecycle=life.status.lifecycle,
        message=life.status_message if done else progress.overall.message or life.status_message,
        percentage=present.rounded(progress.percentage),
        phase=life.current_phase.value if life.current_phase else None,
        cursor=cursor,
        created_at=created or updated,
        updated_at=updated,
        ended_at=life.completed_at,
        done=done,
        inputs=inputs,
        error=present.error(life) if done else None,
    )
