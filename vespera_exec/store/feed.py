"""The committed log as it is followed: history, then live, by cursor."""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_right
from contextlib import aclosing
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import orjson

from vespera_exec.model.events import ExecutionEvent, Json
from vespera_exec.store.encoding import with_cursor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Sequence

    from vespera_exec.store.decisions import Fact

RING = 4096
"""Events that the feed holds in memory; older ones are read from the database."""
RING_BYTES = 16 * 2**20
"""What they may take together, all followers included."""
_TAIL = 32
_PAGE = 500
_cursor_of = attrgetter("cursor")
_TASK, _EXECUTION, _BODY = 2, 3, 5
"""Places that a `Fact` and a `StoredEvent` have in common."""


class StoredEvent(NamedTuple):
    """A committed event. `body` is its JSON in UTF-8, `cursor` included, made once for all who read it."""

    cursor: int
    event_type: str
    task_id: str
    execution_id: str | None
    sequence: int
    body: bytes

    @classmethod
    def of(cls, fact: Fact, cursor: int) -> Self:
        _, kind, task_id, execution_id, sequence, body, *_ = fact
        return cls(cursor, kind, task_id, execution_id, sequence, with_cursor(body, cursor))

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

    `tail` holds its events with a cursor above `since`, without a gap. They are the ring's own. `last` is the cursor
    of the last event that it heard of, also when that is no longer in `tail`.
    """

    __slots__ = ("_timer", "followers", "last", "nudges", "parked", "since", "tail")

    def __init__(self, since: int) -> None:
        self.tail: list[StoredEvent] = []
        self.since = self.last = since
        self.parked: dict[asyncio.Future[None], float] = {}
        self.followers = 0
        self.nudges = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, event: StoredEvent) -> None:
        if event.cursor <= self.last:
            return  # everything is named twice by an event of no execution
        self.last = event.cursor
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

    def park(self, loop: asyncio.AbstractEventLoop, until: float = math.inf) -> asyncio.Future[None]:
        """What to await until there is news, or the loop's time is `until`. Who is cancelled there must `unpark` it."""
        # One future each: a shared one would be cancelled for all by one cancelled waiter.
        future: asyncio.Future[None] = loop.create_future()
        self.parked[future] = until
        # One timer for all: to set and cancel one for each would be half of what a wait costs.
        if until < math.inf and (self._timer is None or until < self._timer.when()):
            self.stop_timer()
            self._timer = loop.call_at(until, self._expire, loop)
        return future

    def unpark(self, future: asyncio.Future[None] | None) -> None:
        if future is not None:
            self.parked.pop(future, None)

    def wake(self) -> None:
        for future in self.parked:
            if not future.done():
                future.set_result(None)
        self.parked.clear()

    def stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        now, self._timer = loop.time(), None
        for future in [future for future, until in self.parked.items() if until <= now]:
            del self.parked[future]
            if not future.done():
                future.set_result(None)
        if (next_end := min(self.parked.values(), default=math.inf)) < math.inf:
            self._timer = loop.call_at(next_end, self._expire, loop)


