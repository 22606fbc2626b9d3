"""What the model costs: a progress report, a transition, a session in memory.

    python benchmarks/model.py

The floor is the least that a log asks for: one dictionary with a random id and a stamp, appended under a lock.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
import tracemalloc
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus, ProgressType
from vespera_exec.model.ledger import Batch, Ledger
from vespera_exec.model.progress import ProgressReport
from vespera_exec.model.session import ExecutionSession

if TYPE_CHECKING:
    from collections.abc import Callable

_REPEATS = 7
_REPORTS = 10_000
_LIVES = 1_000
_SESSIONS = 500
_TAIL = 32
_BUDGETS = {"progress report": 15.0, "idle session": 4.0, "session with a tail of 32": 32.0}


class Nowhere:
    """A sink that takes everything and keeps nothing."""

    def append(self, batch: Batch) -> None:
        pass


def running(*, max_events: int = _TAIL) -> ExecutionSession:
    session = ExecutionSession(task_id="t", role_name="r", ledger=Ledger(sink=Nowhere()), max_events=max_events)
    session.start_execution()
    session.update_status(ExecutionStatus.RUNNING)
    session.enter_phase(ExecutionPhase.EXECUTION)
    return session


def floor() -> float:
    lock, log = threading.RLock(), list[dict[str, object]]()
    began = time.perf_counter()
    for step in range(_REPORTS):
        with lock:
            log.append({"id": str(uuid.uuid4()), "at": datetime.now(UTC), "sequence": step, "percentage": step})
    return (time.perf_counter() - began) / _REPORTS * 1e6


def reports_of_a_phase() -> float:
    session = running()
    began = time.perf_counter()
    for step in range(_REPORTS):
        report = ProgressReport(progress_type=ProgressType.STEPS, current=step, total=_REPORTS, message="reading")
        session.report(report, ExecutionPhase.EXECUTION)
    return (time.perf_counter() - began) / _REPORTS * 1e6


def percentages() -> float:
    session = running()
    began = time.perf_counter()
    for step in range(_REPORTS):
        session.update_progress(step / _REPORTS * 99, message="reading")
    return (time.perf_counter() - began) / _REPORTS * 1e6


def transitions() -> float:
    """IDLE to PENDING, PREPARING, RUNNING, COMPLETING, COMPLETED: five, with their milestones."""
    sessions = [ExecutionSession(task_id="t", ledger=Ledger(sink=Nowhere()), max_events=_TAIL) for _ in range(_LIVES)]
    began = time.perf_counter()
    for session in sessions:
        session.enqueue()
        session.start_execution()
        session.update_status(ExecutionStatus.RUNNING)
        session.complete()
    return (time.perf_counter() - began) / _LIVES / 5 * 1e6


def kilobytes(make: Callable[[], ExecutionSession]) -> float:
    """Memory of one session, with its own ledger."""
    make()
    gc.collect()
    tracemalloc.start()
    kept = [make() for _ in range(_SESSIONS)]
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / len(kept) / 1024


def idle() -> ExecutionSession:
    return ExecutionSession(task_id="t", ledger=Ledger(sink=Nowhere()), max_events=_TAIL)


def with_tail(events: int) -> Callable[[], ExecutionSession]:
    def make() -> ExecutionSession:
        session = running()
        for step in range(events):
            session.update_progress(step / events * 99, message=f"file {step}")
        return session

    return make


def main() -> int:
    timed = {
        "floor (a dictionary)": floor,
        "progress report": reports_of_a_phase,
        "update_progress": percentages,
        "transition": transitions,
    }
    # Interleaved, so that a busy moment of the machine is shared by all.
    figures: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(_REPEATS):
        for name, measure in timed.items():
            figures[name].append(measure())
    base = statistics.median(figures["floor (a dictionary)"])
    missed = 0
    for name, values in figures.items():
        middle = statistics.median(values)
        print(f"{name:28} {middle:7.2f} µs   {middle / base:5.1f}x the floor{_verdict(name, middle)}")
        missed += middle > _BUDGETS.get(name, middle)
    for name, make in {
        "idle session": idle,
        "session with a tail of 32": with_tail(32),
        "the same after 1000 reports": with_tail(1000),
    }.items():
        size = kilobytes(make)
        print(f"{name:28} {size:7.2f} KB{_verdict(name, size)}")
        missed += size > _BUDGETS.get(name, size)
    return 1 if missed else 0


def _verdict(name: str, value: float) -> str:
    budget = _BUDGETS.get(name)
    if budget is None:
        return ""
    return f"   budget {budget:g}: {'kept' if value <= budget else 'MISSED'}"


if __name__ == "__main__":
    raise SystemExit(main())
