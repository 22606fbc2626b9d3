"""Reading checkpoints: which there are, and the state that an execution had at one, from its log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.model.plans.restoring import BoardReplay
from vespera_exec.model.replay import replayed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import datetime

    from vespera_exec.model.events import ExecutionEvent
    from vespera_exec.model.ledger import CheckpointRecord
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.plans.plan import ExecutionPlan
    from vespera_exec.model.plans.steps import PlanState, StepState
    from vespera_exec.model.progress import Progress
    from vespera_exec.store.store import Store

_PAGE = 250
"""What is decoded before others in the loop get their turn."""


class CheckpointReader:
    """Of all executions of a data directory. What was decided before a call is read by it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def record(self, checkpoint_id: str) -> CheckpointRecord | None:
        await self._store.journal.sync()
        return await self._store.queries.checkpoint(checkpoint_id)

    async def last(self, execution_id: str, *, before: datetime | None = None) -> CheckpointRecord | None:
        """The newest of an execution; made before that moment, where it is given."""
        await self._store.journal.sync()
        older: str | None = None
        while found := await self._store.queries.checkpoints(execution_id, limit=_PAGE, before=older):
            for each in found:
                if before is None or each.created_at <= before:
                    return each
            older = found[-1].checkpoint_id
        return None

    async def at(
        self,
        plan: ExecutionPlan,
        execution_id: str,
        *,
        checkpoint_id: str | None = None,
        before: datetime | None = None,
    ) -> tuple[str, dict[str, StepState], PlanState] | None:
        """A checkpoint of a plan's execution, or its last one made before that moment: its id and the board there."""
        found = await (self.record(checkpoint_id) if checkpoint_id else self.last(execution_id, before=before))
        if found is None or found.execution_id != execution_id:
            return None
        replay = await self.board_at(plan, found)
        return found.checkpoint_id, replay.states, replay.state

    async def board_at(self, plan: ExecutionPlan, record: CheckpointRecord) -> BoardReplay:
        """The board of a plan's execution at a checkpoint."""
        replay = BoardReplay(plan, record.execution_id)
        async for page in self._events(record):
            replay.feed(page)
        return replay

    async def task_at(self, record: CheckpointRecord) -> tuple[Lifecycle, Progress]:
        """An execution without steps at a checkpoint."""
        events = [event async for page in self._events(record) for event in page]
        return replayed(events, record.execution_id)

    async def _events(self, record: CheckpointRecord) -> AsyncIterator[list[ExecutionEvent]]:
        await self._store.journal.sync()
        after = 0
        while page := await self._store.queries.events_of(
            record.execution_id, up_to=record.sequence, after=after, limit=_PAGE
        ):
            yield page
            after = page[-1].sequence
