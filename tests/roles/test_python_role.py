"""A python role runs its callable in a child process, and in this loop only where that was asked for."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
import role_callables
from deadlines import WITHIN
from role_harness import Bench, bench

import roles
from roles.definition import Role
from roles.runners import call, python
from vespera_exec.errors import CancellationException, ExecutionError
from vespera_exec.model.enums import EventType

if TYPE_CHECKING:
    from collections.abc import Callable

    from roles.context import Context
    from vespera_exec.engine.work import WorkResult


async def run(tmp_path: Path, fn: Callable[..., Any], **inputs: Any) -> tuple[WorkResult, Bench]:
    async with bench(tmp_path, inputs) as made:
        return await python.run(Role.from_callable(fn), made.work), made


async def test_callable_runs_in_a_child_with_its_inputs_and_reports(tmp_path: Path) -> None:
    result, made = await run(tmp_path, role_callables.doubled, number=21)
    assert result.success
    assert result.output == {"doubled": 42, "cwd": str(tmp_path), "scratch": str(made.work.scratch)}
    assert made.percentages == [50.0, 90.0]
    assert made.session.lifecycle.checkpoint == {"at": 1}
    assert made.messages(EventType.INFO) == ["a line"]


async def test_callable_with_a_task_parameter_gets_task_context_and_progress(tmp_path: Path) -> None:
    async with bench(tmp_path, attempt=2, checkpoint=[7]) as made:
        result = await python.run(Role.from_callable(role_callables.with_task), made.work)
    assert result.output == "a title/a description/2/[7]"
    assert made.percentages == [25.0]


async def test_callable_without_parameters_and_without_result_succeeds(tmp_path: Path) -> None:
    result, _ = await run(tmp_path, role_callables.nothing)
    assert (result.success, result.output) == (True, None)


async def test_async_callable_runs_in_a_child(tmp_path: Path) -> None:
    result, made = await run(tmp_path, role_callables.asynchronous)
    assert result.output == "async"
    assert made.percentages == [25.0]


async def test_exception_becomes_a_failure_with_its_code_and_traceback(tmp_path: Path) -> None:
    result, _ = await run(tmp_path, role_callables.failing)
    assert (result.success, result.error_code, result.error) == (False, "NETWORK_TIMEOUT", "the other side is silent")
    assert "role_callables.py" in result.output["traceback"]
    assert "host.py" not in result.output["traceback"]


def folder(path: Path, name: str) -> Path:
    made = path / name
    made.mkdir()
    return made


async def test_exception_says_whether_another_attempt_can_help(tmp_path: Path) -> None:
    async def here(context: Context) -> None:
        raise role_callables.Hopeless("never again")

    result, _ = await run(folder(tmp_path, "a"), role_callables.hopeless)
    assert (result.error_code, result.recoverable) == ("HOPELESS", False)
    result, _ = await run(folder(tmp_path, "b"), role_callables.failing)
    assert result.recoverable
    async with bench(tmp_path) as made:
        result = await python.run(Role.from_callable(here, in_loop=True), made.work)
    assert (result.error_code, result.recoverable) == ("HOPELESS", False)


async def test_interrupt_that_nobody_asked_for_is_a_failure_not_a_cancel(tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match="interrupted") as caught:
        await run(tmp_path, role_callables.interrupts_itself)
    assert caught.value.failure_code == "WORKER_DIED"


async def test_exception_without_a_code_is_named_by_its_class(tmp_path: Path) -> None:
    result, _ = await run(tmp_path, role_callables.raising_plainly)
    assert (result.success, result.error_code) == (False, "KeyError")


async def test_result_larger_than_a_line_arrives_whole(tmp_path: Path) -> None:
    result, _ = await run(tmp_path, role_callables.large)
    assert result.output == ["ä" * 100] * 20_000


async def test_result_that_is_no_json_is_a_failure_that_says_so(tmp_path: Path) -> None:
    result, _ = await run(tmp_path, role_callables.not_json)
    assert (result.success, result.error_code) == (False, "RESULT_NOT_JSON")


async def test_returned_outcome_says_failure_code_and_quality(tmp_path: Path) -> None:
    result, _ = await run(tmp_path, role_callables.unsuccessful)
    assert (result.success, result.error_code, result.error) == (False, "WRONG", "two of three are wrong")
    assert (result.output, result.quality_score) == ({"seen": 3}, 0.3)


async def test_sys_exit_is_a_failure_with_the_code(tmp_path: Path) -> None:
    result, _ = await run(tmp_path, role_callables.exits)
    assert (result.success, result.error) == (False, "exit with 3")


async def test_killed_worker_is_a_failure_that_names_the_signal(tmp_path: Path) -> None:
    result, _ = await run(tmp_path, role_callables.dies)
    assert (result.success, result.error_code) == (False, "WORKER_DIED")
    assert "SIGKILL" in str(result.error)


async def test_long_lines_from_several_threads_are_not_mixed(tmp_path: Path) -> None:
    result, made = await run(tmp_path, role_callables.from_threads)
    assert result.output == 4
    assert not result.warnings
    heads = {message.rpartition(":")[0] for message in made.messages(EventType.INFO)}
    assert heads == {f"{number}:{turn}" for number in range(4) for turn in range(25)}


async def test_refused_report_does_not_end_the_work(tmp_path: Path) -> None:
    result, made = await run(tmp_path, role_callables.infinite)
    assert result.output == "still here"
    assert "not finite" in made.messages(EventType.WARNING)[0]


async def test_modules_in_the_working_directory_are_never_imported(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('planted')")
    (tmp_path / "roles").mkdir()
    (tmp_path / "roles" / "__init__.py").write_text("raise SystemExit('planted')")
    result, _ = await run(tmp_path, role_callables.imported_from)
    assert result.success, result.error
    assert not str(result.output["json"]).startswith(str(tmp_path))
    assert result.output["roles"] == roles.__file__
    runners = str(Path(roles.__file__).parent / "runners")
    assert not {"", str(tmp_path), runners} & set(result.output["path"])


@pytest.mark.parametrize("fn", [role_callables.waits, role_callables.waits_async])
async def test_cancelled_child_ends_by_sigint_and_is_cancelled_not_failed(
    tmp_path: Path, fn: Callable[..., Any]
) -> None:
    async with bench(tmp_path) as made:
        rungs: list[str | None] = []

        async def cancel_when_it_works() -> None:
            with anyio.fail_after(WITHIN):
                await made.first_progress()
            made.work.token.cancel("enough")
            rungs.append(await made.launcher.cancel(3.0))

        async with anyio.create_task_group() as group:
            group.start_soon(cancel_when_it_works)
            with pytest.raises(CancellationException, match="enough"):
                await python.run(Role.from_callable(fn), made.work)
    assert rungs == ["sigint"]
    if fn is role_callables.waits_async:
        assert made.session.lifecycle.checkpoint == {"stopped": True}


async def test_killed_shim_is_a_failure_not_a_cancel(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:

        async def kill_the_shim() -> None:
            await made.first_progress()
            while not made.launcher.running[0].pid:  # its words may be read before the word that it runs
                await anyio.lowlevel.checkpoint()
            os.kill(made.launcher.running[0].shim_pid, signal.SIGKILL)

        async with anyio.create_task_group() as group:
            group.start_soon(kill_the_shim)
            with pytest.raises(ExecutionError) as caught:
                await python.run(Role.from_callable(role_callables.waits), made.work)
            assert (caught.value.failure_code, caught.value.recoverable) == ("WORKER_DIED", True)
            assert caught.value.context["rung"] in ("sigkill", "sweep")


async def test_target_that_does_not_exist_is_a_failure_that_names_it(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        result = await python.run(Role(name="lost", target="no_such_module:fn"), made.work)
    assert (result.success, result.error_code) == (False, "TARGET_NOT_FOUND")
    assert "no_such_module" in str(result.error)


async def test_callable_that_no_child_can_import_is_refused(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        with pytest.raises(ExecutionError, match="cannot be imported"):
            await python.run(Role.from_callable(lambda: 1, name="closure"), made.work)


async def test_async_callable_runs_in_this_loop_where_asked(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def here(context: Context) -> dict[str, Any]:
        await context.pause_point()
        context.progress(40)
        context.checkpoint({"page": 2})
        seen.append(sys.modules[__name__])
        return {"number": context.inputs["number"]}

    async with bench(tmp_path, {"number": 5}) as made:
        result = await python.run(Role.from_callable(here, in_loop=True), made.work)
    assert result.output == {"number": 5}
    assert seen
    assert made.percentages == [40.0]
    assert made.session.lifecycle.checkpoint == {"page": 2}


async def test_in_loop_callable_that_sees_the_cancel_ends_cancelled(tmp_path: Path) -> None:
    async def here(context: Context) -> None:
        made.work.token.cancel("stop it")
        context.raise_if_cancelled()

    async with bench(tmp_path) as made:
        with pytest.raises(CancellationException, match="stop it"):
            await python.run(Role.from_callable(here, in_loop=True), made.work)


async def test_in_loop_exception_becomes_a_failure(tmp_path: Path) -> None:
    async def here(context: Context) -> None:
        raise role_callables.NetworkTimeout("silent")

    async with bench(tmp_path) as made:
        result = await python.run(Role.from_callable(here, in_loop=True), made.work)
    assert (result.success, result.error_code, result.error) == (False, "NETWORK_TIMEOUT", "silent")


SCRIPT = """
import anyio, sys
from pathlib import Path

