"""Callbacks, called off the thread that made the change, in order, with their faults kept away from it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from vespera_exec.model.enums import EventType
from vespera_exec.model.events import ExecutionEvent

if TYPE_CHECKING:
    from types import TracebackType

Callback = Callable[[ExecutionEvent], Awaitable[None] | None]

_QUEUE_LIMIT = 1000
_FAULT_LIMIT = 10
_TURN = 16  # events that one subscription is given before others have their turn
_LOOP_CHECK_SECONDS = 0.5

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def _let_go(_event: ExecutionEvent) -> None:
    """Stands for a callback that was let go of."""


def _deliverers() -> ThreadPoolExecutor:
    """The threads that call callbacks: made with the first callback, never without one."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="vespera-callback")
        return _pool


class Subscription:
    """One callback and what it has not yet heard; `with subscription:` unsubscribes at the end.

    An asynchronous callback is awaited on the loop that was running when it subscribed. Where the
    callback cannot keep up, the oldest progress events are dropped (`dropped`); a status never is.
    After ten faults in a row it is unsubscribed.
    """

    def __init__(self, callback: Callback, *, undo: Callable[[], None] = lambda: None) -> None:
        self.callback = callback
        self.dropped = 0
        self.faults = 0
        self.undo = undo
        self._queue: deque[ExecutionEvent] = deque()
        self._idle = threading.Condition()
        self._draining = False
        self._closed = False
        self._closing = False
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unsubscribe()

    def offer(self, event: ExecutionEvent) -> None:
        """Hand over an event; never blocks."""
        with self._idle:
            if self._closed:
                return
            if len(self._queue) >= _QUEUE_LIMIT:
                self._make_room()
            self._queue.append(event)
            if self._draining:
                return
            self._draining = True
        self._have_turn()

    def unsubscribe(self) -> None:
        """Hear nothing more. May be called from within the callback."""
        with self._idle:
            self._closed = True
            self._queue.clear()
        self.undo()

    def close_when_idle(self) -> None:
        """Deliver what waits, then let go of the callback."""
        with self._idle:
            self._closing = True
            if not self._draining:
                self.callback = _let_go

    def wait_idle(self, timeout: float) -> bool:
        """True when all that was offered has been delivered within `timeout` seconds. Not for the callback's loop."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._draining, timeout)

    def _make_room(self) -> None:
        for event in self._queue:
            if event.event_type is EventType.PROGRESS_UPDATE:
                self._queue.remove(event)
                self.dropped += 1
                return

    def _have_turn(self) -> None:
        try:
            _deliverers().submit(self._drain)
        except RuntimeError:  # the interpreter is going down, nobody is left to hear
            with self._idle:
                self._queue.clear()
                self._draining = False
                self._idle.notify_all()

    def _drain(self) -> None:
        for _ in range(_TURN):
            with self._idle:
                if not self._queue:
                    self._draining = False
                    if self._closing:
                        self.callback = _let_go
                    self._idle.notify_all()
                    return
                event = self._queue.popleft()
            self._call(event)
        self._have_turn()

    def _call(self, event: ExecutionEvent) -> None:
        try:
            answer = self.callback(event)
            if answer is not None and inspect.isawaitable(answer):
                self._await(answer)
            self.faults = 0
        except Exception:  # noqa: BLE001 - the boundary to a stranger's callback: its fault is not the work's
            self.faults += 1
            _log.exception("A callback failed on %s of %s", event.event_type.value, event.stream)
            if self.faults >= _FAULT_LIMIT:
                _log.warning("A callback failed %d times in a row and is unsubscribed", self.faults)
                self.unsubscribe()

    def _await(self, answer: Awaitable[None]) -> None:
        async def finish() -> None:
            await answer

        loop = self._loop
        if loop is None or not loop.is_running():
            asyncio.run(finish())
            return
        heard = asyncio.run_coroutine_threadsafe(finish(), loop)
        while True:
            try:
                return heard.result(timeout=_LOOP_CHECK_SECONDS)
            except TimeoutError:
                if heard.done():
                    raise
                if not loop.is_running():  # it ended with the callback half-way; a thread must not wait for ever
                    heard.cancel()
                    return None


class Subscribers:
    """The subscriptions of one subject. Thread-safe; costs next to nothing while there are none."""

    __slots__ = ("_all",)

    def __init__(self) -> None:
        self._all: tuple[Subscription, ...] = ()

    def add(self, callback: Callback) -> Subscription:
        subscription = Subscription(callback)
        subscription.undo = lambda: self._drop(subscription)
        with _lock:
            self._all = (*self._all, subscription)
        return subscription

    def remove(self, callback: Callback) -> bool:
        """Whether it was there."""
        found = [each for each in self._all if each.callback == callback]
        for subscription in found:
            subscription.unsubscribe()
        return bool(found)

    @property
    def callbacks(self) -> list[Callback]:
        return [each.callback for each in self._all if each.callback is not _let_go]

    def offer(self, event: ExecutionEvent) -> None:
        for subscription in self._all:
            subscription.offer(event)

    def close_when_idle(self) -> None:
        for subscription in self._all:
            subscription.close_when_idle()

    def wait_idle(self, timeout: float) -> bool:
        """True when all of them have heard all there was, within `timeout` seconds each."""
        return all(each.wait_idle(timeout) for each in self._all)

    def _drop(self, subscription: Subscription) -> None:
        with _lock:
            self._all = tuple(each for each in self._all if each is not subscription)
