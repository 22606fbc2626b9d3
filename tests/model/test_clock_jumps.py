"""The wall clock jumps by an hour, machines sleep, owners change: every duration is what the monotonic clock says."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vespera_exec.model.clock import Clock
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus
from vespera_exec.model.ledger import Ledger
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.timing import TimeTracking

ERROR_SECONDS = 0.05
HOUR = 3600.0


@dataclass
class Machine:
    """A wall clock and a monotonic clock that do not agree. `awake` is what the monotonic one has counted."""

    wall: datetime = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
    awake: float = 0.0
    boot: float = 500.0

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.wall, monotonic=lambda: self.boot + self.awake)

    def passes(self, seconds: float) -> None:
        self.awake += seconds
        self.wall += timedelta(seconds=seconds)

    def jumps(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self.wall += timedelta(seconds=seconds)

    def sleeps(self, seconds: float, *, counted: bool) -> None:
        """A suspend; the monotonic clock stands, or jumps over it where the system counts it."""
        self.wall += timedelta(seconds=seconds)
        self.awake += seconds if counted else 0.0


_seconds = st.floats(0, 500)
_happenings = st.lists(
    st.one_of(
        st.tuples(st.just("passes"), _seconds),
        st.tuples(st.just("jumps"), st.floats(-HOUR, HOUR)),
        st.tuples(st.just("sleeps"), st.floats(0, 8 * HOUR)),
        st.tuples(st.just("sleeps and counts it"), st.floats(0, HOUR)),
        st.tuples(st.sampled_from(["pauses or resumes", "enters a phase", "changes owner"]), st.just(0.0)),
    ),
    max_size=30,
)


def happens(machine: Machine, what: str, seconds: float) -> None:
    match what:
        case "passes":
            machine.passes(seconds)
        case "jumps":
            machine.jumps(seconds)
        case "sleeps":
            machine.sleeps(seconds, counted=False)
        case "sleeps and counts it":
            machine.sleeps(seconds, counted=True)
        case _:
            pass


def turned(session: ExecutionSession) -> None:
    if session.status is ExecutionStatus.PAUSED:
        session.resume()
    else:
        session.pause()


def next_owner(session: ExecutionSession, machine: Machine) -> ExecutionSession:
    """The session under an owner after a reboot; the last one died right after a reading of the clocks."""
    turned(session)
    turned(session)
    machine.boot += 12345.0
    stored: dict[str, Any] = session.to_dict()
    again = ExecutionSession.from_dict(stored, ledger=Ledger(clock=machine.clock))
    again.change_owner("next")
    return again


@pytest.mark.promise("clock")
@given(happenings=_happenings)
@example(happenings=[("passes", 10.0), ("jumps", -HOUR), ("passes", 10.0), ("pauses or resumes", 0.0), ("jumps", HOUR)])
@example(happenings=[("passes", 10.0), ("sleeps", HOUR), ("changes owner", 0.0), ("jumps", HOUR), ("passes", 5.0)])
def test_no_jump_and_no_sleep_is_in_a_duration(happenings: list[tuple[str, float]]) -> None:
    machine = Machine()
    session = ExecutionSession("e1", "t1", "role", ledger=Ledger(clock=machine.clock))
    session.start_execution()
    session.update_status(ExecutionStatus.RUNNING)
    spent = {False: 0.0, True: 0.0}
    for what, seconds in happenings:
        paused, before = session.status is ExecutionStatus.PAUSED, machine.awake
        happens(machine, what, seconds)
        spent[paused] += machine.awake - before
        match what:
            case "pauses or resumes":
                turned(session)
            case "enters a phase" if not paused:
                session.enter_phase(ExecutionPhase.EXECUTION)
            case "changes owner":
                session = next_owner(session, machine)
            case _:
                pass
        assert session.elapsed_seconds == pytest.approx(spent[False], abs=ERROR_SECONDS)
        assert session.time_tracking.is_paused is (session.status is ExecutionStatus.PAUSED)
    session.fail("enough")
    life = session.lifecycle
    machine.jumps(HOUR)
    assert life.active_seconds == pytest.approx(spent[False], abs=ERROR_SECONDS)
    assert life.paused_seconds == pytest.approx(spent[True], abs=ERROR_SECONDS)
    assert session.elapsed_seconds == life.active_seconds
    assert (
        sum(record.duration_seconds or 0.0 for record in session.phase_history) <= life.active_seconds + ERROR_SECONDS
    )


@pytest.mark.promise("clock")
@given(happenings=_happenings)
@example(happenings=[("pauses or resumes", 0.0), ("jumps", -HOUR), ("pauses or resumes", 0.0), ("passes", 1.0)])
def test_a_clock_that_is_driven_alone_is_moved_by_no_jump_either(happenings: list[tuple[str, float]]) -> None:
    machine = Machine()
    tracking = TimeTracking(clock=machine.clock)
    tracking.start()
    paused, spent = False, {False: 0.0, True: 0.0}
    for what, seconds in happenings:
        before = machine.awake
        happens(machine, what, seconds)
        spent[paused] += machine.awake - before
        if what == "pauses or resumes":
            tracking.resume() if paused else tracking.pause()
            paused = not paused
        assert tracking.is_paused is paused
        assert tracking.elapsed_time.total_seconds() == pytest.approx(spent[False], abs=ERROR_SECONDS)
    tracking.finish()
    machine.jumps(-HOUR)
    assert tracking.elapsed_time.total_seconds() == pytest.approx(spent[False], abs=ERROR_SECONDS)
    assert tracking.paused_duration.total_seconds() == pytest.approx(spent[True], abs=ERROR_SECONDS)
