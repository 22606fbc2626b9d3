"""What a plan costs beside its work: deciding which step begins, and recording where each stands.

    python benchmarks/plans.py

Each plan is gone through in memory, without a store: its steps are popped from the schedule, started, completed and
settled, so a step is two decisions (three events, with its checkpoint). The floor is a sorting by `graphlib` of the
same graph, which hands out each node and is told when it is done. Time is CPU time.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING

from vespera_exec.model.ledger import Batch, Ledger
from vespera_exec.model.plans.board import PlanBoard
from vespera_exec.model.plans.check import checked
from vespera_exec.model.plans.plan import PLAN_ROLE, ExecutionPlan, PlanStep
from vespera_exec.model.plans.schedule import Schedule
from vespera_exec.model.session import ExecutionSession

if TYPE_CHECKING:
    from collections.abc import Callable

_SIZES = (100, 1_000, 10_000)
_REPEATS = 5
_FLATNESS = 2.0
"""How much more a step may cost in the largest plan than in the smallest."""


class Nowhere:
    """A sink that takes everything and keeps nothing."""

    def append(self, batch: Batch) -> None:
        pass


def chain(size: int) -> list[tuple[str, ...]]:
    return [(f"s{at - 1}",) if at else () for at in range(size)]


def wide(size: int) -> list[tuple[str, ...]]:
    """One step, all others beside each other, one that needs them all."""
    middle = tuple(f"s{at}" for at in range(1, size - 1))
    return [(), *((("s0",),) * len(middle)), middle]


def chance(size: int) -> list[tuple[str, ...]]:
    """Up to four dependencies, among the hundred steps before."""
    dice = random.Random(size)
    return [
        tuple({f"s{dice.randrange(max(0, at - 100), at)}" for _ in range(dice.randrange(5))}) if at else ()
        for at in range(size)
    ]


def planned(edges: list[tuple[str, ...]]) -> ExecutionPlan:
    steps = (PlanStep(id=f"s{at}", role="r", depends_on=needs) for at, needs in enumerate(edges))
    return checked(ExecutionPlan(id="p", steps=tuple(steps)))


def sorting(plan: ExecutionPlan) -> float:
    began = time.thread_time()
    sorter = TopologicalSorter({step.id: step.depends_on for step in plan.steps})
    sorter.prepare()
    while sorter.is_active():
        for step in sorter.get_ready():
            sorter.done(step)
    return time.thread_time() - began


def scheduling(plan: ExecutionPlan) -> float:
    began = time.thread_time()
    schedule = Schedule(plan, {})
    while (step := schedule.pop()) is not None:
        schedule.settled(step, lets_on=True)
    return time.thread_time() - began


def deciding(plan: ExecutionPlan) -> float:
    """The steps alone: what opening the board costs is in the plan's first decision."""
    session = ExecutionSession(task_id="t", role_name=PLAN_ROLE, ledger=Ledger(sink=Nowhere()), max_events=32)
    session.start_execution()
    board = PlanBoard(session, plan)
    board.open()
    began = time.thread_time()
    schedule = Schedule(plan, board.states)
    while (step := schedule.pop()) is not None:
        board.started(step, role="r", attempt=1, task_id="t", run_id="r")
        board.completed(step, session_id="x", result_of="x")
        schedule.settled(step, lets_on=True)
    took = time.thread_time() - began
    if board.percentage != 100.0:
        raise AssertionError("the plan has not ended")
    return took


def main() -> int:
    shapes: dict[str, Callable[[int], list[tuple[str, ...]]]] = {"chain": chain, "wide": wide, "random": chance}
    missed = 0
    print(f"{'µs for each step':24} {'graphlib':>9} {'schedule':>9} {'with the board':>15}")
    for name, edges in shapes.items():
        plans = {size: planned(edges(size)) for size in _SIZES}
        figures: dict[tuple[int, str], list[float]] = {}
        for _ in range(_REPEATS):
            for size, plan in plans.items():
                # The more plans are held, the longer a collection takes: that is not the plan's cost.
                gc.collect()
                gc.disable()
                for measure in (sorting, scheduling, deciding):
                    figures.setdefault((size, measure.__name__), []).append(measure(plan) / size * 1e6)
                gc.enable()
        middle = {key: statistics.median(values) for key, values in figures.items()}
        for size in _SIZES:
            row = [middle[size, kind] for kind in ("sorting", "scheduling", "deciding")]
            print(f"{f'{name} of {size:,}':24} {row[0]:9.2f} {row[1]:9.2f} {row[2]:15.2f}")
        growth = middle[_SIZES[-1], "deciding"] / middle[_SIZES[0], "deciding"]
        missed += growth > _FLATNESS
        verdict = "kept" if growth <= _FLATNESS else "MISSED"
        print(f"{'':24} {growth:.2f}x from {_SIZES[0]:,} to {_SIZES[-1]:,} steps   budget {_FLATNESS:g}: {verdict}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
