"""Plans on a real store, from the request to the end, and what is left of them: steps, memory, status, restart.

    python benchmarks/plan_runs.py [STEPS]

Each part is a process of its own, so that its memory is its own. The floor of a step is a task of the same callable,
executed alone: as many, 16 callers at a time, each waiting for the end. Time is told as CPU, since the disk is shared;
"in the way" is the longest that the loop could not turn to anybody else.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import anyio
import anyio.lowlevel

from roles.definition import Role
from vespera_exec.app.plans.files import parse_plan
from vespera_exec.app.plans.views import ExecutePlan
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute
from vespera_exec.engine.engine import Engine
from vespera_exec.engine.jobs import Run
from vespera_exec.engine.plans.children import ReadyStep
from vespera_exec.engine.plans.coordinator import Coordinator
from vespera_exec.model.cancellation import CancellationToken
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.ledger import Batch, Ledger
from vespera_exec.model.plans.board import PlanBoard
from vespera_exec.model.plans.plan import PLAN_ROLE, PlanStep
from vespera_exec.model.principal import Caller
from vespera_exec.model.session import ExecutionSession
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from roles.context import Context
    from vespera_exec.app.views import Handle
    from vespera_exec.engine.plans.children import StepHost
    from vespera_exec.engine.running import OutputSink
    from vespera_exec.engine.work import Work

Figures = dict[str, float]

ROUNDS: Final = 3
CALLERS: Final = 16
WIDE: Final = 1000
ASKED: Final = 200
"""Times that a status is asked for."""
ME: Final = Caller(cwd="/", env={"PATH": "/usr/bin:/bin"})


begun = 0
"""How often `wait` has."""


async def nothing(_: Context) -> str:
    return "done"


async def wait(_: Context) -> str:
    global begun
    begun += 1
    await anyio.sleep(1)
    return "done"


async def stay(context: Context) -> str:
    async def is_cancelled() -> bool:
        return context.cancelled

    await until(is_cancelled, every=0.05)
    return "never"


ROLES: Final = [Role.from_callable(each, in_loop=True, inputs=None) for each in (nothing, wait, stay)]


class Turns:
    """Looks at the loop every few milliseconds: the most that it has worked between two looks, in CPU time."""

    def __init__(self) -> None:
        self._longest = 0.0

    async def watch(self) -> None:
        while True:
            before = time.thread_time()
            await anyio.sleep(0.002)
            self._longest = max(self._longest, time.thread_time() - before)

    def longest_ms(self) -> float:
        """Since the last call."""
        longest, self._longest = self._longest, 0.0
        return longest * 1e3


@asynccontextmanager
async def opened(folder: str, *, slots: int = CALLERS) -> AsyncGenerator[Vespera]:
    settings = Settings.load(
        {"HOME": folder}, data_dir=Path(folder) / "data", roles_dir=Path(folder) / "roles", max_concurrent=slots
    )
    async with Vespera.open(settings=settings, roles=ROLES) as vespera:
        yield vespera


@asynccontextmanager
async def watched() -> AsyncGenerator[Turns]:
    turns = Turns()
    async with anyio.create_task_group() as group:
        group.start_soon(turns.watch)
        await anyio.sleep(0.01)
        yield turns
        group.cancel_scope.cancel()


def plan_of(size: int, role: str = "nothing", **more: Any) -> dict[str, Any]:
    """A hundred chains beside each other."""
    steps = [
        {"id": f"s{at}", "role": role, **({"depends_on": [f"s{at - 100}"]} if at >= 100 else {})} for at in range(size)
    ]
    return {"name": "Benchmark", "max_parallel": CALLERS, "steps": steps, **more}


async def ended(vespera: Vespera, handle: Handle) -> None:
    async def is_done() -> bool:
        return (await vespera.get_status(ME, handle.task_id)).done

    await until(is_done, every=0.05)
    status = await vespera.get_status(ME, handle.task_id)
    if status.status != "completed":
        raise AssertionError(f"the plan has {status.status}")


async def until(holds: Callable[[], Awaitable[bool]], *, every: float) -> None:
    """Returns once it does; looked at every so many seconds."""
    while True:
        if await holds():
            return
        await anyio.sleep(every)


async def steps(size: int) -> Figures:
    """A plan of trivial steps, then as many tasks."""
    with tempfile.TemporaryDirectory() as folder:
        async with opened(folder) as vespera, watched() as turns:
            await tasks(vespera, 200)  # whatever is done the first time only
        first = bytes_in(folder)
        async with opened(folder) as vespera, watched() as turns:
            gc.collect()
            peak, began, cpu = peak_mb(), time.perf_counter(), time.process_time()
            handle = await vespera.plans.execute(ME, ExecutePlan(plan=plan_of(size)))
            opening, opening_turn = time.perf_counter() - began, turns.longest_ms()
            await ended(vespera, handle)
            wall, cpu, turn = time.perf_counter() - began, time.process_time() - cpu, turns.longest_ms()
            grown = peak_mb() - peak
        second = bytes_in(folder)
        async with opened(folder) as vespera:
            task_began, task_cpu = time.perf_counter(), time.process_time()
            await tasks(vespera, size)
            task_wall, task_cpu = time.perf_counter() - task_began, time.process_time() - task_cpu
        third = bytes_in(folder)
    return {
        "opening ms": opening * 1e3,
        "longest turn while opened ms": opening_turn,
        "longest turn ms": turn,
        "steps/s": size / wall,
        "tasks/s": size / task_wall,
        "CPU of a step ms": cpu / size * 1e3,
        "CPU of a task ms": task_cpu / size * 1e3,
        "CPU ratio": cpu / task_cpu,
        "memory MB": grown,
        "bytes of a step": (second - first) / size,
        "bytes of a task": (third - second) / size,
    }


async def alone(size: int) -> Figures:
    """The coordinator with children that end at once, without a store; less what the children cost."""
    took: list[float] = []
    for with_coordinator in (True, False):
        host = Children()
        with tempfile.TemporaryDirectory() as folder:
            engine = Engine(Nowhere(), owner="benchmark", scratch_root=Path(folder), open_output=host.no_output)
            session = ExecutionSession(task_id="t", role_name=PLAN_ROLE, ledger=Ledger(), max_events=0)
            session.start_execution()
            plan = parse_plan(plan_of(size))
            board = PlanBoard(session, plan)
            board.open()
            gc.collect()
            cpu = time.thread_time()
            if with_coordinator:
                await Coordinator(session, plan, cast("StepHost", host), engine, board=board).run(cast("Work", Token()))
            else:
                for step in plan.steps:
                    host.begin(step.id, step.id)
                await anyio.lowlevel.checkpoint()
            took.append((time.thread_time() - cpu) / size * 1e6)
    return {"coordinator µs": took[0] - took[1], "child µs": took[1]}


class Token:
    def __init__(self) -> None:
        self.token = CancellationToken()


class Nowhere:
    """A log that takes everything and keeps nothing."""

    fault = None

    def append(self, batch: Batch) -> None:
        pass

    def append_samples(self, samples: object) -> None:
        pass

    async def sync(self) -> int:
        return 0


class Children:
    """What a `StepHost` does where nothing is read: they begin, and have ended in the next turn of the loop."""

    async def ready(self, step: PlanStep, role: str, *_: object, **__: object) -> ReadyStep:
        return ReadyStep(role, None, self.begin)

    def begin(self, task_id: str, run_id: str) -> Run:
        session = ExecutionSession(task_id=task_id, session_id=run_id, ledger=Ledger(), max_events=0)
        run = Run(run_id, task_id, session)
        asyncio.get_running_loop().call_soon(self._end, run)
        return run

    def _end(self, run: Run) -> None:
        run.session.start_execution()
        run.session.update_status(ExecutionStatus.RUNNING)
        run.session.complete()
        run.done.set()

    def answered(self, step: PlanStep, run: Run) -> None:
        return None

    async def output(self, execution_id: str) -> None:
        return None

    def no_output(self, key: str) -> OutputSink:
        raise NotImplementedError


async def tasks(vespera: Vespera, count: int, role: str = "nothing", callers: int = CALLERS) -> None:
    numbers = iter(range(count))

    async def call() -> None:
        for number in numbers:
            ended = await vespera.execute_task(ME, Execute(title=f"Task {number}", role=role, wait_ms=25_000))
            assert ended.done

    async with anyio.create_task_group() as group:
        for _ in range(callers):
            group.start_soon(call)


async def wide(size: int) -> Figures:
    """Steps that all wait for a second at once, then as many tasks that do."""
    plan = {"name": "Wide", "max_parallel": size, "steps": [{"id": f"s{at}", "role": "wait"} for at in range(size)]}
    found: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        async with opened(folder, slots=size) as vespera, watched() as turns:
            for name in ("steps", "tasks"):
                gc.collect()
                peak, began, cpu = peak_mb(), time.perf_counter(), time.process_time()
                earlier, begun_in = begun, 0.0
                async with anyio.create_task_group() as group:
                    if name == "steps":
                        handle = await vespera.plans.execute(ME, ExecutePlan(plan=plan))
                        group.start_soon(ended, vespera, handle)
                    else:
                        group.start_soon(tasks, vespera, size, "wait", size)
                    while begun < earlier + size:  # noqa: ASYNC110 - of another task, and there is no event for it
                        await anyio.sleep(0.005)
                    begun_in = time.perf_counter() - began
                found |= {
                    f"{name}: begun s": begun_in,
                    f"{name}: ended s": time.perf_counter() - began,
                    f"{name}: CPU s": time.process_time() - cpu,
                    f"{name}: longest turn ms": turns.longest_ms(),
                }
                found.setdefault("steps: memory MB", peak_mb() - peak)
    return found


async def after(size: int) -> Figures:
    """A plan of which half the steps have ended: its status, its next owner, its checkpoint."""
    half = plan_of(size)
    for step in half["steps"][size // 2 :]:
        step["role"] = "stay"
    found: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        async with opened(folder) as vespera:
            handle = await vespera.plans.execute(ME, ExecutePlan(plan=half))
            await until(lambda: have(vespera, handle, "completed", size // 2), every=0.1)
            found["status ms"] = await asked(vespera, handle.task_id)
            single = await vespera.execute_task(ME, Execute(title="Task", role="stay"))
            found["status of a task ms"] = await asked(vespera, single.task_id)
        async with watched() as turns:
            began = time.perf_counter()
            async with opened(folder) as vespera:
                found["next owner s"] = time.perf_counter() - began
                await until(lambda: have(vespera, handle, "running", 1), every=0.005)
                found["goes on s"], found["goes on, longest turn ms"] = time.perf_counter() - began, turns.longest_ms()
                made = await vespera.checkpoints.create(ME, handle.task_id)
                began = time.perf_counter()
                await vespera.checkpoints.get(ME, made.checkpoint_id)
                found["checkpoint read s"], found["checkpoint read, longest turn ms"] = (
                    time.perf_counter() - began,
                    turns.longest_ms(),
                )
                began = time.perf_counter()
                await vespera.checkpoints.restore(ME, made.checkpoint_id)
                found["restored s"], found["restored, longest turn ms"] = (
                    time.perf_counter() - began,
                    turns.longest_ms(),
                )
                began = time.perf_counter()
                await vespera.cancel(ME, handle.task_id, wait_ms=20_000)
                found["cancelled s"], found["cancelled, longest turn ms"] = (
                    time.perf_counter() - began,
                    turns.longest_ms(),
                )
    return found


async def have(vespera: Vespera, handle: Handle, status: str, count: int) -> bool:
    """So many steps have that status."""
    return (await vespera.list_steps(ME, handle.task_id, limit=1)).counts.get(status, 0) >= count


async def asked(vespera: Vespera, task_id: str) -> float:
    """Milliseconds of a status, the median."""
    took: list[float] = []
    for _ in range(ASKED):
        began = time.perf_counter()
        await vespera.get_status(ME, task_id)
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e3


def bytes_in(folder: str) -> int:
    return sum(each.stat().st_size for each in (Path(folder) / "data").rglob("*") if each.is_file())


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


PARTS: Final = {"steps": steps, "alone": alone, "wide": wide, "after": after}


def main(size: int) -> int:
    for part, sizes in (
        ("alone", (size // 10, size)),
        ("steps", (size // 10, size)),
        ("wide", (WIDE,)),
        ("after", (size,)),
    ):
        table = [measured(part, each) for each in sizes]
        print(f"{part:32}" + "".join(f"{each:>12,}" for each in sizes))
        for name in table[0]:
            print(f"  {name:30}" + "".join(f"{each[name]:12,.2f}" for each in table))
    return 0


def measured(part: str, size: int) -> Figures:
    """The medians of some rounds, each in a process of its own."""
    rounds: list[Figures] = []
    for _ in range(ROUNDS):
        told = subprocess.run(
            [sys.executable, __file__, part, str(size)], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        rounds.append(json.loads(told))
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(json.dumps(anyio.run(PARTS[sys.argv[1]], int(sys.argv[2]))))
    else:
        raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
