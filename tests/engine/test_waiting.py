"""What waits for a slot, or stands paused without one: how long it may, and what ends the wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
from test_engine import Always, Place, holding, instant, place
from test_pausing import lasting

from vespera_exec.engine.jobs import Job, Policy
from vespera_exec.errors import ExecutionError
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from pathlib import Path

    from vespera_exec.engine.jobs import Run
    from vespera_exec.engine.work import Work, WorkResult
    from vespera_exec.model.session import ExecutionSession

S = ExecutionStatus


async def recovering(here: Place, **policy: Any) -> Run:
    """A run whose owner has died, and which waits to go on."""
    task = Task(title="A task", sink=here.store.journal)
    session = task.enqueue_execution("test", owner="dead")
    session.start_execution()
    session.recover("Its owner died")
    session.enter_phase(ExecutionPhase.RECOVERY)
    await here.store.journal.sync()
    return here.engine.submit(Job(task=task, session=session, run=instant, policy=Policy(**policy)))


def pause(session: ExecutionSession) -> None:
    session.update_status(S.PREPARING)
    session.pause("A break")


async def test_what_is_paused_in_the_queue_does_not_wait_for_its_turn(data_dir: Path) -> None:
    body, begun, let = holding()
    async with place(data_dir, max_concurrent=1) as here:
        await here.submit(body)
        await begun.wait()
        run = await recovering(here, wait_timeout_seconds=1)
        pause(run.session)
        await lasting(1.2)
        assert run.session.status is S.PAUSED
        run.session.resume("Go on", queued=True)
        here.engine.unpark(run.session)
        let.set()
        assert (await here.ended(run)).status is S.COMPLETED


async def test_what_is_resumed_may_wait_as_long_as_any_other(data_dir: Path) -> None:
    body, begun, let = holding()
    async with place(data_dir, max_concurrent=1) as here:
        await here.submit(body)
        await begun.wait()
        run = await recovering(here, wait_timeout_seconds=2)
        pause(run.session)
        await lasting(1.2)
        run.session.resume("Go on", queued=True)
        here.engine.unpark(run.session)
        await lasting(0.9)
        assert run.session.status is S.PREPARING
        assert (await here.ended(run)).status is S.TIMED_OUT
        let.set()


async def test_the_wait_after_a_resume_is_time_in_the_queue_and_not_at_work(data_dir: Path) -> None:
    body, begun, let = holding()
    async with place(data_dir, max_concurrent=1) as here:
        await here.submit(body)
        await begun.wait()
        run = await recovering(here, timeout_seconds=1.5)
        pause(run.session)
        run.session.resume("Go on", queued=True)
        here.engine.unpark(run.session)
        await lasting(1.6)
        let.set()
        life = await here.ended(run)
        assert (life.status, life.active_seconds < 1.5, life.queue_seconds >= 1.6) == (S.COMPLETED, True, True)


async def test_a_cancel_finds_the_next_attempt_before_that_is_on_disk(data_dir: Path) -> None:
    failed = anyio.Event()

    async def body(work: Work) -> WorkResult:
        raise ExecutionError("not yet", code="FLAKY")

    def heard(event: Any) -> None:
        if event.new_status is S.FAILED:
            failed.set()

    async with place(data_dir) as here:
        task = Task(title="A task", sink=here.store.journal)
        task.ledger.listen(heard)
        _, run = await here.submit(body, task=task, retry=Always(3600))
        await failed.wait()
        assert run.session is task.execution.current_session
        assert run.session.request_cancellation("never mind")
        life = await here.ended(run)
        assert (life.status, life.attempt) == (S.CANCELLED, 2)
