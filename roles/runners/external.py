"""A worker elsewhere does the work: what it says at a door reaches the execution, which waits here for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from roles.reports import Intake
from vespera_exec.engine.work import Parked, WorkerNeeded
from vespera_exec.errors import CancellationException, InvalidInput
from vespera_exec.model.enums import ExecutionPhase
from vespera_exec.model.progress import ProgressReport

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from roles.reports import Report
    from vespera_exec.engine.work import PauseGate, Work, WorkResult
    from vespera_exec.model.leases import Lease

_ABSENT_SECONDS: Final = 1.0
"""A lease that is found so long after its end ran out while the owner stood still, and could hear nobody."""


class Shift:
    """One worker's time with one execution. Its methods are called on the engine's loop."""

    def __init__(self, *, begins: bool) -> None:
        """`begins` False: the worker has it from an earlier owner, and is in the middle of it."""
        self._begins = begins
        self._opened = anyio.Event()
        self._turned = anyio.Event()
        self._work: Work | None = None
        self._intake: Intake | None = None
        self._group: TaskGroup | None = None
        self._seconds = 0.0
        self._deadline = 0.0
        self._stands = False
        self._end: WorkResult | Parked | None = None
        self._over = False

    # the worker's side

    @property
    def is_open(self) -> bool:
        """Reports can be taken, or could before it was over."""
        return self._opened.is_set()

    async def opened(self) -> None:
        """Returns when it is open."""
        await self._opened.wait()

    @property
    def over(self) -> bool:
        """It takes nothing more: the worker has concluded it, or has been fenced off."""
        return self._over or self._end is not None

    @property
    def is_cancelled(self) -> bool:
        """The worker has to stop: by request, or since its time is up."""
        return self._work is not None and self._work.token.is_cancelled

    @property
    def cancellation_reason(self) -> str:
        return self._work.token.cancellation_reason if self._work is not None else ""

    def prolong(self) -> None:
        """The worker is there: its lease begins anew."""
        self._deadline = anyio.current_time() + self._seconds

    def take(self, report: ProgressReport | Report) -> str | None:
        """Hand one report on; None, or why it was refused. To be followed by `flush`."""
        intake = self._listening()
        before = intake.problems
        try:
            if isinstance(report, ProgressReport):
                intake.offer(report)
            else:
                intake.take(report)
        except InvalidInput as error:
            return error.message
        return intake.last_problem if intake.problems > before else None

    def flush(self) -> str | None:
        """Record what is held back; None, or why it was refused."""
        intake = self._listening()
        before = intake.problems
        intake.finish()
        return intake.last_problem if intake.problems > before else None

    def stand(self) -> None:
        """The worker stands still: where a pause is wanted, it has taken effect."""
        if self._group is not None and self._work is not None and not self._stands:
            self._stands = True
            self._group.start_soon(self._standing, self._work.gate)

    def end(self, how: WorkResult | Parked) -> None:
        """The worker has concluded its work, or needs something before it can go on."""
        self._end = how
        self._turned.set()

    # the execution's side

    async def served(self, work: Work, lease: Lease) -> WorkResult:
        """What the worker made of it.

        Raises:
            WorkerNeeded: it was not heard of for the length of its lease.
            Parked: it needs something before the work can go on.
        """
        self._work, self._seconds = work, lease.seconds
        self._intake = Intake(work.tracking)
        work.tracking.enter_phase(ExecutionPhase.EXECUTION, f"Worker {lease.worker} has it")
        if self._begins:
            again = lease.fence > 1
            message = f"Worker {lease.worker} starts afresh" if again else f"Worker {lease.worker} begins"
            work.tracking.progress(ProgressReport(current=0.0, message=message, reset=again))
        self.prolong()
        try:
            end = await self._attended(self._intake, lease)
        finally:
            self._over, self._group = True, None
            self._opened.set()
        if isinstance(end, Parked):
            raise end
        return end

    async def _attended(self, intake: Intake, lease: Lease) -> WorkResult | Parked:
        with intake.flushing():
            async with anyio.create_task_group() as self._group:
                self._opened.set()
                await self._until_its_end(lease)
                self._group.cancel_scope.cancel()
        assert self._end is not None
        return self._end

    async def _until_its_end(self, lease: Lease) -> None:
        while self._end is None:
            self._turned = anyio.Event()
            left = self._deadline - anyio.current_time()
            if left < -_ABSENT_SECONDS:
                self.prolong()
                continue
            if left <= 0:
                self._end = WorkerNeeded(f"Worker {lease.worker} was not heard of for {lease.seconds:g} seconds")
                break
            with anyio.move_on_after(left):
                await self._turned.wait()

    async def _standing(self, gate: PauseGate) -> None:
        await gate.passed()
        self._stands = False

    def _listening(self) -> Intake:
        """
        Raises:
            CancellationException: it is over.
        """
        if self._intake is None or self.over:
            raise CancellationException("the worker no longer has it")
        return self._intake


class Shifts:
    """Those that are going on, by session."""

    def __init__(self) -> None:
        self._going_on: dict[str, Shift] = {}

    def begin(self, session_id: str) -> None:
        """A worker has claimed it."""
        self._going_on[session_id] = Shift(begins=True)

    def take_over(self, session_id: str) -> None:
        """A worker has it from an earlier owner."""
        self._going_on[session_id] = Shift(begins=False)

    def of(self, session_id: str) -> Shift | None:
        """That of the session; None where it is over."""
        return self._going_on.get(session_id)

    async def serve(self, work: Work, lease: Lease) -> WorkResult:
        """As `Shift.served`."""
        try:
            return await self._going_on[work.execution_id].served(work, lease)
        finally:
            del self._going_on[work.execution_id]
