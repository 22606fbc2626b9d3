"""The fold of a stored log: what proves that the log is the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.progress import Progress
from vespera_exec.model.record import TaskRecord

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vespera_exec.model.events import ExecutionEvent


def replayed(events: Iterable[ExecutionEvent], execution_id: str) -> tuple[Lifecycle, Progress]:
    """The state of one execution, from its log in order; events of others are passed over."""
    life, progress = Lifecycle(execution_id=execution_id, run_id=execution_id), Progress(execution_id=execution_id)
    for event in events:
        if event.execution_id == execution_id:
            life, progress = life.evolve(event), progress.evolve(event)
    return life, progress


def replayed_task(events: Iterable[ExecutionEvent], task_id: str) -> TaskRecord:
    """The record of one task, from its log in order; events of its executions are passed over."""
    record = TaskRecord(task_id=task_id)
    for event in events:
        if event.execution_id is None and event.task_id == task_id:
            record = record.evolve(event)
    return record
