"""Which steps of a plan may begin, and which never will: decided by what has ended, and nothing else."""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

from vespera_exec.model.enums import StepStatus

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from vespera_exec.model.plans.plan import ExecutionPlan
    from vespera_exec.model.plans.steps import StepState

_AT_WORK = (StepStatus.RUNNING, StepStatus.WAITING)
_HOW = {
    StepStatus.CANCELLED: "which was cancelled",
    StepStatus.SKIPPED: "which was skipped",
}


def ready(plan: ExecutionPlan, states: Mapping[str, StepState], *, now: datetime | None = None) -> list[str]:
    """The steps that may begin, in the order of the plan: PENDING, with every dependency letting them on.

    Not those that are to be tried again after `now`; without it, all. A step without a state is PENDING.
    """
    return [
        step.id
        for step in plan.steps
        if _is_due(states.get(step.id), now) and all(_lets_on(states.get(each)) for each in step.depends_on)
    ]


def levels(plan: ExecutionPlan) -> list[list[str]]:
    """The steps by how many others have to end before them, one after the other: what could run side by side."""
    schedule, found = Schedule(plan, {}), list[list[str]]()
    while not schedule.is_done:
        level: list[str] = []
        while (step := schedule.pop()) is not None:
            level.append(step)
        if not level:
            raise ValueError("the plan has a cycle")
        for step in level:
            schedule.settled(step, lets_on=True)
        found.append(level)
    return found


class Schedule:
    """The same as `ready`, kept up to date by what is told: each dependency is looked at once, however large the plan.

    A step is waiting, ready, handed out (`pop`), or ended. Not thread-safe.
    """

    def __init__(self, plan: ExecutionPlan, states: Mapping[str, StepState], *, now: datetime | None = None) -> None:
        self._ids = [step.id for step in plan.steps]
        self._positions = {step: position for position, step in enumerate(self._ids)}
        self._needs = [tuple({self._positions[each] for each in step.depends_on}) for step in plan.steps]
        self._needed_by: list[list[int]] = [[] for _ in self._ids]
        for position, needs in enumerate(self._needs):
            for each in needs:
                self._needed_by[each].append(position)
        self.reset(states, now=now)

    def reset(self, states: Mapping[str, StepState], *, now: datetime | None = None) -> None:
        """Forget everything and begin with `states`."""
        known = [states.get(step) for step in self._ids]
        self._ended = [state is not None and state.status.is_terminal for state in known]
        self._left = self._ended.count(False)
        self._open = [sum(not _lets_on(known[each]) for each in needs) for needs in self._needs]
        """How many dependencies of each have not let it on."""
        self._queue: list[int] = []
        """A heap of what is ready; what has ended in it is passed over."""
        self._queued = [False] * len(known)
        self.delayed: list[str] = []
        """What could begin but is to be tried again later; `put_back` gives it back."""
        self.doomed: list[tuple[str, str]] = []
        """What can never begin in these states, as `settled` returns it; it counts as ended."""
        self._begun = [state is not None and state.status in _AT_WORK for state in known]
        for position, state in enumerate(known):
            if state is not None and state.status.is_terminal and not state.lets_on:
                self.doomed += self._doom(position, state.status)
        for position, state in enumerate(known):
            if not (self._ended[position] or self._begun[position] or self._open[position]):
                if _is_due(state, now):
                    self._enqueue(position)
                else:
                    self.delayed.append(self._ids[position])

    @property
    def is_done(self) -> bool:
        """Every step has ended."""
        return not self._left

    def pop(self) -> str | None:
        """The first step in the order of the plan that may begin; None while there is none. It is handed out once."""
        while self._queue:
            position = heapq.heappop(self._queue)
            self._queued[position] = False
            if not self._ended[position]:
                self._begun[position] = True
                return self._ids[position]
        return None

    def put_back(self, step_id: str) -> None:
        """What was handed out, or delayed, may begin (again)."""
        position = self._positions[step_id]
        if self._ended[position]:
            raise ValueError(f"step {step_id} has ended")
        self._enqueue(position)

    def settled(self, step_id: str, lets_on: bool, status: StepStatus = StepStatus.FAILED) -> list[tuple[str, str]]:
        """It has ended. What can never begin because of that: ids and reasons, each after what it needs.

        Those count as ended from now on. `status` is how it ended, where it does not let on.
        """
        position = self._positions[step_id]
        if self._ended[position]:
            raise ValueError(f"step {step_id} has ended already")
        self._end(position)
        if not lets_on:
            return self._doom(position, status)
        for each in self._needed_by[position]:
            self._open[each] -= 1
            if not (self._open[each] or self._ended[each] or self._begun[each]):
                self._enqueue(each)
        return []

    def _doom(self, first: int, status: StepStatus) -> list[tuple[str, str]]:
        doomed: list[tuple[str, str]] = []
        following = deque([(first, status)])
        while following:
            cause, how = following.popleft()
            reason = f"needs {self._ids[cause]}, {_HOW.get(how, 'which failed')}"
            for each in self._needed_by[cause]:
                if not (self._ended[each] or self._begun[each]):
                    self._end(each)
                    doomed.append((self._ids[each], reason))
                    following.append((each, StepStatus.SKIPPED))
        return doomed

    def _end(self, position: int) -> None:
        self._ended[position] = True
        self._left -= 1

    def _enqueue(self, position: int) -> None:
        if not self._queued[position]:
            self._queued[position] = True
            heapq.heappush(self._queue, position)


def _lets_on(state: StepState | None) -> bool:
    return state is not None and state.lets_on


def _is_due(state: StepState | None, now: datetime | None) -> bool:
    if state is None:
        return True
    if state.status is not StepStatus.PENDING:
        return False
    return now is None or state.not_before is None or state.not_before <= now
