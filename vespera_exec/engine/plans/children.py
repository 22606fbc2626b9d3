"""The children of a plan: one running step each, what is heard of it, and what the coordinator needs from outside."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from vespera_exec.model.enums import EventType, ExecutionStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vespera_exec.engine.capacity.grants import Grants
    from vespera_exec.engine.jobs import Run
    from vespera_exec.engine.plans.checkpoints import CheckpointReader
    from vespera_exec.engine.plans.strategies import Strategies
    from vespera_exec.engine.running import RunningExecution
    from vespera_exec.model.events import ExecutionEvent, Json
    from vespera_exec.model.ledger import CacheRecord
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.plans.plan import PlanStep
    from vespera_exec.model.plans.steps import PlanState, StepState
    from vespera_exec.model.session import ExecutionSession

S = ExecutionStatus

HELD: Final = "Its plan is paused"
"""The reason of a pause that ends with that of the plan; known by it after a restart, too."""
QUEUED_SECONDS: Final = 0.5
"""That a child may wait for its turn before its step is said to."""
_NOTES_KEPT: Final = 20
_CAPACITY = (EventType.RESOURCE_WAITING, EventType.RESOURCE_ALLOCATED, EventType.RESOURCE_RELEASED)
_NOTES = (EventType.INFO, EventType.WARNING, EventType.ERROR)
_ANNOUNCED = (EventType.EXECUTION_FAILED, EventType.RECOVERY_INITIATED)
"""What is followed by a note of ours, which the step's own events say already."""


@dataclass(frozen=True, slots=True)
class ReadyStep:
    """A step that may begin: who does it is known and allowed, and takes the inputs."""

    role: str
    cached: str | None
    """The execution whose result is the answer already."""
    begin: Callable[[str, str], Run]
    """Make the child of this task id and run id, and hand it to the engine."""


class StepHost(Protocol):
    """How the coordinator makes children and reads what is stored."""

    async def stored(self) -> tuple[PlanState, list[StepState]] | None:
        """The board as an earlier owner left it."""
        ...

    async def ready(
        self,
        step: PlanStep,
        role: str,
        inputs: Mapping[str, Json],
        *,
        task_id: str | None = None,
        after: str | None = None,
    ) -> ReadyStep:
        """`task_id`: of a child that an earlier owner has announced, and perhaps made.

        `after`: the step's run that has failed before this one, whose approval still counts.

        Raises:
            VesperaError: why the role cannot do it: it is unknown, closed to the caller, or refuses the inputs.
        """
        ...

    async def attempts(self, run_id: str) -> list[Lifecycle]:
        """The executions of a run, as they are stored; none where it was never made."""
        ...

    async def capacity_told(self) -> tuple[dict[str, str], set[str]]:
        """What the plan's log tells of capacity: the allocations that steps were given, and those that came back."""
        ...

    async def output(self, execution_id: str) -> Json:
        """What an execution returned; None where that is nothing.

        Raises:
            ExecutionError: it was too large to be kept whole.
        """
        ...

    def answered(self, step: PlanStep, run: Run) -> CacheRecord | None:
        """What is kept of a completed step for others that ask the same; None where its role is not pure."""
        ...


class ChildEngine(Protocol):
    """The engine, as the coordinator needs it: who runs its children, and what they share."""

    @property
    def strategies(self) -> Strategies: ...

    @property
    def checkpoints(self) -> CheckpointReader | None: ...

    @property
    def grants(self) -> Grants: ...

    def run_of(self, task_id: str) -> Run | None: ...

    def runs_of(self, group: str) -> list[Run]: ...

    def execution_of(self, session_id: str) -> RunningExecution | None: ...

    def waits_for(self, session_id: str) -> str | None: ...

    def hold(self, group: str) -> None: ...

    def go_on(self, group: str) -> None: ...

    def unpark(self, session: ExecutionSession) -> None: ...


class Child:
    """One run of one step. `heard` is called under its ledger's lock, from any thread; all else on the loop."""

    __slots__ = (
        "_previous", "_tell", "allocated", "is_external", "is_told", "notes", "run", "shown", "since", "step",
        "wants_capacity",
    )  # fmt: skip

    def __init__(self, step: str, run: Run, tell: Callable[[Child], None], *, now: float) -> None:
        self.step = step
        self.run = run
        self.since = now
        self.shown: tuple[str | None, str] = (None, "")
        """What was said last of what it waits for."""
        self.notes: deque[ExecutionEvent] = deque(maxlen=_NOTES_KEPT)
        self.allocated: deque[ExecutionEvent] = deque()
        self.wants_capacity = ""
        """What of it, in words; empty where it waits for none."""
        self.is_told = False
        self._tell = tell
        self._previous: EventType | None = None
        run.session.ledger.listen(self.heard)

    def heard(self, event: ExecutionEvent) -> None:
        kind = event.event_type
        if kind in _CAPACITY:
            self.wants_capacity = event.message if kind is EventType.RESOURCE_WAITING else ""
            if kind is not EventType.RESOURCE_WAITING:
                self.allocated.append(event)
        elif kind in _NOTES and event.level is not None and self._previous not in _ANNOUNCED:
            self.notes.append(event)
        self._previous = kind
        if not self.is_told:
            self.is_told = True
            self._tell(self)

    def forget(self) -> None:
        """Hear nothing of it any more."""
        self.run.session.ledger.unlisten(self.heard)

    @property
    def is_over(self) -> bool:
        """Its end is decided, though perhaps not yet on disk: nothing of it runs, and nothing of it will."""
        return self.run.done.is_set() or self.run.session.lifecycle.status.is_terminal

    @property
    def percentage(self) -> float | None:
        return self.run.session.progress.percentage

    def waits_for(self, now: float, *, held: bool) -> tuple[str | None, str]:
        """What holds it up, and in which words; None while it works. `held`: its plan is to stand still."""
        life = self.run.session.lifecycle
        if asked := life.open_inputs:
            return "answer", f"Waiting for an answer: {', '.join(each.key for each in asked)}"
        if life.status is S.PAUSED:
            return "pause", life.status_message
        if life.status is not S.PENDING and not life.is_parked:
            return None, ""
        if held:
            return "pause", HELD
        if self.wants_capacity:
            return "capacity", self.wants_capacity
        if life.not_before is not None:
            return "backoff", life.status_message
        if now - self.since < QUEUED_SECONDS:
            return None, ""
        return ("worker" if life.status_message == WAITS_FOR_WORKER else "slot"), life.status_message


WAITS_FOR_WORKER: Final = "Waiting for a worker"
"""What an execution says that waits for a claim."""
