"""The executor takes a task through its phases, cleans up whatever happens, and concludes only in memory."""

from __future__ import annotations

import asyncio
import stat
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import role_callables
from deadlines import WITHIN
from role_harness import bench

from roles.definition import Role
from roles.execution import ExecutionEnvironment, RoleExecutor, ValidationResult
from roles.registry import RoleRegistry
from vespera_exec.engine.work import WorkResult
from vespera_exec.errors import CancellationException, ExecutionError
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus, TaskStatus
from vespera_exec.model.principal import Caller
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from pathlib import Path

    from roles.context import Context
    from vespera_exec.model.session import ExecutionSession

P = ExecutionPhase
S = ExecutionStatus
ALL_PHASES = [P.INITIALIZATION, P.VALIDATION, P.SETUP, P.EXECUTION, P.CLEANUP]
COMMAND = RoleRegistry().get("command")


def phases(session: ExecutionSession) -> list[ExecutionPhase | None]:
    return [event.phase for event in session.status_events if event.event_type is EventType.PHASE_CHANGE]


def overall(session: ExecutionSession) -> list[float | None]:
    return [
        event.progress_data["percentage"]
        for event in session.status_events
        if event.event_type is EventType.PROGRESS_UPDATE and event.progress_data
    ]


def last_session(task: Task) -> ExecutionSession:
    return task.execution.session_history[-1]


class Watched(RoleExecutor):
    """Counts its cleanups; fails in one where told."""

    def __init__(self, *, fails: bool = False, hangs: bool = False) -> None:
        super().__init__(cleanup_seconds=0.2)
        self.cleanups: list[ExecutionEnvironment | None] = []
        self._fails, self._hangs = fails, hangs

    async def cleanup_execution_environment(self, context: ExecutionEnvironment | None) -> None:
        self.cleanups.append(context)
        await super().cleanup_execution_environment(context)
        if self._fails:
            raise OSError("the broom broke")
        if self._hangs:
            await anyio.sleep(60)


# with the engine's Work


async def test_work_goes_through_every_phase_and_is_not_concluded(tmp_path: Path) -> None:
    async with bench(tmp_path, {"number": 2}) as made:
        result = await RoleExecutor().execute_task_with_tracking(
            made.work, Role.from_callable(role_callables.doubled), made.work
        )
    assert result.output["doubled"] == 4
    assert made.phases == ALL_PHASES
    assert overall(made.session) == [10, 25, 30, 60, 84, 95]
    assert not made.session.status.is_terminal
    assert not made.work.scratch.exists()


