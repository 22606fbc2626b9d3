"""What a caller gets from the use cases: real store, real engine, real processes."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import pytest
from deadlines import CANCEL_SECONDS, WITHIN

from roles.definition import RetryPolicy, Role
from vespera_exec.app import following
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute, Handle, NewTask
from vespera_exec.errors import (
    AlreadyExecuting,
    Conflict,
    DataDirectoryInUse,
    ExecutionError,
    InvalidInput,
    PermissionDenied,
    RoleNotFound,
    TaskNotFound,
)
from vespera_exec.model.principal import Caller

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]
ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})
TOKEN = Caller(principal="token:default", over_tcp=True)


def command(*argv: str, **more: Any) -> Execute:
    return Execute(title=" ".join(argv)[:80], role="command", inputs={"argv": list(argv)}, **more)


def python(code: str, **more: Any) -> Execute:
    return Execute(title="python", role="command", inputs={"argv": [sys.executable, "-c", code]}, **more)


def nested(depth: int) -> Any:
    value: Any = "."
    for _ in range(depth):
        value = [value]
    return value


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def in_loop(name: str, work: Any, **policy: Any) -> Role:
    return Role.from_callable(work, name=name, in_loop=True, inputs=None, **policy)


async def done(vespera: Vespera, task_id: str, seconds: float = WITHIN) -> Any:
    """The status, once its run has ended."""
    cursor = 0
    with anyio.fail_after(seconds):
        while True:
            page = await vespera.read_events(ME, task_id, cursor=cursor, wait_ms=25_000)
            if page.done:
                return await vespera.get_status(ME, task_id)
            cursor = page.next_cursor


async def working(vespera: Vespera, task_id: str) -> None:
    """Returns once its work has begun."""
    cursor = 0
    with anyio.fail_after(WITHIN):
        while True:
            page = await vespera.read_events(ME, task_id, cursor=cursor, wait_ms=25_000)
            if any(event["status"]["new"] == "running" for event in page.events):
                return
            cursor = page.next_cursor


async def event_types(vespera: Vespera, any_id: str) -> list[str]:
    page = await vespera.read_events(ME, any_id, max_events=1000)
    return [event["type"] for event in page.events]


async def test_who_waits_for_events_hears_with_the_last_one_that_the_run_is_done(
    vespera: Vespera, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_SETTLING_SECONDS", 60.0)

    async def brief(context: Any) -> int:
        return 1

    vespera.roles.add(in_loop("brief", brief))
    for number in range(2):
        handle = await vespera.execute_task(ME, Execute(title=str(number), role="brief"))
        ended: list[bool] = []
        with anyio.fail_after(WITHIN):
            cursor = 0
            while not ended:
                page = await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=25_000)
                cursor = page.next_cursor
                ended = [page.done for event in page.events if event["type"] == "execution_completed"]
        assert ended == [True]


async def test_a_reader_of_small_pages_holds_up_nobody_at_the_end_of_a_run(vespera: Vespera) -> None:
    async def brief(context: Any) -> int:
        return 1

    vespera.roles.add(in_loop("brief", brief))
    handle = await vespera.execute_task(ME, Execute(title="in small pages", role="brief"))
    seen: list[dict[str, Any]] = []
    cursor, ended = 0, False
    with anyio.fail_after(WITHIN):
        while not ended:
            page = await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=25_000, max_events=1)
            seen += page.events
            cursor, ended = page.next_cursor, page.done
    assert seen == (await vespera.read_events(ME, handle.task_id, max_events=1000)).events


async def test_a_survey_runs_through_its_phases_and_leaves_a_result(vespera: Vespera, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("print(1)\n")
    handle = await vespera.execute_task(
        ME, Execute(title="Survey", role="survey", inputs={"path": str(tmp_path / "src")}, wait_ms=25_000)
    )
    assert handle.done
    assert handle.status == "completed"
    status = await vespera.get_status(ME, handle.task_id, detail=True)
    assert not status.executing
    assert status.task_status == "done"
    assert status.session is not None
    assert status.session.overall_progress.percentage == 100
    assert status.session.phases is not None
    phases = [phase["phase"] for phase in status.session.phases]
    assert phases == ["initialization", "validation", "setup", "execution", "cleanup", "finalization"]
    result = await vespera.get_result(ME, handle.task_id)
    assert result.done
    assert "python" in str(result.result).lower()


async def test_events_of_a_run_are_complete_in_order_and_end_with_the_terminal_one(vespera: Vespera) -> None:
    handle = await vespera.execute_task(ME, command("true", wait_ms=25_000))
    events = [event.message() async for event in vespera.follow_events(ME, handle.task_id)]
    own = [event for event in events if event["execution_id"] == handle.session_id]
    assert [event["sequence"] for event in own] == list(range(1, len(own) + 1))
    cursors = [event["cursor"] for event in events]
    assert cursors == sorted(set(cursors))
    changes = [event["status"]["new"] for event in own if event["type"] == "status_change"]
    assert changes == ["pending", "preparing", "validating", "preparing", "running", "completing", "completed"]
    assert own[-1]["type"] == "execution_completed"


async def test_a_command_runs_where_its_caller_stands_and_its_output_is_kept(vespera: Vespera, tmp_path: Path) -> None:
    caller = Caller(cwd=str(tmp_path), env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"})
    code = "import os,sys; print(os.getcwd()); print('oops', file=sys.stderr)"
    handle = await vespera.execute_task(caller, python(code, wait_ms=25_000))
    output = await vespera.read_output(ME, handle.task_id)
    assert str(tmp_path) in output.text
    assert "oops" in output.text
    assert output.eof
    stderr = await vespera.read_output(ME, handle.task_id, stream="stderr")
    assert stderr.text == "oops\n"


async def test_a_failing_command_is_failed_with_its_exit_code_and_is_not_tried_again(vespera: Vespera) -> None:
    handle = await vespera.execute_task(ME, python("raise SystemExit(3)", wait_ms=25_000))
    assert handle.status == "failed"
    result = await vespera.get_result(ME, handle.task_id)
    assert result.result["returncode"] == 3
    assert result.error is not None
    assert result.error["code"] == "EXIT_NONZERO"
    metrics = await vespera.get_metrics(ME, handle.task_id)
    assert (metrics.total_executions, metrics.failed, metrics.success_rate) == (1, 1, 0.0)
    assert (await vespera.get_status(ME, handle.task_id)).task_status == "todo"


async def test_a_program_that_does_not_exist_is_named(vespera: Vespera) -> None:
    handle = await vespera.execute_task(ME, command("no-such-program-here", wait_ms=25_000))
    result = await vespera.get_result(ME, handle.task_id)
    assert result.error is not None
    assert result.error["code"] == "PROGRAM_NOT_FOUND"
    assert "no-such-program-here" in result.error["message"]


async def test_cancel_ends_the_whole_tree_and_names_the_rung(vespera: Vespera) -> None:
    code = (
        "import os,signal,subprocess,time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep','300'], start_new_session=True)\n"
        "print(os.getpid(), child.pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    handle = await vespera.execute_task(ME, python(code))
    output = await vespera.read_output(ME, handle.task_id, wait_ms=25_000)
    pids = [int(text) for text in output.text.split()]
    assert len(pids) == 2
    began = time.monotonic()
    answer = await vespera.cancel(ME, handle.task_id, reason="enough", wait_ms=25_000)
    assert time.monotonic() - began < CANCEL_SECONDS
    assert answer.success
    assert answer.status == "cancelled"
    assert answer.rung == "sigkill"
    assert not alive(pids)
    status = await vespera.get_status(ME, handle.task_id)
    assert (status.status, status.task_status) == ("cancelled", "cancelled")
    assert status.legacy_compatibility.retry_count == 0
    again = await vespera.cancel(ME, handle.task_id)
    assert not again.success
    assert "cancelled" in (again.reason or "")


async def test_a_queued_execution_is_cancelled_at_once_and_the_queue_goes_by_priority(opening: Opening) -> None:
    started: list[str] = []
    release = anyio.Event()

    async def work(context: Any) -> None:
        started.append(context.inputs["name"])
        await release.wait()

    async with opening(max_concurrent=1) as vespera:
        vespera.roles.add(in_loop("hold", work))
        handles: dict[str, Handle] = {}
        for name, priority in [("first", 5), ("low", 1), ("gone", 5), ("high", 9)]:
            handles[name] = await vespera.execute_task(
                ME, Execute(title=name, role="hold", inputs={"name": name}, priority=priority)
            )
        cancelled = await vespera.cancel(ME, handles["gone"].task_id, wait_ms=25_000)
        assert cancelled.status == "cancelled"
        release.set()
        for name in ("low", "high"):
            assert (await done(vespera, handles[name].task_id)).status == "completed"
        status = await vespera.get_status(ME, handles["low"].task_id)
        assert status.session is not None
        assert status.session.time_tracking.queue_seconds > 0
    assert started == ["first", "high", "low"]


async def test_a_second_start_is_refused_while_one_runs(vespera: Vespera) -> None:
    handle = await vespera.execute_task(ME, command("sleep", "60"))
    with pytest.raises(AlreadyExecuting):
        await vespera.execute_task(ME, Execute(task_id=handle.task_id))
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)


async def test_two_starts_of_one_task_at_once_give_one_run(vespera: Vespera) -> None:
    task = await vespera.create_task(ME, NewTask(title="once", role="command", inputs={"argv": ["sleep", "60"]}))
    outcomes: list[str] = []

    async def start() -> None:
        try:
            await vespera.execute_task(ME, Execute(task_id=task.task_id))
            outcomes.append("started")
        except AlreadyExecuting:
            outcomes.append("refused")

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(start)
    assert sorted(outcomes) == ["refused"] * 3 + ["started"]
    await vespera.cancel(ME, task.task_id, wait_ms=25_000)


async def test_a_timeout_ends_timed_out_by_the_same_ladder(vespera: Vespera) -> None:
    handle = await vespera.execute_task(ME, command("sleep", "300", timeout_seconds=0.3, wait_ms=25_000))
    assert handle.status == "timed_out"
    result = await vespera.get_result(ME, handle.task_id)
    assert result.error is not None
    assert result.error["code"] == "TIMEOUT"
    assert "execution_timeout" in await event_types(vespera, handle.session_id)


async def test_errors_that_the_role_names_are_tried_again_with_back_off(vespera: Vespera) -> None:
    attempts: list[int] = []

    async def flaky(context: Any) -> str:
        attempts.append(context.attempt)
        if len(attempts) < 3:
            raise ExecutionError("the line is down", code="NETWORK_TIMEOUT")
        return "through"

    retry = RetryPolicy(max_retries=3, retry_on=("NETWORK_TIMEOUT",), backoff_seconds=0.05)
    vespera.roles.add(in_loop("flaky", flaky, retry=retry))
    handle = await vespera.execute_task(ME, Execute(title="try", role="flaky", wait_ms=25_000))
    assert handle.done
    assert handle.status == "completed"
    assert attempts == [1, 2, 3]
    status = await vespera.get_status(ME, handle.task_id)
    assert status.session is not None
    assert (status.session.attempt, status.session.run_id) == (3, handle.run_id)
    types = await event_types(vespera, handle.task_id)
    assert types.count("retry_scheduled") == 2
    assert types.count("execution_failed") == 2


async def test_retries_end_when_they_are_used_up_and_the_task_is_failed(vespera: Vespera) -> None:
    async def hopeless(context: Any) -> None:
        raise ExecutionError("no", code="DOWN")

    retry = RetryPolicy(max_retries=10, retry_on=("DOWN",), backoff_seconds=0.01)
    vespera.roles.add(in_loop("hopeless", hopeless, retry=retry))
    handle = await vespera.execute_task(ME, Execute(title="try", role="hopeless", wait_ms=25_000))
    status = await vespera.get_status(ME, handle.task_id)
    assert (handle.done, status.status, status.task_status) == (True, "failed", "failed")
    assert status.legacy_compatibility.retry_count == 3


async def test_a_cancel_while_backing_off_ends_the_run(vespera: Vespera) -> None:
    async def flaky(context: Any) -> None:
        raise ExecutionError("no", code="DOWN")

    retry = RetryPolicy(max_retries=3, retry_on=("DOWN",), backoff_seconds=60)
    vespera.roles.add(in_loop("flaky", flaky, retry=retry))
    handle = await vespera.execute_task(ME, Execute(title="try", role="flaky"))
    cursor = 0
    with anyio.fail_after(WITHIN):
        while "retry_scheduled" not in await event_types(vespera, handle.task_id):
            page = await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=2000)
            cursor = page.next_cursor
    answer = await vespera.cancel(ME, handle.task_id, wait_ms=25_000)
    assert answer.status == "cancelled"
    assert (await done(vespera, handle.task_id)).task_status == "cancelled"


async def test_a_callable_that_stops_on_its_token_is_cancelled_by_it(vespera: Vespera) -> None:
    async def polite(context: Any) -> None:
        while not context.cancelled:  # noqa: ASYNC110 - polling its flag is what such work does
            await anyio.sleep(0.005)

    vespera.roles.add(in_loop("polite", polite))
    handle = await vespera.execute_task(ME, Execute(title="polite", role="polite"))
    await working(vespera, handle.task_id)
    answer = await vespera.cancel(ME, handle.task_id, wait_ms=25_000)
    assert (answer.status, answer.rung) == ("cancelled", "token")


async def test_a_callable_that_swallows_its_cancellation_is_fenced_off_and_called_abandoned(vespera: Vespera) -> None:
    stubborn_may_go = anyio.Event()
    seen: list[str] = []

    async def stubborn(context: Any) -> None:
        while not stubborn_may_go.is_set():
            try:
                await stubborn_may_go.wait()
            except anyio.get_cancelled_exc_class():  # the very fault that is tested
                seen.append("swallowed")
        try:
            context.progress(90, "still here")
        except Exception as error:  # noqa: BLE001 - what it is does not matter to the work
            seen.append(type(error).__name__)

    vespera.roles.add(in_loop("stubborn", stubborn, grace_seconds=0.2))
    handle = await vespera.execute_task(ME, Execute(title="stubborn", role="stubborn"))
    await working(vespera, handle.task_id)
    began = time.monotonic()
    answer = await vespera.cancel(ME, handle.task_id, wait_ms=25_000)
    assert (answer.status, answer.rung) == ("cancelled", "abandoned")
    assert time.monotonic() - began < CANCEL_SECONDS
    before = await event_types(vespera, handle.task_id)
    stubborn_may_go.set()
    with anyio.fail_after(WITHIN):
        while "swallowed" not in seen:
            await anyio.lowlevel.checkpoint()
    assert await event_types(vespera, handle.task_id) == before


async def test_an_idempotency_key_starts_one_run_however_often_it_is_used(vespera: Vespera) -> None:
    first = await vespera.execute_task(ME, command("true", idempotency_key="k1"))
    again = await vespera.execute_task(ME, command("true", idempotency_key="k1"))
    assert (again.task_id, again.run_id, again.repeated) == (first.task_id, first.run_id, True)
    handles: list[str] = []

    async def start() -> None:
        handles.append((await vespera.execute_task(ME, command("true", idempotency_key="k2"))).run_id)

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(start)
    assert len(set(handles)) == 1
    made = await vespera.create_task(ME, NewTask(title="t", idempotency_key="k1"))
    assert (await vespera.create_task(ME, NewTask(title="t", idempotency_key="k1"))).task_id == made.task_id
    await done(vespera, first.task_id)


async def test_a_key_is_remembered_over_a_restart(opening: Opening) -> None:
    async with opening() as vespera:
        first = await vespera.execute_task(ME, command("true", idempotency_key="k", wait_ms=25_000))
    async with opening() as vespera:
        again = await vespera.execute_task(ME, command("true", idempotency_key="k"))
        assert (again.run_id, again.repeated, again.done) == (first.run_id, True, True)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Execute(title="x", role="no-such-role"), RoleNotFound),
        (Execute(title="x", role="survey", inputs={"nonsense": 1}), InvalidInput),
        (Execute(title="x", role="command", inputs={}), InvalidInput),
        (Execute(title="x", role="command", inputs={"argv": "rm -rf"}), InvalidInput),
        (Execute(title="", role="survey"), InvalidInput),
        (Execute(title="   ", role="survey"), InvalidInput),
        (Execute(title="x" * 1_000_000, role="survey"), InvalidInput),
        (Execute(title="bell\a", role="survey"), InvalidInput),
        (Execute(title="two\nlines", role="survey"), InvalidInput),
        (Execute(title="x"), InvalidInput),
        (Execute(title="x", role="command", inputs={"argv": ["a"], "cwd": nested(40)}), InvalidInput),
        (Execute(), InvalidInput),
        (Execute(task_id="x", title="y"), InvalidInput),
        (Execute(task_id="no-such-task"), TaskNotFound),
    ],
)
async def test_bad_requests_are_refused_and_leave_nothing_behind(
    vespera: Vespera, request_: Execute, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await vespera.execute_task(ME, request_)
    assert (await vespera.list_tasks(ME)).tasks == []
    assert vespera.describe().head == 0


async def test_a_token_may_not_run_commands_nor_read_outside_the_roots(opening: Opening, tmp_path: Path) -> None:
    async with opening(allowed_roots=(tmp_path,)) as vespera:
        with pytest.raises(PermissionDenied, match="command"):
            await vespera.execute_task(TOKEN, command("true"))
        with pytest.raises(PermissionDenied):
            await vespera.execute_task(TOKEN, Execute(title="x", role="survey", inputs={"path": "/etc"}))
        with pytest.raises(PermissionDenied):
            await vespera.execute_task(Caller(principal="nobody", scopes=frozenset()), command("true"))
    async with opening(allow_command_over_tcp=True) as vespera:
        handle = await vespera.execute_task(TOKEN, command("true", wait_ms=25_000))
        assert handle.status == "completed"


async def test_unknown_ids_are_named(vespera: Vespera) -> None:
    for call in (vespera.get_status, vespera.get_metrics, vespera.get_result, vespera.cancel, vespera.read_events):
        with pytest.raises(TaskNotFound, match="no-such-task"):
            await call(ME, "no-such-task")
    for hostile in ("\ud800", "x" * 100_000, "\0", "'; drop table tasks; --", "../../etc/passwd", "%", ""):
        with pytest.raises(TaskNotFound):
            await vespera.get_status(ME, hostile)


async def test_a_task_that_was_never_executed_is_idle_and_has_no_result(vespera: Vespera) -> None:
    task = await vespera.create_task(ME, NewTask(title="later", role="survey"))
    status = await vespera.get_status(ME, task.task_id)
    assert (status.executing, status.status, status.session_id, status.task_found) == (False, "idle", None, True)
    with pytest.raises(Conflict):
        await vespera.get_result(ME, task.task_id)
    assert not (await vespera.cancel(ME, task.task_id)).success
    assert await vespera.get_progress(ME, task.task_id) is None


async def test_ids_may_be_cut_short_and_session_ids_name_their_execution(vespera: Vespera) -> None:
    handle = await vespera.execute_task(ME, command("true", wait_ms=25_000))
    assert (await vespera.get_status(ME, handle.task_id[:8])).task_id == handle.task_id
    status = await vespera.get_status(ME, handle.session_id)
    assert status.session_id == handle.session_id


async def test_a_full_queue_refuses_new_work(opening: Opening) -> None:
    async with opening(max_concurrent=1, max_queued=1) as vespera:
        running = await vespera.execute_task(ME, command("sleep", "60"))
        with anyio.fail_after(WITHIN):
            while not vespera.describe().running:
                await anyio.lowlevel.checkpoint()
        await vespera.execute_task(ME, command("true"))
        with pytest.raises(Conflict, match="queue is full"):
            await vespera.execute_task(ME, command("true"))
        await vespera.cancel(ME, running.task_id, wait_ms=25_000)


async def test_a_second_owner_of_a_data_directory_is_refused(opening: Opening) -> None:
    async with opening():
        with pytest.raises(DataDirectoryInUse):
            async with opening():
                pass


async def test_what_ran_when_the_owner_went_is_named_interrupted_and_what_waited_goes_on(opening: Opening) -> None:
    async with opening(max_concurrent=1) as vespera:
        running = await vespera.execute_task(ME, command("sleep", "60"))
        waiting = await vespera.execute_task(ME, command("true"))
        with anyio.fail_after(WITHIN):
            while not vespera.describe().running:
                await anyio.lowlevel.checkpoint()
    async with opening(max_concurrent=1) as vespera:
        ended = await vespera.get_result(ME, running.task_id)
        assert ended.status == "failed"
        assert ended.error is not None
        assert ended.error["code"] == "INTERRUPTED"
        assert (await done(vespera, waiting.task_id)).status == "completed"


async def test_what_waited_runs_as_it_was_asked_for_and_the_log_does_not_tell_from_where(
    opening: Opening, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    caller = Caller(cwd=str(place), env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"})
    async with opening(max_concurrent=1) as vespera:
        await vespera.execute_task(ME, command("sleep", "60"))
        waiting = await vespera.execute_task(caller, python("import os; print(os.getcwd(), os.environ['LANG'])"))
    async with opening(max_concurrent=2) as vespera:
        assert (await done(vespera, waiting.task_id)).status == "completed"
        assert (await vespera.read_output(ME, waiting.task_id)).text == f"{place} C.UTF-8\n"
        told = str(await vespera.read_events(ME, waiting.task_id, max_events=1000))
        assert str(place) not in told
        assert os.environ["PATH"] not in told


@pytest.mark.promise("commands")
async def test_what_is_queued_in_a_directory_that_came_with_a_repository_is_never_run(
    opening: Opening, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    async with opening(max_concurrent=1) as vespera:
        await vespera.execute_task(ME, command("sleep", "60"))
        queued = await vespera.execute_task(ME, command("touch", str(witness)))
        token = (tmp_path / "data" / "token").read_text()
    clone = tmp_path / "clone" / "data"
    shutil.copytree(tmp_path / "data", clone)
    clone.chmod(0o755)
    async with opening(data_dir=clone) as vespera:
        result = await vespera.get_result(ME, queued.task_id)
        assert result.error is not None
        assert (result.status, result.error["code"]) == ("failed", "INTERRUPTED")
    assert not witness.exists()
    assert clone.stat().st_mode & 0o077 == 0
    assert (clone / "token").read_text() != token
    async with opening() as vespera:
        assert (await done(vespera, queued.task_id)).status == "completed"
    assert witness.exists()


async def test_a_client_that_goes_while_its_request_is_accepted_leaves_a_run_that_runs(vespera: Vespera) -> None:
    for moment in range(12):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:

                async def ask(number: int = moment) -> None:
                    await vespera.execute_task(ME, command("true", idempotency_key=f"gone-{number}"))

                group.start_soon(ask)
                for _ in range(moment):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
    with anyio.fail_after(WITHIN):
        for row in (await vespera.list_tasks(ME)).tasks:
            assert (await done(vespera, row.task_id)).status == "completed"


async def test_the_ids_of_an_earlier_attempt_mean_the_run(vespera: Vespera) -> None:
    async def flaky(context: Any) -> None:
        raise ExecutionError("no", code="DOWN")

    retry = RetryPolicy(max_retries=3, retry_on=("DOWN",), backoff_seconds=60)
    vespera.roles.add(in_loop("flaky", flaky, retry=retry))
    request = Execute(title="try", role="flaky", idempotency_key="k")
    handle = await vespera.execute_task(ME, request)
    with anyio.fail_after(WITHIN):
        while "retry_scheduled" not in await event_types(vespera, handle.task_id):
            await anyio.lowlevel.checkpoint()
    again = await vespera.execute_task(ME, request)
    assert (again.run_id, again.done, again.status) == (handle.run_id, False, "pending")
    assert (await vespera.cancel(ME, handle.session_id, wait_ms=25_000)).status == "cancelled"
    assert (await vespera.execute_task(ME, request)).status == "cancelled"


async def test_a_list_and_a_status_say_the_same_percentage(vespera: Vespera) -> None:
    async def third(context: Any) -> None:
        context.progress(34)
        await anyio.sleep_forever()

    vespera.roles.add(in_loop("third", third, grace_seconds=0.1))
    handle = await vespera.execute_task(ME, Execute(title="A third", role="third"))
    with anyio.fail_after(WITHIN):
        while (await vespera.list_tasks(ME)).tasks[0].percentage != 50.4:
            await anyio.lowlevel.checkpoint()
    session = (await vespera.get_status(ME, handle.task_id)).session
    assert session is not None
    assert session.overall_progress.percentage == 50.4
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)


async def test_tasks_are_listed_by_their_own_status_and_by_that_of_their_execution(vespera: Vespera) -> None:
    handle = await vespera.execute_task(ME, command("sleep", "60"))
    await working(vespera, handle.task_id)
    for status in ("doing", "running"):
        assert [row.task_id for row in (await vespera.list_tasks(ME, status=status)).tasks] == [handle.task_id]
    assert (await vespera.list_tasks(ME, status="done")).tasks == []
    with pytest.raises(InvalidInput):
        await vespera.list_tasks(ME, status="walking")
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)


async def test_a_long_poll_on_something_without_a_run_waits_quietly(vespera: Vespera) -> None:
    task = await vespera.create_task(ME, NewTask(title="later"))
    page = await vespera.read_events(ME, task.task_id, wait_ms=300)
    page = await vespera.read_events(ME, task.task_id, cursor=page.next_cursor, wait_ms=300)
    assert (page.events, page.done) == ([], True)


async def test_scratch_that_a_dead_owner_left_is_cleared(opening: Opening, tmp_path: Path) -> None:
    left = tmp_path / "data" / "scratch" / "someone"
    async with opening():
        left.mkdir(parents=True)
    async with opening():
        assert not left.exists()


@pytest.mark.promise("masked")
async def test_the_token_is_masked_wherever_the_work_says_it(vespera: Vespera, tmp_path: Path) -> None:
    token = (tmp_path / "data" / "token").read_text().strip()
    code = (
        "import os, json, sys\n"
        f"t = {token!r}\n"
        "print(t[:9], end='', flush=True); print(t[9:])\n"
        "f = os.fdopen(int(os.environ['VESPERA_PROGRESS_FD']), 'w')\n"
        "f.write(json.dumps({'progress': 5, 'message': 'see ' + t}) + '\\n'); f.flush()\n"
        "sys.stderr.write('bad ' + t); sys.exit(3)\n"
    )
    script = tmp_path / "leak.py"
    script.write_text(code)
    request = Execute(title="leak", role="command", inputs={"argv": [sys.executable, str(script)]}, wait_ms=25_000)
    handle = await vespera.execute_task(ME, request)
    shown = [
        str(await vespera.get_result(ME, handle.task_id, output_limit=4000)),
        str(await vespera.get_status(ME, handle.task_id, detail=True)),
        str(await vespera.read_events(ME, handle.task_id, max_events=1000)),
    ]
    assert "see ***" in shown[2]
    assert "***" in shown[0]
    for text in shown:
        assert token not in text
    assert token.encode() not in (tmp_path / "data" / "vespera.db-wal").read_bytes()


async def test_samples_of_use_are_stored(opening: Opening, tmp_path: Path) -> None:
    async with opening(sample_seconds=0.1) as vespera:
        handle = await vespera.execute_task(ME, command("sleep", "0.6", wait_ms=25_000))
    with sqlite3.connect(tmp_path / "data" / "vespera.db") as database:
        rows = database.execute(
            "SELECT count(*), max(metric) FROM samples JOIN streams ON streams.id = execution WHERE name = ?",
            (handle.session_id,),
        ).fetchone()
    database.close()
    assert rows[0] >= 2


async def test_progress_of_a_run_is_monotonic_and_shows_100_only_at_the_end(vespera: Vespera) -> None:
    async def work(context: Any) -> str:
        for step in range(1, 6):
            context.steps(step, 5, f"step {step}")
        return "ok"

    vespera.roles.add(in_loop("steps", work))
    handle = await vespera.execute_task(ME, Execute(title="steps", role="steps", wait_ms=25_000))
    page = await vespera.read_events(ME, handle.session_id, max_events=1000)
    shown = [event["progress"]["percentage"] for event in page.events if event["type"] == "progress_update"]
    assert shown == sorted(shown)
    assert max(shown) < 100
    assert 60 <= max(value for value in shown if value <= 90) <= 90
    assert any(event["message"] == "step 5" for event in page.events)
    progress = await vespera.get_progress(ME, handle.task_id)
    assert progress is not None
    assert progress.percentage == 100


async def test_usage_of_a_busy_process_is_measured_with_its_peak(opening: Opening) -> None:
    code = "import time\nx=bytearray(30_000_000)\nend=time.process_time()+1\nwhile time.process_time()<end: pass"
    async with opening(sample_seconds=0.2) as vespera:
        handle = await vespera.execute_task(ME, python(code, wait_ms=25_000))
        status = await vespera.get_status(ME, handle.task_id, detail=True)
        assert status.session is not None
        usage = status.session.resource_usage
        assert usage is not None
        assert usage["memory_rss"].peak > 30
        assert usage["cpu_usage"].peak > 0


async def test_sampling_can_be_switched_off(opening: Opening) -> None:
    async with opening(sample_seconds=0) as vespera:
        handle = await vespera.execute_task(ME, command("sleep", "0.3", wait_ms=25_000))
        status = await vespera.get_status(ME, handle.task_id, detail=True)
        assert status.session is not None
        assert status.session.resource_usage == {}


async def test_an_error_of_the_embedding_program_comes_out_as_it_was_raised(opening: Opening) -> None:
    with pytest.raises(ZeroDivisionError):
        async with opening():
            raise ZeroDivisionError


async def test_leaving_closes_everything(opening: Opening) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        async with opening() as vespera:
            await vespera.execute_task(ME, command("true", wait_ms=25_000))
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
    assert threading.active_count() <= threads + 5  # anyio keeps idle worker threads for a while


async def test_whoever_waits_too_long_for_a_turn_is_timed_out(opening: Opening) -> None:
    async def idle(context: Any) -> None:
        await anyio.sleep_forever()

    async with opening(max_concurrent=1) as vespera:
        vespera.roles.add(in_loop("idle", idle, grace_seconds=0.1))
        vespera.roles.add(in_loop("hurried", idle, wait_timeout_seconds=0.2))
        first = await vespera.execute_task(ME, Execute(title="first", role="idle"))
        second = await vespera.execute_task(ME, Execute(title="second", role="hurried", wait_ms=25_000))
        assert (second.status, second.done) == ("timed_out", True)
        assert (await vespera.cancel(ME, first.task_id, wait_ms=25_000)).rung == "scope"


async def test_the_default_timeout_holds_where_nobody_names_another(opening: Opening) -> None:
    async with opening(default_timeout_seconds=0.3) as vespera:
        handle = await vespera.execute_task(ME, command("sleep", "60", wait_ms=25_000))
        assert handle.status == "timed_out"


async def test_a_result_over_the_limit_is_cut_and_says_so(opening: Opening) -> None:
    async def chatty(context: Any) -> str:
        return "x" * 10_000

    async with opening(result_limit_bytes=1000) as vespera:
        vespera.roles.add(in_loop("chatty", chatty))
        handle = await vespera.execute_task(ME, Execute(title="chatty", role="chatty", wait_ms=25_000))
        result = await vespera.get_result(ME, handle.task_id)
        assert result.result_truncated
        assert len(str(result.result)) < 1000


async def test_an_owner_that_goes_while_it_cancels_leaves_the_cancel_to_the_next(opening: Opening) -> None:
    async def stubborn(context: Any) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.3)

    async with opening() as vespera:
        vespera.roles.add(in_loop("stubborn", stubborn, grace_seconds=4))
        handle = await vespera.execute_task(ME, Execute(title="stubborn", role="stubborn"))
        await working(vespera, handle.task_id)
        assert (await vespera.cancel(ME, handle.task_id)).status == "cancelling"
    async with opening() as vespera:
        status = await vespera.get_status(ME, handle.task_id)
        assert (status.status, status.task_status, status.done) == ("cancelled", "cancelled", True)