def local(context):
    return __name__

async def main():
    from role_harness import bench
    from roles.definition import Role
    from roles.runners import python

    async with bench(Path(sys.argv[1])) as made:
        print((await python.run(Role.from_callable(local), made.work)).output)

if __name__ == "__main__":
    anyio.run(main)
"""


async def test_callable_of_a_script_is_found_without_running_the_script_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    await anyio.Path(script).write_text(SCRIPT)
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    done = await anyio.run_process([sys.executable, str(script), str(tmp_path)], env=env)
    assert done.stdout.decode().split() == [call.MAIN_NAME]


def test_target_is_found_by_module_and_name_or_not_at_all(tmp_path: Path) -> None:
    assert call.resolve("role_callables:doubled") is role_callables.doubled
    for target, told in (
        ("role_callables:nowhere", "nowhere"),
        ("role_callables:annotations", "cannot be called"),
        ("no_such_module_at_all:fn", "no module"),
        ("role_callables.sub:fn", "no module"),
        ("no-such-entry-point", "neither"),
    ):
        with pytest.raises(call.TargetNotFound, match=told):
            call.resolve(target)


def test_entry_point_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "planted-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[vespera_exec.callables]\nplanted = role_callables:doubled\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert call.resolve("planted") is role_callables.doubled


def test_arguments_follow_the_signature() -> None:
    task, context, progress = object(), object(), object()

    def of(fn: Callable[..., Any]) -> tuple[Any, ...]:
        return call.arguments(fn, task, context, progress)

    def one(it: Any) -> None: ...
    def two(a: Any, b: Any) -> None: ...
    def optional(context: Any, verbose: bool = True) -> None: ...
    def named(task: Any, context: Any, progress: Any = None) -> None: ...
    def everything(*args: Any) -> None: ...
    def keyword(context: Any, *, flag: bool = False) -> None: ...

    assert of(lambda: None) == ()
    assert of(one) == (context,)
    assert of(optional) == (context,)
    assert of(keyword) == (context,)
    assert of(named) == (task, context, progress)
    assert of(everything) == (task, context, progress)
    assert of(two) == (task, context)


async def test_the_largest_checkpoint_is_kept_and_a_line_that_is_too_long_is_told(tmp_path: Path) -> None:
    result, made = await run(tmp_path, role_callables.large_checkpoints)
    assert result.output == "done"
    assert made.session.lifecycle.checkpoint == "ä" * 131_071
    dropped = "A report of more than 512 KiB was dropped"
    assert made.messages(EventType.WARNING) == [dropped, f"{dropped} (and 1 more since the last warning)"]


@pytest.mark.parametrize("in_loop", [False, True])
async def test_an_integer_that_would_come_back_rounded_is_no_result(tmp_path: Path, *, in_loop: bool) -> None:
    async def here(context: Context) -> dict[str, int]:
        return {"number": 2**64}

    async with bench(tmp_path) as made:
        fn = here if in_loop else role_callables.large_integer
        result = await python.run(Role.from_callable(fn, in_loop=in_loop), made.work)
    assert (result.success, result.error_code) == (False, "RESULT_NOT_JSON")
    assert "64 bits" in (result.error or "")
