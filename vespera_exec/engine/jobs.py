"""What the engine is asked to run, under which limits, and how that ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from vespera_exec.engine.done import Done
from vespera_exec.engine.pausing import Stoppable
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import datetime

    from vespera_exec.engine.work import RetryRule, Work, WorkResult
    from vespera_exec.model.capacity import CapacityRequirement
    from vespera_exec.model.events import Json
    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.model.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The limits of one run, from its role and its request. Seconds; 0 means none."""

    timeout_seconds: float = 0.0
    wait_timeout_seconds: float = 0.0
    grace_seconds: float = 3.0
    retry: RetryRule | None = None


class Coordinating(Stoppable, Protocol):
    """The coordinator of a plan, as the engine needs it."""

    @property
    def is_open(self) -> bool:
        """It knows where its steps stand, and may be asked and told."""
        ...

    @property
    def opened(self) -> Done:
        """Set once it is open, or has ended."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the engine is asked to run. `run` is the role's executor, bound to task and role."""

    task: Task
    session: ExecutionSession
    run: Callable[[Work], Awaitable[WorkResult]]
    policy: Policy = field(default_factory=Policy)
    caller: Caller = field(default_factory=Caller)
    place: Literal["slot", "worker", "coordinator"] = "slot"
    """Where its work is done: in a slot here; by a worker elsewhere, for whose claim it waits; or, as the coordinator
    of a plan, in the loop at once. The last two take no slot."""
    group: str | None = None
    """The plan's execution, of a job that is a step of one."""
    capacity: tuple[CapacityRequirement, ...] = ()
    coordinator: Coordinating | None = None
    """Of a job with that place: what `run` belongs to."""

    @property
    def key(self) -> str:
        return self.session.session_id


@dataclass(frozen=True, slots=True)
class PutBack:
    """Where the work is to go on from, instead of where it stands. `checkpoint_at` None: from its beginning."""

    checkpoint_id: str
    checkpoint: Json
    checkpoint_at: datetime | None
    percentage: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the work ended, before anything is decided about it. Exactly one of the first two is set."""

    result: WorkResult | None = None
    error: BaseException | None = None
    rung: str | None = None
    timed_out: bool = False
    pause_wanted: str | None = None
    """Why it was to stand still, whether it came to that or not."""
    put_back: PutBack | None = None
    """Its work was ended so that it goes on from there."""


@dataclass(slots=True, eq=False)
class Run:
    """One start request with its attempts, while it is active. `done` is set when its end is on disk."""

    run_id: str
    task_id: str
    session: ExecutionSession
    done: Done = field(default_factory=Done)
