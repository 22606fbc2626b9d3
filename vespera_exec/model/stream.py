"""The last events of one execution, and everybody who hears of them: callbacks, and followers in a loop."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias

from vespera_exec.errors import InvalidInput
from vespera_exec.model.listeners import Subscribers

if TYPE_CHECKING:
    from collections.abc import Callable

    from vespera_exec.model.events import ExecutionEvent
    from vespera_exec.model.ledger import Ledger, Part
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.listeners import Callback, Subscription
    from vespera_exec.model.progress import Progress

_TURN = 64  # events that a follower is given before the rest of its loop has its turn


class StatusEventStream:
    """The log of one execution as far as memory holds it: the last `limit` events; `session.stream`.

    `async for event in stream` replays and goes on live; see `follow`. Thread-safe.
    """

    __slots__ = ("_events", "_ledger", "_life", "_limit", "_parked", "_progress", "_subscribers")

    def __init__(self, ledger: Ledger, life: Part[Lifecycle], progress: Part[Progress], *, limit: int) -> None:
        self._ledger = ledger
        self._life = life
        self._progress = progress
        self._limit = limit
        self._events: list[ExecutionEvent] = []
        self._subscribers = Subscribers()
        self._parked: tuple[_Parked, ...] = ()

    def __aiter__(self) -> EventFollower:
        return self.follow()

    @property
    def waiting(self) -> int:
        """How many followers wait for an event at the moment."""
        return len(self._parked)

    def emit(self, event: ExecutionEvent) -> None:
        """The ledger's listener, under its lock: keep the event, hand it over. Those of others are passed over."""
        if event.execution_id != self._life.value.execution_id:
            return
        self._events.append(event)
        if len(self._events) > self._limit:
            del self._events[0]
        self._subscribers.offer(event)
        if self._parked:
            parked, self._parked = self._parked, ()
            for each in parked:
                each.wake()

    def get_events(self, *, after: int = 0) -> list[ExecutionEvent]:
        """The events that memory holds with a sequence above `after`, oldest first."""
        with self._ledger:
            return [event for event in self._events if event.sequence > after]

    def follow(self, *, after: int = 0) -> EventFollower:
        """History after the sequence `after`, then live, in order, without repeat; ends with the execution.

        Nothing is queued for a follower: it reads on from here by its own cursor, so a slow one costs no memory,
        and misses what memory has dropped meanwhile (`EventFollower.dropped`).
        The deadline of a token is judged when the session is read, and following is no such reading.

        Raises:
            InvalidInput: `after` is negative.
        """
        if after < 0:
            raise InvalidInput(f"a sequence is at least 0, not {after}")
        return EventFollower(after, take=self._take, leave=self._leave)

    def subscribe(self, callback: Callback) -> Subscription:
        """Call `callback(event)` for every event from now on, off the thread that caused it, in order."""
        return self._subscribers.add(callback)

    def unsubscribe(self, callback: Callback) -> bool:
        """Whether it was there; what it has not yet heard, it never will."""
        return self._subscribers.remove(callback)

    @property
    def callbacks(self) -> list[Callback]:
        return self._subscribers.callbacks

    def wait_idle(self, timeout: float) -> bool:
        """True when every callback has heard all there was, within `timeout` seconds each."""
        return self._subscribers.wait_idle(timeout)

    def close_when_idle(self) -> None:
        """Deliver what waits, then let go of the callbacks."""
        self._subscribers.close_when_idle()

    def _take(self, follower: EventFollower) -> ExecutionEvent | asyncio.Future[None] | None:
        """The event that `follower` wants; else what wakes it when there is one; None when there will be none."""
        with self._ledger:  # whole decisions only, and none between the look and the parking
            head = self._progress.value.sequence
            if follower.sequence < head:
                oldest = self._events[0].sequence if self._events else head + 1
                lost = max(0, oldest - follower.sequence - 1)
                follower.dropped += lost
                follower.sequence += lost
                if follower.sequence < head:
                    follower.sequence += 1
                    return self._events[follower.sequence - oldest]
            if self._life.value.status.is_terminal:
                return None
            loop = asyncio.get_running_loop()
            parked = _Parked(loop, loop.create_future())
            self._parked = (*self._parked, parked)
            return parked.future

    def _leave(self, future: asyncio.Future[None]) -> None:
        with self._ledger:
            self._parked = tuple(each for each in self._parked if each.future is not future)


class EventFollower:
    """One reader's place in a stream; made by `StatusEventStream.follow`, for one task at a time.

    `sequence` is that of the last event it was given. It may be left and taken up again at any time; there is
    nothing to close.
    """

    def __init__(self, after: int, *, take: _Take, leave: Callable[[asyncio.Future[None]], None]) -> None:
        self.sequence = after
        self.dropped = 0
        """Events after its start that it will not be given, because memory did not hold them any more.

        Counted before the event that follows the gap is given.
        """
        self._take = take
        self._leave = leave
        self._given = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ExecutionEvent:
        self._given += 1
        if self._given % _TURN == 0:
            await asyncio.sleep(0)
        while True:
            found = self._take(self)
            if found is None:
                raise StopAsyncIteration
            if not isinstance(found, asyncio.Future):
                return found
            try:
                await found
            finally:
                self._leave(found)


_Take: TypeAlias = "Callable[[EventFollower], ExecutionEvent | asyncio.Future[None] | None]"


class _Parked(NamedTuple):
    """A follower that waits, and the loop it waits in."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]

    def wake(self) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # its loop is closed, and nobody waits any more
            self.loop.call_soon_threadsafe(_release, self.future)


def _release(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
