"""Follows the children of a plan: hears what they have to say, and tells it of their steps."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING

import anyio.lowlevel

from vespera_exec.engine.plans.children import QUEUED_SECONDS, Child
from vespera_exec.engine.plans.looping import AT_ONCE
from vespera_exec.model.enums import StepStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vespera_exec.engine.jobs import Run
    from vespera_exec.engine.plans.agenda import Agenda
    from vespera_exec.engine.plans.children import ChildEngine
    from vespera_exec.engine.plans.course import Course
    from vespera_exec.engine.plans.looping import PlanLoop
    from vespera_exec.engine.plans.telling import Telling
    from vespera_exec.model.clock import Clock
    from vespera_exec.model.lifecycle import Lifecycle


class Children:
    """The children of one plan, by step: those that count for their steps. To be used on the loop, but for `heard`.

    `concluded`, where it is asked for, is called with the step of a child that has ended, its last state, and its run.
    """

    def __init__(
        self, engine: ChildEngine, course: Course, agenda: Agenda, telling: Telling, loop: PlanLoop, *, clock: Clock
    ) -> None:
        self._engine = engine
        self._course = course
        self._agenda = agenda
        self._telling = telling
        self._loop = loop
        self._clock = clock
        self._by_step: dict[str, Child] = {}
        self._leaving: set[Child] = set()
        """Those that are being ended, since the plan goes back to where they did not run."""
        self._news: deque[Child] = deque()
        self._moved: set[Child] = set()
        """Those of which something is to be told with the next tick."""
        self._timers: deque[tuple[float, str]] = deque()
        """When a step has waited for its turn so long that it is said to, in this order."""
        self._pause_told = False

    def __len__(self) -> int:
        return len(self._by_step)

    def __iter__(self) -> Iterator[Child]:
        """As they are at this moment."""
        return iter(tuple(self._by_step.values()))

    def __contains__(self, step_id: object) -> bool:
        return step_id in self._by_step

    @property
    def steps(self) -> tuple[str, ...]:
        return tuple(self._by_step)

    @property
    def at_work(self) -> list[Child]:
        """All of which something may run, also those that no longer count."""
        return [*self._by_step.values(), *self._leaving]

    @property
    def all_wait(self) -> bool:
        """None of them works, as far as has been told."""
        return all(child.shown[0] is not None for child in self._by_step.values())

    def of(self, step_id: str) -> Child | None:
        return self._by_step.get(step_id)

    def follow(self, step_id: str, run: Run) -> None:
        now = self._clock.monotonic()
        child = self._by_step[step_id] = Child(step_id, run, self.heard, now=now)
        state = self._agenda.board.step(step_id)
        if state.status is StepStatus.WAITING:  # as an earlier owner has said
            child.shown, child.since = (state.waiting_for, state.message), now - QUEUED_SECONDS
            short = self._engine.waits_for(run.session.session_id)
            child.wants_capacity = f"Waiting for {short}" if short is not None else ""
        run.done.then(lambda: self.heard(child))
        self._look_at(child)
        self._timers.append((now + QUEUED_SECONDS, step_id))

    # what is heard

    def heard(self, child: Child) -> None:
        """It has news. From any thread."""
        self._news.append(child)
        self._loop.rouse()

    async def heed_news(self, concluded: Callable[[str, Lifecycle, Run], None]) -> None:
        for number in range(1, len(self._news) + 1):
            child = self._news.popleft()
            child.is_told = False
            if self._by_step.get(child.step) is not child:
                continue
            if child.run.done.is_set():
                self._end(child, concluded)
            else:
                self._telling.capacity(child)
                self._look_at(child)
            if number % AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()

    def heed_pause(self) -> None:
        """What waits for its turn waits for the end of a pause, from its beginning on."""
        if self._course.is_paused is not self._pause_told:
            self._pause_told = self._course.is_paused
            for child in self._by_step.values():
                self._look_at(child)

    @property
    def due_at(self) -> float | None:
        """When there is something for `heed_time`."""
        waited, told = self._timers[0][0] if self._timers else None, self._telling.due_at
        return told if waited is None else waited if told is None else min(waited, told)

    def heed_time(self, now: float) -> None:
        """What is due, or the first of it, where that is much; `due_at` is in the past for what is left."""
        for _ in range(AT_ONCE):
            if not self._timers or self._timers[0][0] > now:
                break
            if (child := self._by_step.get(self._timers.popleft()[1])) is not None:
                self._look_at(child)
        if (due := self._telling.due_at) is not None and due <= now:
            self._tell()

    def _look_at(self, child: Child) -> None:
        """Record what it waits for, where that is new; how far it is comes with the next tick."""
        waits = child.waits_for(self._clock.monotonic(), held=self._course.is_paused)
        if waits != child.shown:
            child.shown = waits
            self._agenda.board.waiting(child.step, *waits)
        if child not in self._moved:
            self._moved.add(child)
            self._telling.soon()

    def _tell(self) -> None:
        """How far the steps are, and so the plan."""
        board, moved = self._agenda.board, list(islice(self._moved, AT_ONCE))
        self._moved.difference_update(moved)
        self._telling.told(is_all=not self._moved)
        for child in moved:
            if self._by_step.get(child.step) is not child:
                continue  # the plan went back to where it did not run
            before, reached = board.step(child.step).percentage or 0.0, child.percentage
            if reached is not None and reached - before >= 1.0:
                board.progress(child.step, min(reached, 100.0))
            self._telling.notes(child)
        if not self._moved:
            self._telling.percentage(board)

    # ends

    def conclude(self, concluded: Callable[[str, Lifecycle, Run], None]) -> None:
        """All of them have ended."""
        for child in self:
            self._end(child, concluded)

    def _end(self, child: Child, concluded: Callable[[str, Lifecycle, Run], None]) -> None:
        del self._by_step[child.step]
        self._moved.discard(child)
        child.forget()
        self._telling.capacity(child)
        self._telling.notes(child)
        concluded(child.step, child.run.session.lifecycle, child.run)

    def cancel(self, reason: str) -> None:
        for child in self:
            child.run.session.request_cancellation(reason)

    async def leave(self, reason: str) -> None:
        """End them all; what becomes of them no longer counts for their steps."""
        gone = list(self)
        self._by_step.clear()
        self._leaving.update(gone)
        for child in gone:
            child.run.session.request_cancellation(reason)
        for child in gone:
            await child.run.done.wait()
            child.forget()
            self._telling.capacity(child)
        self._leaving.clear()

    async def over(self) -> None:
        """Returns when the end of all that are at work is decided; until then nobody else may heed the news."""
        going_on = {child for child in self.at_work if not child.is_over}
        while going_on:
            while self._news:  # those first that came before: whoever is in it does not rouse us
                child = self._news.popleft()
                child.is_told = False
                if child.is_over:
                    going_on.discard(child)
            if going_on:
                await self._loop.rest()

    def forget(self) -> None:
        """Hear nothing of them any more."""
        for child in self:
            child.forget()
