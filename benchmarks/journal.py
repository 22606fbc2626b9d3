"""What a durable append costs: ours, against raw SQLite with 100 events a commit, and against a bare commit.

Run: `python benchmarks/journal.py [EVENTS]`. Everything is `synchronous=FULL`; the event bodies of the floor
are as long as ours. Each producer appends one progress event with its snapshot and waits until it is on disk.
"""

from __future__ import annotations

import gc
import sqlite3
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.progress import ProgressReport
from vespera_exec.model.task import Task
from vespera_exec.store.encoding import encode_event
from vespera_exec.store.journal import Journal

if TYPE_CHECKING:
    from vespera_exec.model.ledger import Batch

ROUNDS = 3
FLOOR_BATCH = 100
PRODUCERS = (1, 10, 100, 1000)
THROUGHPUT_BUDGET = 0.6
ACK_BUDGET = 2.0
P99_BUDGET_MS = 10.0
PACED_RATE = 10_000


class Collector:
    """A sink that keeps the decisions, so that making them is not measured."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def append(self, batch: Batch) -> None:
        self.batches.append(batch)


def main(events: int) -> int:
    raw: list[float] = []
    bare: list[float] = []
    ours: dict[int, list[float]] = {producers: [] for producers in PRODUCERS}
    acks: dict[int, list[float]] = {producers: [] for producers in PRODUCERS}
    paced: list[float] = []
    size = body_size()
    for _ in range(ROUNDS):
        raw.append(raw_rate(events, FLOOR_BATCH, size))
        bare.append(FLOOR_BATCH / raw_rate(1000, 1, size) / FLOOR_BATCH)
        for producers in PRODUCERS:
            rate, latencies = run(events if producers > 10 else events // 10, producers)
            ours[producers].append(rate)
            acks[producers] += latencies
        paced += run(PACED_RATE, 100, rate=PACED_RATE)[1]
    floor, commit = statistics.median(raw), statistics.median(bare)
    print(f"events of {size} B, FULL, {ROUNDS} rounds, medians")
    print(f"  raw SQLite, {FLOOR_BATCH} a commit   {floor:9.0f}/s")
    print(f"  raw SQLite, bare commit    {1 / commit:9.0f}/s   {commit * 1e3:.2f} ms")
    for producers in PRODUCERS:
        rate = statistics.median(ours[producers])
        p50, p99 = quantile(acks[producers], 0.5), quantile(acks[producers], 0.99)
        print(
            f"  ours, {producers:4} producers       {rate:9.0f}/s   {rate / floor:.2f}x of raw   "
            f"ack p50 {p50 * 1e3:.2f} ms  p99 {p99 * 1e3:.2f} ms"
        )
    ratio = statistics.median(ours[100]) / floor
    ack = quantile(acks[1], 0.5) / commit
    p99 = quantile(paced, 0.99) * 1e3
    print(f"  throughput, 100 producers  {ratio:.2f}x of raw        budget >= {THROUGHPUT_BUDGET}")
    print(f"  ack p50, 1 producer        {ack:.2f}x a bare commit   budget <= {ACK_BUDGET}")
    print(f"  ack p99 at {PACED_RATE}/s       {p99:.2f} ms            budget <= {P99_BUDGET_MS} ms")
    kept = ratio >= THROUGHPUT_BUDGET and ack <= ACK_BUDGET and p99 <= P99_BUDGET_MS
    print("within budget" if kept else "BUDGET EXCEEDED")
    return 0


def run(events: int, producers: int, *, rate: float | None = None) -> tuple[float, list[float]]:
    """Acknowledged events a second, and how long each waited, in seconds."""
    decided = [decisions(max(1, events // producers)) for _ in range(producers)]
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        gc.freeze()
        try:
            return anyio.run(measure, Path(folder) / "bench.db", decided, rate)
        finally:
            gc.unfreeze()


async def measure(path: Path, decided: list[list[Batch]], rate: float | None) -> tuple[float, list[float]]:
    latencies: list[float] = []
    async with Journal.open(path) as journal:
        for batches in decided:
            journal.append(batches[0])
        await journal.sync()
        began = time.perf_counter()

        async def produce(number: int, batches: list[Batch]) -> None:
            every = len(decided) / rate if rate else 0.0
            for turn, batch in enumerate(batches[1:]):
                if rate:
                    due = began + turn * every + number / rate
                    if (early := due - time.perf_counter()) > 0:
                        await anyio.sleep(early)
                asked = time.perf_counter()
                journal.append(batch)
                await journal.sync()
                latencies.append(time.perf_counter() - asked)

        async with anyio.create_task_group() as group:
            for number, batches in enumerate(decided):
                group.start_soon(produce, number, batches)
        return len(latencies) / (time.perf_counter() - began), latencies


def decisions(progress_reports: int) -> list[Batch]:
    """The decisions of one task: made and running as the first, then so many progress reports."""
    sink = Collector()
    task = Task(title="A task of the benchmark", sink=sink, max_events_in_memory=0)
    with task.ledger:
        session = task.start_execution("bench")
        session.update_status(ExecutionStatus.RUNNING)
    for number in range(progress_reports):
        session.report(ProgressReport(current=90 * number / progress_reports, message="Reading the input files"))
    made, started, *reports = sink.batches
    first = type(made)(made.events + started.events, made.rows + started.rows)
    return [first, *reports]


def body_size() -> int:
    return len(encode_event(decisions(1)[1].events[0]))


def raw_rate(events: int, batch: int, size: int) -> float:
    """Events a second into an append-only table with UNIQUE(stream, sequence), by `executemany`."""
    with tempfile.TemporaryDirectory() as folder:
        connection = sqlite3.connect(Path(folder) / "raw.db", isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute(
            "CREATE TABLE events (cursor INTEGER PRIMARY KEY, stream INTEGER, sequence INTEGER, body BLOB, "
            "UNIQUE (stream, sequence))"
        )
        body = b"x" * size
        began = time.perf_counter()
        for group in range(events // batch):
            rows = [(group * batch + each + 1, each, group, body) for each in range(batch)]
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", rows)
            connection.execute("COMMIT")
        rate = events / (time.perf_counter() - began)
        connection.close()
        return rate


def quantile(values: list[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 30_000))
