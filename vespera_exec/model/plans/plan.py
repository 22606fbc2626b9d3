"""A plan: steps, what each needs of the others, and how the whole is to be run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.model.capacity import CapacityRequirement
    from vespera_exec.model.events import Json

MAX_STEPS: Final = 20_000
MAX_PARALLEL: Final = 1000
PLAN_ROLE: Final = "plan"
"""The name of the role that an execution of a plan has; no role file may have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRetries:
    """When a failed attempt of a step is followed by another; in the place of the role's own rule. Seconds."""

    max_retries: int = 0
    retry_on: tuple[str, ...] = ()
    """Error codes; empty means every code of an error that is recoverable."""
    backoff_seconds: float = 1.0
    backoff_factor: float = 2.0
    backoff_max_seconds: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """Who does a step when it has failed; with inputs of its own, or those of the step."""

    role: str
    inputs: Mapping[str, Json] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStep:
    """One step. `inputs` may hold references (`model.plans.references`), which are dependencies too."""

    id: str
    role: str
    title: str = ""
    """Shown; the id where it is empty."""
    description: str = ""
    type: str = ""
    """A label of the caller's, by which statistics are grouped."""
    depends_on: tuple[str, ...] = ()
    inputs: Mapping[str, Json] = field(default_factory=dict[str, "Json"])
    timeout_seconds: float = 0.0
    wait_timeout_seconds: float = 0.0
    """0 means: as the role says."""
    retries: StepRetries | None = None
    fallback: Fallback | None = None
    approval: str | bool = False
    capacity: tuple[CapacityRequirement, ...] = ()
    continue_on_failure: bool = False
    recovery: tuple[str, ...] | None = None
    """Ids of the recovery strategies that may decide about it; None means all."""
    on_interrupt: Literal["fail", "resume"] | None = None
    """None means: as the role says."""
    weight: float = 1.0
    """Of its progress in that of the whole; 0 leaves it out."""
    cache: bool = True
    """Its output may come from the cache, where its role is pure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionPlan:
    """A DAG of steps; made and checked by `model.plans.check.checked`, or by a plan file."""

    id: str
    steps: tuple[PlanStep, ...]
    name: str = ""
    description: str = ""
    variables: Mapping[str, Json] = field(default_factory=dict[str, "Json"])
    output: Json = None
    """A template with references: what the plan returns. None: the outputs of the steps that nothing depends on."""
    max_parallel: int = 16
    on_failure: Literal["continue", "abort"] = "continue"
    """Whether the first step that fails for good stops the others, too."""
    timeout_seconds: float = 0.0
    checkpoint_interval_seconds: float = 0.0
    """0: no periodic checkpoints."""
    step_checkpoints: bool = True
    """A checkpoint at the end of each step that was done or has failed."""
