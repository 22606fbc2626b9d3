"""What others ask of a plan that is executed: to stand still, to go on, to cancel a step, to go back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vespera_exec.engine.plan_ends import PlanEnds
from vespera_exec.model.enums import ExecutionStatus, StepStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sized

    from vespera_exec.model.events import Json
    from vespera_exec.model.inputs import Question
    from vespera_exec.model.ledger import CheckpointRecord

S = ExecutionStatus

HELD: Final = "Its plan is paused"
"""The reason of a pause that ends with that of the plan; known by it after a restart, too."""


class PlanControl(PlanEnds):
    """The side of a `Coordinator` that others call, on the loop. `Stoppable`: what runs apart are its children."""

    @property
    def is_open(self) -> bool:
        """There is a board."""
        return self._board is not None

    @property
    def is_paused(self) -> bool:
        """The whole is to stand still."""
        return self._paused

    def open_inputs(self) -> dict[str, Question]:
        """The questions that wait for an answer, by `<step>/<key>`."""
        return {
            f"{child.step}/{each.key}": each
            for child in self._children.values()
            for each in child.run.session.lifecycle.open_inputs
        }

    def checkpoint(self, kind: str = "call", metadata: Mapping[str, Json] | None = None) -> CheckpointRecord:
        """Mark where the plan stands, to go back to."""
        return self.board.checkpoint(kind, metadata=metadata)

    def cancel_step(self, step_id: str, reason: str) -> bool:
        """End a step, whether it has begun or not; False where it has ended, or is about to.

        Raises:
            NotFound: the plan has no such step.
        """
        state = self.board.step(step_id)
        if (child := self._children.get(step_id)) is not None:
            return child.run.session.request_cancellation(reason)
        if state.status.is_terminal:
            return False
        self._deciding.discard(step_id)
        self._retrying.pop(step_id, None)
        if step_id in self._unmade:
            self._unmade.remove(step_id)
        with self._session.ledger:
            self.board.cancelled(step_id, reason)
            self._settle(step_id, lets_on=False, status=StepStatus.CANCELLED)
        self._rouse()
        return True

    # standing still

    @property
    def running(self) -> Sized:
        return (self,)  # it stands by beginning nothing, also where it has no children

    def check_stoppable(self) -> None:
        """
        Raises:
            PauseUnsupported: this system cannot stop what a child runs.
        """
        for child in self._children.values():
            if (execution := self._engine.execution_of(child.run.session.session_id)) is not None:
                execution.check_stoppable()

    async def pause(self) -> None:
        self._paused = True
        self._engine.hold(self._session.session_id)
        for child in list(self._children.values()):
            while not child.run.done.is_set():
                execution = self._engine.execution_of(child.run.session.session_id)
                if execution is None:
                    break  # it waits, and is held
                if execution.pause(HELD):
                    await execution.settled()
                    if child.run.session.lifecycle.status is S.PAUSED:
                        break
                if execution.over:
                    await execution.concluded.wait()

    async def resume(self) -> None:
        self._paused = False
        for child in self._children.values():
            session = child.run.session
            execution = self._engine.execution_of(session.session_id)
            if execution is not None:
                if execution.pause_reason == HELD:
                    execution.resume("Its plan goes on")
                continue
            with session.ledger:
                life = session.lifecycle
                if life.status is not S.PAUSED or life.status_message != HELD:
                    continue
                session.resume("Its plan goes on", queued=True)
            self._engine.unpark(session)
        self._engine.go_on(self._session.session_id)
        self._rouse()
