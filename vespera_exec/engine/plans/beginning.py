"""Begins the steps of a plan when their turn comes: their inputs are put together, and their children made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.engine.plans.looping import AT_ONCE
from vespera_exec.errors import ExecutionError, VesperaError
from vespera_exec.model.enums import StepStatus
from vespera_exec.model.events import new_id

if TYPE_CHECKING:
    from vespera_exec.engine.plans.agenda import Agenda
    from vespera_exec.engine.plans.children import ReadyStep, StepHost
    from vespera_exec.engine.plans.course import Course
    from vespera_exec.engine.plans.ends import Ends
    from vespera_exec.engine.plans.following import Children
    from vespera_exec.engine.plans.outputs import PlanOutputs
    from vespera_exec.model.cancellation import CancellationToken
    from vespera_exec.model.plans.steps import StepState
    from vespera_exec.model.session import ExecutionSession


class Beginning:
    """At most `most` steps of one plan are under way at a time."""

    def __init__(
        self,
        session: ExecutionSession,
        host: StepHost,
        outputs: PlanOutputs,
        course: Course,
        agenda: Agenda,
        children: Children,
        ends: Ends,
        *,
        most: int,
    ) -> None:
        self._ledger = session.ledger
        self._host = host
        self._outputs = outputs
        self._course = course
        self._agenda = agenda
        self._children = children
        self._ends = ends
        self._most = most

    async def announced(self, token: CancellationToken) -> None:
        """Make the children that an earlier owner has announced, or that were held before they were made."""
        while not self._is_held(token) and (step_id := self._agenda.pop_unmade()) is not None:
            await self._begin(step_id, token)

    async def some(self, token: CancellationToken) -> bool:
        """Begin what may begin; False where that was all, True where others are to get their turn before the rest."""
        for _ in range(AT_ONCE):
            is_full = len(self._children) + self._agenda.decisions >= self._most
            if is_full or self._is_held(token) or (step_id := self._agenda.pop()) is None:
                return False
            if not self._agenda.board.step(step_id).status.is_terminal:
                await self._begin(step_id, token)
        return True

    def _is_held(self, token: CancellationToken) -> bool:
        return self._course.is_held or token.is_cancelled

    async def _begin(self, step_id: str, token: CancellationToken) -> None:
        """Make the step's child, or end it where its output is known or it cannot begin."""
        state, epoch = self._agenda.board.step(step_id), self._course.epoch
        made: ReadyStep | VesperaError
        try:
            made = await self._ready(state)
        except VesperaError as error:
            made = error
        if epoch != self._course.epoch or self._agenda.board.step(step_id) != state:
            return  # put back, or cancelled, meanwhile
        is_new = state.status is StepStatus.PENDING
        if self._is_held(token):
            if is_new:
                self._agenda.put_back(step_id)
            else:
                self._agenda.put_unmade(step_id)
        elif isinstance(made, VesperaError):
            self._ends.failed(step_id, _as_failure(made), None)
        elif made.cached is not None and is_new:
            with self._ledger:
                self._agenda.board.completed(step_id, result_of=made.cached, cached=True, message="Known already")
                self._agenda.settle(step_id, lets_on=True)
        else:
            self._make(state, made)

    async def _ready(self, state: StepState) -> ReadyStep:
        """
        Raises:
            VesperaError: why it cannot begin.
        """
        step = self._agenda.steps[state.step_id]
        fallback = step.fallback if state.is_fallback else None
        role = fallback.role if fallback is not None else step.role
        given = step.inputs if fallback is None or fallback.inputs is None else fallback.inputs
        announced, after = (None, state.run_id) if state.status is StepStatus.PENDING else (state.task_id, None)
        inputs = await self._outputs.resolved(dict(given), self._agenda.board)
        return await self._host.ready(step, role, inputs, task_id=announced, after=after)

    def _make(self, state: StepState, ready: ReadyStep) -> None:
        """Announce the child, where that was not done, and make it under those ids."""
        task_id, run_id = state.task_id or "", state.run_id or ""
        if state.status is StepStatus.PENDING:
            task_id, run_id = new_id(), new_id()
            self._agenda.board.started(
                state.step_id,
                role=ready.role,
                attempt=state.attempt + 1,
                task_id=task_id,
                run_id=run_id,
                is_fallback=state.is_fallback,
            )
        self._children.follow(state.step_id, ready.begin(task_id, run_id))


def _as_failure(error: VesperaError) -> ExecutionError:
    if isinstance(error, ExecutionError):
        return error
    return ExecutionError(error.message, code=error.code, recoverable=False)
