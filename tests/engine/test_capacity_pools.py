"""Capacity: granted whole or not at all, by priority and age, never more than there is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vespera_exec.engine.capacity.pools import PATIENCE_SECONDS, CapacityPools
from vespera_exec.errors import CapacityTooLarge, CapacityUnknown, InvalidInput
from vespera_exec.model.capacity import CapacityRequirement, Pool, requirements

if TYPE_CHECKING:
    from vespera_exec.model.events import Json

BIG = Pool(id="big", type="gpu", capacity=2, attributes={"memory_mb": 16384, "model": "a", "gpu_required": False})
SMALL = Pool(id="small", type="gpu", capacity=1, attributes={"memory_mb": 4096, "model": "b"})
CPU = Pool(id="cpu", type="cpu", capacity=4)


def served(pools: CapacityPools, now: float = 0.0) -> list[str]:
    """Whoever is given what it asks for now, in order."""
    keys: list[str] = []
    while (key := pools.next(now)) is not None:
        assert pools.take(key, now) is not None
        keys.append(key)
    return keys


def free(pools: CapacityPools, now: float = 0.0) -> dict[str, float]:
    return {each.pool.id: each.available for each in pools.states(now)}


def of(**amounts: float) -> tuple[CapacityRequirement, ...]:
    return requirements(amounts)


def test_what_is_free_is_given_and_the_next_waits_until_it_is_given_back() -> None:
    pools = CapacityPools([CPU])
    pools.ask("first", of(cpu=3), now=0)
    pools.ask("second", of(cpu=2), now=1)
    assert served(pools) == ["first"]
    assert free(pools) == {"cpu": 1}
    assert [str(each) for each in pools.shortages("second")] == ["cpu: 2 wanted, 1 of 4 free"]
    assert pools.holders({"cpu"}) == ["first"]
    pools.release("first")
    assert served(pools) == ["second"]
    assert free(pools) == {"cpu": 2}


def test_several_are_given_together_or_none_of_them() -> None:
    pools = CapacityPools([CPU, SMALL])
    pools.ask("holder", of(gpu=1), now=0)
    assert served(pools) == ["holder"]
    pools.ask("both", of(cpu=1, gpu=1), now=1)
    assert served(pools) == []
    assert free(pools) == {"cpu": 4, "small": 0}
    pools.release("holder")
    assert served(pools) == ["both"]
    assert free(pools) == {"cpu": 3, "small": 0}


def test_of_the_pools_that_fit_the_one_with_the_largest_free_share_gives() -> None:
    pools = CapacityPools([BIG, SMALL])
    for key in "abc":
        pools.ask(key, of(gpu=1), now=0)
    pools_of = dict[str, str]()
    while (key := pools.next(0)) is not None:
        given = pools.take(key, 0)
        assert given is not None
        pools_of[key] = given[0].pool
    assert pools_of == {"a": "big", "b": "small", "c": "big"}


def test_an_allocation_says_what_the_pool_is_and_what_is_left_of_it() -> None:
    pools = CapacityPools([Pool(id="p", type="gpu", capacity=2, cost_per_unit_hour=1.5, attributes={"model": "a"})])
    pools.ask("it", of(gpu=0.5), now=0)
    allocations = pools.take("it", 0)
    assert allocations is not None
    [given] = allocations
    assert (given.pool, given.type, given.amount, given.capacity, given.available) == ("p", "gpu", 0.5, 2, 1.5)
    assert (given.cost_per_unit_hour, given.attributes) == (1.5, {"model": "a"})


@pytest.mark.parametrize(
    ("constraints", "fits"),
    [
        ({"model": "a"}, True),
        ({"model": "b"}, False),
        ({"model": 1}, False),
        ({"min_memory_mb": 8192}, True),
        ({"min_memory_mb": 20000}, False),
        ({"max_memory_mb": 20000}, True),
        ({"minMemoryMb": 8192, "gpuRequired": False}, True),
        ({"gpu_required": 0}, False),
        ({"memory_mb": 16384.0}, True),
        ({"min_model": 1}, False),
        ({"colour": "red"}, False),
    ],
)
def test_constraints_are_compared_with_the_attributes_of_the_pool(constraints: dict[str, Json], fits: bool) -> None:
    assert BIG.suits(CapacityRequirement(type="gpu", amount=1, constraints=constraints)) is fits


def test_what_could_never_be_given_is_refused_at_once() -> None:
    pools = CapacityPools([BIG, SMALL, CPU])
    with pytest.raises(CapacityUnknown, match=r"capacity tpu: there is no pool of it; there is cpu, gpu"):
        pools.check(of(tpu=1))
    with pytest.raises(CapacityUnknown, match="that meets its constraints"):
        pools.check(requirements([{"type": "gpu", "amount": 1, "constraints": {"model": "c"}}]))
    with pytest.raises(CapacityTooLarge, match="3 wanted; the largest pool has 2"):
        pools.check(of(gpu=3))
    with pytest.raises(CapacityTooLarge, match="together"):
        pools.check(requirements([{"type": "gpu", "amount": 2}, {"type": "gpu", "amount": 2}]))
    pools.check(of(gpu=2, cpu=4))


@pytest.mark.parametrize(
    "given",
    [
        "gpu", {"gpu": 0}, {"gpu": -1}, {"gpu": True}, {"gpu": float("nan")}, {"a b": 1}, [{"type": "gpu"}],
        [{"type": "gpu", "amount": 1, "priority": 11}], [{"type": "gpu", "amount": 1, "prio": 1}], [1],
        [{"type": "gpu", "amount": 1, "constraints": {"a": [1]}}], [{"type": "gpu", "amount": 1}] * 17,
        [{"type": "gpu", "amount": 1, "duration_ms": -1}],
    ],
)  # fmt: skip
def test_a_requirement_that_cannot_be_meant_is_refused(given: Json) -> None:
    with pytest.raises(InvalidInput):
        requirements(given)


def test_the_higher_priority_goes_first_and_among_equals_the_older() -> None:
    pools = CapacityPools([SMALL])
    for key, priority in (("low", 2), ("older", 7), ("younger", 7)):
        pools.ask(key, requirements([{"type": "gpu", "amount": 1, "priority": priority}]), now=0)
    order: list[str] = []
    for _ in range(3):
        order += served(pools)
        pools.release(order[-1])
    assert order == ["older", "younger", "low"]


def test_while_the_first_waits_nobody_behind_it_takes_of_its_types_and_others_pass() -> None:
    pools = CapacityPools([CPU, BIG])
    pools.ask("holder", of(cpu=2), now=0)
    assert served(pools) == ["holder"]
    pools.ask("large", of(cpu=4), now=1)
    pools.ask("small", of(cpu=1), now=2)
    pools.ask("other", of(gpu=1), now=3)
    assert served(pools) == ["other"]
    pools.release("holder")
    assert served(pools) == ["large"]


def test_who_has_waited_a_minute_goes_before_any_priority() -> None:
    pools = CapacityPools([SMALL])
    pools.ask("patient", requirements([{"type": "gpu", "amount": 1, "priority": 0}]), now=0)
    urgent = requirements([{"type": "gpu", "amount": 1, "priority": 10}])
    now, number, holder = 0.0, 0, ""
    while holder != "patient" and number < 100:
        pools.ask(f"urgent {number}", urgent, now=now)
        pools.release(holder)
        [holder] = served(pools, now)
        now, number = now + 1, number + 1
    assert holder == "patient"
    assert PATIENCE_SECONDS < now <= PATIENCE_SECONDS + 3


def test_a_budget_comes_back_with_time_and_not_at_the_release() -> None:
    calls = Pool(id="api", type="calls", capacity=2, window_seconds=10)
    pools = CapacityPools([calls])
    for number in range(3):
        pools.ask(f"{number}", of(calls=1), now=0)
    assert served(pools, 0) == ["0", "1"]
    pools.release("0")
    pools.release("1")
    assert served(pools, 9.9) == []
    assert pools.next_time(9.9) == 10
    assert served(pools, 10) == ["2"]
    assert free(pools, 10) == {"api": 1}
    assert free(pools, 20) == {"api": 2}


def test_of_a_budget_only_what_was_not_used_comes_back_at_once() -> None:
    pools = CapacityPools([Pool(id="api", type="calls", capacity=5, window_seconds=10)])
    for key, amount in (("used", 1), ("unused", 3)):
        pools.ask(key, of(calls=amount), now=0)
        assert pools.take(key, now=1) is not None
    pools.release("used")
    pools.release("unused", unused=True)
    assert free(pools, 2) == {"api": 4}
    assert free(pools, 11) == {"api": 5}


@pytest.mark.parametrize("amount", [0.1, 0.3, 0.7, 1.1, 2.675])
def test_what_is_left_of_a_pool_is_the_nearest_number_and_not_a_sum_of_errors(amount: float) -> None:
    pools = CapacityPools([Pool(id="cpu", type="cpu", capacity=amount)])
    pools.ask("a", of(cpu=0.000001), now=0)
    pools.take("a", now=0)
    pools.release("a")
    assert free(pools, 0) == {"cpu": amount}


AMOUNTS = st.sampled_from([0.1, 0.3, 0.5, 1, 2])
Wants = list[CapacityRequirement]
WANTS: st.SearchStrategy[Wants] = st.lists(
    st.builds(CapacityRequirement, type=st.sampled_from(["cpu", "gpu"]), amount=AMOUNTS, priority=st.integers(0, 10)),
    min_size=1,
    max_size=3,
)
STEPS: st.SearchStrategy[list[Wants | int]] = st.lists(st.one_of(WANTS, st.integers(0, 5)), max_size=60)


@pytest.mark.promise("capacity")
@settings(max_examples=120)
@given(steps=STEPS)
def test_never_more_than_there_is_never_a_part_and_all_of_it_comes_back(steps: list[Wants | int]) -> None:
    """Whoever asks for something that can be given gets all of it in the end, and then everything is free again."""
    pools = CapacityPools([BIG, SMALL, CPU])
    wanted: dict[str, Wants] = {}
    holding: dict[str, float] = {}
    now = 0.0

    def look() -> None:
        while (key := pools.next(now)) is not None:
            given = pools.take(key, now)
            assert given is not None
            assert [(each.type, each.amount) for each in given] == [(each.type, each.amount) for each in wanted[key]]
            holding[key] = now
        for state in pools.states(now):
            assert 0 <= state.available <= state.pool.capacity
            held = sum(each.amount for key in holding for each in wanted[key] if each.type == state.pool.type)
            total = sum(each.pool.capacity for each in pools.states(now) if each.pool.type == state.pool.type)
            assert held <= total + 1e-9

    for number, step in enumerate(steps):
        now += 7
        if isinstance(step, int):
            if step < len(holding):
                pools.release(key := list(holding)[step])
                del holding[key]
        else:
            try:
                pools.check(step)
            except InvalidInput:
                continue
            wanted[f"{number}"] = step
            pools.ask(f"{number}", step, now=now)
        look()
    for _ in range(len(wanted)):
        for key in holding:
            pools.release(key)
        holding.clear()
        look()
    for key in holding:
        pools.release(key)
    assert len(pools) == 0
    assert free(pools, now) == {"big": 2, "small": 1, "cpu": 4}


@pytest.mark.promise("capacity")
@given(large=st.integers(1, 4), rival=WANTS, stay=st.integers(1, 5))
def test_a_stream_of_higher_priorities_starves_nobody(large: int, rival: Wants, stay: int) -> None:
    """However the rivals overlap, the one of lowest priority is served soon after its minute."""
    pools = CapacityPools([BIG, SMALL, CPU])
    urgent = [replace(each, priority=10) for each in rival]
    try:
        pools.check(urgent)
    except InvalidInput:
        return
    ends: dict[str, int] = {}
    for now in range(400):
        for key in [key for key, end in ends.items() if end <= now]:
            pools.release(key)
            del ends[key]
        for twin in range(3):
            pools.ask(f"urgent {now} {twin}", urgent, now=now)
        if now == 1:
            pools.ask("patient", requirements([{"type": "cpu", "amount": large, "priority": 0}]), now=now)
        for key in served(pools, now):
            if key == "patient":
                assert now <= PATIENCE_SECONDS + 2 + 2 * stay
                return
            ends[key] = now + stay
    pytest.fail("it was never served")
