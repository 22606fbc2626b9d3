"""Nobody is left behind: every kind of tree, ended in every way. Ten more rounds of each with `-m full`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import uuid
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import pytest
from deadlines import CANCEL_SECONDS, KILL_SECONDS, WITHIN
from process_harness import (
    KINDS,
    TREES,
    Register,
    eventually,
    holder,
    kill_at_once,
    lives,
    nasty,
    plant,
    sh,
)

from vespera_exec.engine import proctree, shim
from vespera_exec.engine.engine import Engine
from vespera_exec.engine.jobs import Job, Policy
from vespera_exec.engine.processes import ProcessLauncher
from vespera_exec.engine.work import Work, WorkResult
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

S = ExecutionStatus
ROUNDS = [0, *(pytest.param(number, marks=pytest.mark.full) for number in range(1, 11))]
WITH_THE_DAEMON = [("daemon",), ("daemon", "shim"), ("daemon", "guardian")]
BESIDE_A_LIVING_DAEMON: dict[tuple[str, ...], tuple[int, str]] = {
    ("shim",): (-signal.SIGKILL, "sweep"),
    ("guardian",): (-signal.SIGKILL, "sigkill"),
    ("guardian", "shim"): (-signal.SIGKILL, "sweep"),
}


GRACE_SECONDS = {kind: 3.0 if kind == "stopped" else 0.3 for kind in KINDS}
"""What ends by SIGTERM gets a second for it, the others nothing that they would use."""


@pytest.fixture(params=ROUNDS, autouse=True)
def number_of_the_round(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.mark.promise("nobody_left")
@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_left_of_a_tree_after_cancel(kind: str, execution_id: str, register: Register) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process, known = await plant(launcher, kind, register)
        began = time.monotonic()
        rung = await launcher.cancel(GRACE_SECONDS[kind])
        took = time.monotonic() - began
        assert register.left(known, execution_id) == set()
        assert process.exit is not None
        assert rung == process.exit.rung == ("sigterm" if kind == "stopped" else "sigkill")
        assert 0.2 <= took <= CANCEL_SECONDS


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_left_of_a_tree_when_its_launcher_is_left(
    kind: str, execution_id: str, register: Register
) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process, known = await plant(launcher, kind, register)
        began = time.monotonic()
    assert register.left(known, execution_id) == set()
    assert time.monotonic() - began <= KILL_SECONDS
    assert process.exit is not None
    assert process.exit.returncode == -signal.SIGKILL


@pytest.mark.promise("nobody_left")
@pytest.mark.parametrize("ending", [S.CANCELLED, S.TIMED_OUT])
@pytest.mark.parametrize("kind", KINDS)
async def test_the_terminal_event_says_which_rung_ended_the_tree(
    kind: str, ending: ExecutionStatus, register: Register, data_dir: Path
) -> None:
    standing = anyio.Event()

    def stands(line: bytes) -> None:
        standing.set()

    async def body(work: Work) -> WorkResult:
        spec = nasty(kind, register)
        process = await work.launcher.launch(replace(spec, on_report=stands))
        await process.wait()
        work.token.throw_if_cancelled()
        return WorkResult()

    async with Store.open(Settings.load({"HOME": str(data_dir)}, data_dir=data_dir)) as store:
        engine = Engine(
            store.journal, owner="test", scratch_root=data_dir / "scratch", open_output=store.open_output
        )  # fmt: skip
        async with engine.running():
            for limit in (1.0, 10.0, 50.0):  # until it is time enough for the tree to stand
                task = Task(title="A tree", sink=store.journal)
                session = task.enqueue_execution("test", owner="test")
                timeout = limit if ending is S.TIMED_OUT else 0.0
                policy = Policy(timeout_seconds=timeout, grace_seconds=GRACE_SECONDS[kind])
                run = engine.submit(Job(task=task, session=session, run=body, policy=policy))
                await eventually(lambda run=run: standing.is_set() or run.done.is_set())
                if standing.is_set():
                    break
                register.path.write_text("")
            known = register.processes()
            if ending is S.CANCELLED:
                session.request_cancellation("enough")
            with anyio.fail_after(WITHIN):
                await run.done.wait()
            assert register.left(known, session.session_id) == set()
            stored = await store.queries.last_events(limit=10, execution_id=session.session_id)
    (terminal,) = [event for event in (one.event() for one in stored) if event.new_status is ending]
    assert terminal.details["outcome"]["rung"] in (("sigterm",) if kind == "stopped" else ("sigkill", "sweep"))


@pytest.mark.promise("nobody_left")
@pytest.mark.parametrize("victims", WITH_THE_DAEMON, ids=" and ".join)
@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_left_of_a_tree_when_the_daemon_is_killed(
    kind: str, victims: tuple[str, ...], execution_id: str, register: Register
) -> None:
    async with holder(execution_id, kind, register, adopts=True) as (daemon, fact):
        pids = {**await fact(), "daemon": daemon.pid}
        seen = shim.table()
        known = register.processes() | {pids[name]: seen[pids[name]][3] for name in ("guardian", "shim")}
        kill_at_once(*(pids[victim] for victim in victims))
        took = await eventually(lambda: not register.left(known, execution_id))
    assert took <= KILL_SECONDS


@pytest.mark.promise("nobody_left")
@pytest.mark.parametrize("victims", BESIDE_A_LIVING_DAEMON, ids=" and ".join)
@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_left_of_a_tree_when_its_shim_is_killed(
    kind: str, victims: tuple[str, ...], execution_id: str, register: Register
) -> None:
    async with holder(execution_id, kind, register, adopts=True) as (_, fact):
        pids = await fact()
        known = register.processes()
        began = time.monotonic()
        kill_at_once(*(pids[victim] for victim in victims))
        ended = await fact()
        assert register.left(known, execution_id) == set()
        assert time.monotonic() - began <= KILL_SECONDS
        returncode, rung = BESIDE_A_LIVING_DAEMON[victims]
        assert ended == {"returncode": returncode, "rung": rung, "children": []}


@pytest.mark.parametrize("kind", KINDS)
async def test_what_outlives_daemon_guardian_and_shim_is_ended_by_the_next_owner(
    kind: str, execution_id: str, register: Register
) -> None:
    async with holder(execution_id, kind, register, adopts=True) as (daemon, fact):
        pids = await fact()
        known = register.processes()
        kill_at_once(daemon.pid, pids["guardian"], pids["shim"])
        await daemon.wait()
    assert proctree.sweep([execution_id]) >= 1
    # Nothing ties to its execution what has dropped its environment, its session and its parents.
    lost = 1 if kind == "vanished" else 0
    # A process that is ending has no environment any more, and is there for another moment.
    await eventually(lambda: len(register.left(known, execution_id)) == lost)
    for pid in register.left(known, execution_id):
        os.kill(pid, signal.SIGKILL)


async def test_a_killed_shim_loses_no_marked_process_even_where_orphans_are_not_adopted(
    execution_id: str, register: Register
) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process, known = await plant(launcher, "daemonized", register)
        os.kill(process.shim_pid, signal.SIGKILL)
        with anyio.fail_after(WITHIN):
            ended = await process.wait()
        assert register.left(known, execution_id) == set()
        assert (ended.returncode, ended.rung) == (-signal.SIGKILL, "sweep")


async def test_a_killed_shim_takes_no_other_process_of_its_execution_with_it(
    execution_id: str, register: Register
) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        sibling = await launcher.launch(sh("sleep 50; true"))
        _, known = await plant(launcher, "new_session", register)
        other = launcher.running[1]
        os.kill(other.shim_pid, signal.SIGKILL)
        with anyio.fail_after(WITHIN):
            assert (await other.wait()).rung == "sweep"
        row = shim.look(sibling.pid)
        assert launcher.running == (sibling,)
        assert row is not None
        assert row[4] != "T"
        assert register.left(known, execution_id) <= set(shim.descendants(shim.table(), [sibling.shim_pid]))


async def test_cancel_ends_a_tree_whose_shim_is_stopped(execution_id: str, register: Register) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process, known = await plant(launcher, "new_session", register)
        os.kill(process.shim_pid, signal.SIGSTOP)
        began = time.monotonic()
        assert await launcher.cancel(0.2) == "sweep"
        assert time.monotonic() - began <= CANCEL_SECONDS
        assert register.left(known, execution_id) == set()


async def test_a_guardian_that_is_stopped_holds_no_end_up(execution_id: str, register: Register) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process, known = await plant(launcher, "new_session", register)
        os.kill(process.guardian_pid, signal.SIGSTOP)
        assert await launcher.cancel(0.2) == "sigkill"
        assert register.left(known, execution_id) == set()
    assert not lives(process.guardian_pid, None)


@contextmanager
def ticking() -> Generator[list[None]]:
    """Grows by one every 5 ms, by a thread that waits for nobody."""
    ticks, over = list[None](), threading.Event()

    def tick() -> None:
        while not over.wait(0.005):
            ticks.append(None)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield ticks
    finally:
        over.set()
        thread.join()


async def test_twenty_trees_are_cancelled_at_once_and_the_loop_goes_on(tmp_path: Path) -> None:
    # Other tests sweep by the id at the same time: each tree has one that is nobody else's.
    launchers = [ProcessLauncher(execution_id=str(uuid.uuid4())) for _ in range(20)]
    registers = [Register(tmp_path / f"register-{number}") for number in range(20)]
    rungs: list[str | None] = []
    held = 0

    async def cancel(launcher: ProcessLauncher) -> None:
        rungs.append(await launcher.cancel(0.3))

    async with AsyncExitStack() as stack:
        known: list[dict[int, int]] = []
        for launcher, register in zip(launchers, registers, strict=True):
            await stack.enter_async_context(launcher)
            known.append((await plant(launcher, "new_session", register))[1])
        began = time.monotonic()
        async with anyio.create_task_group() as group:
            for launcher in launchers:
                group.start_soon(cancel, launcher)
            with ticking() as ticks:
                while len(rungs) < len(launchers):
                    before = len(ticks)
                    await anyio.sleep(0.005)
                    held = max(held, len(ticks) - before)
        took = time.monotonic() - began
    # Beside other work some shim is too slow to be waited for, and the sweep ends its tree.
    assert set(rungs) <= {"sigkill", "sweep"}
    for launcher, register, his in zip(launchers, registers, known, strict=True):
        assert register.left(his, launcher.execution_id) == set()
    assert took <= CANCEL_SECONDS
    assert held <= 200  # a second of a thread that has the same machine


@pytest.mark.parametrize("victim", ["shim", "guardian"])
async def test_a_daemon_whose_shims_are_killed_gathers_no_zombies(
    victim: str, number_of_the_round: int, execution_id: str
) -> None:
    count = 200 if number_of_the_round == 1 else 10
    argv = [sys.executable, str(TREES / "bereft.py"), execution_id, victim, str(count)]
    with anyio.fail_after(WITHIN):
        done = await anyio.run_process(argv, stderr=None)
    assert json.loads(done.stdout) == {"killed": count, "children": []}
