"""What others ask of a plan that is executed: to stand still, to go on, to cancel a step, to go back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.engine.plans.children import HELD
from vespera_exec.engine.plans.ends import PlanEnds
from vespera_exec.errors import Conflict
from vespera_exec.model.enums import ExecutionStatus, StepStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sized

    from vespera_exec.model.events import Json
    from vespera_exec.model.ledger import CheckpointRecord

S = ExecutionStatus


class PlanControl(PlanEnds):
    """The side of a `Coordinator` that others call, on the loop. `Stoppable`: what runs apart are its children."""

    @property
    def is_open(self) -> bool:
        """It knows where its steps stand, and may be asked and told."""
        return self._is_open

    @property
    def under_way(self) -> tuple[str, ...]:
        """The steps that have begun and not ended, and perhaps some more."""
        return (*self._children, *self._deciding, *self._unmade)

    def checkpoint(self, kind: str = "call", metadata: Mapping[str, Json] | None = None) -> CheckpointRecord:
        """Mark where the plan stands, to go back to.

        Raises:
            Conflict: it is on its way back to another.
        """
        if self._restoring:
            raise Conflict("The plan goes back to a checkpoint just now", hint="try again")
        return self.board.checkpoint(kind, metadata=metadata)

    def cancel_step(self, step_id: str, reason: str) -> bool:
        """End a step, whether it has begun or not; False where it has ended, or is about to.

        Raises:
            NotFound: the plan has no such step.
            Conflict: the plan goes back to a checkpoint, before or after which it may be tried.
        """
        state = self.board.step(step_id)
        if self._restoring:
            raise Conflict("the plan goes back to a checkpoint", hint="try again in a moment")
        if (child := self._children.get(step_id)) is not None:
            return child.run.session.request_cancellation(reason)
        if state.status.is_terminal or step_id in self._doomed:
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
        self._rouse()
        await self._children_stand()
        while self._restoring:
            await self._arrived.wait()
            await self._children_stand()

    async def _children_stand(self) -> None:
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
        self._let_go()
        self._engine.go_on(self._session.session_id)
        self._rouse()

    def _let_go(self) -> None:
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
