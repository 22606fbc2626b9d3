"""Following the log of a task or an execution to the end of its run."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vespera_exec.errors import InvalidInput
from vespera_exec.model.enums import EventType

if TYPE_CHECKING:
    from vespera_exec.app.tasks import Found, LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.model.clock import Clock
    from vespera_exec.model.principal import Caller
    from vespera_exec.store.feed import StoredEvent
    from vespera_exec.store.store import Store

_END_OF_RUN = frozenset(
    {
        EventType.EXECUTION_COMPLETED,
        EventType.EXECUTION_FAILED,
        EventType.EXECUTION_CANCELLED,
        EventType.EXECUTION_TIMEOUT,
    }
)
MAX_EVENTS = 1000
_SETTLING_SECONDS = 1.0


class Read(NamedTuple):
    """What was read. `done`: that was all there will be. `removed_before`: as `Queries.removed_before`."""

    events: list[StoredEvent]
    done: bool
    status: str | None
    removed_before: int | None


class Following:
    """Pages of the log, and whether there will be more."""

    def __init__(self, store: Store, engine: Engine, tasks: LiveTasks, clock: Clock) -> None:
        self._store = store
        self._engine = engine
        self._tasks = tasks
        self._clock = clock

    def is_done(self, found: Found) -> bool:
        """The run that is meant has ended, and its end is on disk; also where there was none."""
        if found.life is None:
            return True
        if not found.life.status.is_terminal:
            return False
        run = self._engine.run_of(found.record.task_id)
        if run is None:
            return True
        return found.by_session and run.session.session_id != found.life.execution_id

    async def read(self, any_id: str, caller: Caller, *, cursor: int, wait_ms: int, limit: int) -> Read:
        """Events after `cursor`.

        Waits up to `wait_ms` (25 s at most) for the first event.

        Raises:
            TaskNotFound: the id is unknown.
            InvalidInput: a negative cursor, or a limit outside 1 to 1000.
        """
        if cursor < 0 or not 1 <= limit <= MAX_EVENTS:
            raise InvalidInput(f"cursor is at least 0 and max_events between 1 and {MAX_EVENTS}")
        found = await self._tasks.find(any_id, caller)
        task_id, execution_id = found.record.task_id, None
        if found.by_session and found.life is not None:
            execution_id = found.life.execution_id
        deadline = self._clock.monotonic() + max(0, min(wait_ms, 25_000)) / 1000
        while True:
            # Judged before reading: an end that was on disk then is among the events read now.
            done = self.is_done(found)
            whole = self._store.feed.remembers(cursor)
            events = await self._store.feed.read(after=cursor, task_id=task_id, execution_id=execution_id, limit=limit)
            left = deadline - self._clock.monotonic()
            if not done and len(events) < limit and _has_end_of(found, events):
                # The run is settled a moment after its last event: one call less for who waits for the end.
                left = min(left, _SETTLING_SECONDS) if left > 0 else _SETTLING_SECONDS
            elif events or done or left <= 0:
                return await self._read(found, cursor, events, whole=whole, done=done and len(events) < limit)
            settled = await self._news(task_id, execution_id, events[-1].cursor if events else cursor, left)
            found = await self._tasks.find(any_id, caller)
            if not settled and events:
                return await self._read(found, cursor, events, whole=whole, done=False)

    async def last(self, any_id: str, caller: Caller, *, limit: int) -> Read:
        """The last `limit` events, oldest first.

        Raises:
            TaskNotFound: the id is unknown.
        """
        found = await self._tasks.find(any_id, caller)
        execution_id = found.life.execution_id if found.by_session and found.life is not None else None
        done = self.is_done(found)
        events = await self._store.feed.recent(
            task_id=found.record.task_id, execution_id=execution_id, limit=min(limit, MAX_EVENTS)
        )
        return Read(events, done, found.life.status.value if found.life else None, None)

    async def _read(self, found: Found, cursor: int, events: list[StoredEvent], *, whole: bool, done: bool) -> Read:
        removed_before = None
        if events and not whole and not found.by_session:  # a session goes whole
            removed_before = await self._store.queries.removed_before(found.record.task_id, cursor)
        return Read(events, done, found.life.status.value if found.life else None, removed_before)

    async def _news(self, task_id: str, execution_id: str | None, after: int, seconds: float) -> bool:
        """True once there is an event after `after`, or the run is done, within `seconds`."""
        feed, run = self._store.feed, self._engine.run_of(task_id)
        if run is None:
            return await feed.wait(after=after, task_id=task_id, execution_id=execution_id, timeout=seconds)
        with run.done.calling(lambda: feed.nudge(task_id=task_id, execution_id=execution_id)):
            heard = await feed.wait(after=after, task_id=task_id, execution_id=execution_id, timeout=seconds)
        return heard or run.done.is_set()


def _has_end_of(found: Found, events: list[StoredEvent]) -> bool:
    """The session that is meant ends in these; the end of an earlier one says nothing of the run."""
    meant = found.life.execution_id if found.life is not None else None
    return any(event.event_type in _END_OF_RUN and event.execution_id == meant for event in events)