class Feed:
    """Hands committed events to whoever follows. Used on the event loop that opened the store.

    A follower has a cursor and, while it waits, one future. Nothing is queued for it: a slow one reads
    on from its cursor, out of memory or out of the database.
    """

    def __init__(self, history: History, *, head: int, ring: int = RING, ring_bytes: int = RING_BYTES) -> None:
        self._history = history
        self._head = head
        self._ring: list[Fact | StoredEvent] = []
        self._ring_size = ring
        self._ring_since = head
        self._ring_bytes = ring_bytes
        self._held_bytes = 0
        self._topics: dict[str | None, _Topic] = {}
        """Those with followers, by the id of an execution or a task; None stands for everything."""

    @property
    def head(self) -> int:
        """The cursor of the last published event."""
        return self._head

    def publish(self, facts: Sequence[Fact | StoredEvent], head: int) -> None:
        """Take a committed group, in order, the last at the cursor `head`; wakes only those whose events are in it."""
        if not facts:
            return
        self._ring.extend(facts)
        self._held_bytes += sum([len(fact[_BODY]) for fact in facts])
        self._head = head
        touched: set[_Topic] = set()
        if topics := self._topics:
            for place, fact in enumerate(facts, len(self._ring) - len(facts)):
                for key in (None, fact[_TASK], fact[_EXECUTION]):
                    if (topic := topics.get(key)) is not None:
                        topic.add(self._event(place))
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
            held -= len(self._ring[surplus][_BODY])
            surplus += 1
        self._ring_since += surplus
        self._held_bytes = held
        del self._ring[:surplus]
        for topic in self._topics.values():
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
        if (found := self._held(after, task_id, execution_id, types, limit)) is not None:
            return found[0]
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
        nudges, future = topic.nudges, None
        try:
            if after < self._head:
                found, after = await self._next(after, task_id, execution_id, None, 1)
                if found:
                    return True
            loop = asyncio.get_running_loop()
            now = loop.time()
            until = now + timeout
            while topic.last <= after and topic.nudges == nudges and now < until:
                future = topic.park(loop, until)
                await future
                now = loop.time()
            return topic.last > after
        finally:
            topic.unpark(future)
            self._leave(topic, task_id, execution_id)

    def nudge(self, *, task_id: str, execution_id: str | None = None) -> None:
        """Whoever is in `wait` for the same returns, though there is no event."""
        topic = self._topics.get(_key(task_id, execution_id))
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
        topic, future = self._enter(task_id, execution_id), None
        loop = asyncio.get_running_loop()
        try:
            while True:
                events, after = await self._next(after, task_id, execution_id, types, _PAGE)
                if events:
                    yield events
                elif topic.last <= after:
                    future = topic.park(loop)
                    await future
        finally:
            topic.unpark(future)
            self._leave(topic, task_id, execution_id)

    def followers(self) -> int:
        """How many follow or wait at the moment."""
        return sum(topic.followers for topic in self._topics.values())

    async def _next(
        self,
        after: int,
        task_id: str | None,
        execution_id: str | None,
        types: Collection[str] | None,
        limit: int,
    ) -> tuple[list[StoredEvent], int]:
        """The next events, and the cursor up to which the log has been searched with them."""
        if (found := self._held(after, task_id, execution_id, types, limit)) is not None:
            return found
        head = self._head
        events = await self._history.events_after(
            after, task_id=task_id, execution_id=execution_id, types=types, limit=limit
        )
        return events, events[-1].cursor if events else head

    def _held(
        self, after: int, task_id: str | None, execution_id: str | None, types: Collection[str] | None, limit: int
    ) -> tuple[list[StoredEvent], int] | None:
        """As `_next`, out of memory; None where that does not reach back so far."""
        head = self._head
        if after >= head:
            return [], after
        known = self._remembered(after, task_id, execution_id)
        if known is None:
            return None
        if types is not None:
            known = [event for event in known if event.event_type in types]
        if len(known) > limit:
            return known[:limit], known[limit - 1].cursor
        return known, head

    def _remembered(self, after: int, task_id: str | None, execution_id: str | None) -> list[StoredEvent] | None:
        """The events after `after` as far as memory has them; None where it does not reach back so far."""
        topic = self._topics.get(_key(task_id, execution_id))
        if topic is not None and after >= topic.since:
            return topic.tail[bisect_right(topic.tail, after, key=_cursor_of) :]
        if after < self._ring_since:
            return None
        # Cursors have no gap, so the place in the ring is a subtraction.
        places = range(max(0, after - self._ring_since), len(self._ring))
        if execution_id is not None:
            places = [place for place in places if self._ring[place][_EXECUTION] == execution_id]
        elif task_id is not None:
            places = [place for place in places if self._ring[place][_TASK] == task_id]
        return [self._event(place) for place in places]

    def _event(self, place: int) -> StoredEvent:
        """What the ring holds at `place`: made of the fact for the first who asks, the same one for all."""
        held = self._ring[place]
        if isinstance(held, StoredEvent):
            return held
        made = self._ring[place] = StoredEvent.of(held, self._ring_since + 1 + place)
        self._held_bytes += len(made.body) - len(held[_BODY])
        return made

    def _enter(self, task_id: str | None, execution_id: str | None) -> _Topic:
        key = _key(task_id, execution_id)
        topic = self._topics.get(key)
        if topic is None:
            topic = self._topics[key] = _Topic(self._head)
        topic.followers += 1
        return topic

    def _leave(self, topic: _Topic, task_id: str | None, execution_id: str | None) -> None:
        topic.followers -= 1
        if not topic.followers:
            topic.stop_timer()
            del self._topics[_key(task_id, execution_id)]


def _key(task_id: str | None, execution_id: str | None) -> str | None:
    return task_id if execution_id is None else execution_id
