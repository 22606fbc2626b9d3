"""Every error this package raises on purpose, as one tree.

    VesperaError                     VESPERA_ERROR
    ├── InvalidInput                 INVALID_INPUT         a value was refused; nothing changed
    │   ├── InvalidProgress          INVALID_PROGRESS      not finite, negative, backwards, after the end
    │   ├── InvalidRoleFile          INVALID_ROLE_FILE     names the file and the line
    │   ├── CapacityUnknown          CAPACITY_UNKNOWN      no pool is of that type and kind
    │   ├── CapacityTooLarge         CAPACITY_TOO_LARGE    more than the pools have, were they all free
    │   ├── InvalidPlan              INVALID_PLAN          all that is wrong with it, each with its step
    │   └── InvalidReference         INVALID_REFERENCE     a `${...}` in a plan that cannot be read
    ├── NotFound                     NOT_FOUND
    │   ├── TaskNotFound             TASK_NOT_FOUND
    │   │   └── RunExpired           RUN_EXPIRED           it ended longer ago than handles are kept
    │   ├── ExecutionNotFound        EXECUTION_NOT_FOUND
    │   ├── CheckpointNotFound       CHECKPOINT_NOT_FOUND
    │   └── RoleNotFound             ROLE_NOT_FOUND
    ├── Conflict                     CONFLICT              the request does not fit the present state
    │   ├── InvalidTransitionError   INVALID_TRANSITION
    │   ├── AlreadyExecuting         ALREADY_EXECUTING
    │   ├── NotExecuting             NOT_EXECUTING
    │   ├── PauseUnsupported         PAUSE_UNSUPPORTED     this system cannot stop what runs
    │   ├── CapacityUnavailable      CAPACITY_UNAVAILABLE  not free now, nor within the time that was given
    │   ├── LeaseLost                LEASE_LOST            the worker no longer has this execution
    │   └── Fenced                   FENCED                somebody else owns this execution now
    ├── PermissionDenied             PERMISSION_DENIED
    ├── Unauthenticated              UNAUTHENTICATED       no token was shown, or none that is valid
    ├── ExecutionError               EXECUTION_FAILED      the work itself failed (any code)
    │   └── MissingReference         REFERENCE_MISSING     what a step's inputs refer to is not there
    ├── StoreError                   STORE_ERROR
    │   ├── StoreUnavailable         STORE_UNAVAILABLE     cannot be opened or written (permissions, disk full)
    │   ├── StoreTooNew              STORE_TOO_NEW         written by a newer version
    │   └── StoreDamaged             STORE_DAMAGED
    ├── DataDirectoryInUse           DATA_DIRECTORY_IN_USE another process owns it
    └── DaemonUnavailable            DAEMON_UNAVAILABLE    could not be started or does not answer

`CancellationException` stands outside: it is how work stops, not a fault.
"""

from __future__ import annotations

import errno
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, cast

if TYPE_CHECKING:
    from collections.abc import Iterable


class VesperaError(Exception):
    """Base of all. `code` is stable and machine-readable; `hint` says what to do."""

    code: ClassVar[str] = "VESPERA_ERROR"
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint

    def to_dict(self) -> dict[str, Any]:
        """`{"error_code", "error", "hint"}`: what every door shows."""
        return {"error_code": self.error_code, "error": self.message, "hint": self.hint}

    @property
    def error_code(self) -> str:
        return self.code


class InvalidInput(VesperaError):
    code = "INVALID_INPUT"


class InvalidProgress(InvalidInput):
    code = "INVALID_PROGRESS"


class InvalidRoleFile(InvalidInput):
    code = "INVALID_ROLE_FILE"


class CapacityUnknown(InvalidInput):
    code = "CAPACITY_UNKNOWN"
    default_hint = "VESPERA_CAPACITY says what there is; ask for a type of it, with constraints that a pool meets"


class CapacityTooLarge(InvalidInput):
    code = "CAPACITY_TOO_LARGE"
    default_hint = "ask for less; VESPERA_CAPACITY says what there is"


