"""What the waiting queue promises, against a list that is sorted anew each time."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vespera_exec.engine.queue import WaitingQueue

KEYS = st.sampled_from("abcdefgh")
PRIORITIES = st.integers(0, 3)


@dataclass(frozen=True)
class Waiting:
    key: str
    item: object
    priority: int
    arrival: int
    not_before: float | None


class QueueMachine(RuleBasedStateMachine):
    """Puts, takes out and pops while time goes on; the model is a list of all that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: WaitingQueue[object] = WaitingQueue()
        self.waiting: list[Waiting] = []
        self.now = 0.0
        self.arrivals = 0

    @rule(key=KEYS, priority=PRIORITIES, delay=st.none() | st.integers(-1, 5))
    def put(self, key: str, priority: int, delay: int | None) -> None:
        self.arrivals += 1
        item = object()
        not_before = None if delay is None else self.now + delay
        self.queue.put(key, item, priority=priority, not_before=not_before)
        self.waiting = [each for each in self.waiting if each.key != key]
        self.waiting.append(Waiting(key, item, priority, self.arrivals, not_before))

    @rule(key=KEYS)
    def take_out(self, key: str) -> None:
        assert self.queue.discard(key) is any(each.key == key for each in self.waiting)
        self.waiting = [each for each in self.waiting if each.key != key]

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def pop(self) -> None:
        ready = [each for each in self.waiting if each.not_before is None or each.not_before <= self.now]
        expected = min(ready, key=lambda each: (-each.priority, each.arrival), default=None)
        assert self.queue.pop(self.now) is (expected.item if expected else None)
        self.waiting = [each for each in self.waiting if each is not expected]

    @invariant()
    def it_counts_and_knows_those_who_wait(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert all(each.key in self.queue for each in self.waiting)

    @invariant()
    def it_wakes_no_later_than_the_first_held_item_is_due(self) -> None:
        held = [each.not_before for each in self.waiting if each.not_before is not None and each.not_before > self.now]
        wakes = self.queue.next_time()
        assert not held or (wakes is not None and wakes <= min(held))
        assert wakes is None or any(each.not_before == wakes for each in self.waiting)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Item:
    """Something that can be seen to be gone."""


def test_what_is_taken_out_is_let_go_of_at_once_though_its_time_is_far() -> None:
    queue: WaitingQueue[Item] = WaitingQueue()
    item = Item()
    gone = weakref.ref(item)
    queue.put("a", item, priority=5, not_before=1e9)
    queue.discard("a")
    del item
    gc.collect()
    assert gone() is None


def test_a_key_that_comes_back_waits_anew_behind_those_who_came_meanwhile() -> None:
    queue: WaitingQueue[str] = WaitingQueue()
    queue.put("a", "first a", priority=5)
    queue.discard("a")
    queue.put("b", "b", priority=5)
    queue.put("a", "second a", priority=5)
    assert [queue.pop(0.0), queue.pop(0.0), queue.pop(0.0)] == ["b", "second a", None]


def test_thousands_of_cancelled_items_leave_nothing_behind_those_who_still_wait() -> None:
    queue: WaitingQueue[str] = WaitingQueue()
    queue.put("stays", "stays", priority=0)
    for number in range(5000):
        queue.put(str(number), "goes", priority=5, not_before=1e9 if number % 2 else None)
        queue.discard(str(number))
    kept = len(gc.get_referents(queue.__dict__["_ready"])) + len(gc.get_referents(queue.__dict__["_held"]))
    assert kept < 200
    assert queue.pop(0.0) == "stays"
