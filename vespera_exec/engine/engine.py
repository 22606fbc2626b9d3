"""The engine: queue, slots, attempts; decides what a run's end means and writes it down."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, Self

import anyio

from vespera_exec.engine.capacity.grants import CLAIM_SECONDS, Grants
from vespera_exec.engine.capacity.pools import CapacityPools
from vespera_exec.engine.claims import ClaimQueue
from vespera_exec.engine.endings import Endings
from vespera_exec.engine.jobs import Job, Run
from vespera_exec.engine.measuring import Measuring
from vespera_exec.engine.plans.strategies import Strategies
from vespera_exec.engine.queue import WaitingQueue
from vespera_exec.engine.running import OutputSink, RunningExecution
from vespera_exec.errors import ExecutionError, InvalidInput, StoreUnavailable, VesperaError
from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus
from vespera_exec.model.ledger import Sink
from vespera_exec.model.transitions import AT_WORK

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection, Sequence
    from pathlib import Path

    from anyio.abc import TaskGroup

    from vespera_exec.engine.measuring import Sampler
    from vespera_exec.engine.plans.checkpoints import CheckpointReader
    from vespera_exec.engine.plans.coordinator import Coordinator
    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.store.writer import Sample as StoredSample

_log = logging.getLogger(__name__)

S = ExecutionStatus

_STARTABLE = (S.PENDING, S.RECOVERING, *AT_WORK)
"""The last are of one that stood without a slot, paused or parked, and may go on."""
_BEGUN = 1_000_000
_REMOVING_SECONDS = 2.0
_ANNOUNCING_SECONDS = 0.5
_OPENING_SECONDS = 2.0


class Log(Sink, Protocol):
    """The journal, as the engine needs it."""

    async def sync(self) -> int:
        """Returns when everything appended before is on disk."""
        ...

    @property
    def fault(self) -> StoreUnavailable | None:
        """Why it cannot be written now, or None."""
        ...

    def append_samples(self, samples: Sequence[StoredSample]) -> None:
        """Keep measurements, where there is time."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    max_concurrent: int = 4
    result_limit_bytes: int = 1024 * 1024
    read_interval: float = 0.02
    secrets: tuple[bytes, ...] = ()
    """Masked wherever the words of the work are kept or shown."""
    adopts_orphans: bool = False
    """The process is a subreaper: orphans of a killed shim come to it."""


