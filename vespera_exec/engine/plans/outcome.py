"""How a plan has ended: what it returns, and what is said of the steps that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vespera_exec.engine.work import WorkResult
from vespera_exec.model.enums import StepStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.model.events import Json
    from vespera_exec.model.plans.plan import ExecutionPlan
    from vespera_exec.model.plans.steps import StepState

STEP_FAILED: Final = "STEP_FAILED"
MOST_OUTPUTS: Final = 1000
"""Of steps that nothing depends on, where a plan has no template of its own."""
MOST_OUTPUT_BYTES: Final = 512 * 1024
"""Of those together."""
_TOLD = 100
_IN_CONTEXT = 20


def last_steps(plan: ExecutionPlan) -> list[str]:
    """The steps that nothing depends on."""
    needed = {each for step in plan.steps for each in step.depends_on}
    return [step.id for step in plan.steps if step.id not in needed]


def outcome(
    plan: ExecutionPlan, states: Mapping[str, StepState], output: Json, *, more: int = 0, aborted: str | None = None
) -> WorkResult:
    """The result of a plan whose steps have all ended. `aborted` says why its end was decided before.

    `more`: how many steps have returned something that is not in `output`.
    """
    counts: dict[str, int] = {}
    failed: list[dict[str, Json]] = []
    skipped: list[dict[str, Json]] = []
    cancelled: list[dict[str, Json]] = []
    stopped = 0
    for step in plan.steps:
        state = states[step.id]
        counts[state.status.value] = counts.get(state.status.value, 0) + 1
        if state.status is StepStatus.SKIPPED:
            skipped.append({"step": step.id, "reason": state.reason})
        elif state.status is StepStatus.FAILED:
            failed.append({"step": step.id, "code": state.error.get("code"), "message": state.error.get("message")})
            stopped += not state.continues
        elif state.status is StepStatus.CANCELLED:
            cancelled.append({"step": step.id, "reason": state.reason})
    result: dict[str, Json] = {
        "output": output,
        "counts": counts,
        "failed": failed[:_TOLD],
        "skipped": skipped[:_TOLD],
    }
    if cancelled:
        result["cancelled"] = cancelled[:_TOLD]
    if more:
        result["more"] = more
    if not stopped and not cancelled and aborted is None:
        return WorkResult(output=result)
    return WorkResult(
        output=result,
        success=False,
        error=aborted or _said(plan, states),
        error_code=STEP_FAILED,
        recoverable=False,
        error_context={"failed": failed[:_IN_CONTEXT], "skipped": len(skipped)},
    )


def _said(plan: ExecutionPlan, states: Mapping[str, StepState]) -> str:
    """What is said of the first step that failed, else of the first that was cancelled."""
    for step in plan.steps:
        state = states[step.id]
        if state.status is StepStatus.FAILED and not state.continues:
            return f"Step {step.id} failed: {state.error.get('code')}: {state.error.get('message')}"
    step = next(step for step in plan.steps if states[step.id].status is StepStatus.CANCELLED)
    return f"Step {step.id} was cancelled: {states[step.id].reason}"
