"""One execution while it runs: its work, its processes, the ladder that ends it, and its outcome."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, cast

import anyio

from vespera_exec.engine.done import Done
from vespera_exec.engine.jobs import Job, Outcome, PutBack
from vespera_exec.engine.pausing import Pauses
from vespera_exec.engine.processes import ProcessLauncher
from vespera_exec.engine.tracking import SessionTracking
from vespera_exec.engine.work import Process, ProcessExit, ProcessSpec, Work
from vespera_exec.errors import CancellationException, ExecutionError
from vespera_exec.model.cancellation import CancellationToken
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.store.output import SecretMask

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from anyio.abc import TaskGroup

    from vespera_exec.model.session import ExecutionSession

CANCEL_SECONDS = 5.0
"""From the request to the terminal event, whatever the work does."""

_STANDING_LOOK_SECONDS = 1.0
"""Between two looks at a clock that stands: of a paused execution, or of a plan that only waits."""

_log = logging.getLogger(__name__)


class OutputSink(Protocol):
    """Where what the work writes is kept."""

    def write(self, stream: str, data: bytes) -> None: ...

    def close(self) -> None: ...


class RunningExecution:
    """Runs one job to its outcome.

    What only processes need (launcher, output, usage sampling) is opened when the first is launched:
    `open_output` and `sampled`, a context around the time in which there are processes, told their roots.
    """

    def __init__(
        self,
        job: Job,
        *,
        open_output: Callable[[str], OutputSink],
        sampled: Callable[[ExecutionSession, Callable[[], tuple[int, ...]]], AbstractContextManager[object]],
        scratch: Path,
        before_ladder: Callable[[], Awaitable[object]],
        on_disk: Callable[[], Awaitable[object]],
        refusing: Callable[[], bool] = lambda: False,
        secrets: tuple[bytes, ...] = (),
        adopts_orphans: bool = False,
        read_interval: float = 0.02,
    ) -> None:
        self.job = job
        self._secrets = secrets
        self._open_output = open_output
        self._sampled = sampled
        self.scratch = scratch
        self._before_ladder = before_ladder
        self._tracking = SessionTracking(job.session, refusing)
        self._launcher = ProcessLauncher(
            execution_id=job.session.session_id,
            python=sys.executable,
            adopts_orphans=adopts_orphans,
            read_interval=read_interval,
        )
        self._pauses = Pauses(job.session, job.coordinator or self._launcher, on_disk)
        if job.coordinator is not None and job.session.lifecycle.status is ExecutionStatus.PAUSED:
            self._pauses.pause(job.session.lifecycle.status_message)  # it was, when its owner died
        self._keeping = False
        self._group: TaskGroup | None = None
        self._output: OutputSink | None = None
        self._scope = anyio.CancelScope()
        self._news = asyncio.Event()
        self._ended = False
        self._cancelled = False
        self._timed_out = False
        self._put_back: PutBack | None = None
        self._closed = False
        self.concluded = Done()
        """Set when its end, or that it is parked, has been decided; or when its owner goes."""
        self._launching: asyncio.Event | None = None
        """From the first launch on; set when the launcher takes it, or never will."""
        self._outcome = Outcome(error=CancellationException("cancelled"))
        self._rung: str | None = None

    @property
    def roots(self) -> tuple[int, ...]:
        """Pids of the shims, for the usage sampler."""
        return self._launcher.roots

    @property
    def pause_pending(self) -> bool:
        """A pause is wanted and has not taken effect: the work has not come to a place where it stops."""
        return self._pauses.pending

    @property
    def pause_reason(self) -> str | None:
        """Why it stands still, or is to; None where it is not to."""
        return self._pauses.wanted

    def check_stoppable(self) -> None:
        """
        Raises:
            PauseUnsupported: this system cannot stop what runs.
        """
        self._launcher.check_stoppable()

    def pause(self, reason: str) -> bool:
        """Ask it to stand still; False when its work is over or is being ended. PAUSED says that it does.

        Raises:
            PauseUnsupported: this system cannot stop what runs.
        """
        accepted = self._pauses.pause(reason)
        self._keep_pauses()
        return accepted

    def resume(self, reason: str) -> bool:
        """Record that it goes on, which it does once that is on disk; False as for `pause`."""
        accepted = self._pauses.resume(reason)
        self._keep_pauses()
        self._news.set()
        return accepted

    def put_back(self, place: PutBack) -> bool:
        """End its work, not the execution, which then goes on from `place`; False when it is over, or being ended."""
        if self.over:
            return False
        self._put_back = place
        self._news.set()
        return True

    async def settled(self) -> None:
        """Returns when it stands or goes on as was asked, is asked otherwise, or is over."""
        await self._pauses.settled()

    async def run(self, group: TaskGroup) -> Outcome:
        """The outcome, with nothing of the work left behind.

        The work itself is a task of `group`: an asynchronous callable that swallows its cancellation
        cannot be ended, and is left there, fenced off (`abandoned`). Cancelled itself, `run` ends all
        processes and concludes nothing: that is how an owner goes.
        """
        loop = asyncio.get_running_loop()
        requested = self.job.session.cancellation_token or CancellationToken()
        if requested.is_cancelled and self.job.place == "slot":
            self._cancelled = True
            self._pauses.close()
            return Outcome(error=CancellationException(requested.cancellation_reason))
        # The work's own token: a timeout cancels the work, but it is no request to cancel the execution.
        token = requested.child()

        def heard() -> None:
            self._cancelled = True
            self._news.set()

        def tell(_: CancellationToken) -> None:
            loop.call_soon_threadsafe(heard)

        undo = requested.on_cancel(tell)
        try:
            self._group = group
            self._keep_pauses()
            group.start_soon(self._run_work, self._work(token))
            await self._until_news()
            if self._launching is None or self.over:
                await self._stop(token)
            else:
                await self._with_processes(token, self._launching)
        # The boundary to what stands around the work (its output, the callbacks of its processes).
        except Exception as fault:  # noqa: BLE001
            await self._give_up(fault)
        finally:
            undo()
            token.detach()
            self._pauses.close()
            self._refuse_launches()
            self._tracking.fence()  # parked, it does not end: what the work has left behind must not speak for it
            if not self._ended:
                self._scope.cancel()
        seen = token.is_cancelled and isinstance(self._outcome.error, CancellationException)
        if seen and self._rung is None and self._launching is None:
            self._rung = "token"  # it was gone before the ladder was begun
        return replace(
            self._outcome,
            rung=self._rung,
            timed_out=self._timed_out,
            pause_wanted=self._pauses.wanted,
            put_back=self._put_back,
        )

    async def launch(self, spec: ProcessSpec) -> Process:
        """`Launcher`, which keeps what the processes write, before the runner sees it."""
        if self._launching is None and not self._closed:
            self._launching = asyncio.Event()
            self._news.set()
        if self._launching is not None:
            await self._launching.wait()
        await self._pauses.gate.passed()
        if self._closed or self._output is None:
            raise CancellationException("the execution is over, or is being cancelled")
        heard = _Heard(self._output, spec, self._secrets)
        heard.process = await self._launcher.launch(
            replace(spec, on_output=heard.output, on_report=heard.report if spec.on_report is not None else None)
        )
        return heard

    @property
    def over(self) -> bool:
        """Its work has ended, or has to."""
        return self._ended or self._cancelled or self._timed_out or self._put_back is not None or self._closed

    def _work(self, token: CancellationToken) -> Work:
        record, life = self.job.task.record, self.job.session.lifecycle
        return Work(
            task_id=record.task_id,
            execution_id=life.execution_id,
            title=record.title,
            description=record.description,
            inputs=record.inputs,
            token=token,
            tracking=self._tracking,
            gate=self._pauses.gate,
            launcher=self,
            scratch=self.scratch,
            caller=self.job.caller,
            attempt=life.attempt,
            checkpoint=life.checkpoint,
            answers=life.answers,
        )

    async def _run_work(self, work: Work) -> None:
        try:
            with self._scope:
                if self.job.place == "slot":  # others have begun: they are to hear of it, and to stop by themselves
                    await self._pauses.gate.passed()
                    work.token.throw_if_cancelled()
                self._outcome = Outcome(result=await self.job.run(work))
        except asyncio.CancelledError:
            if anyio.current_effective_deadline() == -math.inf:
                raise  # the owner goes
            # Something inside the work was cancelled, but not the work: let out, it would end the whole engine.
            self._outcome = Outcome(error=ExecutionError("The work was cancelled from within", code="CancelledError"))
        except SystemExit as exit:
            left = ExecutionError(f"The work left by sys.exit({exit.code!r})", code="SystemExit")
            self._outcome = Outcome(error=left)
        # The boundary to the role's code: its fault is its outcome.
        except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001
            self._outcome = Outcome(error=error)
        finally:
            self._ended = True
            self._pauses.close()
            self._news.set()

    async def _with_processes(self, token: CancellationToken, launching: asyncio.Event) -> None:
        self._output = self._open_output(self.job.key)
        try:
            with self._sampled(self.job.session, lambda: self.roots):
                async with self._launcher:
                    launching.set()
                    await self._until_news()
                    await self._stop(token)
        finally:
            self._output.close()

    async def _until_news(self) -> None:
        """Until the work has ended or has to, or wants to launch its first process."""
        limit = self.job.policy.timeout_seconds
        while not self.over and (self._launching is None or self._launching.is_set()):
            self._news.clear()
            if not limit:
                await self._news.wait()
                continue
            left = limit - self.job.session.elapsed_seconds
            if left <= 0:
                self._timed_out = True
                return
            life = self.job.session.lifecycle
            if life.status is ExecutionStatus.PAUSED or life.is_parked:
                left = max(left, _STANDING_LOOK_SECONDS)
            with anyio.move_on_after(left):
                await self._news.wait()

    async def _stop(self, token: CancellationToken) -> None:
        """Down the ladder until the work has ended; it alone says then by which rung. Nothing where it has ended."""
        if self._ended:
            return
        self._pauses.close()
        grace = self.job.policy.grace_seconds
        with anyio.move_on_after(max(CANCEL_SECONDS, grace + 1)):
            await self._before_ladder()
            if self._timed_out:
                token.cancel(f"Timeout after {self.job.policy.timeout_seconds:g} seconds of work")
            elif self._put_back is not None:
                token.cancel(f"It goes back to checkpoint {self._put_back.checkpoint_id}")
            self._refuse_launches()
            self._rung = await self._launcher.cancel(grace) or "token"
            with anyio.move_on_after(grace):
                await self._until_ended()
            if not self._ended:
                # What is done elsewhere cannot be ended from here: it is fenced off, which is all.
                self._rung = "abandoned" if self.job.place == "worker" else "scope"
                self._scope.cancel()
                await self._until_ended()
        if not self._ended:
            self._abandon()

    async def _give_up(self, fault: Exception) -> None:
        """End the work, because what it stands on has failed."""
        self._refuse_launches()
        self._scope.cancel()
        with anyio.move_on_after(CANCEL_SECONDS):
            await self._until_ended()
        if not self._ended:
            self._abandon()
        self._outcome = Outcome(error=_alone(fault))

    async def _until_ended(self) -> None:
        while not self._ended:
            self._news.clear()
            await self._news.wait()

    def _keep_pauses(self) -> None:
        if self._group is not None and not self._keeping and not self._pauses.is_settled:
            self._keeping = True
            self._group.start_soon(self._kept)

    async def _kept(self) -> None:
        try:
            await self._pauses.keep()
        # The supervisor of the pauses: a fault of theirs ends no work, and no other execution.
        except Exception:  # noqa: BLE001
            _log.exception("A pause or resume of %s has failed; another may be asked for", self.job.key)
        finally:
            self._keeping = False

    def _abandon(self) -> None:
        self._rung = "abandoned"
        _log.warning("Work of %s will not stop; it is fenced off and abandoned", self.job.key)

    def _refuse_launches(self) -> None:
        """Nothing starts any more, and whoever waits to start hears it."""
        self._closed = True
        if self._launching is not None:
            self._launching.set()
        self._pauses.gate.open()


class _Heard:
    """`Process` whose words are kept, and masked before anybody else hears them."""

    def __init__(self, output: OutputSink, spec: ProcessSpec, secrets: tuple[bytes, ...]) -> None:
        self._output = output
        self._spec = spec
        self._reports = SecretMask(secrets)
        self._masks = {stream: SecretMask(secrets) for stream in ("stdout", "stderr")}
        self.process: Process | None = None

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    async def wait(self) -> ProcessExit:
        if self.process is None:
            raise RuntimeError("it was not launched")
        ended = await self.process.wait()
        for stream, mask in self._masks.items():
            self._tell(stream, mask.rest())
        return ended

    def output(self, stream: str, data: bytes) -> None:
        self._output.write(stream, data)
        self._tell(stream, self._masks[stream].feed(data))

    def report(self, line: bytes) -> None:
        line = self._reports.whole(line)
        if self._spec.on_report is not None:
            self._spec.on_report(line)

    def _tell(self, stream: str, data: bytes) -> None:
        if data and self._spec.on_output is not None:
            self._spec.on_output(stream, data)


def _alone(fault: Exception) -> Exception:
    """The one fault in a task group's wrapping."""
    if not isinstance(fault, ExceptionGroup):
        return fault
    group = cast("ExceptionGroup[Exception]", fault)
    return _alone(group.exceptions[0]) if len(group.exceptions) == 1 else group
