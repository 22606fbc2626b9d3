"""1000 tasks with 10 progress reports each: ours through store and engine, against huey and docket on the same job.

Run: `python benchmarks/peers.py [PEERS_PYTHON]`. `PEERS_PYTHON` is an interpreter of an environment of its own
that has `huey` and `pydocket`; without it, the peers' figures are those recorded on 2 noisy cores.
A closed loop keeps 100 tasks under way. Every run is a fresh process; ours commits every event with
`synchronous=FULL`, huey keeps the last value of each task in SQLite, docket keeps all in memory. The floor is a loop
and a writer that do nothing but encode and commit as many events and rows as a task of ours has: no model, no engine.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio

from vespera_exec import garbage
from vespera_exec.engine.engine import Engine, EngineOptions
from vespera_exec.engine.jobs import Job
from vespera_exec.engine.work import Work, WorkResult
from vespera_exec.model.enums import ExecutionPhase
from vespera_exec.model.progress import ProgressReport
from vespera_exec.model.task import Task
from vespera_exec.monitoring.sampler import UsageSampler
from vespera_exec.settings import Settings
from vespera_exec.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

TASKS: Final = 1000
REPORTS: Final = 10
UNDER_WAY: Final = 100
ROUNDS: Final = 3
DURABLE_BUDGET: Final = 10.0
CPU_BUDGET: Final = 0.1


class Figures(NamedTuple):
    reports_per_second: float
    start_ms: float
    cpu_seconds: float
    rss_mb: float


RECORDED: Final = {"huey": Figures(2900, 128, 1.5, 45), "docket": Figures(4700, 1.6, 2.5, 56)}

HUEY = """
import json, resource, sys, tempfile, threading, time
from huey import SqliteHuey
tasks, reports, under_way = map(int, sys.argv[1:])
huey = SqliteHuey(filename=tempfile.mkdtemp() + "/huey.db", fsync=True)
room, all_done, left = threading.Semaphore(under_way), threading.Event(), [tasks]
asked, started, lock = {}, [], threading.Lock()

@huey.task()
def job(number):
    started.append(time.perf_counter() - asked[number])
    for report in range(reports):
        huey.put(f"progress:{number}", report)
    with lock:
        left[0] -= 1
        if not left[0]:
            all_done.set()
    room.release()

consumer = huey.create_consumer(workers=4, worker_type="thread", periodic=False, initial_delay=0.01, max_delay=0.05)
consumer.start()
began, cpu = time.perf_counter(), time.process_time()
for number in range(tasks):
    room.acquire()
    asked[number] = time.perf_counter()
    job(number)
