"""The metrics of an execution: each number counted by hand first, on a clock that stands until it is told to go on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from vespera_exec.app.executions.metrics import (
    Clocks,
    Counted,
    Measured,
    clocks,
    metrics,
    quality_score,
    resource_efficiency,
    seconds_at_work,
    usage,
)
from vespera_exec.app.executions.result import ExecutionMetrics, ResourceUsage
from vespera_exec.model.clock import Clock
from vespera_exec.model.enums import EventType, ExecutionStatus
from vespera_exec.model.ledger import Batch, Ledger
from vespera_exec.model.plans.board import PlanBoard
from vespera_exec.model.plans.plan import PLAN_ROLE, ExecutionPlan, PlanStep
from vespera_exec.model.session import ExecutionSession

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
S = ExecutionStatus


class HandClock:
    def __init__(self) -> None:
        self.seconds = 0.0
        self.clock = Clock(now=self.now, monotonic=lambda: self.seconds)

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds)

    def pass_(self, seconds: float) -> None:
        self.seconds += seconds


class Log:
    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def append(self, batch: Batch) -> None:
        self.batches.append(batch)

    @property
    def events(self) -> list[Any]:
        return [event for batch in self.batches for event in batch.events]


def made(hand: HandClock, *step_ids: str) -> tuple[ExecutionSession, PlanBoard, Log]:
    """A plan that is accepted, and not begun."""
    log = Log()
    session = ExecutionSession("e1", "t1", PLAN_ROLE, ledger=Ledger(sink=log, clock=hand.clock))
    session.enqueue()
    plan = ExecutionPlan(id="p", steps=tuple(PlanStep(id=each, role="r") for each in step_ids))
    board = PlanBoard(session, plan)
    board.open()
    return session, board, log


def begin(session: ExecutionSession) -> None:
    session.start_execution()
    session.update_status(S.RUNNING)


def allocated(session: ExecutionSession, step: str, allocation_id: str, amount: float) -> None:
    given = {"allocation_id": allocation_id, "pool": "cpu", "type": "cpu", "amount": amount, "cost_per_unit_hour": 36.0}
    session.record_fact(EventType.RESOURCE_ALLOCATED, (), step_id=step, details={"allocations": [given]})


def released(session: ExecutionSession, step: str, allocation_id: str, cost: float, efficiency: float | None) -> None:
    given = {"allocation_id": allocation_id, "cost": cost, "efficiency": efficiency}
    session.record_fact(EventType.RESOURCE_RELEASED, (), step_id=step, details={"allocations": [given]})


def test_the_metrics_of_a_plan_are_those_that_are_counted_by_hand() -> None:
    hand = HandClock()
    session, board, log = made(hand, "fetch", "build", "test")
    hand.pass_(2)  # 2 s in the queue
    begin(session)
    board.started("fetch", role="r", attempt=1)
    allocated(session, "fetch", "a1", 2)
    board.started("build", role="r", attempt=1)
    hand.pass_(10)  # 10 s: both at work
    released(session, "fetch", "a1", 0.2, 0.5)
    board.completed("fetch")
    hand.pass_(5)  # 5 s: build alone
    board.failed("build", {"code": "NET", "message": "no"}, final=False, not_before=hand.now() + timedelta(seconds=3))
    hand.pass_(3)  # 3 s of back-off: nobody works
    board.started("build", role="r", attempt=2)
    allocated(session, "build", "a2", 1)
    session.pause()
    hand.pass_(60)  # 60 s paused
    session.resume()
    board.waiting("build", "slot")
    hand.pass_(4)  # 4 s: it waits for a slot
    board.waiting("build", None)
    hand.pass_(6)  # 6 s at work
    released(session, "build", "a2", 0.7, 0.2)
    board.completed("build")
    board.started("test", role="r", attempt=1)
    hand.pass_(9)  # 9 s at work
    board.failed("test", {"code": "RED", "message": "no"})
    session.fail("one has failed")

    used = usage(log.events)
    got = metrics(
        Measured(
            clocks=clocks([session.lifecycle], now=hand.now()),
            effective=seconds_at_work(log.events),
            steps=Counted(completed=2, failed=1),
            attempts=Counted(completed=2, failed=2),
            usage=used,
            result={"quality_score": 0.75},
        )
    )
    total = 2 + 10 + 5 + 3 + 60 + 4 + 6 + 9
    assert got.total_duration == total * 1000
    assert got.effective_duration == (10 + 5 + 6 + 9) * 1000
    assert got.efficiency == 30 / 99
    assert got.total_cost == pytest.approx(0.9)
    # a1: 2 units for 10 s at 0.5; a2: 1 unit for 70 s, the pause and the wait included, at 0.2
    assert got.resource_efficiency == pytest.approx((20 * 0.5 + 70 * 0.2) / 90)
    assert got.quality_score == 0.75
    assert got.success_rate == 2 / 3
    assert got.throughput == 2 / total
    assert got.error_rate == 0.5
    assert [(each.resource_id, each.task_id, each.amount_used, each.duration) for each in used] == [
        ("a1", "fetch", 2, 10_000),
        ("a2", "build", 1, 70_000),
    ]


def test_what_is_not_known_is_none_and_not_a_number() -> None:
    nothing = metrics(Measured(clocks=Clocks(), steps=Counted()))
    assert nothing == ExecutionMetrics(total_duration=0.0)
    assert nothing.efficiency is None
    assert nothing.throughput is None


def test_a_run_of_no_time_has_no_efficiency_and_no_throughput() -> None:
    got = metrics(Measured(clocks=Clocks(), effective=0.0, steps=Counted(completed=1), attempts=Counted(completed=1)))
    assert (got.total_duration, got.effective_duration) == (0.0, 0.0)
    assert (got.efficiency, got.throughput) == (None, None)
    assert (got.success_rate, got.error_rate) == (1.0, 0.0)


def test_the_clock_that_runs_is_read_now() -> None:
    hand = HandClock()
    session, _, _ = made(hand, "a")
    hand.pass_(3)
    assert clocks([session.lifecycle], now=hand.now()) == Clocks(0.0, 0.0, 3.0)
    begin(session)
    hand.pass_(5)
    session.pause()
    hand.pass_(7)
    assert clocks([session.lifecycle], now=hand.now()) == Clocks(5.0, 7.0, 3.0)
    session.resume()
    hand.pass_(11)
    assert clocks([session.lifecycle], now=hand.now()) == Clocks(16.0, 7.0, 3.0)
    session.complete()
    hand.pass_(13)
    assert clocks([session.lifecycle], now=hand.now()) == Clocks(16.0, 7.0, 3.0)


def test_the_time_without_an_owner_is_nobodys_work() -> None:
    hand = HandClock()
    session, board, log = made(hand, "a")
    begin(session)
    board.started("a", role="r", attempt=1)
    hand.pass_(5)
    board.progress("a", 10)
    hand.pass_(3600)
    session.change_owner("the next")
    hand.pass_(2)
    board.completed("a")
    assert seconds_at_work(log.events) == 7


def test_what_still_runs_is_counted_until_now() -> None:
    hand = HandClock()
    session, board, log = made(hand, "a")
    begin(session)
    board.started("a", role="r", attempt=1)
    hand.pass_(5)
    assert seconds_at_work(log.events) == 0
    assert seconds_at_work(log.events, now=hand.now()) == 5


def test_time_that_runs_backwards_is_no_time() -> None:
    hand = HandClock()
    session, board, log = made(hand, "a")
    begin(session)
    board.started("a", role="r", attempt=1)
    hand.pass_(-50)
    board.completed("a")
    assert seconds_at_work(log.events) == 0
    got = metrics(Measured(clocks=Clocks(active=2.0), effective=900.0, steps=Counted()))
    assert got.effective_duration == got.total_duration == 2000


@pytest.mark.parametrize(
    ("result", "score"),
    [
        ({"quality_score": 1}, 1.0),
        ({"a": {"quality_score": 0.4}, "b": {"quality_score": 0.8}, "c": 3}, pytest.approx(0.6)),
        ({"quality_score": 1.5}, None),
        ({"quality_score": True}, None),
        ({"quality_score": "good"}, None),
        ({"quality_score": float("nan")}, None),
        ([1, 2], None),
        (None, None),
    ],
)
def test_quality_is_what_the_work_says_of_itself(result: Any, score: Any) -> None:
    assert quality_score(result) == score


def test_efficiency_of_what_nothing_measured_is_none() -> None:
    held = ResourceUsage(resource_id="a", resource_type="gpu", amount_used=1, cost=None, start_time=START)
    assert held.duration is None
    assert resource_efficiency([held]) is None
