"""What would hold up everybody else, since a plan, or its log, is large: done in a thread."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeVar

import anyio
import anyio.to_thread

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

MOST_IN_LOOP: Final = 200
"""Steps, or events, of what is not large."""


async def apart(size: int, call: Callable[[], T]) -> T:
    """What `call` makes of so many steps, or events; in a thread, where they are many."""
    return call() if size <= MOST_IN_LOOP else await anyio.to_thread.run_sync(call)


async def wholly(size: int, call: Callable[[], T]) -> T:
    """As `apart`, for a decision that somebody has to take further: whoever is cancelled meanwhile, also by asyncio
    itself, has its result first, and hears of it where he waits next."""
    if size <= MOST_IN_LOOP:
        return call()
    asking, deciding = asyncio.current_task(), asyncio.ensure_future(apart(size, call))
    assert asking is not None
    cancelled = 0
    with anyio.CancelScope(shield=True):
        while not deciding.done():
            try:
                await asyncio.wait([deciding])
            except asyncio.CancelledError:
                cancelled += 1
    for _ in range(cancelled):
        asking.uncancel()
        asking.cancel()
    return deciding.result()