async def test_a_callable_in_the_loop_has_a_scratch_folder_once_it_asks_for_it(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        folder = made.work.scratch
        folder.rmdir()

        async def writes(context: Context) -> list[Any]:
            before = folder.exists()
            (context.scratch / "note").write_text("a note")
            return [before, stat.S_IMODE(context.scratch.stat().st_mode)]

        result = await RoleExecutor().execute_task_with_tracking(
            made.work, Role.from_callable(writes, in_loop=True), made.work
        )
    assert result.output == [False, 0o700]
    assert not folder.exists()


async def test_a_scratch_folder_that_cannot_be_made_fails_the_setup_in_the_loop_too(tmp_path: Path) -> None:
    def asks(context: Context) -> None:
        assert context.scratch

    async def asks_in_loop(context: Context) -> None:
        asks(context)

    async with bench(tmp_path) as made:
        made.work.scratch.rmdir()
        made.work.scratch.write_text("in the way")
        in_loop = await RoleExecutor().execute_task_with_tracking(
            made.work, Role.from_callable(asks_in_loop, in_loop=True), made.work
        )
    (tmp_path / "other").mkdir()
    async with bench(tmp_path / "other") as made:
        made.work.scratch.rmdir()
        made.work.scratch.write_text("in the way")
        with pytest.raises(ExecutionError) as caught:
            await RoleExecutor().execute_task_with_tracking(made.work, Role.from_callable(asks, name="asks"), made.work)
    assert in_loop.error_code == caught.value.failure_code == "SETUP_FAILED"
    assert "The scratch folder cannot be made" in str(in_loop.error)


async def test_what_a_callable_in_the_loop_leaves_behind_makes_no_scratch_folder_any_more(tmp_path: Path) -> None:
    left: list[Context] = []

    async def leaves(context: Context) -> None:
        left.append(context)

    async with bench(tmp_path) as made:
        await RoleExecutor().execute_task_with_tracking(made.work, Role.from_callable(leaves, in_loop=True), made.work)
        assert left[0].scratch == made.work.scratch
        assert not made.work.scratch.exists()


async def test_bad_inputs_fail_in_validation_before_anything_is_started(tmp_path: Path) -> None:
    async with bench(tmp_path, {"argv": "ls"}) as made:
        with pytest.raises(ExecutionError, match="argv: expected a list") as caught:
            await RoleExecutor().execute_task_with_tracking(made.work, COMMAND, made.work)
    assert (caught.value.failure_code, caught.value.recoverable) == ("INVALID_INPUT", False)
    assert made.phases == [P.INITIALIZATION, P.VALIDATION, P.ERROR_HANDLING, P.CLEANUP]
    assert made.launcher.roots == ()


async def test_path_outside_the_roots_fails_in_setup(tmp_path: Path) -> None:
    executor = RoleExecutor(allowed_roots=(tmp_path,))
    async with bench(tmp_path, {"path": "/etc"}, caller=Caller("ci", over_tcp=True)) as made:
        with pytest.raises(ExecutionError) as caught:
            await executor.execute_task_with_tracking(made.work, RoleRegistry().get("survey"), made.work)
    assert caught.value.failure_code == "PERMISSION_DENIED"
    assert P.EXECUTION not in made.phases


async def test_failed_result_enters_error_handling_and_is_returned(tmp_path: Path) -> None:
    async with bench(tmp_path, {"argv": ["false"]}) as made:
        result = await RoleExecutor().execute_task_with_tracking(made.work, COMMAND, made.work)
    assert (result.success, result.error_code) == (False, "EXIT_NONZERO")
    assert made.phases == [*ALL_PHASES[:-1], P.ERROR_HANDLING, P.CLEANUP]
    assert 95 not in overall(made.session)


async def test_cleanup_runs_after_an_error_too(tmp_path: Path) -> None:
    executor = Watched()
    async with bench(tmp_path, {"argv": ["no-such-program-anywhere"]}) as made:
        with pytest.raises(ExecutionError, match="no-such-program"):
            await executor.execute_task_with_tracking(made.work, COMMAND, made.work)
    assert len(executor.cleanups) == 1
    assert not made.work.scratch.exists()


@pytest.mark.parametrize(("executor", "told"), [(Watched(fails=True), "broom"), (Watched(hangs=True), "did not end")])
async def test_cleanup_trouble_is_a_warning_and_the_result_stands(tmp_path: Path, executor: Watched, told: str) -> None:
    async with bench(tmp_path, {"argv": ["true"]}) as made:
        result = await executor.execute_task_with_tracking(made.work, COMMAND, made.work)
    assert result.success
    assert told in result.warnings[0]
    assert told in made.messages(EventType.WARNING)[0]


async def test_cancel_between_phases_is_seen_and_enters_no_error_handling(tmp_path: Path) -> None:
    executor = Watched()
    async with bench(tmp_path, {"argv": ["true"]}) as made:
        made.work.token.cancel("never mind")
        with pytest.raises(CancellationException, match="never mind"):
            await executor.execute_task_with_tracking(made.work, COMMAND, made.work)
    assert made.phases == [P.INITIALIZATION, P.CLEANUP]
    assert len(executor.cleanups) == 1


async def test_cleanup_is_shielded_from_the_cancellation_of_the_task(tmp_path: Path) -> None:
    executor = Watched()

    async def waits(context: Context) -> None:
        context.progress(1)
        await anyio.sleep(60)

    async with bench(tmp_path) as made, anyio.create_task_group() as group:
        group.start_soon(
            executor.execute_task_with_tracking, made.work, Role.from_callable(waits, in_loop=True), made.work
        )
        await made.first_progress()
        group.cancel_scope.cancel()
    assert len(executor.cleanups) == 1
    assert not made.work.scratch.exists()


# alone in memory


async def test_task_alone_completes_with_its_result() -> None:
    task = Task(title="t", inputs={"number": 4})

    def quadrupled(context: Context, extra: int = 0) -> int:
        assert threading.current_thread() is not threading.main_thread()
        context.progress(50, "half")
        return context.inputs["number"] * 4

    result = await RoleExecutor().execute_task_with_tracking(task, Role.from_callable(quadrupled))
    assert result.output == 16
    session = last_session(task)
    assert (session.status, task.status) == (S.COMPLETED, TaskStatus.DONE)
    assert phases(session) == ALL_PHASES
    assert overall(session) == [10, 25, 30, 60, 95]
    assert session.overall_progress.get_percentage() == 100


async def test_seed_style_role_object_works() -> None:
    @dataclass
    class Result:
        output: str

    class Greeter:
        name = "greeter"

        async def execute_task(self, task: Any, context: Any, progress_callback: Any) -> Result:
            progress_callback(150, "too much")
            progress_callback(40, "back")
            progress_callback("x")
            return Result(f"hello {task.title}")

    task = Task(title="you")
    result = await RoleExecutor().execute_task_with_tracking(task, Greeter())
    assert result == Result("hello you")
    session = last_session(task)
    assert session.status is S.COMPLETED
    assert overall(session) == [10, 25, 30, 90, 95]


async def test_progress_from_many_threads_is_taken() -> None:
    def busy(context: Context) -> int:
        def tell(number: int) -> None:
            context.report(number, metric=f"m{number}")

        threads = [threading.Thread(target=tell, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return 20

    task = Task(title="t")
    await RoleExecutor().execute_task_with_tracking(task, Role.from_callable(busy))
    assert len(last_session(task).custom_progress) == 20


async def test_unsuccessful_result_fails_the_task() -> None:
    async def wrong() -> WorkResult:
        return WorkResult(output="half", success=False, error="two are wrong", error_code="WRONG")

    task = Task(title="t")
    executor = Watched()
    await executor.execute_task_with_tracking(task, Role.from_callable(wrong))
    session = last_session(task)
    assert session.status is S.FAILED
    assert (session.error_context["code"], session.error_context["message"]) == ("WRONG", "two are wrong")
    assert phases(session)[-2:] == [P.ERROR_HANDLING, P.CLEANUP]
    assert len(executor.cleanups) == 1


async def test_exception_fails_the_task_and_goes_on_to_the_caller() -> None:
    async def breaks() -> None:
        raise KeyError("missing")

    task = Task(title="t")
    with pytest.raises(KeyError):
        await RoleExecutor().execute_task_with_tracking(task, Role.from_callable(breaks))
    assert last_session(task).status is S.FAILED
    assert "missing" in last_session(task).error_context["message"]


async def test_invalid_task_fails_in_validation() -> None:
    class Strict(RoleExecutor):
        async def validate_task_for_role(self, task: Any, role: Any) -> ValidationResult:
            return ValidationResult(False, "not today")

    task = Task(title="t")
    with pytest.raises(ExecutionError, match="not today"):
        await Strict().execute_task_with_tracking(task, Role.from_callable(role_callables.nothing))
    assert phases(last_session(task)) == [P.INITIALIZATION, P.VALIDATION, P.ERROR_HANDLING, P.CLEANUP]


async def test_cancelled_task_ends_cancelled_not_failed_and_burns_no_retry() -> None:
    task = Task(title="t")
    executor = Watched()

    async def checks(context: Context) -> None:
        task.execution.request_cancellation("enough")
        context.raise_if_cancelled()

    with pytest.raises(CancellationException, match="enough"):
        await executor.execute_task_with_tracking(task, Role.from_callable(checks))
    session = last_session(task)
    assert (session.status, task.status) == (S.CANCELLED, TaskStatus.CANCELLED)
    assert task.record.retry_count == 0
    assert P.ERROR_HANDLING not in phases(session)
    assert len(executor.cleanups) == 1


async def test_role_that_ignores_the_cancel_is_cancelled_after_its_grace() -> None:
    task = Task(title="t")

    async def ignores() -> None:
        task.execution.request_cancellation("enough")
        await anyio.sleep(60)

    with anyio.fail_after(WITHIN), pytest.raises(CancellationException):
        await RoleExecutor().execute_task_with_tracking(task, Role.from_callable(ignores, grace_seconds=0.05))
    assert last_session(task).status is S.CANCELLED


async def test_late_result_does_not_win_over_the_cancel() -> None:
    task = Task(title="t")

    async def finishes() -> str:
        task.execution.request_cancellation("enough")
        return "done anyway"

    with pytest.raises(CancellationException):
        await RoleExecutor().execute_task_with_tracking(task, Role.from_callable(finishes))
    assert last_session(task).status is S.CANCELLED


async def test_cancellation_of_the_asyncio_task_is_recorded_and_goes_on() -> None:
    task = Task(title="t")
    executor = Watched()
    started = anyio.Event()

    async def waits() -> None:
        started.set()
        await anyio.sleep(60)

    async with asyncio.TaskGroup() as group:
        running = group.create_task(executor.execute_task_with_tracking(task, Role.from_callable(waits)))
        await started.wait()
        running.cancel()
    assert running.cancelled()
    assert (last_session(task).status, task.status) == (S.CANCELLED, TaskStatus.CANCELLED)
    assert len(executor.cleanups) == 1


async def test_cleanup_error_leaves_a_completed_task_completed() -> None:
    task = Task(title="t")
    await Watched(fails=True).execute_task_with_tracking(task, Role.from_callable(role_callables.nothing))
    session = last_session(task)
    assert session.status is S.COMPLETED
    warnings = [event.message for event in session.status_events if event.event_type is EventType.WARNING]
    assert warnings == ["Cleanup failed: the broom broke"]


async def test_paused_task_waits_before_it_executes() -> None:
    task = Task(title="t")
    passed: list[ExecutionStatus] = []

    class Pausing(RoleExecutor):
        async def setup_execution_environment(self, task: Any, role: Any) -> ExecutionEnvironment:
            made = await super().setup_execution_environment(task, role)
            paused.set()
            session.append(running.execution.current_session)
            session[0].pause("a moment")
            return made

    def note() -> None:
        passed.append(session[0].status)

    running, paused, session = task, anyio.Event(), list[Any]()
    with anyio.fail_after(WITHIN):
        async with anyio.create_task_group() as group:
            group.start_soon(Pausing().execute_task_with_tracking, task, Role.from_callable(note, name="note"))
            await paused.wait()
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            assert passed == []
            session[0].resume()
    assert passed == [S.RUNNING]


async def test_process_role_alone_in_memory_says_that_it_needs_the_engine() -> None:
    task = Task(title="t", inputs={"argv": ["true"]})
    with pytest.raises(ExecutionError) as caught:
        await RoleExecutor().execute_task_with_tracking(task, COMMAND)
    assert caught.value.failure_code == "NEEDS_ENGINE"
    assert last_session(task).status is S.FAILED