class InvalidPlan(InvalidInput):
    """A plan was refused whole. `problems` are all that was found: the step's id, or None, and what is wrong."""

    code = "INVALID_PLAN"
    _SHOWN = 5

    def __init__(self, problems: Iterable[tuple[str | None, str]], *, hint: str | None = None) -> None:
        self.problems = tuple(problems)
        shown = [what if step is None else f"step {step}: {what}" for step, what in self.problems[: self._SHOWN]]
        if (more := len(self.problems) - len(shown)) > 0:
            shown.append(f"and {more} more")
        super().__init__("; ".join(shown) or "the plan is not valid", hint=hint)

    def to_dict(self) -> dict[str, Any]:
        problems = [{"step": step, "problem": what} for step, what in self.problems]
        return {**super().to_dict(), "problems": problems}


class InvalidReference(InvalidInput):
    code = "INVALID_REFERENCE"
    default_hint = "write $${ for a literal ${"


class NotFound(VesperaError):
    code = "NOT_FOUND"


class TaskNotFound(NotFound):
    code = "TASK_NOT_FOUND"
    default_hint = "list_tasks shows the tasks of this data directory"

    def __init__(self, task_id: str) -> None:
        super().__init__(f"Task not found: {task_id}")
        self.task_id = task_id


class RunExpired(TaskNotFound):
    code = "RUN_EXPIRED"
    default_hint = "list_tasks shows what is still kept of it"

    def __init__(self, run_id: str) -> None:
        NotFound.__init__(self, f"The run has expired: {run_id}")
        self.task_id = run_id


class ExecutionNotFound(NotFound):
    code = "EXECUTION_NOT_FOUND"
    default_hint = "the task's status names its sessions"

    def __init__(self, execution_id: str) -> None:
        super().__init__(f"Execution not found: {execution_id}")
        self.execution_id = execution_id


class CheckpointNotFound(NotFound):
    code = "CHECKPOINT_NOT_FOUND"
    default_hint = "the checkpoints of a task are listed with it"

    def __init__(self, checkpoint_id: str) -> None:
        super().__init__(f"Checkpoint not found: {checkpoint_id}")
        self.checkpoint_id = checkpoint_id


class RoleNotFound(NotFound):
    code = "ROLE_NOT_FOUND"
    default_hint = "list_roles shows the roles that exist"

    def __init__(self, name: str) -> None:
        super().__init__(f"Role not found: {name}")
        self.name = name


class Conflict(VesperaError):
    code = "CONFLICT"


class InvalidTransitionError(Conflict):
    """A status change that the table does not list. Nothing has changed."""

    code = "INVALID_TRANSITION"

    def __init__(self, old: str, new: str, allowed: tuple[str, ...]) -> None:
        listed = ", ".join(allowed) if allowed else "nothing, it has ended"
        super().__init__(f"Cannot go from {old} to {new}; allowed: {listed}")
        self.old = old
        self.new = new
        self.allowed = allowed


class AlreadyExecuting(Conflict):
    code = "ALREADY_EXECUTING"
    default_hint = "wait for it, or cancel it first"

    def __init__(self, task_id: str, execution_id: str) -> None:
        super().__init__(f"Task {task_id} is executing already (session {execution_id})")
        self.task_id = task_id
        self.execution_id = execution_id


class NotExecuting(Conflict):
    code = "NOT_EXECUTING"
    default_hint = "start it with execute_task"


class PauseUnsupported(Conflict):
    code = "PAUSE_UNSUPPORTED"
    default_hint = "let it run, or cancel it"


class CapacityUnavailable(Conflict):
    code = "CAPACITY_UNAVAILABLE"
    default_hint = "wait longer (`wait_ms`), or ask for less"


class LeaseLost(Conflict):
    code = "LEASE_LOST"
    default_hint = "stop working on it; claim_task gives you another"

    def __init__(self, session_id: str) -> None:
        super().__init__(f"The lease of session {session_id[:100]} is not yours, or has ended")


class Fenced(Conflict):
    code = "FENCED"


class PermissionDenied(VesperaError):
    code = "PERMISSION_DENIED"


