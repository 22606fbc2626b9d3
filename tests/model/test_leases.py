"""The lease of a worker: one at a time, counted, of which the log has a digest and nothing that could be shown."""

from __future__ import annotations

import pytest
from model_harness import KeptLog

from vespera_exec.errors import InvalidTransitionError
from vespera_exec.model.enums import EventType
from vespera_exec.model.ledger import Ledger
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.replay import replayed
from vespera_exec.model.session import ExecutionSession


def waiting() -> tuple[ExecutionSession, KeptLog]:
    log = KeptLog()
    session = ExecutionSession(task_id="t", ledger=Ledger(sink=log))
    session.enqueue()
    return session, log


def test_a_lease_admits_its_key_from_its_principal_and_no_other() -> None:
    session, log = waiting()
    key = session.grant_lease("agent", "ann", seconds=60)
    lease = session.lifecycle.lease
    assert lease is not None
    assert (lease.worker, lease.principal, lease.fence, lease.seconds) == ("agent", "ann", 1, 60)
    assert lease.admits(key, "ann")
    assert not lease.admits(key, "ben")
    assert not lease.admits(key + "x", "ann")
    assert not lease.admits("\ud800", "ann")
    assert key not in str([event.to_stream_message() for event in log.events])


def test_a_claim_fences_off_the_one_before() -> None:
    session, _ = waiting()
    first = session.grant_lease("one", "ann", seconds=60)
    with pytest.raises(InvalidTransitionError):
        session.grant_lease("two", "ann", seconds=60)
    assert session.end_lease("one was not heard of")
    assert not session.end_lease("again")
    assert session.lifecycle.lease is None
    second = session.grant_lease("two", "ann", seconds=60)
    lease = session.lifecycle.lease
    assert lease is not None
    assert (lease.fence, lease.admits(first, "ann"), lease.admits(second, "ann")) == (2, False, True)


def test_the_log_tells_who_had_it_and_gives_the_same_state_again() -> None:
    session, log = waiting()
    session.grant_lease("one", "ann", seconds=60)
    session.end_lease("one was not heard of")
    session.grant_lease("two", "ben", seconds=30)
    life, progress = replayed(log.events, session.session_id)
    assert (life, progress) == (session.lifecycle, session.progress)
    assert life == log.lives[session.session_id] == Lifecycle.from_dict(life.to_dict())
    kinds = [event.event_type for event in log.events if event.event_type.value.startswith("lease")]
    assert kinds == [EventType.LEASE_GRANTED, EventType.LEASE_ENDED, EventType.LEASE_GRANTED]


def test_what_has_ended_is_given_to_nobody_and_keeps_its_last_lease() -> None:
    session, _ = waiting()
    key = session.grant_lease("one", "ann", seconds=60)
    session.start_execution()
    session.complete("done")
    lease = session.lifecycle.lease
    assert lease is not None
    assert lease.admits(key, "ann")
    for late in (lambda: session.end_lease("late"), lambda: session.grant_lease("two", "ann", seconds=60)):
        with pytest.raises(InvalidTransitionError):
            late()
