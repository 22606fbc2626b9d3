"""From a decided job to what whoever starts it is answered: the ids of its run, and where it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from vespera_exec.app import present, views
from vespera_exec.errors import StoreUnavailable, TaskNotFound

if TYPE_CHECKING:
    from vespera_exec.app.tasks import LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.engine.jobs import Job, Run
    from vespera_exec.model.ledger import IdempotencyRecord
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.store.store import Store


async def accepted(job: Job, *, tasks: LiveTasks, engine: Engine, store: Store) -> Run:
    """The run of a job whose PENDING has just been decided; that is on disk when this returns.

    Nothing is awaited before the engine has it, so that nothing comes between, a client that goes included. The engine
    starts nothing before PENDING is on disk.

    Raises:
        StoreUnavailable: it could not be written; the run is cancelled.
    """
    tasks.hold(job.task)
    run = engine.submit(job)
    try:
        await store.journal.sync()
    except StoreUnavailable:
        job.session.request_cancellation("Its acceptance could not be written")
        raise
    return run


async def within(run: Run, cursor: int, *, wait_ms: int) -> views.Handle:
    """Where a run stands, or how it ended, where that is within `wait_ms`; to be followed from `cursor`."""
    if wait_ms:
        with anyio.move_on_after(wait_ms / 1000):
            await run.done.wait()
    return handle(run.session.lifecycle, cursor, done=run.done.is_set())


def handle(life: Lifecycle, cursor: int, *, done: bool) -> views.Handle:
    error = present.error(life) if done else None
    return views.Handle(
        task_id=life.task_id,
        run_id=life.run_id,
        session_id=life.execution_id,
        status=life.status.value,
        cursor=cursor,
        done=done,
        error=error["message"] if error else None,
    )


async def repeated(known: IdempotencyRecord, engine: Engine, store: Store) -> views.Handle:
    """For a request that was made before: that of the run which it started.

    Raises:
        TaskNotFound: the run is not kept any more.
    """
    run = engine.run_of(known.task_id)
    if run is not None and run.run_id == known.run_id:
        life, done = run.session.lifecycle, run.done.is_set()
    else:
        attempts = await store.queries.attempts_of(known.run_id or "")
        if not attempts:
            raise TaskNotFound(known.task_id)
        life, done = attempts[-1][0], True
    return handle(life, 0, done=done).model_copy(update={"repeated": True})
