"""Where one plan is executed: wakes who coordinates it, and holds what is done beside."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVarTuple, Unpack

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

    from anyio.abc import TaskGroup

Given = TypeVarTuple("Given")

AT_ONCE: Final = 16
"""Steps that are begun, or ended, before others in the loop get their turn."""


class PlanLoop:
    """To be used on the event loop, but for `rouse`."""

    def __init__(self) -> None:
        self._wake = asyncio.Event()
        self._roused = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: int | None = None
        """Of the loop."""
        self._group: TaskGroup | None = None

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Within the block it may be rested and started in; what was started ends with it."""
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        async with anyio.create_task_group() as self._group:
            yield
            self._group.cancel_scope.cancel()

    def start(self, call: Callable[[Unpack[Given]], Coroutine[Any, Any, object]], *given: *Given) -> None:
        """Do it beside, while the plan is executed."""
        if self._group is None:
            raise RuntimeError("the plan is not executed yet")
        self._group.start_soon(call, *given)

    def rouse(self) -> None:
        """Let `rest` return. From any thread."""
        if self._roused or self._loop is None or self._loop.is_closed():
            return
        self._roused = True
        if threading.get_ident() == self._thread:
            self._wake.set()
        else:
            self._loop.call_soon_threadsafe(self._wake.set)

    async def rest(self, seconds: float | None = None) -> None:
        """Until it is roused, or so long; None: without an end."""
        with anyio.move_on_after(seconds):
            await self._wake.wait()
        self._wake.clear()
        self._roused = False
