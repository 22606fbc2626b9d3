"""Where each step of a plan stands, and what the plan's execution remembers beside them: folded from its log."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from vespera_exec.model.enums import EventType, StepStatus
from vespera_exec.model.rows import Readers, iso, present, stamp
from vespera_exec.model.values import copier

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from vespera_exec.model.events import ExecutionEvent, Json


@dataclass(frozen=True, slots=True, kw_only=True)
class StepState:
    """One step within one execution of its plan. Only `evolve` makes a new one.

    The work of a step is a task of its own (`task_id`), whose run (`run_id`) may have several attempts; the fields
    speak of the last run. `attempt` counts runs, `recoveries` those that a recovery strategy asked for.
    """

    execution_id: str
    """Of the plan."""
    step_id: str
    position: int
    """In the plan, from 0."""
    status: StepStatus = StepStatus.PENDING
    role: str | None = None
    attempt: int = 0
    recoveries: int = 0
    is_fallback: bool = False
    task_id: str | None = None
    run_id: str | None = None
    session_id: str | None = None
    """Of the attempt that ended it."""
    started_at: datetime | None = None
    """Of its first run."""
    ended_at: datetime | None = None
    percentage: float | None = None
    message: str = ""
    waiting_for: str | None = None
    """"answer", "capacity", "slot", "worker" or "pause" (of it, or of its plan), while WAITING; "backoff", also while
    PENDING and to be tried again."""
    not_before: datetime | None = None
    error: Mapping[str, Json] = field(default_factory=dict[str, "Json"])
    """`{"code", "message"}` of the last failure, also of one that was followed by another run."""
    failures: int = 0
    """Its last runs in a row that failed with the code of `error`; a success sets it back."""
    reason: str = ""
    """Why it was skipped or cancelled."""
    continues: bool = False
    """FAILED or SKIPPED, and what depends on it runs all the same."""
    ends_plan: bool = False
    """FAILED, and the rest of the plan does not go on."""
    result_of: str | None = None
    """The execution whose result is this step's output."""
    cached: bool = False
    sequence: int = 0

    @property
    def lets_on(self) -> bool:
        """What depends on it may begin."""
        return self.status is StepStatus.COMPLETED or (self.continues and self.status.is_terminal)

    def failures_with(self, code: str) -> int:
        """What `failures` will be when it fails with `code` now."""
        return self.failures + 1 if self.error.get("code") == code else 1

    def evolve(self, event: ExecutionEvent) -> StepState:
        """The state after `event`, which is about this step."""
        told, at = event.details, event.timestamp
        base: dict[str, Any] = {"sequence": event.sequence}
        match event.event_type:
            case EventType.STEP_STARTED:
                return _copy(
                    self,
                    **base,
                    status=StepStatus.RUNNING,
                    role=told["role"],
                    attempt=told["attempt"],
                    is_fallback=told.get("is_fallback", False),
                    task_id=told.get("task_id"),
                    run_id=told.get("run_id"),
                    started_at=self.started_at or at,
                    percentage=0.0,
                    message=event.message,
                    waiting_for=None,
                    not_before=None,
                )
            case EventType.STEP_PROGRESS:
                return _copy(self, **base, percentage=told["percentage"], message=event.message)
            case EventType.STEP_WAITING:
                waits = told.get("for")
                status = StepStatus.WAITING if waits else StepStatus.RUNNING
                return _copy(self, **base, status=status, waiting_for=waits, message=event.message)
            case EventType.STEP_COMPLETED:
                return _copy(
                    self,
                    **base,
                    status=StepStatus.COMPLETED,
                    session_id=told.get("session_id"),
                    result_of=told.get("result_of"),
                    cached=told.get("cached", False),
                    started_at=self.started_at or at,
                    ended_at=at,
                    percentage=100.0,
                    message=event.message,
                    waiting_for=None,
                    error={},
                    failures=0,
                )
            case EventType.STEP_FAILED:
                return self._failed(event, base)
            case EventType.STEP_SKIPPED | EventType.STEP_CANCELLED:
                skipped = event.event_type is EventType.STEP_SKIPPED
                return _copy(
                    self,
                    **base,
                    status=StepStatus.SKIPPED if skipped else StepStatus.CANCELLED,
                    reason=told.get("reason", event.message),
                    continues=told.get("continues", False),
                    ended_at=at,
                    message=event.message,
                    waiting_for=None,
                    not_before=None,
                )
            case EventType.STEP_RESET:
                return _copy(StepState.from_dict({**told["state"], "execution_id": self.execution_id}), **base)
            case _:
                return self

    def _failed(self, event: ExecutionEvent, base: dict[str, Any]) -> StepState:
        told = event.details
        common: dict[str, Any] = base | {
            "session_id": told.get("session_id"),
            "error": told["error"],
            "failures": self.failures_with(told["error"].get("code", "")),
            "message": event.message,
            "recoveries": told.get("recoveries", self.recoveries),
            "waiting_for": None,
        }
        if told.get("final", True):
            ended = {"status": StepStatus.FAILED, "ended_at": event.timestamp}
            ended |= {name: told.get(name, False) for name in ("continues", "ends_plan")}
            return _copy(self, **common, **ended)
        not_before = stamp(told["not_before"]) if told.get("not_before") else None
        return _copy(
            self,
            **common
            | {
                "status": StepStatus.PENDING,
                "is_fallback": told.get("is_fallback", self.is_fallback),
                "not_before": not_before,
                "waiting_for": "backoff" if not_before is not None else None,
                "percentage": None,
            },
        )

    def to_dict(self) -> dict[str, Json]:
        return {
            "execution_id": self.execution_id,
            "step_id": self.step_id,
            "position": self.position,
            "status": self.status.value,
            "role": self.role,
            "attempt": self.attempt,
            "recoveries": self.recoveries,
            "is_fallback": self.is_fallback,
            "task_id": self.task_id,
            "run_id": self.run_id,
            "session_id": self.session_id,
            "started_at": iso(self.started_at),
            "ended_at": iso(self.ended_at),
            "percentage": self.percentage,
            "message": self.message,
            "waiting_for": self.waiting_for,
            "not_before": iso(self.not_before),
            "error": dict(self.error),
            "failures": self.failures,
            "reason": self.reason,
            "continues": self.continues,
            "ends_plan": self.ends_plan,
            "result_of": self.result_of,
            "cached": self.cached,
            "sequence": self.sequence,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> StepState:
        """The inverse of `to_dict`; keys that an older version did not write take their defaults."""
        return cls(**present(data, _STEP_NAMES, _STEP_READERS))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanState:
    """What the execution of a plan remembers beside its steps. `variables` are what references read."""

    execution_id: str
    plan_id: str = ""
    name: str = ""
    steps: int = 0
    """How many there are."""
    variables: Mapping[str, Json] = field(default_factory=dict[str, "Json"])
    restores: int = 0
    restored_from: str | None = None
    """The checkpoint that it began or was last put back to."""
    restoring: Mapping[str, Json] = field(default_factory=dict[str, "Json"])
    """While it is on its way back to a checkpoint: `checkpoint_id`, the `variables` that it will have, and whether
    it `keeps_recoveries`. Else empty."""
    sequence: int = 0

    def evolve(self, event: ExecutionEvent) -> PlanState:
        """The state after `event`."""
        if event.event_type is not EventType.VARIABLES_CHANGED:
            return self
        told = event.details
        restored = told.get("restored_from")
        return _copy_plan(
            self,
            plan_id=told.get("plan_id", self.plan_id),
            name=told.get("name", self.name),
            steps=told.get("steps", self.steps),
            variables=told["variables"],
            restores=self.restores + (1 if restored else 0),
            restored_from=restored or self.restored_from,
            restoring=told.get("restoring") or ({} if restored else self.restoring),
            sequence=event.sequence,
        )

    def to_dict(self) -> dict[str, Json]:
        return {
            "execution_id": self.execution_id,
            "plan_id": self.plan_id,
            "name": self.name,
            "steps": self.steps,
            "variables": dict(self.variables),
            "restores": self.restores,
            "restored_from": self.restored_from,
            "restoring": dict(self.restoring),
            "sequence": self.sequence,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> PlanState:
        """The inverse of `to_dict`."""
        return cls(**present(data, _PLAN_NAMES, {}))


_copy = copier(StepState)
_copy_plan = copier(PlanState)
_STEP_NAMES = tuple(each.name for each in fields(StepState))
_STEP_READERS: Readers = {
    "status": StepStatus,
    **dict.fromkeys(("started_at", "ended_at", "not_before"), stamp),
}
_PLAN_NAMES = tuple(each.name for each in fields(PlanState))
