"""Where an execution stood at a place in its log, and what it goes back to from there."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vespera_exec.errors import InvalidInput
from vespera_exec.model.enums import EventType, StepStatus
from vespera_exec.model.jsonable import exact_json
from vespera_exec.model.plans.steps import PlanState, StepState
from vespera_exec.model.rows import iso
from vespera_exec.model.values import copier

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from vespera_exec.model.events import ExecutionEvent, Json
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.plans.plan import ExecutionPlan
    from vespera_exec.model.progress import Progress

SCHEMA_VERSION = 1
_PENDING = StepState(execution_id="", step_id="", position=0)
_copy = copier(StepState)
_UNDER_WAY = frozenset({StepStatus.RUNNING, StepStatus.WAITING})


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionState:
    """The complete state of an execution at one moment: JSON through and through.

    Of a plan: `completed_tasks` are step ids in the order of the plan, `task_states` are `StepState.to_dict()` by step
    id, `current_task_id` is the first step that was under way. Of a plain task: the one task, by its id, with its last
    own checkpoint. `resource_allocations` are `CapacityUse.to_dict()` by allocation id, of what was held then.
    """

    current_task_id: str | None = None
    completed_tasks: tuple[str, ...] = ()
    task_states: dict[str, Json] = field(default_factory=dict[str, "Json"])
    resource_allocations: dict[str, Json] = field(default_factory=dict[str, "Json"])
    variables: dict[str, Json] = field(default_factory=dict[str, "Json"])
    schema_version: int = SCHEMA_VERSION

    def copy(self) -> ExecutionState:
        """One that shares nothing with this."""
        return deepcopy(self)

    def to_dict(self) -> dict[str, Json]:
        """JSON, a copy.

        Raises:
            InvalidInput: somebody has put something into it that is no JSON.
        """
        return {
            "schema_version": self.schema_version,
            "current_task_id": self.current_task_id,
            "completed_tasks": list(self.completed_tasks),
            "task_states": exact_json(self.task_states, "task_states"),
            "resource_allocations": exact_json(self.resource_allocations, "resource_allocations"),
            "variables": exact_json(self.variables, "the variables"),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> ExecutionState:
        """The inverse of `to_dict`; what is missing is empty.

        Raises:
            InvalidInput: a newer version wrote it.
        """
        version = data.get("schema_version", SCHEMA_VERSION)
        if version > SCHEMA_VERSION:
            raise InvalidInput(f"the state has schema version {version}; this version reads up to {SCHEMA_VERSION}")
        return cls(
            current_task_id=data.get("current_task_id"),
            completed_tasks=tuple(data.get("completed_tasks") or ()),
            task_states=deepcopy(data.get("task_states") or {}),
            resource_allocations=deepcopy(data.get("resource_allocations") or {}),
            variables=deepcopy(data.get("variables") or {}),
            schema_version=version,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionCheckpoint:
    """A place in the log of an execution, with the state that it had there."""

    id: str
    execution_id: str
    timestamp: datetime
    state: ExecutionState
    metadata: Mapping[str, Json] = field(default_factory=dict[str, "Json"])

    def to_dict(self) -> dict[str, Json]:
        return {
            "id": self.id,
            "execution_id": self.execution_id,
            "timestamp": iso(self.timestamp),
            "state": self.state.to_dict(),
            "metadata": dict(self.metadata),
        }


class BoardReplay:
    """The board of a plan's execution, folded from its log. Feed it events in order; others' are passed over."""

    def __init__(self, plan: ExecutionPlan, execution_id: str) -> None:
        self.state = PlanState(execution_id=execution_id)
        self.states = {
            step.id: _copy(_PENDING, execution_id=execution_id, step_id=step.id, position=position)
            for position, step in enumerate(plan.steps)
        }
        self._held: dict[str, dict[str, Json]] = {}
        """By step what it was given, by allocation id."""

    @property
    def allocations(self) -> dict[str, Json]:
        """What the plan's steps hold, by allocation id. One that neither runs nor is paused holds nothing, though its
        owner, which would have said so, has died."""
        holding = (held for step, held in self._held.items() if _may_hold(self.states[step]))
        return {allocation_id: each for held in holding for allocation_id, each in held.items()}

    def feed(self, events: Iterable[ExecutionEvent]) -> None:
        for event in events:
            if event.execution_id != self.state.execution_id:
                continue
            match event.event_type:
                case EventType.VARIABLES_CHANGED:
                    self.state = self.state.evolve(event)
                case EventType.RESOURCE_ALLOCATED | EventType.RESOURCE_RELEASED:
                    self._hold(event)
                case _ if (step := self.states.get(event.step_id or "")) is not None:
                    self.states[step.step_id] = step.evolve(event)
                case _:
                    pass

    def _hold(self, event: ExecutionEvent) -> None:
        if event.step_id not in self.states:
            return
        told = {each["allocation_id"]: each for each in event.details.get("allocations") or ()}
        if event.event_type is EventType.RESOURCE_ALLOCATED:
            self._held[event.step_id] = told  # a run is given all that it needs at once
        else:
            held = self._held.get(event.step_id, {})
            self._held[event.step_id] = {name: each for name, each in held.items() if name not in told}


def _may_hold(state: StepState) -> bool:
    return state.status is StepStatus.RUNNING or (state.status is StepStatus.WAITING and state.waiting_for == "pause")


def states_at(
    plan: ExecutionPlan, events: Iterable[ExecutionEvent], sequence: int, *, execution_id: str
) -> tuple[dict[str, StepState], PlanState]:
    """Where each step and the variables stood after the event `sequence`, from the execution's log in order."""
    replay = BoardReplay(plan, execution_id)
    replay.feed(event for event in events if event.sequence <= sequence)
    return replay.states, replay.state


