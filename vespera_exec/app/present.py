"""From state to view: what the doors show of a task and its sessions."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from vespera_exec.app import views
from vespera_exec.model.enums import RESOURCE_UNITS, ExecutionPhase, ExecutionStatus, ResourceType
from vespera_exec.model.events import Json, mapping
from vespera_exec.model.plans.plan import PLAN_ROLE
from vespera_exec.model.progress import Progress, measured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vespera_exec.model.clock import Clock
    from vespera_exec.model.inputs import Question
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.record import TaskRecord
    from vespera_exec.model.task import Task
    from vespera_exec.monitoring.eta import NaiveEstimator
    from vespera_exec.store.owners import Tenure


def summary(
    life: Lifecycle,
    progress: Progress,
    *,
    elapsed: float,
    usage: Mapping[str, views.UsageView],
    estimator: NaiveEstimator,
    clock: Clock,
    detail: bool,
) -> views.Summary:
    """One session. `detail` adds usage, phases and custom metrics."""
    work = progress.phases.get(ExecutionPhase.EXECUTION)
    percentage = work.get_percentage() if work is not None else None
    estimate = None
    if life.status in (ExecutionStatus.PREPARING, ExecutionStatus.VALIDATING, ExecutionStatus.RUNNING):
        fraction = percentage / 100 if percentage is not None else None
        estimate = estimator.estimate(
            role=life.role_name, elapsed_seconds=elapsed, fraction=fraction, phase=life.current_phase
        )
    eta = None
    completion = life.completed_at if life.status.is_terminal else None
    if estimate is not None:
        eta = views.Eta(
            remaining_seconds=round(estimate.remaining_seconds, 1),
            low_seconds=round(estimate.low_seconds, 1),
            high_seconds=round(estimate.high_seconds, 1),
            label=estimate.label,
        )
        completion = clock.now() + timedelta(seconds=estimate.remaining_seconds)
    failed = life.status in (ExecutionStatus.FAILED, ExecutionStatus.TIMED_OUT)
    return views.Summary(
        session_id=life.execution_id,
        task_id=life.task_id,
        run_id=life.run_id,
        attempt=life.attempt,
        role=life.role_name,
        status=life.status.value,
        lifecycle=life.status.lifecycle,
        current_phase=life.current_phase.value if life.current_phase else None,
        overall_progress=views.OverallProgress(
            percentage=rounded(progress.percentage), message=progress.overall.message
        ),
        time_tracking=views.TimeView(
            elapsed_seconds=round(elapsed, 3),
            estimated_completion=completion,
            eta_confidence=estimate.confidence if estimate else None,
            eta=eta,
            queue_seconds=round(life.queue_seconds, 3),
        ),
        resource_usage=dict(usage) if detail else None,
        error_context=dict(life.error) if failed else None,
        work=measured(work) if work is not None and detail else None,
        phases=[phase.to_dict() for phase in life.phases] if detail else None,
        custom_progress={name: measured(state) for name, state in progress.custom.items()} if detail else None,
    )


def peaks(life: Lifecycle) -> dict[str, views.UsageView]:
    """The usage of an execution that has ended, from its terminal event."""
    return {
        name: views.UsageView(current=peak, peak=peak, unit=RESOURCE_UNITS[ResourceType(name)])
        for name, peak in mapping(life.outcome.get("peaks")).items()
    }


def task(record: TaskRecord, *, repeated: bool = False) -> views.TaskView:
    assert record.created_at is not None
    return views.TaskView(
        task_id=record.task_id,
        title=record.title,
        description=record.description,
        role=record.assigned_role,
        inputs=dict(record.inputs),
        priority=record.priority,
        status=record.status.value,
        sla_seconds=record.sla_seconds,
        created_at=record.created_at,
        updated_at=record.updated_at or record.created_at,
        repeated=repeated,
    )


def legacy(record: TaskRecord) -> views.Legacy:
    return views.Legacy(
        assigned_role=record.assigned_role,
        execution_id=record.current_execution_id or record.last_execution_id,
        retry_count=record.retry_count,
        last_error=record.last_error,
    )


def steps(life: Lifecycle, progress: Progress) -> views.ProgressInfo | None:
    """Document 004's body: one step without a plan; None where no progress was ever recorded."""
    if progress.sequence == 0:
        return None
    begun = life.started_at is not None
    return views.ProgressInfo(
        current_step=1 if begun else 0,
        total_steps=1,
        percentage=rounded(progress.percentage) or 0.0,
        current_step_name=(progress.overall.message or life.role_name or "main") if begun else None,
    )


def error(life: Lifecycle) -> dict[str, Json] | None:
    if life.status is ExecutionStatus.CANCELLED:
        return {"code": "CANCELLED", "message": life.cancellation_reason or "Cancelled"}
    return dict(life.error) or None


def before_its_end(life: Lifecycle) -> Lifecycle:
    """What is told of one that has ended, until that is on disk, or the next attempt begins instead."""
    cancelled = life.status is ExecutionStatus.CANCELLED
    status = ExecutionStatus.CANCELLING if cancelled else ExecutionStatus.COMPLETING
    return replace(life, status=status, completed_at=None, outcome={})


def open_inputs(life: Lifecycle) -> list[views.InputView]:
    """The questions that wait for an answer."""
    return [question(each) for each in life.open_inputs]


def question(asked: Question, *, key: str | None = None) -> views.InputView:
    """`key`: what it is called where it is shown, in the place of its own name."""
    assert asked.asked_at is not None
    return views.InputView(
        key=key or asked.key, kind=asked.kind, message=asked.message, schema=dict(asked.schema), asked_at=asked.asked_at
    )


def rounded(value: float | None) -> float | None:
    return round(value, 2) if value is not None else None


def work(tasks: Iterable[Task], *, resumes: Callable[[str], bool], limit: int) -> list[views.WorkRow]:
    """Of these tasks the executions that have begun: those that would be interrupted first, then the oldest.

    A plan itself is not interrupted; of its steps each is judged as what it is.
    `resumes` says of a role whether what stands still of it goes on under the next owner.
    """
    shown: list[views.WorkRow] = []
    for task in tasks:
        session = task.execution.current_session
        if session is None or session.lifecycle.status is ExecutionStatus.PENDING:
            continue
        life = session.lifecycle
        waits = life.status in (ExecutionStatus.PAUSED, ExecutionStatus.RECOVERING)
        stays = life.is_parked or life.lease is not None or life.role_name == PLAN_ROLE
        shown.append(
            views.WorkRow(
                task_id=task.id,
                session_id=session.session_id,
                title=task.record.title,
                status=life.status.value,
                kept=stays or (waits and resumes(life.role_name or "")),
            )
        )
    return sorted(shown, key=lambda row: row.kept)[:limit]


def owners(tenures: Iterable[Tenure]) -> list[views.OwnerView]:
    return [views.OwnerView(**asdict(each)) for each in tenures]
