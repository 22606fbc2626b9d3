"""That something is over: told to whoever waits for it, at the price of a flag where nobody does."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


class Done:
    """`wait` returns once it is set. An event would cost every queued run a kilobyte, waited for or not.

    Used on one event loop.
    """

    __slots__ = ("_calls", "_set")

    def __init__(self) -> None:
        self._set = False
        self._calls: dict[object, Callable[[], object]] | None = None

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        calls, self._calls = self._calls or {}, None
        for call in calls.values():
            call()

    async def wait(self) -> None:
        if self._set:
            return
        event = asyncio.Event()
        with self.calling(event.set):
            await event.wait()

    def then(self, call: Callable[[], object]) -> None:
        """`call` is called when it is set; at once where it is."""
        if self._set:
            call()
        else:
            calls = self._calls = self._calls or {}
            calls[object()] = call

    @contextmanager
    def calling(self, call: Callable[[], object]) -> Generator[None]:
        """Within the block, `call` is called when it is set."""
        calls, token = self._calls or {}, object()
        calls[token] = call
        self._calls = calls
        try:
            yield
        finally:
            calls.pop(token, None)