all_done.wait()
wall, cpu = time.perf_counter() - began, time.process_time() - cpu
consumer.stop(graceful=True)
started.sort()
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([tasks * reports / wall, started[tasks // 2] * 1e3, cpu * 1000 / tasks, rss]))
"""

DOCKET = """
import asyncio, json, logging, resource, sys, time
from docket import Docket, Progress, Worker
logging.disable(logging.CRITICAL)
tasks, reports, under_way = map(int, sys.argv[1:])
asked, started = {}, []

async def main():
    room, done, left = asyncio.Semaphore(under_way), asyncio.Event(), [tasks]

    async def job(number: int, progress: Progress = Progress()):
        started.append(time.perf_counter() - asked[number])
        await progress.set_total(reports)
        for report in range(reports):
            await progress.increment()
        left[0] -= 1
        if not left[0]:
            done.set()
        room.release()

    async with Docket(name="benchmark", url="memory://") as docket:
        docket.register(job)
        async with Worker(docket, concurrency=under_way) as worker:
            running = asyncio.create_task(worker.run_forever())
            began, cpu = time.perf_counter(), time.process_time()
            for number in range(tasks):
                await room.acquire()
                asked[number] = time.perf_counter()
                await docket.add(job)(number)
            await done.wait()
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    started.sort()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([tasks * reports / wall, started[tasks // 2] * 1e3, cpu * 1000 / tasks, rss]))

asyncio.run(main())
"""


FLOOR = """
import asyncio, json, resource, sqlite3, sys, tempfile, threading, time
import orjson
tasks, reports, under_way = map(int, sys.argv[1:])
EVENTS, SNAPSHOTS = 26, 4  # of one of our tasks: its events, and how often its task, execution and progress are written
queue, waiting, lock, wake = [], [], threading.Lock(), threading.Event()
db = sqlite3.connect(tempfile.mkdtemp() + "/floor.db", isolation_level=None, check_same_thread=False)
for line in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL",
             "CREATE TABLE events (cursor INTEGER PRIMARY KEY, task INTEGER, sequence INTEGER, body BLOB, "
             "UNIQUE (task, sequence))", "CREATE TABLE states (id INTEGER PRIMARY KEY, doc TEXT)"):
    db.execute(line)

def write(loop):
    while wake.wait() and queue is not None:
        wake.clear()
        with lock:
            events, told = queue[:], waiting[:]
            queue.clear(), waiting.clear()
        if not told:
            continue
        db.execute("BEGIN")
        db.executemany("INSERT INTO events (task, sequence, body) VALUES (?, ?, ?)", events)
        touched = {task for task, _, _ in events}
        states = [(3 * task + kind, "x" * size) for task in touched for kind, size in enumerate((600, 950, 430))]
        db.executemany("INSERT INTO states VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET doc = excluded.doc", states)
        db.execute("COMMIT")
        loop.call_soon_threadsafe(lambda told=told: [each.set_result(None) for each in told if not each.done()])

async def main():
    loop = asyncio.get_running_loop()
    threading.Thread(target=write, args=(loop,), daemon=True).start()
    numbers, started = iter(range(tasks)), []

    def record(task, sequence, message):
        body = orjson.dumps({"event_id": "b5f5ceb8-59de-401f-ba63-a9486e4c5f45", "timestamp": time.time(),
                             "type": "progress_update", "message": message, "progress": {"current": sequence},
                             "details": {}, "task_id": str(task), "execution_id": "x" * 200, "sequence": sequence})
        with lock:
            queue.append((task, sequence, body))

    async def on_disk():
        future = loop.create_future()
        with lock:
            waiting.append(future)
        wake.set()
        await future

    async def work(task):
        for report in range(reports):
            record(task, EVENTS - reports + report, "Working")
            await asyncio.sleep(0)

    async def client():
        for task in numbers:
            asked = time.perf_counter()
            per_wait = (EVENTS - reports) // (SNAPSHOTS - 1)
            for part in range(SNAPSHOTS - 1):
                for each in range(per_wait):
                    record(task, part * per_wait + each, "Queued")
                if part < SNAPSHOTS - 2:
                    await on_disk()
            started.append(time.perf_counter() - asked)
            await loop.create_task(work(task))
            await on_disk()

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(under_way)))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    started.sort()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([tasks * reports / wall, started[tasks // 2] * 1e3, cpu * 1000 / tasks, rss]))

asyncio.run(main())
"""


def main(peers_python: str | None) -> int:
    measured: dict[str, list[Figures]] = {}
    for _ in range(ROUNDS):
        measured.setdefault("ours", []).append(in_a_process([sys.executable, __file__, "--ours"]))
        numbers = [str(number) for number in (TASKS, REPORTS, UNDER_WAY)]
        measured.setdefault("floor", []).append(in_a_process([sys.executable, "-c", FLOOR, *numbers]))
        for name, program in (("huey", HUEY), ("docket", DOCKET)):
            if peers_python is not None:
                measured.setdefault(name, []).append(in_a_process([peers_python, "-c", program, *numbers]))
    medians = {name: middle(rounds) for name, rounds in measured.items()}
    print(f"{TASKS} tasks x {REPORTS} reports, {UNDER_WAY} under way, medians of {ROUNDS} interleaved rounds")
    print("                   reports/s  start p50 ms  CPU s/1000 tasks  RSS MB")
    for name in ("ours", "floor", "huey", "docket"):
        figures = medians.get(name, RECORDED.get(name))
        assert figures is not None
        mark = "" if name in medians else "  (recorded, not measured: no PEERS_PYTHON given)"
        shown = f"{figures.reports_per_second:9.0f}  {figures.start_ms:12.2f}  {figures.cpu_seconds:16.3f}"
        print(f"  {name:15}{shown}  {figures.rss_mb:6.0f}{mark}")
    ours, peers = medians["ours"], RECORDED | medians
    faster = ours.reports_per_second / peers["huey"].reports_per_second
    cheaper = ours.cpu_seconds / peers["docket"].cpu_seconds
    print(f"  durable reports    {faster:.1f}x of huey                  budget >= {DURABLE_BUDGET:g}")
    print(f"  CPU per 1000 tasks {cheaper:.3f}x of docket in memory     budget <= {CPU_BUDGET:g}")
    print("within budget" if faster >= DURABLE_BUDGET and cheaper <= CPU_BUDGET else "BUDGET EXCEEDED")
    return 0


def middle(rounds: list[Figures]) -> Figures:
    return Figures(*(statistics.median(column) for column in zip(*rounds, strict=True)))


def in_a_process(command: list[str]) -> Figures:
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=300)
    return Figures(*json.loads(ran.stdout.splitlines()[-1]))


async def ours(tasks: int = TASKS, profiled: Callable[[], object] | None = None) -> Figures:
    """The closed loop over a store of its own; the figures of the loop alone, without opening the store."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.load({"HOME": folder}, data_dir=Path(folder) / "data")
        async with Store.open(settings) as store, UsageSampler() as sampler:
            engine = Engine(
                store.journal,
                owner="benchmark",
                scratch_root=Path(folder) / "scratch",
                open_output=store.open_output,
                sampler=sampler,
                options=EngineOptions(max_concurrent=UNDER_WAY),
            )
            async with engine.running():
                if profiled is not None:
                    profiled()
                began, cpu = time.perf_counter(), time.process_time()
                started = await closed_loop(store, engine, tasks)
                wall, cpu = time.perf_counter() - began, time.process_time() - cpu
                assert store.journal.statistics().events >= tasks * REPORTS
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Figures(tasks * REPORTS / wall, statistics.median(started) * 1e3, cpu * 1000 / tasks, rss)


async def closed_loop(store: Store, engine: Engine, tasks: int) -> list[float]:
    """Seconds from each request to its work's first line."""
    started: list[float] = []

    async def client() -> None:
        for _ in range(tasks // UNDER_WAY):
            asked = time.perf_counter()
            task = Task(title="A task of the benchmark", sink=store.journal, max_events_in_memory=32)

            async def work(work: Work, asked: float = asked) -> WorkResult:
                work.tracking.enter_phase(ExecutionPhase.EXECUTION, "Working")
                started.append(time.perf_counter() - asked)
                for report in range(REPORTS):
                    work.tracking.progress(ProgressReport(current=100.0 * report / REPORTS, message="Working"))
                    await anyio.lowlevel.checkpoint()
                return WorkResult(output={"reports": REPORTS})

            session = task.enqueue_execution("benchmark", owner="benchmark")
            await store.journal.sync()
            run = engine.submit(Job(task=task, session=session, run=work))
            await run.done.wait()

    async with anyio.create_task_group() as group:
        for _ in range(UNDER_WAY):
            group.start_soon(client)
    return started


if __name__ == "__main__":
    if sys.argv[1:] == ["--ours"]:
        garbage.settle()  # as the daemon does
        print(json.dumps(anyio.run(ours)))
    else:
        sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else None))
