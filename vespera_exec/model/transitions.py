"""Which status may follow which, and what each change announces."""

from __future__ import annotations

from typing import Final

from vespera_exec.errors import InvalidTransitionError
from vespera_exec.model.enums import EventType, ExecutionStatus, TaskStatus

S = ExecutionStatus

AT_WORK: Final = (S.PREPARING, S.VALIDATING, S.RUNNING)
"""What may be paused, and gone back to."""
_FROM_WORK: Final = (S.COMPLETING, S.PAUSED, S.CANCELLING, S.RECOVERING, S.FAILED, S.TIMED_OUT)

ALLOWED: Final[dict[ExecutionStatus, tuple[ExecutionStatus, ...]]] = {
    S.IDLE: (S.PENDING, S.PREPARING),
    S.PENDING: (S.PREPARING, S.CANCELLED, S.TIMED_OUT, S.FAILED),
    S.PREPARING: (S.VALIDATING, S.RUNNING, *_FROM_WORK),
    S.VALIDATING: (S.PREPARING, S.RUNNING, *_FROM_WORK),
    S.RUNNING: (S.COMPLETED, *_FROM_WORK),
    # From PAUSED only back to where it was paused; `allowed_from` narrows this.
    S.PAUSED: (S.PREPARING, S.VALIDATING, S.RUNNING, S.RECOVERING, S.CANCELLING, S.FAILED, S.TIMED_OUT),
    S.RECOVERING: (S.PREPARING, S.VALIDATING, S.RUNNING, S.CANCELLING, S.FAILED, S.TIMED_OUT),
    S.COMPLETING: (S.COMPLETED, S.FAILED, S.TIMED_OUT),
    S.CANCELLING: (S.CANCELLED,),
    S.COMPLETED: (),
    S.FAILED: (),
    S.CANCELLED: (),
    S.TIMED_OUT: (),
}

TASK_ALLOWED: Final[dict[TaskStatus, tuple[TaskStatus, ...]]] = {
    TaskStatus.TODO: (TaskStatus.DOING, TaskStatus.CANCELLED, TaskStatus.DONE),
    TaskStatus.DOING: (TaskStatus.DONE, TaskStatus.TODO, TaskStatus.FAILED, TaskStatus.CANCELLED),
    TaskStatus.DONE: (TaskStatus.TODO,),
    TaskStatus.FAILED: (TaskStatus.TODO,),
    TaskStatus.CANCELLED: (TaskStatus.TODO,),
}

_ENTERED: Final[dict[ExecutionStatus, tuple[EventType, ...]]] = {
    S.PAUSED: (EventType.EXECUTION_PAUSED,),
    S.CANCELLING: (EventType.INFO,),
    S.RECOVERING: (EventType.RECOVERY_INITIATED,),
    S.COMPLETED: (EventType.EXECUTION_COMPLETED,),
    S.FAILED: (EventType.EXECUTION_FAILED, EventType.ERROR),
    S.TIMED_OUT: (EventType.EXECUTION_TIMEOUT,),
    S.CANCELLED: (EventType.EXECUTION_CANCELLED,),
}
_CHANGED: Final[dict[tuple[ExecutionStatus, ExecutionStatus], tuple[EventType, ...]]] = {
    (S.IDLE, S.PENDING): (EventType.EXECUTION_CREATED, EventType.EXECUTION_QUEUED),
    (S.IDLE, S.PREPARING): (EventType.EXECUTION_CREATED, EventType.EXECUTION_STARTED),
    (S.PENDING, S.PREPARING): (EventType.EXECUTION_STARTED,),
    **{(S.PAUSED, working): (EventType.EXECUTION_RESUMED,) for working in AT_WORK},
    **{(S.RECOVERING, working): (EventType.INFO,) for working in AT_WORK},
    **{(working, S.RECOVERING): (EventType.RECOVERY_INITIATED, EventType.ERROR) for working in AT_WORK},
}
"""Instead of the annotations of the new status as such."""


def allowed_from(status: ExecutionStatus, paused_from: ExecutionStatus | None = None) -> tuple[ExecutionStatus, ...]:
    """What may follow `status`; out of PAUSED, the work goes back only to the status it was paused in."""
    allowed = ALLOWED[status]
    if status is S.PAUSED and paused_from is not None:
        return tuple(each for each in allowed if each not in AT_WORK or each is paused_from)
    return allowed


def check(old: ExecutionStatus, new: ExecutionStatus, paused_from: ExecutionStatus | None = None) -> None:
    """
    Raises:
        InvalidTransitionError: the table does not list it.
    """
    allowed = allowed_from(old, paused_from)
    if new not in allowed:
        raise InvalidTransitionError(old.value, new.value, tuple(each.value for each in allowed))


def check_task(old: TaskStatus, new: TaskStatus) -> None:
    """
    Raises:
        InvalidTransitionError: the table does not list it.
    """
    allowed = TASK_ALLOWED[old]
    if new not in allowed:
        raise InvalidTransitionError(old.value, new.value, tuple(each.value for each in allowed))


def milestones(old: ExecutionStatus, new: ExecutionStatus) -> tuple[EventType, ...]:
    """The annotations written with a change, after its `status_change`, in order."""
    found = _CHANGED.get((old, new))
    return _ENTERED.get(new, ()) if found is None else found
