"""Whoever waits has one place, and gets its turn or leaves with a reason; nobody of a held group has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vespera_exec.engine.capacity.pools import CapacityPools
from vespera_exec.engine.jobs import Job, Policy
from vespera_exec.engine.waiting import Waiting
from vespera_exec.errors import StoreUnavailable
from vespera_exec.model.capacity import Pool, requirements
from vespera_exec.model.clock import Clock
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from vespera_exec.engine.work import Work, WorkResult

S = ExecutionStatus
GPU = requirements({"gpu": 1})
NONE: tuple[Any, ...] = ()


@dataclass
class Time:
    """A clock that goes when it is told to."""

    seconds: float = 0.0
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        began = datetime(2026, 1, 1, tzinfo=UTC)
        self.clock = Clock(now=lambda: began + timedelta(seconds=self.seconds), monotonic=lambda: self.seconds)


def waiting_at(time: Time) -> Waiting:
    return Waiting(CapacityPools([Pool(id="one", type="gpu", capacity=1)]), clock=time.clock)


async def never(work: Work) -> WorkResult:
    raise AssertionError("nothing is run here")


def job_of(time: Time, **asked: Any) -> Job:
    """One that came before, under an owner who is dead: it may be paused without a slot."""
    task = Task(title="A task", clock=time.clock)
    session = task.enqueue_execution("test", owner="dead")
    session.start_execution()
    session.recover("Its owner died")
    session.enter_phase(ExecutionPhase.RECOVERY)
    limit = asked.pop("limit", 0.0)
    return Job(task=task, session=session, run=never, policy=Policy(wait_timeout_seconds=limit), **asked)


def pause(job: Job) -> None:
    job.session.update_status(S.PREPARING)
    job.session.pause("A break")


def started(job: Job) -> None:
    """What is recorded of one that gets its turn."""


def test_free_slots_are_filled_in_order_and_no_more_than_those() -> None:
    time = Time()
    waiting, jobs = waiting_at(time), [job_of(time) for _ in range(3)]
    for job in jobs:
        waiting.put(job)
    assert waiting.admitted(2) == jobs[:2]
    assert (waiting.admitted(0), len(waiting)) == ([], 1)
    assert waiting.admitted(5) == jobs[2:]


def test_a_held_group_stands_still_and_those_who_come_to_it_too() -> None:
    time = Time()
    waiting = waiting_at(time)
    before, after, other = (job_of(time, group=group) for group in ("plan", "plan", "another"))
    waiting.put(before)
    waiting.hold("plan")
    waiting.put(after)
    waiting.put(other)
    assert waiting.admitted(9) == [other]
    assert waiting.of("plan") == [before, after]
    waiting.go_on("plan")
    assert waiting.admitted(9) == [before, after]


def test_who_leaves_takes_no_turn_and_gives_up_its_place_for_capacity() -> None:
    time = Time()
    waiting = waiting_at(time)
    first, second = (job_of(time, capacity=GPU) for _ in range(2))
    waiting.put(first)
    waiting.put(second)
    first.session.request_cancellation("never mind")
    waiting.withdraw(first.key)
    assert waiting.departed() == [first]
    assert waiting.admitted(9) == [second]
    assert (waiting.get(first.key), len(waiting)) == (None, 0)


def test_who_waits_too_long_leaves_and_its_log_says_so() -> None:
    time = Time()
    waiting, job = waiting_at(time), job_of(time, limit=10.0)
    waiting.put(job)
    time.seconds = 9.0
    assert waiting.departed() == []
    time.seconds = 10.0
    assert waiting.departed() == [job]
    assert job.session.status is S.TIMED_OUT
    assert waiting.admitted(9) == []


def test_a_claim_that_could_not_be_recorded_gives_nobody_more_time_to_wait() -> None:
    time = Time()
    waiting, job = waiting_at(time), job_of(time, place="worker", limit=10.0)
    waiting.put(job)

    def refused(job: Job) -> None:
        raise StoreUnavailable("no room")

    time.seconds = 6.0
    with pytest.raises(StoreUnavailable):
        waiting.claim(["test"], refused, started)
    time.seconds = 10.0
    assert waiting.departed() == [job]


def test_a_claim_that_could_not_be_recorded_takes_nobody_out_of_the_line() -> None:
    time = Time()
    waiting, job = waiting_at(time), job_of(time, place="worker", capacity=GPU)
    waiting.put(job)

    def refused(job: Job) -> None:
        raise StoreUnavailable("the disk is full")

    with pytest.raises(StoreUnavailable):
        waiting.claim(["test"], refused, started)
    assert [each.available for each in waiting.grants.states()] == [1]
    assert waiting.claim(["test"], started, started) is job


class Waits(RuleBasedStateMachine):
    """Jobs come, are paused, held, cancelled and given their turn while time goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.time = Time()
        self.waiting = waiting_at(self.time)
        self.here: dict[str, Job] = {}
        """All that were put and have neither got their turn nor left."""
        self.holding: list[Job] = []
        """Those that have got it, with capacity."""
        self.held: set[str] = set()

    @rule(
        place=st.sampled_from(["slot", "slot", "worker"]),
        group=st.sampled_from([None, "a", "b"]),
        capacity=st.sampled_from([NONE, NONE, GPU, requirements({"tpu": 1})]),
        limit=st.sampled_from([0.0, 3.0]),
        paused=st.booleans(),
    )
    def put(self, place: str, group: str | None, capacity: Any, limit: float, *, paused: bool) -> None:
        job = job_of(self.time, place=place, group=group, capacity=capacity, limit=limit)
        if paused:
            pause(job)
        self.here[job.key] = job
        self.waiting.put(job)

    @rule(data=st.data())
    @precondition(lambda self: self.here)
    def stand_or_go_on(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(list(self.here.values())))
        if job.session.status is S.PAUSED:
            job.session.resume("Go on", queued=True)
        elif job.session.status in (S.RECOVERING, S.PREPARING):
            pause(job)
        self.waiting.unpark(job.session)

    @rule(data=st.data())
    @precondition(lambda self: self.here)
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(list(self.here.values())))
        job.session.request_cancellation("never mind")
        self.waiting.withdraw(job.key)

    @rule(group=st.sampled_from(["a", "b"]))
    def hold(self, group: str) -> None:
        self.held.add(group)
        self.waiting.hold(group)

    @rule(group=st.sampled_from(["a", "b"]))
    def go_on(self, group: str) -> None:
        self.held.discard(group)
        self.waiting.go_on(group)

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds: int) -> None:
        self.time.seconds += seconds

    @rule(free=st.integers(0, 3))
    def look(self, free: int) -> None:
        for job in self.waiting.departed():
            del self.here[job.key]
            life = job.session.lifecycle
            assert life.status is S.CANCELLING or life.status.is_terminal
            if life.status is S.FAILED:
                assert life.error["code"] == "CAPACITY_UNKNOWN"
        turns = self.waiting.admitted(free)
        assert len(turns) <= free
        for job in turns:
            assert job.place == "slot"
            self._has_its_turn(job)

    @rule()
    def claim(self) -> None:
        job = self.waiting.claim(["test"], started, started)
        if job is not None:
            assert job.place == "worker"
            self._has_its_turn(job)

    @rule()
    @precondition(lambda self: self.holding)
    def give_back(self) -> None:
        self.waiting.grants.give_back(self.holding.pop())
        self.waiting.rouse()

    @invariant()
    def each_has_one_place(self) -> None:
        waiting: Any = self.waiting
        assert set(waiting._jobs) == set(self.here)
        for key, job in self.here.items():
            lines = [key in waiting._queue, _stands(waiting._claims, key), key in waiting.grants._jobs]
            assert sum(lines) <= 1
            if job.group in self.held:
                assert not any(lines)
        assert len(waiting) == sum(
            key in waiting._queue or _stands(waiting._claims, key) or key in waiting.grants._jobs for key in self.here
        )

    def teardown(self) -> None:
        """Let go, everybody gets a turn, or leaves."""
        for group in list(self.held):
            self.go_on(group)
        for job in list(self.here.values()):
            if job.session.status is S.PAUSED:
                job.session.resume("Go on", queued=True)
            self.waiting.unpark(job.session)
        for _ in range(3 * len(self.here) + 1):
            self.look(3)
            self.claim()
            while self.holding:
                self.give_back()
        assert not self.here

    def _has_its_turn(self, job: Job) -> None:
        del self.here[job.key]
        assert job.group not in self.held
        assert job.session.status in (S.RECOVERING, S.PREPARING)
        if job.capacity:
            assert job.session.lifecycle.held_capacity
            assert not self.holding
            self.holding.append(job)


def _stands(claims: Any, key: str) -> bool:
    return any(key in queue for queues in claims._queues.values() for queue in queues.values())


TestWaits = Waits.TestCase
TestWaits.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
