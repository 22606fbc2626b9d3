"""What a session, a task and its executions say of themselves at a glance."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus
from vespera_exec.model.progress import measured

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.model.events import Json
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.progress import Progress
    from vespera_exec.model.record import TaskRecord
    from vespera_exec.model.timing import TimeTracking

_FAILED = (ExecutionStatus.FAILED, ExecutionStatus.TIMED_OUT)


def session_summary(
    life: Lifecycle, progress: Progress, tracking: TimeTracking | None, usage: Mapping[str, Json]
) -> dict[str, Json]:
    """The keys of document 000, JSON-safe. `tracking` is of no use, and may be None, once it has ended.

    `estimated_completion` is None while paused (nobody knows when it goes on) and after the end;
    `error_context` is None unless it failed or timed out.
    """
    percentage, eta, elapsed = progress.percentage, None, life.active_seconds
    if tracking is not None:
        elapsed = tracking.get_elapsed_time().total_seconds()
    if tracking is not None and not life.status.is_terminal and life.status is not ExecutionStatus.PAUSED:
        work = progress.phases.get(ExecutionPhase.EXECUTION)
        eta = tracking.calculate_eta(work.get_percentage() if work and work.current else percentage)
    return {
        "session_id": life.execution_id,
        "task_id": life.task_id,
        "status": life.status.value,
        "current_phase": life.current_phase.value if life.current_phase else None,
        "overall_progress": {"percentage": percentage, "message": progress.overall.message},
        "time_tracking": {
            "elapsed_seconds": elapsed,
            "estimated_completion": eta.isoformat() if eta else None,
            "eta_confidence": None,
        },
        "resource_usage": dict(usage),
        "custom_progress": {name: measured(state) for name, state in progress.custom.items()},
        "error_context": dict(life.error) if life.status in _FAILED else None,
    }


def current_status(
    record: TaskRecord, status: ExecutionStatus, session: Mapping[str, Json] | None, *, executing: bool
) -> dict[str, Json]:
    """One shape, idle or not; `session` is the summary of the running session, else of the last, else None."""
    return {
        "executing": executing,
        "status": status.value,
        "lifecycle": status.lifecycle,
        "session_id": session["session_id"] if session else None,
        "session": session,
        "legacy_compatibility": {
            "assigned_role": record.assigned_role,
            "execution_id": record.current_execution_id or record.last_execution_id,
            "retry_count": record.retry_count,
            "last_error": record.last_error,
        },
    }


def performance_metrics(record: TaskRecord, durations: Sequence[float]) -> dict[str, Json]:
    """Totals over the task's life; `durations` are those of the last completed executions, in seconds.

    `success_rate` is 0 to 1 and leaves cancelled ones out; None where nothing has ended.
    """
    judged = record.completed + record.failed + record.timed_out
    rate = record.completed / judged if judged else None
    return {
        "total_executions": judged + record.cancelled,
        "completed": record.completed,
        "failed": record.failed,
        "cancelled": record.cancelled,
        "timed_out": record.timed_out,
        "success_rate": rate,
        "success_rate_percent": rate * 100 if rate is not None else None,
        "average_duration_seconds": record.duration_sum / record.completed if record.completed else None,
        "median_duration_seconds": statistics.median(durations) if durations else None,
        "retry_count": record.retry_count,
        "last_error": record.last_error,
    }
