"""Jobs and capacity: which of those that ask may begin, what each holds, and what its log says of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

from vespera_exec.engine.queue import WaitingQueue
from vespera_exec.errors import CapacityUnavailable, VesperaError
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.events import new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vespera_exec.engine.capacity.pools import CapacityPools, PoolState, Shortage
    from vespera_exec.engine.jobs import Job
    from vespera_exec.model.capacity import Allocation, CapacityRequirement
    from vespera_exec.model.clock import Clock
    from vespera_exec.model.events import Json

CLAIM_SECONDS = 5.0
"""How long capacity is set aside for a worker that has asked for a job and was told to wait."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Asking:
    job: Job
    priority: int
    """Its place in the queue for a slot."""


class _Outsider:
    """Somebody who asks for capacity and is no job."""

    def __init__(self) -> None:
        self.served = anyio.Event()
        self.allocations: tuple[Allocation, ...] = ()


class Grants:
    """Stands between the dispatcher and the pools. In the loop.

    `wake` makes the dispatcher look again, `stir` the workers that wait for a job.

    A job of a slot is given its capacity by `take`, when it has one. For a job of a worker it is set aside when it is
    the first's turn and a worker has asked, until that one claims it or asks no more.
    """

    def __init__(
        self, pools: CapacityPools, *, clock: Clock, wake: Callable[[], object], stir: Callable[[], object]
    ) -> None:
        self._pools = pools
        self._clock = clock
        self._wake = wake
        self._stir = stir
        self._jobs: dict[str, _Asking] = {}
        """All that wait in a slot's place, those whose time has not come included."""
        self._held: WaitingQueue[_Asking] = WaitingQueue()
        self._offered: dict[str, tuple[Job, float]] = {}
        """Those of workers that were asked for, until when that counts."""
        self._aside: dict[str, tuple[Allocation, ...]] = {}
        self._outsiders: dict[str, _Outsider] = {}
        self._told: dict[str, tuple[str, ...]] = {}
        """Which shortages the log of each knows of."""
        self._new: dict[str, Job] = {}

    def __len__(self) -> int:
        """How many wait for a slot and capacity."""
        return len(self._jobs)

    @property
    def is_asked(self) -> bool:
        """Somebody waits for capacity; else there is nothing to settle, to tell or to look for."""
        return bool(self._jobs or self._offered or len(self._pools))

    def check(self, requirements: Sequence[CapacityRequirement]) -> None:
        """
        Raises:
            CapacityUnknown, CapacityTooLarge: it can never be given.
        """
        self._pools.check(requirements)

    # jobs of slots

    def ask(self, job: Job, *, priority: int, not_before: float | None = None) -> None:
        """It waits for its capacity, from `not_before` on, with its place in the queue for a slot."""
        asking = self._jobs[job.key] = _Asking(job, priority)
        if not_before is not None:
            self._held.put(job.key, asking, priority=0, not_before=not_before)
        else:
            self._stand(asking)

    def first(self, now: float) -> tuple[int, Job] | None:
        """Who of them is next and can be served, behind its priority; or None."""
        while (key := self._pools.next(now)) is not None:
            if (asking := self._jobs.get(key)) is None:
                self._serve(key, now)  # its turn has come since one of them was given what it asked for
            elif asking.job.session.lifecycle.status is ExecutionStatus.PAUSED:
                self.forget(asking.job)  # until it is asked for again
            else:
                return asking.priority, asking.job
        return None

    def take(self, job: Job, now: float) -> None:
        """Give it what it asks for, and record that. It can be given: `first` or `offer` have said so."""
        if not job.capacity:
            return
        allocations = self._aside.pop(job.key, None) or self._pools.take(job.key, now) or ()
        self.forget(job)
        try:
            job.session.hold_capacity(allocations)
        except VesperaError:  # it ends just now, or the log refuses: its capacity is given back with its slot
            _log.exception("That %s holds capacity could not be recorded", job.key)

    def forget(self, job: Job) -> None:
        """It asks no longer; what was set aside for it is free."""
        self._jobs.pop(job.key, None)
        self._offered.pop(job.key, None)
        self._told.pop(job.key, None)
        self._new.pop(job.key, None)
        self._held.discard(job.key)
        self._pools.forget(job.key)
        if self._aside.pop(job.key, None) is not None:
            self._pools.release(job.key, unused=True)

    def give_back(self, job: Job) -> None:
        """Nothing of it runs any more. Its log has said so."""
        self._pools.release(job.key)

    def adopt(self, job: Job) -> None:
        """Count what it holds by its log: the work went on without an owner."""
        held = job.session.lifecycle.held_capacity
        if held and not self._pools.adopt(job.key, held, self._clock.monotonic()):
            job.session.release_capacity("The pools no longer have room for it")

    # jobs of workers

    def offer(self, job: Job, now: float) -> bool:
        """Whether a worker may have it now. If not, it stands in line, for as long as workers ask."""
        if not job.capacity or job.key in self._aside:
            return True
        if job.key not in self._pools:
            self._pools.ask(job.key, job.capacity, now=now)
            self._new[job.key] = job
        self._offered[job.key] = (job, now + CLAIM_SECONDS)
        self.settle(now)
        self._wake()
        return job.key in self._aside

    @property
    def has_offers(self) -> bool:
        """Workers have asked for jobs that wait for capacity."""
        return bool(self._offered)

    # outsiders

    async def allocate(
        self, requirements: Sequence[CapacityRequirement], *, within: float
    ) -> tuple[str, tuple[Allocation, ...]]:
        """The key that holds it from now on, and what it holds.

        Raises:
            CapacityUnknown, CapacityTooLarge: it can never be given.
            CapacityUnavailable: it was not free within so many seconds.
        """
        self.check(requirements)
        key, outsider = new_id(), _Outsider()
        self._outsiders[key] = outsider
        now = self._clock.monotonic()
        self._pools.ask(key, requirements, now=now)
        self.settle(now)
        kept = False
        try:
            if not outsider.served.is_set():
                self._wake()
                with anyio.move_on_after(within):
                    await outsider.served.wait()
            if not outsider.served.is_set():
                short = "; ".join(map(str, self._pools.shortages(key)))
                raise CapacityUnavailable(f"the capacity is not free: {short}")
            kept = True
            return key, outsider.allocations
        finally:
            del self._outsiders[key]
            if not kept:
                self._pools.forget(key)
                self._pools.release(key, unused=True)
            self._wake()

    def release(self, key: str, allocation_id: str) -> bool:
        """One allocation of an outsider is given back; False where it holds no such."""
        done = self._pools.release_one(key, allocation_id)
        self._wake()
        return done

    # the dispatcher

    def settle(self, now: float) -> None:
        """Serve whoever needs no slot."""
        for job, until in list(self._offered.values()):
            if until <= now:
                told = self._told.get(job.key)
                self.forget(job)
                if told is not None:
                    self._told[job.key] = told  # its log knows, however often workers come and go
        while (asking := self._held.pop(now)) is not None:
            self._stand(asking)
        while (key := self._pools.next(now, stands=self._jobs.__contains__)) is not None:
            self._serve(key, now)

    def tell(self, now: float) -> None:
        """Let the logs of those that have to wait say so: of the new ones, and of the first where it changed."""
        for key in dict.fromkeys((*self._new, *self._pools.firsts(now))):
            job = self._new.pop(key, None) or self._job(key)
            if job is None or key not in self._pools:
                continue
            short = self._short(key, now)
            types = tuple(each.type for each in short)
            if types and types != self._told.get(key):
                self._told[key] = types
                self._record_waiting(job, short)

    def next_time(self, now: float) -> float | None:
        """When to look again though nothing happens, or None."""
        times = [self._held.next_time(), self._pools.next_time(now), *(until for _, until in self._offered.values())]
        return min((each for each in times if each is not None), default=None)

    # who looks

    def shortages(self, key: str) -> list[Shortage]:
        """What of its capacity it waits for; nothing, where that is not what it waits for."""
        return self._short(key, self._clock.monotonic()) if key in self._pools else []

    def holders(self, key: str) -> list[str]:
        """Who holds capacity of the types that it waits for."""
        return self._pools.holders({each.type for each in self.shortages(key)})

    def states(self) -> list[PoolState]:
        """The pools, how much of each is free, and by whom the rest is held."""
        return self._pools.states(self._clock.monotonic())

    def waiting(self) -> list[str]:
        """The keys of the jobs that stand in line, also of those that only want for a slot."""
        return [key for key in (*self._jobs, *self._offered) if key in self._pools]

    # inside

    def _serve(self, key: str, now: float) -> None:
        """Give one that needs no slot what it asks for."""
        allocations = self._pools.take(key, now) or ()
        if (outsider := self._outsiders.get(key)) is not None:
            outsider.allocations = allocations
            outsider.served.set()
        else:
            self._aside[key] = allocations
            self._stir()

    def _stand(self, asking: _Asking) -> None:
        job = asking.job
        self._pools.ask(job.key, job.capacity, now=self._clock.monotonic(), priority=asking.priority)
        self._new[job.key] = job

    def _job(self, key: str) -> Job | None:
        if (asking := self._jobs.get(key)) is not None:
            return asking.job
        offered = self._offered.get(key)
        return offered[0] if offered is not None else None

    def _short(self, key: str, now: float) -> list[Shortage]:
        """The shortages of one that waits for capacity; all its types, where somebody before it waits for them too."""
        every = self._pools.shortages(key)
        short = [each for each in every if each.free < each.wanted]
        if short or not self._pools.could_have(key, now):
            return short or list(every)
        before = [first for first in self._pools.firsts(now) if not self._pools.could_have(first, now)]
        taken = {name for first in before if first != key for name in self._pools.types_of(first)}
        return [each for each in every if each.type in taken]

    def _record_waiting(self, job: Job, short: list[Shortage]) -> None:
        types: dict[str, Json] = {
            each.type: {"wanted": each.wanted, "free": each.free, "capacity": each.capacity} for each in short
        }
        details: dict[str, Json] = {"types": types, "holders": len(self.holders(job.key))}
        try:
            job.session.wait_for_capacity(f"Waiting for {'; '.join(map(str, short))}", details)
        except VesperaError:
            _log.debug("That %s waits for capacity could not be recorded", job.key, exc_info=True)
