"""Callbacks, called off the thread that made the change, in order, with their faults kept away from it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from vespera_exec.model.enums import EventType
from vespera_exec.model.events import ExecutionEvent

Callback = Callable[[ExecutionEvent], Awaitable[None] | None]

_QUEUE_LIMIT = 1000
_FAULT_LIMIT = 10


def _nobody(_event: ExecutionEvent) -> None:
    """Stands for a callback that was let go of."""


_log = logging.getLogger(__name__)
_pool_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def _deliverers() -> ThreadPoolExecutor:
    """The threads that call callbacks: made with the first callback, never without one."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="vespera-callback")
        return _pool


class Subscription:
    """One callback and what it has not yet heard.

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
        _deliverers().submit(self._drain)

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
                self.callback = _nobody

    def wait_idle(self, timeout: float) -> bool:
        """True when all that was offered has been delivered within `timeout` seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._draining, timeout)

    def _make_room(self) -> None:
        for event in self._queue:
            if event.event_type is EventType.PROGRESS_UPDATE:
                self._queue.remove(event)
                self.dropped += 1
                return

    def _drain(self) -> None:
        while True:
            with self._idle:
                if not self._queue:
                    self._draining = False
                    if self._closing:
                        self.callback = _nobody
                    self._idle.notify_all()
                    return
                event = self._queue.popleft()
            self._call(event)

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

        if self._loop is not None and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(finish(), self._loop).result()
        else:
            asyncio.run(finish())