def put_back(
    then: Mapping[str, StepState], now: Mapping[str, StepState] | None = None, *, keeps_recoveries: bool = False
) -> dict[str, StepState]:
    """The states that a plan goes on from when it goes back to `then`.

    What was completed stays so, and what was skipped by decision; everything else is PENDING again, also what was
    skipped for want of something that failed. Runs are numbered on from `now`, so that no number comes twice; None
    where a new execution begins from there. With `keeps_recoveries` the recoveries that were made since still count:
    who goes back by itself must come to an end.
    """
    return {step_id: _put_back(state, (now or {}).get(step_id), keeps_recoveries) for step_id, state in then.items()}


def _put_back(state: StepState, now: StepState | None, keeps_recoveries: bool) -> StepState:
    attempt = max(state.attempt, now.attempt) if now is not None else state.attempt
    recoveries = max(state.recoveries, now.recoveries) if now is not None and keeps_recoveries else state.recoveries
    if state.status is StepStatus.COMPLETED or (state.status is StepStatus.SKIPPED and state.continues):
        return state if attempt == state.attempt else _copy(state, attempt=attempt)
    return _copy(
        _PENDING,
        execution_id=state.execution_id,
        step_id=state.step_id,
        position=state.position,
        attempt=attempt,
        recoveries=recoveries,
        is_fallback=state.is_fallback and state.status is StepStatus.PENDING,
        error=now.error if now is not None and keeps_recoveries else {},
        failures=now.failures if now is not None and keeps_recoveries else 0,
    )


def state_of_plan(
    states: Mapping[str, StepState],
    variables: Mapping[str, Json],
    allocations: Mapping[str, Json] | None = None,
    *,
    current: str | None = None,
) -> ExecutionState:
    """What a board says, as one value that shares nothing with it. `current` None: the first step under way."""
    under_way = (step_id for step_id, state in states.items() if state.status in _UNDER_WAY)
    return ExecutionState(
        current_task_id=current or next(under_way, None),
        completed_tasks=tuple(step_id for step_id, state in states.items() if state.status is StepStatus.COMPLETED),
        task_states={step_id: state.to_dict() for step_id, state in states.items()},
        resource_allocations=deepcopy(dict(allocations or {})),
        variables=deepcopy(dict(variables)),
    )


def state_of_task(life: Lifecycle, progress: Progress) -> ExecutionState:
    """What an execution without steps says."""
    return ExecutionState(
        current_task_id=None if life.status.is_terminal else life.task_id,
        task_states={
            life.task_id: {
                "status": life.status.value,
                "phase": life.current_phase.value if life.current_phase else None,
                "percentage": progress.percentage,
                "checkpoint": deepcopy(life.checkpoint),
                "checkpoint_at": iso(life.checkpoint_at),
            }
        },
    )