class Engine:
    """Runs jobs, at most `max_concurrent` at a time. One event loop; its methods are called there."""

    def __init__(
        self,
        log: Log,
        *,
        owner: str,
        scratch_root: Path,
        open_output: Callable[[str], OutputSink],
        sampler: Sampler | None = None,
        on_done: Callable[[Job], None] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        options: EngineOptions | None = None,
        capacity: CapacityPools | None = None,
        strategies: Strategies | None = None,
        checkpoints: CheckpointReader | None = None,
    ) -> None:
        self._log = log
        self._scratch_root = scratch_root
        self._open_output = open_output
        self._measured = Measuring(sampler, log.append_samples)
        self._clock = clock
        self._options = options or EngineOptions()
        self._endings = Endings(owner=owner, clock=clock, result_limit_bytes=self._options.result_limit_bytes)
        self._on_done = on_done
        self.strategies = strategies if strategies is not None else Strategies.built_in()
        self.checkpoints = checkpoints
        self._queue: WaitingQueue[Job] = WaitingQueue()
        self._waiting: dict[str, Job] = {}
        """All that have no slot: in the queue, parked, or paused."""
        self._parked: dict[str, None] = {}
        """Those of them that wait for something, and whose PAUSED is that wait."""
        self._deadlines: WaitingQueue[Job] = WaitingQueue()
        """Those in the queue, or parked, whose role limits the wait; each until then."""
        self._withdrawn: deque[str] = deque()
        self._claims = ClaimQueue()
        pools = CapacityPools() if capacity is None else capacity
        self.grants = Grants(pools, clock=clock, wake=self._rouse, stir=self._claims.stir)
        """Who may begin of those that need capacity, and who holds it."""
        self._slots: dict[str, RunningExecution] = {}
        self._elsewhere: dict[str, RunningExecution] = {}
        """Those that workers do, who take no slot."""
        self._plans: dict[str, RunningExecution] = {}
        """Those of coordinators, who take none either."""
        self._held: set[str] = set()
        """The groups whose jobs do not get their turn."""
        self._runs: dict[str, Run] = {}
        """By run id, until its end is on disk; a task may have its next run by then."""
        self._latest: dict[str, Run] = {}
        """By task id."""
        self._wake = anyio.Event()
        self._group: TaskGroup | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Self]:
        """The engine's lifetime. Leaving it ends all processes and concludes nothing: the next owner does."""
        self._loop = asyncio.get_running_loop()
        async with anyio.create_task_group() as group:
            self._group = group
            group.start_soon(self._dispatch)
            try:
                yield self
            finally:
                self._group = None
                group.cancel_scope.cancel()

    def submit(self, job: Job) -> Run:
        """Queue a job that is PENDING, or RECOVERING from a dead owner. Its run is active until its end is on disk.

        One that is PAUSED waits for `unpark`. One that a worker has goes on, and so does the coordinator of a plan.
        """
        life = job.session.lifecycle
        run = Run(life.run_id, life.task_id, job.session)
        self._runs[life.run_id] = self._latest[life.task_id] = run
        if job.place == "coordinator" or (job.place == "worker" and life.lease is not None):
            if life.status is S.PAUSED:
                self.hold(job.key)
            self.grants.adopt(job)
            self._heed(job)
            self._start(job)
        else:
            self._wait(job)
        return run

    def claim(self, roles: Collection[str], grant: Callable[[Job], None]) -> Job | None:
        """Give the next of these roles to a worker, or None. `grant` records the lease, in one decision with the start.

        The start is not yet on disk; whoever tells the worker of it waits for that.
        """
        now = self._clock.monotonic()
        while (job := self._claims.pop(roles, now, lambda job: self.grants.offer(job, now))) is not None:
            with job.session.ledger:
                if job.key not in self._waiting or job.session.lifecycle.status not in _STARTABLE:
                    self.grants.forget(job)
                    continue  # paused since, or about to leave
                grant(job)
                self.grants.take(job, now)
                self._begin(job.session)
            self._deadlines.discard(job.key)
            del self._waiting[job.key]
            self._start(job)
            return job
        return None

    async def offered(self, roles: Collection[str]) -> None:
        """Returns when there may be something new for `claim`."""
        # Whoever waits for capacity keeps its place in line for as long as workers ask.
        with anyio.move_on_after(CLAIM_SECONDS / 2 if self.grants.has_offers else None):
            await self._claims.news(roles, self._clock.monotonic())

    def unpark(self, session: ExecutionSession) -> None:
        """Queue again the job of a session that has left PAUSED without a slot; let it go where that has ended.

        It may wait for its turn as long as any other. Nothing, where it stands still.
        """
        job = self._waiting.get(session.session_id)
        if job is None or session.lifecycle.status is S.PAUSED:
            return
        self._parked.pop(job.key, None)
        if session.lifecycle.status.is_terminal:
            self._withdraw(job.key)
        else:
            self._enqueue(job)

    def hold(self, group: str) -> None:
        """Keep the jobs of a group that wait for their turn from getting it, those to come included, until `go_on`."""
        if group in self._held:
            return
        self._held.add(group)
        for job in [job for job in self._waiting.values() if job.group == group and job.key not in self._parked]:
            self._queue.discard(job.key)
            self._claims.discard(job)
            self.grants.forget(job)
            self._deadlines.discard(job.key)

    def go_on(self, group: str) -> None:
        """Take back a `hold`. They may wait for their turn as long as any other, from now on."""
        if group not in self._held:
            return
        self._held.remove(group)
        for job in [job for job in self._waiting.values() if job.group == group and job.key not in self._parked]:
            if job.session.lifecycle.status is not S.PAUSED:
                self._enqueue(job)

    def coordinator(self, execution_id: str) -> Coordinator | None:
        """That of the execution of a plan while it runs and has its board, or None."""
        execution = self._plans.get(execution_id)
        found = execution.job.coordinator if execution is not None else None
        return found if found is not None and found.is_open else None

    def asking(self, group: str) -> dict[str, ExecutionSession]:
        """The sessions of a group that wait for an answer, by their steps, in the order in which they began to."""
        found: dict[str, ExecutionSession] = {}
        for key in self._parked:
            job = self._waiting[key]
            step = job.task.record.step_id
            if job.group == group and step is not None and job.session.lifecycle.open_inputs:
                found[step] = job.session
        return found

    async def opened(self, execution_id: str) -> Coordinator | None:
        """As `coordinator`, for which it waits a little where the plan has just begun, or been taken over."""
        execution = self._plans.get(execution_id)
        if execution is not None and execution.job.coordinator is not None:
            with anyio.move_on_after(_OPENING_SECONDS):
                await execution.job.coordinator.opened.wait()
        return self.coordinator(execution_id)

    def runs_of(self, group: str) -> list[Run]:
        """The runs of a group that wait, or are at work."""
        at_work = (each.job for each in (*self._slots.values(), *self._elsewhere.values()))
        jobs = [job for job in (*self._waiting.values(), *at_work) if job.group == group]
        return [run for job in jobs if (run := self._runs.get(job.session.run_id)) is not None]

    def run_of(self, task_id: str) -> Run | None:
        """The active run of a task, or None."""
        return self._latest.get(task_id)

    def run(self, run_id: str) -> Run | None:
        """The run of this id while it is active, or None."""
        return self._runs.get(run_id)

    def execution_of(self, session_id: str) -> RunningExecution | None:
        """The execution of a session that has a slot or a worker, or of a plan, also while it is paused, or None."""
        return self._slots.get(session_id) or self._elsewhere.get(session_id) or self._plans.get(session_id)

    def job(self, session_id: str) -> Job | None:
        """That of a session which waits here or is at work, or None."""
        execution = self.execution_of(session_id)
        return execution.job if execution is not None else self._waiting.get(session_id)

    def waits_for(self, session_id: str) -> str | None:
        """The capacity that a session waits for, in words; None where it waits for none."""
        return "; ".join(map(str, self.grants.shortages(session_id))) or None

    @property
    def queued(self) -> int:
        return len(self._queue) + len(self._claims) + len(self.grants)

    @property
    def active(self) -> int:
        return len(self._slots) + len(self._elsewhere)

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or backs off."""
        return not self._runs

    # the queue

    def _wait(self, job: Job) -> None:
        """Until there is a slot, or it is unparked, or it ends."""
        self._keep(job)
        self._heed(job)

    def _keep(self, job: Job) -> None:
        self._waiting[job.key] = job
        if job.session.lifecycle.status is not S.PAUSED:
            self._enqueue(job)
        elif job.session.lifecycle.open_inputs:
            self._park(job)

    def _heed(self, job: Job) -> None:
        """Let it leave when it is cancelled without a slot."""
        if job.session.cancellation_token is not None:
            job.session.cancellation_token.on_cancel(lambda _: self._withdraw(job.key))

    def _park(self, job: Job) -> None:
        """Until `unpark`, or for as long as it may wait, counted from when it was parked, also by an earlier owner."""
        self._waiting[job.key] = job
        self._parked[job.key] = None
        since = job.session.lifecycle.paused_at
        if job.policy.wait_timeout_seconds and since is not None:
            waited = max(0.0, (self._clock.now() - since).total_seconds())
            latest = self._clock.monotonic() + max(0.0, job.policy.wait_timeout_seconds - waited)
            self._deadlines.put(job.key, job, priority=0, not_before=latest)
            self._wake.set()

    def _enqueue(self, job: Job) -> None:
        if job.group is not None and job.group in self._held:
            return
        life, now = job.session.lifecycle, self._clock.monotonic()
        not_before = None
        if life.not_before is not None:
            not_before = now + (life.not_before - self._clock.now()).total_seconds()
        if job.policy.wait_timeout_seconds:
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
            self._withdraw(job.key)
            return False
        return True

    def _withdraw(self, key: str) -> None:
        """Called from any thread when a token is cancelled."""
        self._withdrawn.append(key)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._rouse)

    def _rouse(self) -> None:
        self._wake.set()

    async def _dispatch(self) -> None:
        """Fill the free slots whenever something changes, or the next held job or deadline is due."""
        while (group := self._group) is not None:
            self._wake = anyio.Event()
            while self._withdrawn:
                if job := self._waiting.get(self._withdrawn.popleft()):
                    self._leave(job, group)
            now = self._clock.monotonic()
            while job := self._deadlines.pop(now):
                if job.session.lifecycle.status is not S.PAUSED or job.key in self._parked:
                    self._wait_no_longer(job)
                    self._leave(job, group)
            self.grants.settle(now)
            while len(self._slots) < self._options.max_concurrent and (job := self._next(now)):
                self._deadlines.discard(job.key)
                if job.session.lifecycle.status is S.PAUSED:
                    continue  # until `unpark`
                del self._waiting[job.key]
                self._start(job)
            self.grants.tell(now)
            next_times = (self._queue.next_time(), self._deadlines.next_time(), self.grants.next_time(now))
            times = [time for time in next_times if time is not None]
            if not times:
                await self._wake.wait()
                continue
            with anyio.move_on_after(max(0.0, min(times) - now)):
                await self._wake.wait()

    def _next(self, now: float) -> Job | None:
        """Whose turn it is: the first of the queue, or of those whose capacity is free, which is given to it."""
        able, queued = self.grants.first(now), self._queue.first(now)
        if able is None or (queued is not None and _rank(queued) < _rank(able)):
            return self._queue.pop(now)
        self.grants.take(able[1], now)
        return able[1]

    def _wait_no_longer(self, job: Job) -> None:
        try:
            what = f"what it needs ({job.session.lifecycle.status_message})" if job.key in self._parked else "its turn"
            job.session.time_out(f"Waited too long for {what}")
        except VesperaError:
            _log.exception("That %s waited too long could not be recorded", job.key)

    def _leave(self, job: Job, group: TaskGroup) -> None:
        """It ended before its turn came, or is to end and nothing of it runs."""
        del self._waiting[job.key]
        self._parked.pop(job.key, None)
        self._queue.discard(job.key)
        self._claims.discard(job)
        self.grants.forget(job)
        self._deadlines.discard(job.key)
        self._end_if_cancelling(job)
        group.start_soon(self._done, job)

    def _end_if_cancelling(self, job: Job) -> None:
        try:
            if job.session.lifecycle.status is S.CANCELLING:
                job.session.end_cancelled()
        except VesperaError:
            _log.exception("The end of %s could not be recorded", job.key)

    # one execution

    def _start(self, job: Job) -> None:
        if (group := self._group) is None:
            return  # the owner goes; the next one finds it as it is
        execution = self._new_execution(job)
        self._place_of(job)[job.key] = execution
        group.start_soon(self._execute, job, execution, group)

    def _place_of(self, job: Job) -> dict[str, RunningExecution]:
        match job.place:
            case "slot":
                return self._slots
            case "worker":
                return self._elsewhere
            case "coordinator":
                return self._plans

    async def _execute(self, job: Job, execution: RunningExecution, group: TaskGroup) -> None:
        following = None
        try:
            status = job.session.lifecycle.status
            if status in _STARTABLE or (job.place != "slot" and not status.is_terminal):
                following = await self._attempt(job, execution, group)
            else:
                self._end_if_cancelling(job)
        # The supervisor of one execution: what goes wrong with it is its end, and no other's.
        except Exception as fault:  # noqa: BLE001
            self._give_up(job, fault)
        finally:
            self._place_of(job).pop(job.key, None)
            self._held.discard(job.key)
            self.grants.give_back(job)
            execution.concluded.set()
            self._wake.set()
        if following is None:
            await self._done(job)
            return
        if following is job:
            self._keep(job)
            return
        # At once, so that a cancel finds it while its beginning is still on the way to the disk.
        self._runs[following.session.run_id].session = following.session
        await self._durable(job)
        self._wait(following)

    async def _attempt(self, job: Job, execution: RunningExecution, group: TaskGroup) -> Job | None:
        """One execution from its start to its conclusion, or until it is parked.

        Returns the job of the next attempt, where there is one, or `job` itself, which is parked.
        """
        if job.place == "slot" or job.session.lifecycle.status is S.PENDING:
            self._begin(job.session)
        await self._durable(job)
        try:
            outcome = await execution.run(group)
        finally:
            await self._remove(self._scratch_root / job.key)
        return self._endings.conclude(job, outcome)

    def _new_execution(self, job: Job) -> RunningExecution:
        return RunningExecution(
            job,
            open_output=self._open_output,
            sampled=self._measured,
            scratch=self._scratch_root / job.key,
            before_ladder=self._announced,
            on_disk=partial(self._durable, job),
            refusing=lambda: self._log.fault is not None,
            secrets=self._options.secrets,
            adopts_orphans=self._options.adopts_orphans,
            read_interval=self._options.read_interval,
        )

    def _begin(self, session: ExecutionSession) -> None:
        with session.ledger:
            life = session.lifecycle
            found = "from its last checkpoint" if life.checkpoint_at else "from the start, for want of a checkpoint"
            if life.status is S.PENDING:
                session.start_execution()
            elif life.status is S.RECOVERING:
                session.update_status(S.PREPARING, f"It goes on {found}")
            elif life.is_parked:
                # On disk before anything of it runs: from here on it has begun.
                session.enter_phase(ExecutionPhase.INITIALIZATION, "It is called again")
            else:
                session.phases.exit(f"It goes on {found}")  # of its recovery; the clock of its work runs from here

    async def _remove(self, scratch: Path) -> None:
        """What the cleanup of the role has left."""
        if not os.path.lexists(scratch):  # noqa: ASYNC240 - a thread would cost more than the look
            return
        # Bounded, off the loop; a scratch folder that nobody owns any more would stay for ever.
        with anyio.move_on_after(_REMOVING_SECONDS, shield=True):
            await anyio.to_thread.run_sync(partial(shutil.rmtree, scratch, ignore_errors=True), abandon_on_cancel=True)

    def _give_up(self, job: Job, fault: Exception) -> None:
        """End an execution that the engine itself could not bring to its end."""
        _log.error("Execution %s is given up", job.key, exc_info=fault)
        try:
            job.session.fail(fault)
        except VesperaError:
            _log.exception("The end of %s could not be recorded", job.key)

    async def _done(self, job: Job) -> None:
        """Its end is on disk, or will never be: let go whoever waits for the run."""
        with job.task.ledger:
            pass  # another thread may be about to append the end that has been seen here
        await self._durable(job)
        run = self._runs.pop(job.session.run_id, None)
        if run is not None:
            run.done.set()
        task_id = job.session.task_id
        if self._latest.get(task_id) is run:
            del self._latest[task_id]
            if self._on_done is not None:
                self._on_done(job)

    async def _durable(self, job: Job) -> None:
        """Wait until all that was decided is on disk, however long the disk refuses.

        A decision that the store will never take is logged, and no longer waited for.
        """
        pause = 0.05
        while True:
            try:
                await self._log.sync()
            except StoreUnavailable:
                await anyio.sleep(pause)
                pause = min(pause * 2, 2.0)
            except VesperaError:
                _log.exception("A decision about execution %s was refused by the store", job.key)
                return
            else:
                return

    async def _announced(self) -> None:
        """Give the log its moment. A cancel does not wait for a disk that refuses: it may be what frees it."""
        with anyio.move_on_after(_ANNOUNCING_SECONDS):
            try:
                await self._log.sync()
            except VesperaError as fault:
                _log.warning("A cancel goes on before it is on disk: %s", fault)


def _rank(waiting: tuple[int, Job]) -> tuple[int, float]:
    priority, job = waiting
    since = job.session.lifecycle.queued_at
    return -priority, since.timestamp() if since is not None else 0.0
