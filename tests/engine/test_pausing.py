"""What a pause stops, what it leaves alone, and what it races with: real store, real processes, in-loop work."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest
from deadlines import CANCEL_SECONDS, WITHIN
from test_engine import Body, Place, alive, instant, place, process, telling

from vespera_exec.engine import proctree, shim
from vespera_exec.engine.work import Work, WorkResult
from vespera_exec.errors import PauseUnsupported, StoreUnavailable
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus, ResourceType
from vespera_exec.monitoring.sampler import UsageSampler

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vespera_exec.engine.jobs import Run
    from vespera_exec.engine.running import RunningExecution

S = ExecutionStatus
BUSY = "import os; os.write(3, b'ready\\n')\nwhile True: pass"
TREE = (
    "import os, subprocess, sys\n"
    "subprocess.Popen([sys.executable, '-I', '-S', '-c', 'while True: pass'], start_new_session=True)\n"
    "os.write(3, b'ready\\n')\n"
    "while True: pass"
)
ENDS = {EventType.EXECUTION_COMPLETED, EventType.EXECUTION_FAILED, EventType.EXECUTION_CANCELLED}


async def eventually(claim: Callable[[], bool], seconds: float = WITHIN) -> None:
    """Returns when `claim` is true; fails after a deadline."""
    with anyio.fail_after(seconds):
        while True:
            if claim():
                return
            await anyio.sleep(0.005)


async def admitted(here: Place, run: Run) -> None:
    """Returns as soon as it has a slot."""
    with anyio.fail_after(WITHIN):
        while here.engine.execution_of(run.session.session_id) is None:
            await anyio.lowlevel.checkpoint()


async def lasting(seconds: float) -> None:
    """Returns when this much time has gone by."""
    began = time.monotonic()
    await eventually(lambda: time.monotonic() - began >= seconds)


def running(code: str) -> tuple[Body, anyio.Event, list[int]]:
    """Work of one process that says when it is ready, the event, and where its pid will be."""
    ready, pids = anyio.Event(), list[int]()

    async def body(work: Work) -> WorkResult:
        work.tracking.enter_phase(ExecutionPhase.EXECUTION, "Running")
        launched = await work.launcher.launch(process(code, on_report=telling(ready)))
        pids.append(launched.pid)
        ended = await launched.wait()
        work.token.throw_if_cancelled()
        return WorkResult(returncode=ended.returncode, success=ended.returncode == 0)

    return body, ready, pids


def stepping() -> tuple[Body, anyio.Event, anyio.Event, list[int]]:
    """In-loop work: begun, the event that lets it reach its gate, and a list that grows with each step after it."""
    begun, let, steps = anyio.Event(), anyio.Event(), list[int]()

    async def body(work: Work) -> WorkResult:
        work.tracking.enter_phase(ExecutionPhase.EXECUTION, "Stepping")
        begun.set()
        await let.wait()
        await work.gate.passed()
        work.token.throw_if_cancelled()
        steps.append(len(steps))
        return WorkResult()

    return body, begun, let, steps


def circling() -> tuple[Body, anyio.Event]:
    """In-loop work that passes its gate again and again, and the event that says that it has begun."""
    begun = anyio.Event()

    async def body(work: Work) -> WorkResult:
        work.tracking.enter_phase(ExecutionPhase.EXECUTION, "Circling")
        begun.set()
        while not work.token.is_cancelled:
            await work.gate.passed()
            await anyio.sleep(0.001)
        return WorkResult()

    return body, begun


def execution(here: Place, run: Run) -> RunningExecution:
    found = here.engine.execution_of(run.session.session_id)
    assert found is not None
    return found


async def paused(here: Place, run: Run, reason: str = "A break") -> None:
    """Returns when it stands still."""
    assert execution(here, run).pause(reason)
    with anyio.fail_after(WITHIN):
        await execution(here, run).settled()
    assert run.session.status is S.PAUSED


async def resumed(here: Place, run: Run) -> None:
    assert execution(here, run).resume("Go on")
    with anyio.fail_after(WITHIN):
        await execution(here, run).settled()
    assert run.session.status is not S.PAUSED


async def types(here: Place, run: Run) -> list[str]:
    await here.store.journal.sync()
    events = await here.store.feed.read(after=0, execution_id=run.session.session_id, limit=1000)
    return [event.event_type for event in events]


def states(root: int) -> set[str]:
    seen = shim.table()
    return {seen[pid][4] for pid in shim.descendants(seen, [root])}


# what a pause stops


async def test_paused_is_recorded_when_the_whole_tree_is_stopped_and_resume_lets_it_go_on(data_dir: Path) -> None:
    seen_at_pause: list[set[str]] = []
    async with place(data_dir) as here:
        body, ready, pids = running(TREE)
        task, run = await here.submit(body)
        await ready.wait()
        (root,) = execution(here, run).roots

        def heard(batch: object) -> None:
            if run.session.status is S.PAUSED and not seen_at_pause:
                seen_at_pause.append(states(root))

        task.ledger.listen(heard)
        await eventually(lambda: len(shim.descendants(shim.table(), [root])) == 2)
        await paused(here, run, "Lunch")
        assert seen_at_pause == [{"T"}]
        assert states(root) == {"T"}
        assert run.session.lifecycle.status_message == "Lunch"
        await resumed(here, run)
        assert run.session.status is S.RUNNING
        await eventually(lambda: "T" not in states(root))
        run.session.request_cancellation("enough")
        assert (await here.ended(run)).status is S.CANCELLED
        assert not alive(pids)


async def test_work_in_the_loop_stops_at_its_gate_and_not_before(data_dir: Path) -> None:
    async with place(data_dir) as here:
        body, begun, let, steps = stepping()
        _, run = await here.submit(body)
        await begun.wait()
        assert execution(here, run).pause("A break")
        await anyio.wait_all_tasks_blocked()
        assert run.session.status is S.RUNNING
        assert execution(here, run).pause_pending
        let.set()
        with anyio.fail_after(WITHIN):
            await execution(here, run).settled()
        assert run.session.status is S.PAUSED
        assert not execution(here, run).pause_pending
        assert steps == []
        await resumed(here, run)
        assert (await here.ended(run)).status is S.COMPLETED
        assert steps == [0]


async def test_a_pause_that_has_not_taken_effect_is_taken_back_by_a_resume(data_dir: Path) -> None:
    async with place(data_dir) as here:
        body, begun, let, _ = stepping()
        _, run = await here.submit(body)
        await begun.wait()
        assert execution(here, run).pause("A break")
        await anyio.wait_all_tasks_blocked()
        await resumed(here, run)
        let.set()
        assert (await here.ended(run)).status is S.COMPLETED
        assert EventType.EXECUTION_PAUSED not in await types(here, run)


async def test_work_that_is_paused_before_it_begins_has_not_begun(data_dir: Path) -> None:
    async with place(data_dir) as here:
        body, begun, let, _ = stepping()
        _, run = await here.submit(body)
        await admitted(here, run)
        await paused(here, run)
        assert not begun.is_set()
        assert run.session.lifecycle.paused_from is S.PREPARING
        await resumed(here, run)
        let.set()
        assert (await here.ended(run)).status is S.COMPLETED


async def test_a_pause_during_a_launch_stops_what_is_launched(data_dir: Path) -> None:
    async with place(data_dir) as here:
        body, _, pids = running(BUSY)
        _, run = await here.submit(body)
        await eventually(lambda: bool(here.engine.execution_of(run.session.session_id) and execution(here, run).roots))
        (root,) = execution(here, run).roots
        await paused(here, run)
        assert states(root) <= {"T"}
        run.session.request_cancellation("enough")
        assert (await here.ended(run)).status is S.CANCELLED
        assert not alive(pids)


async def test_work_between_two_processes_stops_before_the_second(data_dir: Path) -> None:
    first_ended, let = anyio.Event(), anyio.Event()

    async def body(work: Work) -> WorkResult:
        await (await work.launcher.launch(process("pass"))).wait()
        first_ended.set()
        await let.wait()
        await (await work.launcher.launch(process("pass"))).wait()
        return WorkResult()

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        await first_ended.wait()
        assert execution(here, run).pause("A break")
        await anyio.wait_all_tasks_blocked()
        assert execution(here, run).pause_pending
        let.set()
        with anyio.fail_after(WITHIN):
            await execution(here, run).settled()
        assert run.session.status is S.PAUSED
        assert execution(here, run).roots == ()
        await resumed(here, run)
        assert (await here.ended(run)).status is S.COMPLETED


# the clock


async def test_paused_time_counts_in_no_duration_and_no_timeout(data_dir: Path) -> None:
    async with place(data_dir) as here:
        body, begun = circling()
        began = time.monotonic()
        _, run = await here.submit(body, timeout_seconds=1.5)
        await begun.wait()
        for _ in range(2):
            await paused(here, run)
            before = run.session.elapsed_seconds
            await lasting(0.3)
            assert run.session.status is S.PAUSED
            assert run.session.elapsed_seconds == before
            await resumed(here, run)
        life = await here.ended(run)
        assert life.status is S.TIMED_OUT
        assert life.paused_seconds >= 0.6
        assert 1.5 <= life.active_seconds <= time.monotonic() - began - life.paused_seconds


async def test_a_timeout_is_judged_again_as_soon_as_it_goes_on(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vespera_exec.engine.running._STANDING_LOOK_SECONDS", 3600)
    async with place(data_dir) as here:
        body, begun = circling()
        _, run = await here.submit(body, timeout_seconds=1)
        await begun.wait()
        await paused(here, run)
        await lasting(1.05)  # when it was to time out, it stands still
        await resumed(here, run)
        assert (await here.ended(run)).status is S.TIMED_OUT


async def test_a_paused_run_uses_no_cpu(data_dir: Path) -> None:
    async with UsageSampler(interval_seconds=0.05) as sampler, place(data_dir, sampler=sampler) as here:
        body, ready, _ = running(BUSY)
        _, run = await here.submit(body)
        await ready.wait()

        def latest() -> list[float]:
            return [value for _, value in list(run.session.resource_metrics.get(ResourceType.CPU_USAGE, ()))[-3:]]

        await eventually(lambda: sum(latest()) > 0)
        await paused(here, run)
        await eventually(lambda: latest() == [0.0, 0.0, 0.0])
        run.session.request_cancellation("enough")
        await here.ended(run)


# ends


async def test_a_cancel_of_a_paused_run_ends_it_with_everything(data_dir: Path) -> None:
    async with place(data_dir) as here:
        body, ready, pids = running(TREE)
        _, run = await here.submit(body, grace_seconds=4.0)
        await ready.wait()
        await paused(here, run)
        began = time.monotonic()
        run.session.request_cancellation("enough")
        life = await here.ended(run)
        assert time.monotonic() - began < CANCEL_SECONDS
        assert (life.status, life.outcome["rung"] in ("sigint", "sigterm")) == (S.CANCELLED, True)
        assert not alive(pids)


async def test_a_cancel_lets_work_at_the_gate_see_that_it_is_cancelled(data_dir: Path) -> None:
    told: list[str] = []

    async def body(work: Work) -> WorkResult:
        await work.gate.passed()
        begun.set()
        await let.wait()
        await work.gate.passed()
        told.append("cancelled" if work.token.is_cancelled else "running")
        return WorkResult()

    begun, let = anyio.Event(), anyio.Event()
    async with place(data_dir) as here:
        _, run = await here.submit(body)
        await begun.wait()
        execution(here, run).pause("A break")
        let.set()
        await eventually(lambda: run.session.status is S.PAUSED)
        run.session.request_cancellation("enough")
        life = await here.ended(run)
        assert (life.status, life.outcome["rung"]) == (S.CANCELLED, "token")
    assert told == ["cancelled"]


async def test_an_owner_that_goes_leaves_nothing_of_a_paused_run_but_its_record(data_dir: Path) -> None:
    async with place(data_dir, max_concurrent=2) as here:
        body, ready, pids = running(TREE)
        in_loop, begun, let, _ = stepping()
        _, run = await here.submit(body)
        _, beside = await here.submit(in_loop)
        await ready.wait()
        await begun.wait()
        let.set()
        await paused(here, run)
        (root,) = execution(here, run).roots
    assert not alive([*pids, root])
    assert run.session.status is S.PAUSED
    assert not run.done.is_set()
    assert beside.session.status in (S.COMPLETED, S.RUNNING)


async def test_nothing_is_paused_whose_work_is_over(data_dir: Path) -> None:
    async with place(data_dir) as here:
        _, run = await here.submit(instant)
        await admitted(here, run)
        found = execution(here, run)
        assert (await here.ended(run)).status is S.COMPLETED
        assert found.over
        assert not found.pause("too late")
        assert not found.resume("too late")
        assert here.engine.execution_of(run.session.session_id) is None


async def test_nothing_is_paused_between_the_last_word_of_its_work_and_its_end(data_dir: Path) -> None:
    accepted: list[bool] = []

    async def body(work: Work) -> WorkResult:
        found = here.engine.execution_of(work.execution_id)
        assert found is not None
        asyncio.get_running_loop().call_soon(lambda: accepted.append(found.pause("too late")))
        return WorkResult()

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        assert (await here.ended(run)).status is S.COMPLETED
    assert accepted == [False]


# races


async def test_pauses_at_once_make_one_event_and_one_resume_ends_them_all(data_dir: Path) -> None:
    async with place(data_dir) as here:
        body, ready, _ = running(BUSY)
        _, run = await here.submit(body)
        await ready.wait()
        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(paused, here, run, f"reason {number}")
        await resumed(here, run)
        run.session.request_cancellation("enough")
        await here.ended(run)
        seen = await types(here, run)
        assert (seen.count(EventType.EXECUTION_PAUSED), seen.count(EventType.EXECUTION_RESUMED)) == (1, 1)


async def test_a_resume_is_on_disk_before_anything_goes_on(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with place(data_dir) as here:
        body, ready, _ = running(BUSY)
        _, run = await here.submit(body)
        await ready.wait()
        await paused(here, run)
        (root,) = execution(here, run).roots
        written, sync = anyio.Event(), here.store.journal.sync

        async def held() -> int:
            await written.wait()
            return await sync()

        monkeypatch.setattr(here.store.journal, "sync", held)
        assert execution(here, run).resume("Go on")
        await anyio.wait_all_tasks_blocked()
        assert run.session.status is S.RUNNING
        assert states(root) == {"T"}
        written.set()
        await eventually(lambda: states(root) != {"T"})
        run.session.request_cancellation("enough")
        await here.ended(run)


async def test_a_pause_that_hangs_is_taken_back_by_a_resume(data_dir: Path) -> None:
    async with place(data_dir) as here:
        body, ready, _ = running(BUSY)
        _, run = await here.submit(body)
        await ready.wait()
        (root,) = execution(here, run).roots
        os.kill(root, signal.SIGSTOP)  # the shim hears nothing, so nothing is stopped
        assert execution(here, run).pause("A break")
        await anyio.wait_all_tasks_blocked()
        assert execution(here, run).pause_pending
        await resumed(here, run)
        os.kill(root, signal.SIGCONT)
        run.session.request_cancellation("enough")
        assert (await here.ended(run)).status is S.CANCELLED
        assert EventType.EXECUTION_PAUSED not in await types(here, run)


async def test_a_cancel_that_comes_before_the_pause_takes_effect_is_first(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with place(data_dir) as here:
        body, begun, let, _ = stepping()
        _, run = await here.submit(body)
        await begun.wait()
        assert execution(here, run).pause("A break")
        await anyio.wait_all_tasks_blocked()
        let.set()
        run.session.request_cancellation("enough")
        assert (await here.ended(run)).status is S.CANCELLED
        assert EventType.EXECUTION_PAUSED not in await types(here, run)
    assert "have failed" not in caplog.text


@pytest.mark.parametrize("seed", range(8))
async def test_pauses_resumes_cancels_and_ends_in_any_order_leave_one_end_each(data_dir: Path, seed: int) -> None:
    codes = ["import time; time.sleep(0.15)", BUSY.replace("True", "os.times().user < 0.1"), "pass", TREE]
    async with place(data_dir, max_concurrent=4) as here, anyio.create_task_group() as group:
        runs: list[tuple[Run, list[int]]] = []
        for number, code in enumerate(codes):
            body, _, pids = running(code)
            _, run = await here.submit(body, grace_seconds=0.3)
            runs.append((run, pids))
            await admitted(here, run)
            chance = random.Random(10 * seed + number)
            group.start_soon(disturb, execution(here, run), run, chance, code is TREE or chance.random() < 0.4)
        for run, pids in runs:
            await here.ended(run)
            seen = [each for each in await types(here, run) if each in _TOLD | ENDS]
            assert len([each for each in seen if each in ENDS]) == 1
            assert seen[-1] in ENDS
            changes = [each for each in seen if each in _TOLD]
            assert changes == (_ALTERNATING * len(changes))[: len(changes)]
            assert not alive(pids)
        assert here.engine.idle


async def disturb(found: RunningExecution, run: Run, chance: random.Random, cancels: bool) -> None:
    """Pause and resume a few times, as chance has it; then cancel from another thread, or let it go on."""
    for _ in range(chance.randrange(2, 8)):
        match chance.randrange(4):
            case 0:
                found.pause("A break")
            case 1:
                found.resume("Go on")
            case 2:
                found.pause("A break")
                found.resume("Go on")
            case _:
                with anyio.move_on_after(0.5):
                    await found.settled()
        await anyio.sleep(chance.random() * 0.05)
    if cancels:
        found.pause("A break")
        await anyio.to_thread.run_sync(run.session.request_cancellation, "enough")
    else:
        found.resume("Go on")


_ALTERNATING = [EventType.EXECUTION_PAUSED, EventType.EXECUTION_RESUMED]
_TOLD = frozenset(_ALTERNATING)


# where it cannot be done


async def test_what_the_system_cannot_stop_is_not_paused_and_the_refusal_says_so(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proctree, "PROC", str(tmp_path / "no-such-folder"))
    async with place(data_dir) as here:
        body, ready, _ = running(BUSY)
        _, run = await here.submit(body)
        await ready.wait()
        with pytest.raises(PauseUnsupported, match="/proc"):
            execution(here, run).pause("A break")
        assert not execution(here, run).pause_pending
        run.session.request_cancellation("enough")
        await here.ended(run)
        assert EventType.EXECUTION_PAUSED not in await types(here, run)
        in_loop, begun, let, _ = stepping()
        _, beside = await here.submit(in_loop)
        await begun.wait()
        let.set()
        await paused(here, beside)
        await resumed(here, beside)
        assert (await here.ended(beside)).status is S.COMPLETED


async def test_a_pause_that_could_not_be_recorded_is_taken_back_by_a_resume(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with place(data_dir) as here:
        body, ready, _ = running(BUSY)
        _, run = await here.submit(body)
        await ready.wait()
        (root,) = execution(here, run).roots
        refused = anyio.Event()

        def refuse(batch: object) -> None:
            refused.set()
            raise StoreUnavailable("the disk is on strike")

        with monkeypatch.context() as broken:
            broken.setattr(here.store.journal, "append", refuse)
            assert execution(here, run).pause("A break")
            await refused.wait()
        assert run.session.status is S.RUNNING
        await resumed(here, run)
        await eventually(lambda: "T" not in states(root))
        run.session.request_cancellation("enough")
        assert (await here.ended(run)).status is S.CANCELLED
