"""What the steps of a plan have returned: put into the inputs of others, and into the result of the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from vespera_exec.engine.plans.outcome import MOST_OUTPUT_BYTES, MOST_OUTPUTS, last_steps, outcome
from vespera_exec.errors import ExecutionError
from vespera_exec.model.enums import StepStatus
from vespera_exec.model.plans.references import lookup_in, references, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vespera_exec.engine.plans.children import StepHost
    from vespera_exec.engine.work import WorkResult
    from vespera_exec.model.events import Json
    from vespera_exec.model.plans.board import PlanBoard
    from vespera_exec.model.plans.plan import ExecutionPlan


class PlanOutputs:
    """Of one plan; `board` says each time which steps have returned something."""

    def __init__(self, plan: ExecutionPlan, host: StepHost) -> None:
        self._plan = plan
        self._host = host

    async def resolved(self, template: Json, board: PlanBoard) -> Json:
        """The template with values in the place of its references.

        Raises:
            MissingReference: what it refers to is not there.
            ExecutionError: the output of a step was not kept whole.
        """
        found = references(template)
        if not found:
            return template
        states, outputs = board.states, dict[str, "Json"]()
        for reference in found:
            if reference.kind == "output" and reference.name not in outputs:
                state = states[reference.name]
                if state.status is StepStatus.COMPLETED:
                    outputs[reference.name] = await self._host.output(state.result_of) if state.result_of else None
        return resolve(template, lookup_in(states, board.state.variables, outputs))

    async def result(self, board: PlanBoard, *, aborted: str | None) -> WorkResult:
        """What the plan returns, whose steps have all ended. `aborted` says why its end was decided before.

        Raises:
            ExecutionError: it has done all, and what its template refers to is not there, or was not kept whole.
        """
        states, output, more = board.states, None, 0
        missing: ExecutionError | None = None
        try:
            if self._plan.output is not None:
                output = await self.resolved(self._plan.output, board)
            else:
                output, more = await self._of(last_steps(self._plan), board)
        except ExecutionError as error:
            missing = error
        ended = outcome(self._plan, states, output, more=more, aborted=aborted)
        if missing is not None and ended.success:
            raise missing
        return ended

    async def _of(self, steps: Sequence[str], board: PlanBoard) -> tuple[dict[str, Json], int]:
        """What they returned, and of how many it was left out: it was too much to be given whole."""
        outputs: dict[str, Json] = {}
        left, more = MOST_OUTPUT_BYTES, 0
        for step_id in steps:
            state = board.step(step_id)
            if state.status is not StepStatus.COMPLETED or state.result_of is None:
                continue
            if left <= 0 or len(outputs) >= MOST_OUTPUTS:
                more += 1
                continue
            try:
                output = await self._host.output(state.result_of)
            except ExecutionError:
                more += 1
                continue
            size = len(orjson.dumps(output)) if output is not None else 0
            if size > left:
                more += 1
                continue
            left -= size
            outputs[step_id] = output
        return outputs, more
