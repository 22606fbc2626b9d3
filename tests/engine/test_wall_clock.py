"""The engine while somebody sets the wall clock: timeouts, waits and back-offs come when they are due."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN

from vespera_exec.engine.engine import Engine, EngineOptions
from vespera_exec.engine.jobs import Job, Policy, Run
from vespera_exec.engine.work import Work, WorkResult
from vespera_exec.model.clock import Clock
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

HOUR = 3600.0
JUMPS = pytest.mark.parametrize("jump", [-HOUR, HOUR], ids=["back", "forward"])


@dataclass
class Wall:
    """The real clocks, of which the wall clock can be set."""

    offset: float = 0.0
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(now=lambda: datetime.now(UTC) + timedelta(seconds=self.offset), monotonic=time.monotonic)


@dataclass
class Place:
    store: Store
    engine: Engine
    wall: Wall

    async def submit(self, body: Callable[[Work], Awaitable[WorkResult]], **policy: Any) -> Run:
        task = Task(title="A task", sink=self.store.journal, clock=self.wall.clock, max_retries=3)
        session = task.enqueue_execution("test", owner="test")
        await self.store.journal.sync()
        return self.engine.submit(Job(task=task, session=session, run=body, policy=Policy(**policy)))


@dataclass(frozen=True)
class AfterAMoment:
    """Another attempt, `seconds` after the first failed."""

    seconds: float

    def applies(self, error_code: str, failed_attempts: int) -> bool:
        return failed_attempts == 1

    def delay(self, failed_attempts: int) -> float:
        return self.seconds


@asynccontextmanager
async def place(data_dir: Path) -> AsyncGenerator[Place]:
    wall = Wall()
    async with Store.open(Settings.load({"HOME": str(data_dir)}, data_dir=data_dir)) as store:
        engine = Engine(
            store.journal,
            owner="test",
            scratch_root=data_dir / "scratch",
            open_output=store.open_output,
            clock=wall.clock,
            options=EngineOptions(max_concurrent=1),
        )
        async with engine.running():
            yield Place(store, engine, wall)


async def ended(run: Run) -> None:
    with anyio.fail_after(WITHIN):
        await run.done.wait()


async def until(holds: Callable[[], bool]) -> None:
    with anyio.fail_after(WITHIN):
        while True:
            if holds():
                return
            await anyio.sleep(0.005)


@pytest.mark.promise("clock")
@JUMPS
async def test_a_timeout_comes_in_its_time(data_dir: Path, jump: float) -> None:
    begun = anyio.Event()

    async def body(work: Work) -> WorkResult:
        begun.set()
        await anyio.sleep_forever()
        raise AssertionError("unreachable")

    async with place(data_dir) as here:
        began = time.monotonic()
        run = await here.submit(body, timeout_seconds=0.3, grace_seconds=0.05)
        await begun.wait()
        here.wall.offset = jump
        await ended(run)
        assert run.session.status is ExecutionStatus.TIMED_OUT
        assert 0.3 <= run.session.elapsed_seconds <= time.monotonic() - began


@JUMPS
async def test_a_wait_for_a_turn_ends_in_its_time(data_dir: Path, jump: float) -> None:
    begun, let = anyio.Event(), anyio.Event()

    async def body(work: Work) -> WorkResult:
        begun.set()
        await let.wait()
        return WorkResult()

    async with place(data_dir) as here:
        first = await here.submit(body)
        await begun.wait()
        second = await here.submit(body, wait_timeout_seconds=0.3)
        here.wall.offset = jump
        await ended(second)
        assert second.session.status is ExecutionStatus.TIMED_OUT
        assert 0.25 <= second.session.lifecycle.queue_seconds < WITHIN
        let.set()
        await ended(first)
        assert first.session.elapsed_seconds < WITHIN


@JUMPS
async def test_a_back_off_that_is_waited_for_neither_ends_early_nor_drags_on(data_dir: Path, jump: float) -> None:
    began: list[float] = []

    async def body(work: Work) -> WorkResult:
        began.append(time.monotonic())
        return WorkResult(success=work.attempt == 2, error="the first fails")

    async with place(data_dir) as here:
        run = await here.submit(body, retry=AfterAMoment(0.3))
        await until(lambda: bool(began) and here.engine.queued == 1)
        here.wall.offset = jump
        await ended(run)
        assert run.session.status is ExecutionStatus.COMPLETED
        assert 0.25 <= began[1] - began[0] < WITHIN
