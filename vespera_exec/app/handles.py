"""What whoever starts a run is answered: its ids, and where it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.app import present, views
from vespera_exec.errors import TaskNotFound

if TYPE_CHECKING:
    from vespera_exec.engine.engine import Engine
    from vespera_exec.model.ledger import IdempotencyRecord
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.store.store import Store


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
