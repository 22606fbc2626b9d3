"""What is told in the log of a plan of the work that its children do: notes, capacity, and how far the plan is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vespera_exec.model.enums import EventType
from vespera_exec.model.transitions import AT_WORK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.engine.plans.children import Child, StepHost
    from vespera_exec.model.capacity import CapacityUse
    from vespera_exec.model.events import Json
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.plans.board import PlanBoard
    from vespera_exec.model.session import ExecutionSession


TELLING_SECONDS: Final = 0.1
"""Between two records of how far the steps are."""


class Telling:
    """Into the log of one plan's execution."""

    def __init__(self, session: ExecutionSession, host: StepHost) -> None:
        self._session = session
        self._host = host
        self._due_at: float | None = None
        self._told_at = 0.0
        self._percentage = -1.0

    @property
    def due_at(self) -> float | None:
        """When it is to be told how far the steps are; None while there is nothing new."""
        return self._due_at

    def soon(self) -> None:
        """There is something to tell of how far the steps are."""
        if self._due_at is None:
            self._due_at = max(self._session.ledger.clock.monotonic(), self._told_at + TELLING_SECONDS)

    def told(self, *, is_all: bool) -> None:
        """How far the steps are was told just now, or a part of it."""
        self._told_at = self._session.ledger.clock.monotonic()
        self._due_at = None if is_all else self._told_at

    def percentage(self, board: PlanBoard) -> None:
        """How far the plan is."""
        reached = board.percentage
        if abs(reached - self._percentage) >= 1.0 and self._session.lifecycle.status in AT_WORK:
            self._percentage = reached
            ended = sum(number for status, number in board.counts.items() if status.is_terminal)
            self._session.milestone(reached, f"{ended} of {len(board.plan.steps)} steps")

    def notes(self, child: Child) -> None:
        """What its work has said."""
        while child.notes:
            note = child.notes.popleft()
            self._session.record_fact(
                note.event_type,
                (),
                step_id=child.step,
                message=note.message,
                details=dict(note.details),
                level=note.level,
            )

    def capacity(self, child: Child) -> None:
        """What it was given, and gave back."""
        while child.allocated:
            event = child.allocated.popleft()
            self._session.record_fact(
                event.event_type, (), step_id=child.step, message=event.message, details=dict(event.details)
            )

    async def missed(self, board: PlanBoard, going_on: Mapping[str, Lifecycle]) -> None:
        """What steps were given, and gave back, while nobody listened to them."""
        given, returned = await self._host.capacity_told()
        holding = {step_id for each, step_id in given.items() if each not in returned}
        for step_id in holding.union(step_id for step_id, life in going_on.items() if life.capacity):
            lives = await self._host.attempts(board.step(step_id).run_id or "")
            if (now := going_on.get(step_id)) is not None:
                lives = [*(each for each in lives if each.attempt < now.attempt), now]
            uses = [use for life in lives for use in life.capacity]
            untold = [use for use in uses if use.allocation_id not in given]
            back = [use for use in uses if use.ended_at is not None and use.allocation_id not in returned]
            self._allocations(EventType.RESOURCE_RELEASED, step_id, [each for each in back if each not in untold])
            self._allocations(EventType.RESOURCE_ALLOCATED, step_id, untold)
            self._allocations(EventType.RESOURCE_RELEASED, step_id, [each for each in back if each in untold])

    def _allocations(self, kind: EventType, step_id: str, uses: Sequence[CapacityUse]) -> None:
        if uses:
            details: dict[str, Json] = {"allocations": [use.to_dict() for use in uses]}
            self._session.record_fact(kind, (), step_id=step_id, message="While nobody listened", details=details)
