"""The engine: submit, wait, start, attempt, conclude. What waits is in `waiting`, what an end means in `endings`."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

import anyio

from vespera_exec.engine.capacity.pools import CapacityPools
from vespera_exec.engine.disk import Disk
from vespera_exec.engine.endings import Endings
from vespera_exec.engine.jobs import Job, Run
from vespera_exec.engine.measuring import Measuring
from vespera_exec.engine.plans.coordinator import Coordinator
from vespera_exec.engine.plans.strategies import Strategies
from vespera_exec.engine.running import OutputSink, RunningExecution
from vespera_exec.engine.waiting import STARTABLE, Waiting
from vespera_exec.errors import VesperaError
from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection
    from pathlib import Path

    from anyio.abc import TaskGroup

    from vespera_exec.engine.capacity.grants import Grants
    from vespera_exec.engine.disk import Log
    from vespera_exec.engine.measuring import Sampler
    from vespera_exec.engine.plans.checkpoints import CheckpointReader
    from vespera_exec.model.cancellation import CancellationToken
    from vespera_exec.model.session import ExecutionSession

_log = logging.getLogger(__name__)

S = ExecutionStatus

_REMOVING_SECONDS = 2.0
_OPENING_SECONDS = 2.0


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
        self._disk = Disk(log)
        self._scratch_root = scratch_root
        self._open_output = open_output
        self._measured = Measuring(sampler, log.append_samples)
        self._clock = clock
        self._options = options or EngineOptions()
        self._endings = Endings(owner=owner, clock=clock, result_limit_bytes=self._options.result_limit_bytes)
        self._on_done = on_done
        self.strategies = strategies if strategies is not None else Strategies.built_in()
        self.checkpoints = checkpoints
        self._waiting = Waiting(CapacityPools() if capacity is None else capacity, clock=clock)
        self._slots: dict[str, RunningExecution] = {}
        self._elsewhere: dict[str, RunningExecution] = {}
        """Those that workers do, who take no slot."""
        self._plans: dict[str, RunningExecution] = {}
        """Those of coordinators, who take none either."""
        self._runs: dict[str, Run] = {}
        """By run id, until its end is on disk; a task may have its next run by then."""
        self._latest: dict[str, Run] = {}
        """By task id."""
        self._group: TaskGroup | None = None

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Self]:
        """The engine's lifetime. Leaving it ends all processes and concludes nothing: the next owner does."""
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
        self._heed(job)
        if job.place == "coordinator" or (job.place == "worker" and life.lease is not None):
            if life.status is S.PAUSED:
                self.hold(job.key)
            self.grants.adopt(job)
            self._start(job)
        else:
            self._waiting.put(job)
        return run

    def claim(self, roles: Collection[str], grant: Callable[[Job], None]) -> Job | None:
        """Give the next of these roles to a worker, or None. `grant` records the lease, in one decision with the start.

        The start is not yet on disk; whoever tells the worker of it waits for that.
        """
        job = self._waiting.claim(roles, grant, self._begin)
        if job is not None:
            self._start(job)
        return job

    async def offered(self, roles: Collection[str]) -> None:
        """Returns when there may be something new for `claim`."""
        await self._waiting.offered(roles)

    def unpark(self, session: ExecutionSession) -> None:
        """Queue again the job of a session that has left PAUSED without a slot; let it go where that has ended.

        It may wait for its turn as long as any other. Nothing, where it stands still.
        """
        self._waiting.unpark(session)

    def hold(self, group: str) -> None:
        """Keep the jobs of a group that wait for their turn from getting it, those to come included, until `go_on`."""
        self._waiting.hold(group)

    def go_on(self, group: str) -> None:
        """Take back a `hold`. They may wait for their turn as long as any other, from now on."""
        self._waiting.go_on(group)

    @property
    def grants(self) -> Grants:
        """Who may begin of those that need capacity, and who holds it."""
        return self._waiting.grants

    def coordinator(self, execution_id: str) -> Coordinator | None:
        """That of the execution of a plan while it runs and has its board, or None."""
        execution = self._plans.get(execution_id)
        found = execution.job.coordinator if execution is not None else None
        return found if isinstance(found, Coordinator) and found.is_open else None

    def asking(self, group: str) -> dict[str, ExecutionSession]:
        """The sessions of a group that wait for an answer, by their steps, in the order in which they began to."""
        return self._waiting.asking(group)

    async def opened(self, execution_id: str) -> Coordinator | None:
        """As `coordinator`, for which it waits a little where the plan has just begun, or been taken over."""
        execution = self._plans.get(execution_id)
        if execution is not None and execution.job.coordinator is not None:
            with anyio.move_on_after(_OPENING_SECONDS):
                await execution.job.coordinator.opened.wait()
        return self.coordinator(execution_id)

    def runs_of(self, group: str) -> list[Run]:
        """The runs of a group that wait, or are at work."""
        at_work = [each.job for each in (*self._slots.values(), *self._elsewhere.values()) if each.job.group == group]
        jobs = [*self._waiting.of(group), *at_work]
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
        return len(self._waiting)

    @property
    def active(self) -> int:
        return len(self._slots) + len(self._elsewhere)

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or backs off."""
        return not self._runs

    # who is next

    async def _dispatch(self) -> None:
        """Fill the free slots whenever something changes, or the next held job or deadline is due."""
        while (group := self._group) is not None:
            for job in self._waiting.departed():
                self._end_if_cancelling(job)
                group.start_soon(self._done, job)
            for job in self._waiting.admitted(self._options.max_concurrent - len(self._slots)):
                self._start(job)
            await self._waiting.changed()

    def _heed(self, job: Job) -> None:
        """Let it leave when it is cancelled without a slot."""
        if job.session.cancellation_token is not None:
            # One for each that waits: a closure would take twice as much.
            job.session.cancellation_token.on_cancel(partial(_withdraw, self._waiting, job.key))

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
            if status in STARTABLE or (job.place != "slot" and not status.is_terminal):
                following = await self._attempt(job, execution, group)
            else:
                self._end_if_cancelling(job)
        # The supervisor of one execution: what goes wrong with it is its end, and no other's.
        except Exception as fault:  # noqa: BLE001
            self._give_up(job, fault)
        finally:
            self._place_of(job).pop(job.key, None)
            if job.capacity or job.place != "slot":  # what an owner took over may hold some, whatever it needs now
                self.grants.give_back(job)
                self._waiting.free(job.key)
            execution.concluded.set()
            self._waiting.rouse()
        if following is None:
            await self._done(job)
            return
        if following is job:
            self._waiting.put(job)
            return
        # At once, so that a cancel finds it while its beginning is still on the way to the disk.
        self._runs[following.session.run_id].session = following.session
        await self._disk.has(job.key)
        self._heed(following)
        self._waiting.put(following)

    async def _attempt(self, job: Job, execution: RunningExecution, group: TaskGroup) -> Job | None:
        """One execution from its start to its conclusion, or until it is parked.

        Returns the job of the next attempt, where there is one, or `job` itself, which is parked.
        """
        if job.place == "slot" or job.session.lifecycle.status is S.PENDING:
            self._begin(job)
        await self._disk.has(job.key)
        try:
            outcome = await execution.run(group)
        finally:
            await self._remove(execution.scratch)
        return self._endings.conclude(job, outcome)

    def _end_if_cancelling(self, job: Job) -> None:
        try:
            if job.session.lifecycle.status is S.CANCELLING:
                job.session.end_cancelled()
        except VesperaError:
            _log.exception("The end of %s could not be recorded", job.key)

    def _new_execution(self, job: Job) -> RunningExecution:
        return RunningExecution(
            job,
            open_output=self._open_output,
            sampled=self._measured,
            scratch=self._scratch_root / job.key,
            before_ladder=self._disk.had_its_moment,
            on_disk=partial(self._disk.has, job.key),
            refusing=self._disk.refuses,
            secrets=self._options.secrets,
            adopts_orphans=self._options.adopts_orphans,
            read_interval=self._options.read_interval,
        )

    def _begin(self, job: Job) -> None:
        session = job.session
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
        await self._disk.has(job.key)
        run = self._runs.pop(job.session.run_id, None)
        if run is not None:
            run.done.set()
        task_id = job.session.task_id
        if self._latest.get(task_id) is run:
            del self._latest[task_id]
            if self._on_done is not None:
                self._on_done(job)


def _withdraw(waiting: Waiting, key: str, _: CancellationToken) -> None:
    waiting.withdraw(key)
