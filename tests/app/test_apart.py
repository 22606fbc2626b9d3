"""What is done in a thread for a large plan, and is not lost when whoever asked for it goes."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import anyio
import pytest
from deadlines import WITHIN

from vespera_exec.app.plans.apart import MOST_IN_LOOP, wholly

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup


class Decision:
    """One that takes until it `may` be made."""

    def __init__(self) -> None:
        self.begun, self.may = threading.Event(), threading.Event()
        self.taken: list[int] = []

    def make(self) -> int:
        self.begun.set()
        assert self.may.wait(WITHIN)
        return 7

    async def take(self) -> None:
        self.taken.append(await wholly(MOST_IN_LOOP + 1, self.make))
        await anyio.sleep_forever()

    async def until_begun(self) -> None:
        await asyncio.to_thread(self.begun.wait, WITHIN)


def by_asyncio(group: TaskGroup, task: asyncio.Task[None]) -> None:
    task.cancel()


def by_its_scope(group: TaskGroup, task: asyncio.Task[None]) -> None:
    group.cancel_scope.cancel()


@pytest.mark.parametrize("cancel", [by_asyncio, by_its_scope])
async def test_whoever_is_cancelled_takes_the_decision_further_first(
    cancel: Callable[[TaskGroup, asyncio.Task[None]], None],
) -> None:
    decision, tasks = Decision(), list[asyncio.Task[None]]()

    async def take() -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        await decision.take()

    with anyio.fail_after(WITHIN):
        async with anyio.create_task_group() as group:
            group.start_soon(take)
            await decision.until_begun()
            cancel(group, tasks[0])
            decision.may.set()
    assert decision.taken == [7]
    assert tasks[0].cancelled()


async def test_a_limit_of_time_is_told_as_that() -> None:
    decision = Decision()
    opening = threading.Timer(0.1, decision.may.set)
    opening.start()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await decision.take()
    assert decision.taken == [7]
    opening.join()
