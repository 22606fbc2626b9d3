"""What has no slot: whose turn it is, what stands still, and what leaves without a turn."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

import anyio

from vespera_exec.engine.capacity.grants import CLAIM_SECONDS, Grants
from vespera_exec.engine.claims import ClaimQueue
from vespera_exec.engine.queue import WaitingQueue
from vespera_exec.errors import ExecutionError, InvalidInput, VesperaError
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.transitions import AT_WORK

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from vespera_exec.engine.capacity.pools import CapacityPools
    from vespera_exec.engine.jobs import Job
    from vespera_exec.model.clock import Clock
    from vespera_exec.model.session import ExecutionSession

_log = logging.getLogger(__name__)

S = ExecutionStatus

STARTABLE = (S.PENDING, S.RECOVERING, *AT_WORK)
"""The last are of one that stood without a slot, paused or parked, and may go on."""
_BEGUN = 1_000_000


class Waiting:
    """The jobs that have no slot, from `put` until each is admitted, or claimed by a worker, or has departed.

    Each stands in one line (for a slot, for a slot with capacity, for a worker) or in none: while it is PAUSED, parked
    or not, and while its group is held. Whoever is in a line gets its turn, or leaves it: it has ended, it is to end,
    it has waited too long, or what it needs can never be given; its log says which. To be used on the loop, but for
    `withdraw`.
    """

    def __init__(self, pools: CapacityPools, *, clock: Clock) -> None:
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._parked: dict[str, None] = {}
        """Those of them that wait for something, and whose PAUSED is that wait."""
        self._held: set[str] = set()
        """The groups whose jobs do not get their turn."""
        self._queue: WaitingQueue[Job] = WaitingQueue()
        self._claims = ClaimQueue()
        self.grants = Grants(pools, clock=clock, wake=self.rouse, stir=self._claims.stir)
        """Who may begin of those that need capacity, and who holds it."""
        self._deadlines: WaitingQueue[Job] = WaitingQueue()
        """Those in a line, or parked, whose role limits the wait; each until then."""
        self._withdrawn: deque[str] = deque()
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        """How many are in a line."""
        return len(self._queue) + len(self._claims) + len(self.grants)

    def get(self, key: str) -> Job | None:
        """The job, while it has no slot, or None."""
        return self._jobs.get(key)

    def of(self, group: str) -> list[Job]:
        """Those of a group, in the order in which they came."""
        return [job for job in self._jobs.values() if job.group == group]

    def asking(self, group: str) -> dict[str, ExecutionSession]:
        """The sessions of a group that wait for an answer, by their steps, in the order in which they began to."""
        found: dict[str, ExecutionSession] = {}
        for key in self._parked:
            job = self._jobs[key]
            step = job.task.record.step_id
            if job.group == group and step is not None and job.session.lifecycle.open_inputs:
                found[step] = job.session
        return found

    # coming

    def put(self, job: Job) -> None:
        """It waits for its turn; one that is PAUSED for `unpark`."""
        self._jobs[job.key] = job
        if job.session.lifecycle.status is not S.PAUSED:
            self._line_up(job)
        elif job.session.lifecycle.open_inputs:
            self._park(job)

    def unpark(self, session: ExecutionSession) -> None:
        """Let one that has left PAUSED wait for its turn, as long as any other; or leave, where it has ended.

        Nothing, where it stands still.
        """
        job = self._jobs.get(session.session_id)
        if job is None or session.lifecycle.status is S.PAUSED:
            return
        self._parked.pop(job.key, None)
        if session.lifecycle.status.is_terminal:
            self.withdraw(job.key)
        else:
            self._line_up(job)

    def hold(self, group: str) -> None:
        """No job of a group gets its turn, those to come included, until `go_on`, or `free`."""
        if group in self._held:
            return
        self._held.add(group)
        for job in self.of(group):
            if job.key not in self._parked:
                self._out_of_line(job)

    def go_on(self, group: str) -> None:
        """Take back a `hold`. They may wait for their turn as long as any other, from now on."""
        if group not in self._held:
            return
        self._held.remove(group)
        for job in self.of(group):
            if job.key not in self._parked and job.session.lifecycle.status is not S.PAUSED:
                self._line_up(job)

    def free(self, group: str) -> None:
        """There is no such group any more."""
        self._held.discard(group)

    # leaving

    def withdraw(self, key: str) -> None:
        """It is to leave, where it waits. From any thread."""
        self._withdrawn.append(key)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake.set)

    def departed(self) -> list[Job]:
        """Those that have ended, or are to end, before their turn came: they wait no longer."""
        self._wake.clear()
        left: list[Job] = []
        while self._withdrawn:
            if job := self._jobs.get(self._withdrawn.popleft()):
                left.append(self._remove(job))
        now = self._clock.monotonic()
        while job := self._deadlines.pop(now):
            if job.session.lifecycle.status is not S.PAUSED or job.key in self._parked:
                self._time_out(job)
                left.append(self._remove(job))
        return left

    def admitted(self, free: int) -> list[Job]:
        """At most so many whose turn it is, with the capacity that they need: they wait no longer."""
        now = self._clock.monotonic()
        asked = self.grants.is_asked
        if asked:
            self.grants.settle(now)
        turns: list[Job] = []
        while len(turns) < free and (job := self._next(now)):
            self._deadlines.discard(job.key)
            if job.session.lifecycle.status is not S.PAUSED:  # else until `unpark`
                del self._jobs[job.key]
                turns.append(job)
        if asked:
            self.grants.tell(now)
        return turns

    def claim(self, roles: Collection[str], grant: Callable[[Job], None], begin: Callable[[Job], None]) -> Job | None:
        """The next of these roles for a worker, or None: it waits no longer.

        `grant` records the lease, `begin` that it begins: one decision, with its capacity.
        """
        now = self._clock.monotonic()
        while (job := self._claims.pop(roles, now, lambda job: self.grants.offer(job, now))) is not None:
            try:
                with job.session.ledger:
                    if job.key not in self._jobs or job.session.lifecycle.status not in STARTABLE:
                        self.grants.forget(job)
                        continue  # paused since, or about to leave
                    grant(job)
                    self.grants.take(job, now)
                    begin(job)
            except BaseException:  # nothing of it was decided: the next worker may have it
                self.grants.forget(job)
                self.grants.give_back(job)
                self._line_up(job, again=True)
                raise
            self._deadlines.discard(job.key)
            del self._jobs[job.key]
            return job
        return None

    # whoever waits for a change

    async def offered(self, roles: Collection[str]) -> None:
        """Returns when there may be something new for `claim`."""
        # Whoever waits for capacity keeps its place in line for as long as workers ask.
        with anyio.move_on_after(CLAIM_SECONDS / 2 if self.grants.has_offers else None):
            await self._claims.news(roles, self._clock.monotonic())

    async def changed(self) -> None:
        """Returns when there may be something new for `departed` or `admitted`."""
        self._loop = asyncio.get_running_loop()
        if self._withdrawn:
            return  # by a thread that did not know the loop yet
        now = self._clock.monotonic()
        next_times = [self._queue.next_time(), self._deadlines.next_time()]
        if self.grants.is_asked:
            next_times.append(self.grants.next_time(now))
        times = [time for time in next_times if time is not None]
        if not times:
            await self._wake.wait()
            return
        with anyio.move_on_after(max(0.0, min(times) - now)):
            await self._wake.wait()

    def rouse(self) -> None:
        """A slot, or capacity, may be free."""
        if self._jobs or self.grants.is_asked:
            self._wake.set()

    # the lines

    def _line_up(self, job: Job, *, again: bool = False) -> None:
        """`again`: as if it had never left, so that it may wait no longer than it might."""
        if job.group is not None and job.group in self._held:
            return
        life, now = job.session.lifecycle, self._clock.monotonic()
        not_before = None
        if life.not_before is not None:
            not_before = now + (life.not_before - self._clock.now()).total_seconds()
        if job.policy.wait_timeout_seconds and not again:
            latest = max(now, not_before or now) + job.policy.wait_timeout_seconds
            self._deadlines.put(job.key, job, priority=0, not_before=latest)
        # What has begun goes before what has not.
        priority = life.priority if life.status is S.PENDING else _BEGUN
        if job.capacity and not self._can_be_given(job):
            return
        if job.place == "worker":
            self._claims.put(job, priority=priority, not_before=not_before)
        elif job.capacity:
            self.grants.ask(job, priority=priority, not_before=not_before)
        else:
            self._queue.put(job.key, job, priority=priority, not_before=not_before)
        self._wake.set()

    def _park(self, job: Job) -> None:
        """Until `unpark`, or for as long as it may wait, counted from when it was parked, also by an earlier owner."""
        self._parked[job.key] = None
        since = job.session.lifecycle.paused_at
        if job.policy.wait_timeout_seconds and since is not None:
            waited = max(0.0, (self._clock.now() - since).total_seconds())
            latest = self._clock.monotonic() + max(0.0, job.policy.wait_timeout_seconds - waited)
            self._deadlines.put(job.key, job, priority=0, not_before=latest)
            self._wake.set()

    def _can_be_given(self, job: Job) -> bool:
        """False, and it fails, where the pools that there are now could never give it what it needs."""
        try:
            self.grants.check(job.capacity)
        except InvalidInput as error:
            fault = ExecutionError(error.message, code=error.code, recoverable=False)
            try:
                job.session.fail(fault)
            except VesperaError:
                _log.exception("The end of %s could not be recorded", job.key)
            self.withdraw(job.key)
            return False
        return True

    def _next(self, now: float) -> Job | None:
        """Whose turn it is: the first of the queue, or of those whose capacity is free, which is given to it."""
        if not self.grants.is_asked:
            return self._queue.pop(now)
        able, queued = self.grants.first(now), self._queue.first(now)
        if able is None or (queued is not None and _rank(queued) < _rank(able)):
            return self._queue.pop(now)
        self.grants.take(able[1], now)
        return able[1]

    def _out_of_line(self, job: Job) -> None:
        if job.place == "worker":
            self._claims.discard(job)
        else:
            self._queue.discard(job.key)
        if job.capacity:
            self.grants.forget(job)
        self._deadlines.discard(job.key)

    def _remove(self, job: Job) -> Job:
        self._out_of_line(job)
        self._parked.pop(job.key, None)
        del self._jobs[job.key]
        return job

    def _time_out(self, job: Job) -> None:
        try:
            what = f"what it needs ({job.session.lifecycle.status_message})" if job.key in self._parked else "its turn"
            job.session.time_out(f"Waited too long for {what}")
        except VesperaError:
            _log.exception("That %s waited too long could not be recorded", job.key)


def _rank(waiting: tuple[int, Job]) -> tuple[int, float]:
    priority, job = waiting
    since = job.session.lifecycle.queued_at
    return -priority, since.timestamp() if since is not None else 0.0
