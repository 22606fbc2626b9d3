"""What the engine makes of its jobs when things go wrong: real store, real processes, in-loop work."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN

from vespera_exec.engine.engine import Engine, EngineOptions
from vespera_exec.engine.jobs import Job, Policy, Run
from vespera_exec.engine.work import ProcessSpec, Work, WorkResult
from vespera_exec.errors import CancellationException, ExecutionError, StoreUnavailable
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus, TaskStatus
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.store import Store

if TYPE_CHECKING:
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.session import ExecutionSession

S = ExecutionStatus
Body = Callable[[Work], Awaitable[WorkResult]]
SLEEPER = "import os, time; os.write(3, b'ready\\n'); time.sleep(60)"


@dataclass
class Place:
    """A store and a running engine."""

    store: Store
    engine: Engine
    let_go: list[Job] = field(default_factory=list[Job])

    async def submit(self, body: Body, *, task: Task | None = None, **policy: Any) -> tuple[Task, Run]:
        task = task or Task(title="A task", sink=self.store.journal)
        session = task.enqueue_execution("test", owner="test")
        await self.store.journal.sync()
        return task, self.engine.submit(Job(task=task, session=session, run=body, policy=Policy(**policy)))

    async def ended(self, run: Run) -> Lifecycle:
        """The stored end of a run."""
        with anyio.fail_after(WITHIN):
            await run.done.wait()
        stored = await self.store.queries.get_execution(run.session.session_id)
        assert stored is not None
        assert stored[0] == run.session.lifecycle
        return stored[0]

    async def still_works(self) -> bool:
        _, run = await self.submit(instant)
        return (await self.ended(run)).status is S.COMPLETED


@asynccontextmanager
async def place(data_dir: Path, sampler: Any = None, open_output: Any = None, **options: Any) -> AsyncGenerator[Place]:
    settings = Settings.load({"HOME": str(data_dir)}, data_dir=data_dir)
    async with Store.open(settings) as store:
        let_go: list[Job] = []
        engine = Engine(
            store.journal,
            owner="test",
            scratch_root=data_dir / "scratch",
            open_output=open_output or store.open_output,
            sampler=sampler,
            on_done=let_go.append,
            options=EngineOptions(**options),
        )
        orderly = False
        async with engine.running():
            yield Place(store, engine, let_go)
            orderly = True
        # A task group that falls over cancels this test's body, and then leaves without a word.
        assert orderly, "the engine ended under the test"


async def instant(work: Work) -> WorkResult:
    return WorkResult(output=work.execution_id)


async def sleeping(work: Work) -> WorkResult:
    work.tracking.enter_phase(ExecutionPhase.EXECUTION, "Sleeping")
    await anyio.sleep_forever()
    raise AssertionError("unreachable")


def holding() -> tuple[Body, anyio.Event, anyio.Event]:
    """Work that says when it has begun, and ends when it is let."""
    begun, let = anyio.Event(), anyio.Event()

    async def body(work: Work) -> WorkResult:
        work.tracking.enter_phase(ExecutionPhase.EXECUTION, "Holding")
        begun.set()
        await let.wait()
        return WorkResult()

    return body, begun, let


def telling(ready: anyio.Event) -> Callable[[bytes], None]:
    return lambda line: ready.set()


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def process(code: str, **more: Any) -> ProcessSpec:
    return ProcessSpec(argv=(sys.executable, "-I", "-S", "-c", code), cwd=Path("/"), env=dict(os.environ), **more)


# work that ends in strange ways


async def test_work_that_lets_a_foreign_cancellation_out_fails_alone(data_dir: Path) -> None:
    async def body(work: Work) -> WorkResult:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future
        return WorkResult()

    async with place(data_dir) as here:
        other, begun, let = holding()
        _, beside = await here.submit(other)
        await begun.wait()
        _, run = await here.submit(body)
        life = await here.ended(run)
        assert (life.status, life.error["code"]) == (S.FAILED, "CancelledError")
        let.set()
        assert (await here.ended(beside)).status is S.COMPLETED


async def test_work_that_calls_sys_exit_ends_itself_and_nothing_else(data_dir: Path) -> None:
    async def body(work: Work) -> WorkResult:
        sys.exit(3)

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        life = await here.ended(run)
        assert (life.status, life.error["code"]) == (S.FAILED, "SystemExit")
        assert await here.still_works()


async def test_a_result_that_is_no_json_fails_the_execution(data_dir: Path) -> None:
    async def body(work: Work) -> WorkResult:
        return WorkResult(output=2**80)

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        life = await here.ended(run)
        assert (life.status, life.error["code"]) == (S.FAILED, "BAD_RESULT")
        assert await here.still_works()


async def test_an_execution_that_somebody_else_concluded_stays_as_it_is(data_dir: Path) -> None:
    async def body(work: Work) -> WorkResult:
        holder[0].execution.complete_execution(True, "done by hand")
        return WorkResult(output="late")

    holder: list[Task] = []
    async with place(data_dir) as here:
        task = Task(title="A task", sink=here.store.journal)
        holder.append(task)
        _, run = await here.submit(body, task=task)
        life = await here.ended(run)
        assert (life.status, life.status_message) == (S.COMPLETED, "done by hand")
        assert await here.still_works()


async def test_work_that_returns_while_paused_is_completed(data_dir: Path) -> None:
    body, begun, let = holding()
    async with place(data_dir) as here:
        _, run = await here.submit(body)
        await begun.wait()
        run.session.pause("A break")
        let.set()
        assert (await here.ended(run)).status is S.COMPLETED


# what stands around the work


async def test_an_output_that_cannot_be_opened_fails_the_execution_that_needs_it(data_dir: Path) -> None:
    def refuse(execution_id: str) -> Any:
        raise OSError(24, "Too many open files")

    async def body(work: Work) -> WorkResult:
        ended = await (await work.launcher.launch(process("pass"))).wait()
        return WorkResult(returncode=ended.returncode)

    async with place(data_dir, open_output=refuse) as here:
        _, run = await here.submit(body)
        life = await here.ended(run)
        assert (life.status, life.error["type"]) == (S.FAILED, "OSError")
        assert await here.still_works()


class BrokenSampler:
    def __init__(self, *, at_start: bool) -> None:
        self._at_start = at_start

    def watch(self, *_: object) -> BrokenSampler:
        if self._at_start:
            raise OSError(24, "Too many open files")
        return self

    def stop(self) -> object:
        raise OSError(24, "Too many open files")


@pytest.mark.parametrize("at_start", [True, False])
async def test_work_goes_on_when_its_usage_cannot_be_measured(data_dir: Path, at_start: bool) -> None:
    async def body(work: Work) -> WorkResult:
        return WorkResult(returncode=(await (await work.launcher.launch(process("pass"))).wait()).returncode)

    async with place(data_dir, sampler=BrokenSampler(at_start=at_start)) as here:
        _, run = await here.submit(body)
        life = await here.ended(run)
        assert (life.status, life.outcome["returncode"]) == (S.COMPLETED, 0)


async def test_a_report_callback_that_raises_fails_its_execution_and_ends_its_process(data_dir: Path) -> None:
    pids: list[int] = []

    def bad(line: bytes) -> None:
        raise LookupError("the callback is broken")

    async def body(work: Work) -> WorkResult:
        launched = await work.launcher.launch(process(SLEEPER, on_report=bad))
        pids.append(launched.pid)
        await launched.wait()
        return WorkResult()

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        life = await here.ended(run)
        assert (life.status, life.error["type"]) == (S.FAILED, "LookupError")
        assert not alive(pids)
        assert await here.still_works()


async def test_an_execution_without_processes_leaves_no_folder_and_no_output(data_dir: Path) -> None:
    opened: list[str] = []
    async with place(data_dir, open_output=opened.append) as here:
        _, run = await here.submit(instant)
        assert (await here.ended(run)).status is S.COMPLETED
    assert opened == []
    assert not (data_dir / "scratch").exists()


async def test_what_work_leaves_in_its_scratch_folder_is_gone_when_the_run_is_done(data_dir: Path) -> None:
    folders: list[Path] = []

    async def body(work: Work) -> WorkResult:
        folders.append(work.scratch)
        await anyio.Path(work.scratch / "deep").mkdir(parents=True)
        return WorkResult()

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        await here.ended(run)
    assert len(folders) == 1
    assert not folders[0].exists()


# cancelling


async def test_work_that_was_cancelled_before_its_start_never_begins(data_dir: Path) -> None:
    ran: list[str] = []

    async def body(work: Work) -> WorkResult:
        ran.append(work.execution_id)
        return WorkResult()

    async with place(data_dir) as here:
        task = Task(title="A task", sink=here.store.journal)
        # Heard when the start is decided, and so in the middle of its way to the disk.
        session = task.enqueue_execution("test", owner="test")

        def cancel() -> None:
            session.request_cancellation("too late")

        def cancel_at_start(event: Any) -> None:
            if event.new_status is S.PREPARING:
                task.ledger.afterwards(cancel)

        task.ledger.listen(cancel_at_start)
        run = here.engine.submit(Job(task=task, session=session, run=body))
        life = await here.ended(run)
        assert life.status is S.CANCELLED
        assert await here.still_works()
    assert ran == []


async def test_cancels_from_another_thread_at_any_moment_leave_no_run_without_its_end(data_dir: Path) -> None:
    async with place(data_dir, max_concurrent=8) as here:
        queued: list[tuple[Task, ExecutionSession]] = []
        for _ in range(150):
            task = Task(title="A task", sink=here.store.journal)
            queued.append((task, task.enqueue_execution("test", owner="test")))
        await here.store.journal.sync()
        go = threading.Event()

        def cancel_all() -> None:
            go.wait(10)
            for _, session in queued:
                session.request_cancellation("raced")

        thread = threading.Thread(target=cancel_all)
        thread.start()
        runs: list[Run] = []
        for task, session in queued:
            runs.append(here.engine.submit(Job(task=task, session=session, run=instant)))
            if len(runs) == 50:
                go.set()
                await anyio.lowlevel.checkpoint()
        statuses = {(await here.ended(run)).status for run in runs}
        await anyio.to_thread.run_sync(thread.join)
        assert statuses <= {S.CANCELLED, S.COMPLETED}
        assert S.CANCELLED in statuses
        assert here.engine.idle
        assert await here.still_works()


async def test_a_cancel_ends_the_process_and_names_the_rung(data_dir: Path) -> None:
    pids: list[int] = []
    ready = anyio.Event()

    async def body(work: Work) -> WorkResult:
        launched = await work.launcher.launch(process(SLEEPER, on_report=telling(ready)))
        pids.append(launched.pid)
        ended = await launched.wait()
        return WorkResult(returncode=ended.returncode)

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        with anyio.fail_after(WITHIN):
            await ready.wait()
            while not pids:  # it may be ready before `launch` has returned
                await anyio.lowlevel.checkpoint()
        assert run.session.request_cancellation("enough")
        assert run.session.request_cancellation("really"), "a second request is accepted, too"
        life = await here.ended(run)
        assert (life.status, life.cancellation_reason) == (S.CANCELLED, "enough")
        assert life.outcome["rung"] == "sigint"
        assert len(pids) == 1
        assert not alive(pids)


async def test_work_that_is_gone_as_soon_as_it_sees_its_token_was_ended_by_it(data_dir: Path) -> None:
    begun = anyio.Event()

    async def body(work: Work) -> WorkResult:
        begun.set()
        while not work.token.is_cancelled:
            await anyio.lowlevel.checkpoint()
        raise CancellationException("it has seen it")

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        with anyio.fail_after(WITHIN):
            await begun.wait()
        assert run.session.request_cancellation("stop")
        life = await here.ended(run)
        assert (life.status, life.outcome["rung"], life.outcome["forced"]) == (S.CANCELLED, "token", False)


async def test_work_that_is_cancelled_cannot_launch_its_first_process(data_dir: Path) -> None:
    told: list[str] = []
    begun = anyio.Event()

    async def body(work: Work) -> WorkResult:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                try:
                    await work.launcher.launch(process(SLEEPER))
                except Exception as error:
                    told.append(type(error).__name__)
                    raise
        raise AssertionError("unreachable")

    async with place(data_dir) as here:
        _, run = await here.submit(body, grace_seconds=0.05)
        await begun.wait()
        run.session.request_cancellation("enough")
        assert (await here.ended(run)).status is S.CANCELLED
    assert told == ["CancellationException"]


async def test_work_that_will_not_stop_is_abandoned_fenced_and_holds_nobody_up(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vespera_exec.engine.running.CANCEL_SECONDS", 0.2)
    body, begun, let = holding()
    late: list[str] = []
    over = anyio.Event()

    async def stubborn(work: Work) -> WorkResult:
        with anyio.CancelScope(shield=True):
            await body(work)
        try:
            work.tracking.enter_phase(ExecutionPhase.CLEANUP, "still here")
        except Exception as error:
            late.append(str(error))
            raise
        finally:
            over.set()
        return WorkResult()

    async with place(data_dir, max_concurrent=1) as here:
        _, run = await here.submit(stubborn, grace_seconds=0.05)
        await begun.wait()
        run.session.request_cancellation("enough")
        life = await here.ended(run)
        assert (life.status, life.outcome["rung"]) == (S.CANCELLED, "abandoned")
        assert await here.still_works()
        let.set()
        with anyio.fail_after(WITHIN):
            await over.wait()
        assert late == ["this work is over; its reports are refused"]
        assert await here.still_works()


async def test_a_cancel_gets_through_while_the_disk_takes_nothing(data_dir: Path) -> None:
    pids: list[int] = []
    ready, gone = anyio.Event(), anyio.Event()

    async def body(work: Work) -> WorkResult:
        launched = await work.launcher.launch(process(SLEEPER, on_report=telling(ready)))
        pids.append(launched.pid)
        await launched.wait()
        gone.set()
        return WorkResult()

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        with anyio.fail_after(WITHIN):
            await ready.wait()
            here.store.journal.limit_pages(1)
            filler = Task(title="A task that finds no room", description="x" * 100_000, sink=here.store.journal)
            with pytest.raises(StoreUnavailable):
                await here.store.journal.sync()
            run.session.request_cancellation("make room")
            await gone.wait()
        assert len(pids) == 1
        assert not alive(pids)
        assert not run.done.is_set(), "the end is not on disk yet"
        here.store.journal.limit_pages(1_000_000)
        assert (await here.ended(run)).status is S.CANCELLED
        assert filler.status is TaskStatus.TODO


async def test_a_timeout_ends_the_work_as_timed_out_and_not_as_cancelled(data_dir: Path) -> None:
    async with place(data_dir) as here:
        _, run = await here.submit(sleeping, timeout_seconds=0.05, grace_seconds=0.05)
        life = await here.ended(run)
        assert (life.status, life.error["code"]) == (S.TIMED_OUT, "TIMEOUT")


# the queue and the runs


async def test_a_job_that_waits_too_long_for_its_turn_times_out(data_dir: Path) -> None:
    body, begun, let = holding()
    async with place(data_dir, max_concurrent=1) as here:
        _, first = await here.submit(body)
        await begun.wait()
        _, second = await here.submit(instant, wait_timeout_seconds=0.05)
        assert (await here.ended(second)).status is S.TIMED_OUT
        let.set()
        assert (await here.ended(first)).status is S.COMPLETED


async def test_a_cancelled_job_leaves_the_queue_at_once(data_dir: Path) -> None:
    body, begun, let = holding()
    async with place(data_dir, max_concurrent=1) as here:
        _, first = await here.submit(body)
        await begun.wait()
        _, second = await here.submit(instant)
        assert here.engine.queued == 1
        second.session.request_cancellation("not needed")
        assert (await here.ended(second)).status is S.CANCELLED
        assert (here.engine.queued, here.engine.active) == (0, 1)
        let.set()
        await here.ended(first)


async def test_a_task_may_run_again_before_the_end_of_its_last_run_is_on_disk(data_dir: Path) -> None:
    body, begun, let = holding()
    async with place(data_dir) as here:
        task, first = await here.submit(body)
        await begun.wait()
        ended = anyio.Event()

        def heard(event: Any) -> None:
            if event.new_status is not None and event.new_status.is_terminal:
                ended.set()

        undo = task.ledger.listen(heard)
        let.set()
        await ended.wait()
        undo()
        again, begun_again, let_again = holding()
        session = task.enqueue_execution("test", owner="test")
        second = here.engine.submit(Job(task=task, session=session, run=again))
        assert not first.done.is_set()
        assert here.engine.run_of(task.id) is second
        with anyio.fail_after(WITHIN):
            await first.done.wait()
            await begun_again.wait()
        assert not second.done.is_set()
        assert here.engine.run_of(task.id) is second
        assert here.let_go == [], "the task is still in use"
        let_again.set()
        assert (await here.ended(second)).status is S.COMPLETED
        assert here.engine.run_of(task.id) is None
        assert len(here.let_go) == 1


@dataclass
class Always:
    seconds: float = 0.0

    def applies(self, error_code: str, failed_attempts: int) -> bool:
        return failed_attempts < 3

    def delay(self, failed_attempts: int) -> float:
        return self.seconds


async def test_a_run_is_done_when_its_last_attempt_is(data_dir: Path) -> None:
    attempts: list[int] = []

    async def body(work: Work) -> WorkResult:
        attempts.append(work.attempt)
        if work.attempt < 3:
            raise ExecutionError("not yet", code="FLAKY")
        return WorkResult()

    async with place(data_dir) as here:
        _, run = await here.submit(body, retry=Always())
        life = await here.ended(run)
        assert (life.status, life.attempt) == (S.COMPLETED, 3)
        assert attempts == [1, 2, 3]
        assert here.engine.idle


async def test_a_cancel_during_the_back_off_ends_the_run(data_dir: Path) -> None:
    async def body(work: Work) -> WorkResult:
        raise ExecutionError("not yet", code="FLAKY")

    async with place(data_dir) as here:
        task, run = await here.submit(body, retry=Always(3600))
        with anyio.fail_after(WITHIN):
            while here.engine.queued == 0 or run.session.lifecycle.attempt == 1:
                await anyio.lowlevel.checkpoint()
        assert task.execution.request_cancellation("never mind")
        life = await here.ended(run)
        assert (life.status, life.attempt) == (S.CANCELLED, 2)


async def test_a_run_is_done_also_when_the_store_refuses_what_it_did(data_dir: Path) -> None:
    async with place(data_dir) as here:
        task = Task(title="A task", sink=here.store.journal)
        session = task.enqueue_execution("test", owner="test")
        await here.store.journal.sync()
        # Another owner has written on: the next event of this one does not follow.
        task.ledger.resume_at(session.session_id, 1000)
        run = here.engine.submit(Job(task=task, session=session, run=instant))
        with anyio.fail_after(WITHIN):
            await run.done.wait()
        assert here.engine.idle
        assert here.let_go
        assert await here.still_works()


async def test_those_that_end_together_are_each_told_once_their_end_is_on_disk(data_dir: Path) -> None:
    let = anyio.Event()
    begun: list[str] = []

    async def body(work: Work) -> WorkResult:
        begun.append(work.execution_id)
        await let.wait()
        if len(begun) % 2 == begun.index(work.execution_id) % 2:
            raise ExecutionError("every second one fails", code="SECOND")
        return WorkResult(output=work.execution_id)

    async with place(data_dir, max_concurrent=10) as here:
        runs = [(await here.submit(body))[1] for _ in range(10)]
        with anyio.fail_after(WITHIN):
            while len(begun) < len(runs):
                await anyio.lowlevel.checkpoint()
        let.set()
        ends = [(await here.ended(run)).status for run in runs]
        assert sorted(ends, key=lambda each: each.value) == [S.COMPLETED] * 5 + [S.FAILED] * 5
        assert here.engine.idle
        assert len(here.let_go) == len(runs)


async def test_a_cancel_as_the_work_ends_leaves_one_end(data_dir: Path) -> None:
    async with place(data_dir) as here:
        for number in range(20):
            body, begun, let = holding()
            _, run = await here.submit(body)
            with anyio.fail_after(WITHIN):
                await begun.wait()
            let.set()
            for _ in range(number % 4):
                await anyio.lowlevel.checkpoint()
            run.session.request_cancellation("too late, or just in time")
            assert (await here.ended(run)).status in (S.CANCELLED, S.COMPLETED)
        assert here.engine.idle
        assert len(here.let_go) == 20


async def test_an_engine_that_closes_ends_processes_and_concludes_nothing(data_dir: Path) -> None:
    pids: list[int] = []
    ready = anyio.Event()

    async def body(work: Work) -> WorkResult:
        launched = await work.launcher.launch(process(SLEEPER, on_report=telling(ready)))
        pids.append(launched.pid)
        await launched.wait()
        return WorkResult()

    async def flaky(work: Work) -> WorkResult:
        raise ExecutionError("not yet", code="FLAKY")

    async with place(data_dir, max_concurrent=3) as here:
        in_loop, begun, _ = holding()
        _, backing_off = await here.submit(flaky, retry=Always(3600))
        with anyio.fail_after(WITHIN):
            while backing_off.session.lifecycle.attempt == 1:
                await anyio.lowlevel.checkpoint()
            _, running = await here.submit(body)
            _, looping = await here.submit(in_loop)
            await ready.wait()
            await begun.wait()
        third, _, _ = holding()
        await here.submit(third)
        _, queued = await here.submit(instant)
        runs = [running, looping, queued, backing_off]
    assert len(pids) == 1
    assert not alive(pids)
    assert not any(run.done.is_set() for run in runs)
    statuses = [run.session.lifecycle.status for run in runs]
    assert not any(status.is_terminal for status in statuses)
    assert statuses[2:] == [S.PENDING, S.PENDING]
