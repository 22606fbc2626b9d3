"""The committed log as it is followed: history, then live, by cursor."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from contextlib import aclosing
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, Protocol

import anyio
import orjson

from vespera_exec.model.events import ExecutionEvent, Json

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Iterable, Sequence

RING = 4096
"""Events that the feed holds in memory; older ones are read from the database."""
RING_BYTES = 16 * 2**20
"""What they may take together, all followers included."""
_TAIL = 32
_PAGE = 500
_cursor_of = attrgetter("cursor")


class StoredEvent(NamedTuple):
    """A committed event. `body` is its JSON in UTF-8, `cursor` included, encoded once for all who read it."""

    cursor: int
    event_type: str
    task_id: str
    execution_id: str | None
    sequence: int
    body: bytes

    def message(self) -> dict[str, Json]:
        """The JSON shape of every door (`ExecutionEvent.to_stream_message`)."""
        return orjson.loads(self.body)

    def event(self) -> ExecutionEvent:
        return ExecutionEvent.from_stream_message(self.message())


class History(Protocol):
    """The log in the database."""

    async def events_after(
        self, after: int, *, task_id: str | None, execution_id: str | None, types: Collection[str] | None, limit: int
    ) -> list[StoredEvent]: ...

    async def last_events(self, *, task_id: str | None, execution_id: str | None, limit: int) -> list[StoredEvent]: ...


class _Topic:
    """What the followers of one task, of one execution, or of everything share while there are any.

    `tail` holds its events with a cursor above `since`, without a gap. They are the ring's own.
    """

    __slots__ = ("followers", "nudges", "parked", "since", "tail", "version")

    def __init__(self, since: int) -> None:
        self.tail: list[StoredEvent] = []
        self.since = since
        self.parked: set[asyncio.Future[None]] = set()
        self.followers = 0
        self.version = 0
        self.nudges = 0

    def add(self, event: StoredEvent) -> None:
        self.tail.append(event)
        if len(self.tail) >= 2 * _TAIL:
            self._drop(_TAIL)

    def forget(self, until: int) -> None:
        """Let go of the events up to the cursor `until`."""
        self._drop(bisect_right(self.tail, until, key=_cursor_of))

    def _drop(self, count: int) -> None:
        if count:
            self.since = self.tail[count - 1].cursor
            del self.tail[:count]

    async def news(self) -> None:
        # One future each: a shared one would be cancelled for all by one cancelled waiter.
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.parked.add(future)
        try:
            await future
        finally:
            self.parked.discard(future)

    def wake(self) -> None:
        self.version += 1
        for future in self.parked:
            if not future.done():
                future.set_result(None)
        self.parked.clear()


class Feed:
    """Hands committed events to whoever follows. Used on the event loop that opened the store.

    A follower has a cursor and, while it waits, one future. Nothing is queued for it: a slow one reads
    on from its cursor, out of memory or out of the database.
    """

    def __init__(self, history: History, *, head: int, ring: int = RING, ring_bytes: int = RING_BYTES) -> None:
        self._history = history
        self._head = head
        self._ring: list[StoredEvent] = []
        self._ring_size = ring
        self._ring_since = head
        self._ring_bytes = ring_bytes
        self._held_bytes = 0
        self._all = _Topic(head)
        self._tasks: dict[str, _Topic] = {}
        self._executions: dict[str, _Topic] = {}

    @property
    def head(self) -> int:
        """The cursor of the last published event."""
        return self._head

    def publish(self, events: Sequence[StoredEvent]) -> None:
        """Take a committed group, in order; wakes only those whose events are in it."""
        if not events:
            return
        self._ring.extend(events)
        self._held_bytes += sum(len(event.body) for event in events)
        self._head = events[-1].cursor
        touched: set[_Topic] = {self._all}
        if self._tasks or self._executions:
            for event in events:
                if (topic := self._tasks.get(event.task_id)) is not None:
                    topic.add(event)
                    touched.add(topic)
                if event.execution_id and (topic := self._executions.get(event.execution_id)) is not None:
                    topic.add(event)
                    touched.add(topic)
        if len(self._ring) >= 2 * self._ring_size or self._held_bytes > self._ring_bytes:
            self._trim()
        for topic in touched:
            topic.wake()

    def _trim(self) -> None:
        """Down to `ring` events and half of the bytes, so that it is seldom done. The topics let go of the same."""
        surplus, held = 0, self._held_bytes
        most = self._ring_bytes // 2 if held > self._ring_bytes else held
        while held > most or len(self._ring) - surplus > self._ring_size:
            held -= len(self._ring[surplus].body)
            surplus += 1
        self._ring_since = self._ring[surplus - 1].cursor
        self._held_bytes = held
        del self._ring[:surplus]
        for topic in (*self._tasks.values(), *self._executions.values()):
            topic.forget(self._ring_since)

    async def read(
        self,
        *,
        after: int = 0,
        task_id: str | None = None,
        execution_id: str | None = None,
        types: Collection[str] | None = None,
        limit: int = _PAGE,
    ) -> list[StoredEvent]:
        """Up to `limit` events after `after`, in order: of all, of a task with its executions, or of one execution.

        Raises:
            StoreDamaged: an event does not match its checksum.
            StoreUnavailable: the database cannot be read.
        """
        events, _ = await self._next(after, task_id, execution_id, types, limit)
        return events

    async def recent(
        self, *, task_id: str | None = None, execution_id: str | None = None, limit: int = 10
    ) -> list[StoredEvent]:
        """The last `limit` events, oldest first."""
        return await self._history.last_events(task_id=task_id, execution_id=execution_id, limit=limit)

    async def wait(
        self, *, after: int, task_id: str | None = None, execution_id: str | None = None, timeout: float
    ) -> bool:
        """True once there is an event after `after`; False when there was none within `timeout` seconds, or `nudge`."""
        topic = self._enter(task_id, execution_id)
        try:
            version, nudges = topic.version, topic.nudges
            found, position = await self._next(after, task_id, execution_id, None, 1)
            if found:
                return True
            with anyio.move_on_after(timeout):
                while not found and topic.nudges == nudges:
                    if topic.version == version:
                        await topic.news()
                    version = topic.version
                    found, position = await self._next(position, task_id, execution_id, None, 1)
            return bool(found)
        finally:
            self._leave(topic, task_id, execution_id)

    def nudge(self, *, task_id: str, execution_id: str | None = None) -> None:
        """Whoever is in `wait` for the same returns, though there is no event."""
        topic = self._topic(task_id, execution_id)
        if topic is not None:
            topic.nudges += 1
            topic.wake()

    def remembers(self, after: int) -> bool:
        """All that came after the cursor is in memory: to read it misses nothing that has been removed since."""
        return after >= self._ring_since

    async def follow(
        self,
        *,
        after: int = 0,
        task_id: str | None = None,
        execution_id: str | None = None,
        types: Collection[str] | None = None,
    ) -> AsyncGenerator[StoredEvent]:
        """History after the cursor `after`, then live, in order, without gap or repeat.

        Takes the wake-up signal before it reads, so an event in between is seen. Never ends by itself; close it
        (`contextlib.aclosing`) when leaving early.
        """
        bursts = self.bursts(after=after, task_id=task_id, execution_id=execution_id, types=types)
        async with aclosing(bursts):
            async for events in bursts:
                for event in events:
                    yield event

    async def bursts(
        self,
        *,
        after: int = 0,
        task_id: str | None = None,
        execution_id: str | None = None,
        types: Collection[str] | None = None,
    ) -> AsyncGenerator[list[StoredEvent]]:
        """As `follow`, but all that has come since the last one at once; never empty, at most 500."""
        topic = self._enter(task_id, execution_id)
        try:
            while True:
                version = topic.version
                events, after = await self._next(after, task_id, execution_id, types, _PAGE)
                if events:
                    yield events
                elif topic.version == version:
                    await topic.news()
        finally:
            self._leave(topic, task_id, execution_id)

    def followers(self) -> int:
        """How many follow or wait at the moment."""
        topics: Iterable[_Topic] = (self._all, *self._tasks.values(), *self._executions.values())
        return sum(topic.followers for topic in topics)

    async def _next(
        self,
        after: int,
        task_id: str | None,
        execution_id: str | None,
        types: Collection[str] | None,
        limit: int,
    ) -> tuple[list[StoredEvent], int]:
        """The next events, and the cursor up to which the log has been searched with them."""
        head = self._head
        if after >= head:
            return [], after
        known = self._remembered(after, task_id, execution_id)
        if known is None:
            events = await self._history.events_after(
                after, task_id=task_id, execution_id=execution_id, types=types, limit=limit
            )
            return events, events[-1].cursor if events else max(after, head)
        if types is not None:
            known = [event for event in known if event.event_type in types]
        if len(known) > limit:
            return known[:limit], known[limit - 1].cursor
        return known, head

    def _remembered(self, after: int, task_id: str | None, execution_id: str | None) -> list[StoredEvent] | None:
        """The events after `after` as far as memory has them; None where it does not reach back so far."""
        topic = self._topic(task_id, execution_id)
        if topic is not None and after >= topic.since:
            return topic.tail[bisect_right(topic.tail, after, key=_cursor_of) :]
        if after < self._ring_since:
            return None
        # Cursors have no gap, so the place in the ring is a subtraction.
        live = self._ring[max(0, after - self._ring_since) :]
        if execution_id is not None:
            return [event for event in live if event.execution_id == execution_id]
        if task_id is not None:
            return [event for event in live if event.task_id == task_id]
        return live

    def _topic(self, task_id: str | None, execution_id: str | None) -> _Topic | None:
        """What the followers of this execution, or of this task, share; None where there are none."""
        if execution_id is not None:
            return self._executions.get(execution_id)
        return self._tasks.get(task_id) if task_id is not None else None

    def _enter(self, task_id: str | None, execution_id: str | None) -> _Topic:
        if execution_id is not None:
            topic = self._executions.setdefault(execution_id, _Topic(self._head))
        elif task_id is not None:
            topic = self._tasks.setdefault(task_id, _Topic(self._head))
        else:
            topic = self._all
        topic.followers += 1
        return topic

    def _leave(self, topic: _Topic, task_id: str | None, execution_id: str | None) -> None:
        topic.followers -= 1
        if topic.followers:
            return
        if execution_id is not None:
            self._executions.pop(execution_id, None)
        elif task_id is not None:
            self._tasks.pop(task_id, None)
