"""What a session holds of the capacity there is: recorded, folded, paid for, and given back with every end."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from model_harness import HandClock, running_session

from vespera_exec.errors import InvalidInput, InvalidTransitionError
from vespera_exec.model.capacity import Allocation
from vespera_exec.model.enums import EventType, ExecutionStatus, ResourceType
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.replay import replayed

if TYPE_CHECKING:
    from collections.abc import Callable

    from vespera_exec.model.session import ExecutionSession

S = ExecutionStatus
E = EventType


def allocation(kind: str = "gpu", amount: float = 2, *, price: float = 3) -> Allocation:
    return Allocation(
        id=f"of {kind}",
        pool=f"pool of {kind}",
        type=kind,
        amount=amount,
        capacity=4,
        available=2,
        cost_per_unit_hour=price,
        attributes={},
    )


def test_what_it_holds_is_paid_by_the_hour_and_has_a_beginning_and_an_end() -> None:
    clock = HandClock()
    session, _ = running_session(hand=clock)
    session.hold_capacity([allocation()])
    [use] = session.lifecycle.held_capacity
    assert (use.allocation_id, use.pool, use.amount, use.cost, use.ended_at) == ("of gpu", "pool of gpu", 2, None, None)
    clock.pass_(1800)
    assert session.release_capacity("It is done")
    assert session.lifecycle.held_capacity == ()
    [use] = session.lifecycle.capacity
    assert use.ended_at == use.started_at + timedelta(seconds=1800)
    assert (use.cost, use.efficiency) == (3.0, None)
    assert not session.release_capacity("Again")


ENDS: dict[str, Callable[[ExecutionSession], object]] = {
    "completed": lambda session: session.complete(),
    "failed": lambda session: session.fail("it broke"),
    "timed out": lambda session: session.time_out(),
    "cancelled": lambda session: (session.request_cancellation("no"), session.end_cancelled()),
    "parked": lambda session: session.park("It waits"),
    "recovering": lambda session: session.recover("Its owner died"),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_however_its_work_ends_it_holds_nothing_afterwards_and_the_log_says_so_before(
    end: Callable[[ExecutionSession], object],
) -> None:
    session, log = running_session()
    session.hold_capacity([allocation("gpu"), allocation("cpu")])
    end(session)
    assert session.lifecycle.held_capacity == ()
    kinds = [event.event_type for event in log.events]
    last = max(number for number, kind in enumerate(kinds) if kind is E.STATUS_CHANGE)
    assert kinds.index(E.RESOURCE_RELEASED) < last
    assert kinds.count(E.RESOURCE_RELEASED) == 1


def test_what_was_measured_is_compared_with_what_it_was_given() -> None:
    clock = HandClock()
    session, _ = running_session(hand=clock)
    session.hold_capacity([allocation("cpu", 2), allocation("memory", 1000), allocation("gpu", 1)])
    for percent, megabytes in ((50, 100), (150, 250), (100, 200)):
        clock.pass_(1)
        session.record_resource_usage(ResourceType.CPU_USAGE, percent)
        session.record_resource_usage(ResourceType.MEMORY_RSS, megabytes)
    session.complete()
    assert [use.efficiency for use in session.lifecycle.capacity] == [0.5, 0.25, None]


def test_of_no_time_at_all_there_is_no_efficiency() -> None:
    session, _ = running_session(hand=HandClock())
    session.record_resource_usage(ResourceType.CPU_USAGE, 50)
    session.hold_capacity([allocation("cpu")])
    session.complete()
    assert [(use.cost, use.efficiency) for use in session.lifecycle.capacity] == [(0, None)]


def test_nobody_pays_for_the_time_without_an_owner() -> None:
    clock = HandClock()
    session, _ = running_session(hand=clock)
    session.hold_capacity([allocation()])
    last = clock.now() + timedelta(hours=1)
    clock.pass_(5 * 3600)
    session.release_capacity("Its owner ended", at=last)
    [use] = session.lifecycle.capacity
    assert (use.ended_at, use.cost) == (last, 6)


def test_what_is_stored_of_it_comes_back_and_older_rows_hold_nothing() -> None:
    session, log = running_session()
    session.hold_capacity([allocation()])
    stored = session.lifecycle.to_dict()
    assert log.lives["e1"] == replayed(log.events, "e1")[0] == session.lifecycle
    assert Lifecycle.from_dict(stored) == session.lifecycle
    del stored["capacity"]
    assert Lifecycle.from_dict(stored).capacity == ()


def test_the_capacity_of_a_plans_steps_is_not_its_own() -> None:
    session, _ = running_session()
    given = {"allocations": [allocation().to_dict()]}
    session.record_fact(E.RESOURCE_ALLOCATED, (), details=given, step_id="train")
    assert session.lifecycle.capacity == ()


def test_after_the_end_nothing_is_held_and_none_of_it_is_written_by_hand() -> None:
    session, _ = running_session()
    for kind in (E.RESOURCE_WAITING, E.RESOURCE_ALLOCATED, E.RESOURCE_RELEASED):
        with pytest.raises(InvalidInput):
            session.emit_status_event(kind.value, "by hand")
    session.complete()
    with pytest.raises(InvalidTransitionError):
        session.hold_capacity([allocation()])
    with pytest.raises(InvalidTransitionError):
        session.wait_for_capacity("Waiting", {})
    assert session.lifecycle.capacity == ()
