"""How fast a cancel arrives through the engine: at work in the loop, and at a child that obeys its signal.

Run: `python benchmarks/cancel.py`. Real store and engine. In the loop: from `request_cancellation`, out of another
thread, to the token seen by work that looks at each turn of the loop, with 20 other executions reporting progress.
A child: from its last instruction in the signal handler to the runner's `wait`, and to the end of the run on disk.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio

from vespera_exec.engine.engine import Engine, EngineOptions
from vespera_exec.engine.jobs import Job, Policy, Run
from vespera_exec.engine.work import ProcessSpec, Work, WorkResult
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus
from vespera_exec.model.progress import ProgressReport
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Body = Callable[[Work], Awaitable[WorkResult]]

IN_LOOP_ROUNDS: Final = 300
CHILD_ROUNDS: Final = 40
BESIDE: Final = 20
IN_LOOP_BUDGET_MS: Final = 5.0
CHILD_BUDGET_MS: Final = 10.0
OBEDIENT: Final = """
import os, signal, time
def end(number, frame):
    os.write(1, b"%d" % time.monotonic_ns())
    os._exit(0)
signal.signal(signal.SIGINT, end)
os.write(3, b"ready\\n")
signal.pause()
"""


async def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        async with Store.open(Settings.load({"HOME": folder}, data_dir=Path(folder) / "data")) as store:
            engine = Engine(
                store.journal,
                owner="benchmark",
                scratch_root=Path(folder) / "scratch",
                open_output=store.open_output,
                options=EngineOptions(max_concurrent=BESIDE + 1),
            )
            async with engine.running():
                seen, ended = await in_loop(store, engine)
                gone, whole = await child(store, engine)
    p99, middle = quantile(seen, 0.99), statistics.median(gone)
    show("in the loop, request to token seen", seen, f"budget p99 < {IN_LOOP_BUDGET_MS:g} ms")
    show("in the loop, request to end on disk", ended)
    show("child, its last instruction to gone", gone, f"budget p50 <= {CHILD_BUDGET_MS:g} ms")
    show("child, request to end on disk", whole)
    print("within budget" if p99 < IN_LOOP_BUDGET_MS and middle <= CHILD_BUDGET_MS else "BUDGET EXCEEDED")
    return 0


def show(what: str, values: list[float], budget: str = "") -> None:
    print(
        f"{what:36}  p50 {statistics.median(values):6.2f} ms  p99 {quantile(values, 0.99):6.2f} ms   {budget}".rstrip()
    )


async def submitted(store: Store, engine: Engine, body: Body) -> Run:
    task = Task(title="A task", sink=store.journal, max_events_in_memory=8)
    session = task.enqueue_execution("benchmark", owner="benchmark")
    await store.journal.sync()
    return engine.submit(Job(task=task, session=session, run=body, policy=Policy(grace_seconds=3.0)))


async def in_loop(store: Store, engine: Engine) -> tuple[list[float], list[float]]:
    """Milliseconds to the token, and to the end of the run."""
    over = anyio.Event()

    async def busy(work: Work) -> WorkResult:
        work.tracking.enter_phase(ExecutionPhase.EXECUTION, "Busy")
        number = 0
        while not over.is_set():
            number += 1
            work.tracking.progress(ProgressReport(current=100 - 100 / number, message="Busy"))
            await anyio.sleep(0.01)
        return WorkResult()

    beside = [await submitted(store, engine, busy) for _ in range(BESIDE)]
    seen: list[float] = []
    ended: list[float] = []
    for _ in range(IN_LOOP_ROUNDS):
        begun = anyio.Event()
        looked: list[float] = []

        async def looking(work: Work, begun: anyio.Event = begun, looked: list[float] = looked) -> WorkResult:
            work.tracking.enter_phase(ExecutionPhase.EXECUTION, "Looking")
            begun.set()
            while not work.token.is_cancelled:  # noqa: ASYNC110 - this is the work that looks now and then
                await anyio.sleep(0.0005)
            looked.append(time.perf_counter())
            work.token.throw_if_cancelled()
            return WorkResult()

        run = await submitted(store, engine, looking)
        await begun.wait()
        asked = await anyio.to_thread.run_sync(ask, run)
        await run.done.wait()
        ended.append((time.perf_counter() - asked) * 1e3)
        seen.append((looked[0] - asked) * 1e3)
        assert run.session.lifecycle.status is ExecutionStatus.CANCELLED
    over.set()
    for run in beside:
        await run.done.wait()
    return seen, ended


async def child(store: Store, engine: Engine) -> tuple[list[float], list[float]]:
    """Milliseconds from the child's last instruction to its `wait`, and from the request to the end of the run."""
    gone: list[float] = []
    whole: list[float] = []
    for _ in range(CHILD_ROUNDS):
        ready = anyio.Event()
        said = bytearray()

        async def launching(work: Work, ready: anyio.Event = ready, said: bytearray = said) -> WorkResult:
            def on_output(stream: str, chunk: bytes) -> None:
                said.extend(chunk)

            def on_report(line: bytes) -> None:
                ready.set()

            work.tracking.enter_phase(ExecutionPhase.EXECUTION, "Launching")
            launched = await work.launcher.launch(
                ProcessSpec(
                    argv=(sys.executable, "-I", "-S", "-c", OBEDIENT),
                    cwd=Path("/"),
                    env={"PATH": os.environ.get("PATH", os.defpath)},
                    on_output=on_output,
                    on_report=on_report,
                )
            )
            ended = await launched.wait()
            gone.append((time.monotonic_ns() - int(said)) / 1e6)
            return WorkResult(returncode=ended.returncode)

        run = await submitted(store, engine, launching)
        await ready.wait()
        asked = ask(run)
        await run.done.wait()
        whole.append((time.perf_counter() - asked) * 1e3)
    return gone, whole


def ask(run: Run) -> float:
    asked = time.perf_counter()
    assert run.session.request_cancellation("benchmark")
    return asked


def quantile(values: list[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


if __name__ == "__main__":
    sys.exit(anyio.run(main))
