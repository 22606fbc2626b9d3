"""The closed sets of the domain; a member's value is its name on the wire and in the log."""

from __future__ import annotations

from enum import StrEnum


class ExecutionStatus(StrEnum):
    """Where one execution stands. The transitions are in `model.transitions`."""

    IDLE = "idle"
    PENDING = "pending"
    PREPARING = "preparing"
    VALIDATING = "validating"
    RUNNING = "running"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    COMPLETING = "completing"
    COMPLETED = "completed"
    FAILED = "failed"
    RECOVERING = "recovering"
    TIMED_OUT = "timed_out"
    QUEUED = "pending"
    TIMEOUT = "timed_out"

    @property
    def is_terminal(self) -> bool:
        """It has ended and will never change again."""
        return self in _TERMINAL

    @property
    def is_active(self) -> bool:
        """It was accepted and has not ended: waiting, working, paused or ending."""
        return self is not ExecutionStatus.IDLE and self not in _TERMINAL

    @property
    def lifecycle(self) -> str:
        """The six-state view of documents 003 and 004: pending, running, paused, completed, failed, cancelled.

        IDLE, which those documents do not have, is shown as pending.
        """
        return _LIFECYCLE.get(self, "running")


_TERMINAL = frozenset(
    {ExecutionStatus.COMPLETED, ExecutionStatus.FAILED, ExecutionStatus.CANCELLED, ExecutionStatus.TIMED_OUT}
)
_LIFECYCLE = {
    ExecutionStatus.IDLE: "pending",
    ExecutionStatus.PENDING: "pending",
    ExecutionStatus.PAUSED: "paused",
    ExecutionStatus.COMPLETED: "completed",
    ExecutionStatus.FAILED: "failed",
    ExecutionStatus.TIMED_OUT: "failed",
    ExecutionStatus.CANCELLED: "cancelled",
}


class TaskStatus(StrEnum):
    TODO = "todo"
    DOING = "doing"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StepStatus(StrEnum):
    """Where one step of a plan stands."""

    PENDING = "pending"
    """Its turn has not come, or it is to be tried again from `not_before` on."""
    RUNNING = "running"
    WAITING = "waiting"
    """It has begun and is held up: for an answer, for capacity, for a slot, for a worker."""
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """It has ended; only a restore makes it anything else."""
        return self in _ENDED_STEPS


_ENDED_STEPS = frozenset({StepStatus.COMPLETED, StepStatus.FAILED, StepStatus.SKIPPED, StepStatus.CANCELLED})


class RecoveryAction(StrEnum):
    """What a recovery strategy decides after a step has failed."""

    RETRY = "retry"
    SKIP = "skip"
    FALLBACK = "fallback"
    ABORT = "abort"
    CHECKPOINT_RESTORE = "checkpoint_restore"


class ExecutionPhase(StrEnum):
    INITIALIZATION = "initialization"
    VALIDATION = "validation"
    SETUP = "setup"
    EXECUTION = "execution"
    CLEANUP = "cleanup"
    FINALIZATION = "finalization"
    ERROR_HANDLING = "error_handling"
    RECOVERY = "recovery"


class ProgressType(StrEnum):
    """How progress is counted. Only PERCENTAGE has no total of its own."""

    PERCENTAGE = "percentage"
    STEPS = "steps"
    BYTES = "bytes"
    ITEMS = "items"
    TIME_BASED = "time_based"
    CUSTOM = "custom"


class ResourceType(StrEnum):
    """What the usage sampler measures. Units are in `RESOURCE_UNITS`."""

    CPU_USAGE = "cpu_usage"
    MEMORY_RSS = "memory_rss"
    MEMORY_VMS = "memory_vms"
    DISK_READ = "disk_read"
    DISK_WRITE = "disk_write"
    NETWORK_IN = "network_in"
    NETWORK_OUT = "network_out"
    CUSTOM = "custom"


RESOURCE_UNITS: dict[ResourceType, str] = {
    ResourceType.CPU_USAGE: "percent of one core",
    ResourceType.MEMORY_RSS: "MB",
    ResourceType.MEMORY_VMS: "MB",
    ResourceType.DISK_READ: "bytes since the start",
    ResourceType.DISK_WRITE: "bytes since the start",
    ResourceType.NETWORK_IN: "bytes since the start, whole host",
    ResourceType.NETWORK_OUT: "bytes since the start, whole host",
    ResourceType.CUSTOM: "as reported",
}


class MessageLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class EventType(StrEnum):
    """What one line of the log says.

    `status_change`, `phase_change`, `progress_update`, `checkpoint_created`, `owner_changed`, `variables_changed`, the
    `approval_*`, `lease_*`, `step_*`, `resource_*` and `task_*` facts are folded into state. All others annotate: they
    are written in the same transaction for those who filter by them, and change nothing.
    """

    STATUS_CHANGE = "status_change"
    PHASE_CHANGE = "phase_change"
    PROGRESS_UPDATE = "progress_update"
    OWNER_CHANGED = "owner_changed"
    TASK_CREATED = "task_created"
    TASK_UPDATED = "task_updated"

    EXECUTION_CREATED = "execution_created"
    EXECUTION_QUEUED = "execution_queued"
    EXECUTION_STARTED = "execution_started"
    EXECUTION_PAUSED = "execution_paused"
    EXECUTION_RESUMED = "execution_resumed"
    EXECUTION_COMPLETED = "execution_completed"
    EXECUTION_FAILED = "execution_failed"
    EXECUTION_CANCELLED = "execution_cancelled"
    EXECUTION_TIMEOUT = "execution_timeout"
    RETRY_SCHEDULED = "retry_scheduled"

    STEP_STARTED = "step_started"
    STEP_COMPLETED = "step_completed"
    STEP_FAILED = "step_failed"
    STEP_PROGRESS = "step_progress"
    STEP_WAITING = "step_waiting"
    STEP_SKIPPED = "step_skipped"
    STEP_CANCELLED = "step_cancelled"
    STEP_RESET = "step_reset"
    VARIABLES_CHANGED = "variables_changed"

    APPROVAL_REQUESTED = "approval_requested"
    APPROVAL_APPROVED = "approval_approved"
    APPROVAL_REJECTED = "approval_rejected"

    SYSTEM_HEALTH = "system_health"
    SYSTEM_ALERT = "system_alert"

    RESOURCE_WAITING = "resource_waiting"
    RESOURCE_ALLOCATED = "resource_allocated"
    RESOURCE_RELEASED = "resource_released"
    CHECKPOINT_CREATED = "checkpoint_created"
    LEASE_GRANTED = "lease_granted"
    LEASE_ENDED = "lease_ended"
    RECOVERY_INITIATED = "recovery_initiated"

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"

    TASK_STARTED = "step_started"
    TASK_COMPLETED = "step_completed"
    TASK_FAILED = "step_failed"