class Unauthenticated(VesperaError):
    code = "UNAUTHENTICATED"


class ExecutionError(VesperaError):
    """The work failed. Carries what the record of the failure needs.

    `failure_code` classifies (retry rules match on it), `recoverable` says whether another
    attempt can help, `context` is JSON-safe.
    """

    code = "EXECUTION_FAILED"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        task_id: str | None = None,
        recoverable: bool = True,
        context: dict[str, Any] | None = None,
        timestamp: datetime | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.failure_code = code or type(self).code
        self.task_id = task_id
        self.recoverable = recoverable
        self.context = dict(context or {})
        self.timestamp = timestamp or datetime.now(UTC)

    @property
    def error_code(self) -> str:
        return self.failure_code

    def to_dict(self) -> dict[str, Any]:
        """The 003 record: code, message, task_id, timestamp, recoverable, context."""
        return {
            "code": self.failure_code,
            "message": self.message,
            "task_id": self.task_id,
            "timestamp": self.timestamp.isoformat(),
            "recoverable": self.recoverable,
            "context": self.context,
        }


class MissingReference(ExecutionError):
    """What a reference in a plan names is not there. Another attempt finds the same."""

    code = "REFERENCE_MISSING"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, recoverable=False, hint=hint)


class StoreError(VesperaError):
    code = "STORE_ERROR"


class StoreUnavailable(StoreError):
    code = "STORE_UNAVAILABLE"


class StoreTooNew(StoreError):
    code = "STORE_TOO_NEW"
    default_hint = "upgrade vespera-exec, or name another folder in VESPERA_DATA_DIR"


class StoreDamaged(StoreError):
    code = "STORE_DAMAGED"
    default_hint = "restore a backup, or move the data directory away"


class DataDirectoryInUse(VesperaError):
    code = "DATA_DIRECTORY_IN_USE"


class DaemonUnavailable(VesperaError):
    code = "DAEMON_UNAVAILABLE"


class CancellationException(Exception):
    """Raised by `CancellationToken.throw_if_cancelled`. The argument is the reason."""

    @property
    def reason(self) -> str:
        return str(self)


_UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH})
_REFUSING = (ConnectionRefusedError, ConnectionResetError, ConnectionAbortedError)


def failure_code_of(error: BaseException) -> str:
    """What a failure that work has raised is called: as it says itself; for faults of the network CONNECTION_REFUSED
    (the other side would not, or no longer) or NETWORK_TIMEOUT (nobody answered); else the name of its class."""
    said = getattr(error, "failure_code", None)
    return str(said) if said else network_code(error) or type(error).__name__


def network_code(error: BaseException) -> str | None:
    """The code of a fault of the network that a built-in exception stands for, or each one of a group; None where it
    is another."""
    if isinstance(error, BaseExceptionGroup):
        codes = {network_code(each) for each in cast("BaseExceptionGroup[BaseException]", error).exceptions}
        return codes.pop() if len(codes) == 1 else None
    if isinstance(error, _REFUSING):
        return "CONNECTION_REFUSED"
    socket = sys.modules.get("socket")  # not imported for this: work that has no file left can be told of too
    if isinstance(error, TimeoutError) or (socket is not None and isinstance(error, socket.gaierror)):
        return "NETWORK_TIMEOUT"
    return "NETWORK_TIMEOUT" if isinstance(error, OSError) and error.errno in _UNREACHABLE else None


def failure_context_of(error: BaseException) -> dict[str, Any]:
    """What is kept with a failure beside its code: its own context, and its class, where its code is another name."""
    own = getattr(error, "context", None)
    context = dict(cast("dict[str, Any]", own)) if isinstance(own, dict) else {}
    return {"type": type(error).__name__, **context} if network_code(error) is not None else context


def failure_names_of(error: BaseException) -> tuple[str, ...]:
    """What a rule may call a failure: by its code, and by its class, where that has another name."""
    kind = failure_context_of(error).get("type")
    return (failure_code_of(error), kind) if isinstance(kind, str) else (failure_code_of(error),)
