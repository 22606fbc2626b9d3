"""The board of a plan, and what follows from it for steps that have not ended: which begin, and which never will."""

from __future__ import annotations

import heapq
import math
from itertools import islice
from typing import TYPE_CHECKING

import anyio.lowlevel

from vespera_exec.engine.plans.looping import AT_ONCE
from vespera_exec.model.enums import StepStatus
from vespera_exec.model.plans.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Container

    from vespera_exec.engine.plans.course import Course
    from vespera_exec.engine.plans.telling import Telling
    from vespera_exec.model.plans.board import PlanBoard
    from vespera_exec.model.plans.plan import ExecutionPlan
    from vespera_exec.model.session import ExecutionSession


class Agenda:
    """Of one plan. It has a board from `take` on, if not from the beginning, and a schedule from `reschedule` on."""

    _schedule: Schedule

    def __init__(
        self, session: ExecutionSession, plan: ExecutionPlan, board: PlanBoard | None, course: Course, telling: Telling
    ) -> None:
        self.steps = {step.id: step for step in plan.steps}
        self._ledger = session.ledger
        self._plan = plan
        self._board = board
        self._course = course
        self._telling = telling
        self._deciding: set[str] = set()
        """Steps whose run has failed, while strategies decide what follows."""
        self._retrying: dict[str, float] = {}
        """Steps that are to be tried again later, and when; a timer of an earlier run of theirs may ring before."""
        self._timers: list[tuple[float, str]] = []
        """A heap of when a step is to be tried again."""
        self._unmade: list[str] = []
        """Steps that have begun, as the log says, whose child was not made before the owner died."""
        self._doomed: dict[str, str] = {}
        """Steps that can never begin, and why; they are skipped soon."""

    @property
    def board(self) -> PlanBoard:
        if self._board is None:
            raise RuntimeError("the board is not read yet")
        return self._board

    @property
    def has_board(self) -> bool:
        return self._board is not None

    def take(self, board: PlanBoard) -> None:
        self._board = board

    def reschedule(self) -> None:
        """Go by the board as it is now, and by nothing that was known before."""
        self._schedule = Schedule(self._plan, self.board.states, now=self._ledger.clock.now())
        self._doomed = dict(self._schedule.doomed)
        for step_id in self._schedule.delayed:
            self.retry_later(step_id)

    # what is to be done

    @property
    def is_done(self) -> bool:
        """Every step has ended, and that is on the board."""
        return not (self._deciding or self._unmade or self._doomed) and self._schedule.is_done

    @property
    def under_way(self) -> tuple[str, ...]:
        """The steps that have begun and not ended, without a child."""
        return (*self._deciding, *self._unmade)

    @property
    def decisions(self) -> int:
        """For how many steps strategies decide just now."""
        return len(self._deciding)

    @property
    def due_at(self) -> float | None:
        """When the next step is to be tried again."""
        return self._timers[0][0] if self._timers else None

    def heed_time(self, now: float) -> None:
        """What is due may begin, or the first of it, where that is much; `due_at` is in the past for what is left."""
        for _ in range(AT_ONCE):
            if not self._timers or self._timers[0][0] > now:
                return
            step_id = heapq.heappop(self._timers)[1]
            if self._retrying.get(step_id, math.inf) <= now:
                del self._retrying[step_id]
                self._schedule.put_back(step_id)

    def pop(self) -> str | None:
        """The next step that may begin, to be begun, or to be given back by `put_back`."""
        return self._schedule.pop()

    def pop_unmade(self) -> str | None:
        """A step that has begun, and whose child is to be made."""
        return self._unmade.pop() if self._unmade else None

    def put_back(self, step_id: str) -> None:
        """It may begin (again)."""
        self._schedule.put_back(step_id)

    def put_unmade(self, step_id: str) -> None:
        """It has begun, and its child is not made."""
        self._unmade.append(step_id)

    def retry_later(self, step_id: str) -> None:
        """It may begin again when the board says."""
        not_before = self.board.step(step_id).not_before
        assert not_before is not None
        clock = self._ledger.clock
        due = clock.monotonic() + max(0.0, (not_before - clock.now()).total_seconds())
        self._retrying[step_id] = due
        heapq.heappush(self._timers, (due, step_id))

    def decide(self, step_id: str) -> None:
        """Its run has failed, and it is not yet known what follows."""
        self._deciding.add(step_id)

    def decided(self, step_id: str) -> None:
        self._deciding.discard(step_id)

    def stop_deciding(self) -> None:
        """What is decided about any step no longer counts."""
        self._deciding.clear()

    def forget(self) -> None:
        """Nothing is tried again, or made, that was to be."""
        self._retrying.clear()
        self._unmade.clear()

    # ends

    def settle(self, step_id: str, *, lets_on: bool, status: StepStatus = StepStatus.FAILED) -> None:
        """It has ended: what needs it may begin, or can never begin, and is skipped soon."""
        self._doomed.update(self._schedule.settled(step_id, lets_on, status))
        self._telling.soon()

    def cancel(self, step_id: str, reason: str) -> bool:
        """End a step without a child; False where it has ended, or is about to."""
        if self.board.step(step_id).status.is_terminal or step_id in self._doomed:
            return False
        self._deciding.discard(step_id)
        self._retrying.pop(step_id, None)
        if step_id in self._unmade:
            self._unmade.remove(step_id)
        self.cancelled(step_id, reason)
        return True

    def cancelled(self, step_id: str, reason: str) -> None:
        """Nothing of it runs, or will."""
        with self._ledger:
            self.board.cancelled(step_id, reason)
            self.settle(step_id, lets_on=False, status=StepStatus.CANCELLED)

    async def cancel_rest(self, reason: str, *, but: Container[str]) -> None:
        """End all that has not ended, `but` those of these steps."""
        self.forget()
        await self.skip_doomed()
        for number, step_id in enumerate(self.steps, 1):
            if not (self.board.step(step_id).status.is_terminal or step_id in but or step_id in self._doomed):
                self.cancelled(step_id, reason)
            if number % AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()
        await self.skip_doomed()

    async def skip_doomed(self) -> None:
        """What can never begin ends, in portions. After a crash in between the next owner finds the rest as doomed."""
        while self._doomed:
            with self._ledger:
                for step_id, reason in list(islice(self._doomed.items(), AT_ONCE)):
                    del self._doomed[step_id]
                    if self._course.aborted is None:
                        self.board.skipped(step_id, reason)
                    else:
                        self.board.cancelled(step_id, self._course.aborted)
            await anyio.lowlevel.checkpoint()
