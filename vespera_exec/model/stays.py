"""One stay in a phase after another: the record of each, and their fold from the events of an execution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from vespera_exec.model.enums import ExecutionPhase
from vespera_exec.model.events import ExecutionEvent, Json, mapping
from vespera_exec.model.rows import iso, stamp

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime


PARKED: Final = "parked"
"""The outcome of a stay in which the work ended for now: it is called again later."""


class PhaseRecord(NamedTuple):
    """One stay in a phase. `exited_at`, `duration_seconds` (at work) and `outcome` are None while it lasts."""

    phase: ExecutionPhase
    entered_at: datetime
    exited_at: datetime | None = None
    duration_seconds: float | None = None
    outcome: str | None = None
    """"completed", "failed" (ERROR_HANDLING followed), "interrupted" (RECOVERY followed), "parked" (called
    again later), or how all ended."""

    def to_dict(self) -> dict[str, Json]:
        return {
            "phase": self.phase.value,
            "entered_at": self.entered_at.isoformat(),
            "exited_at": iso(self.exited_at),
            "duration_seconds": self.duration_seconds,
            "outcome": self.outcome,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> PhaseRecord:
        return cls(
            ExecutionPhase(data["phase"]),
            stamp(data["entered_at"]),
            stamp(data["exited_at"]) if data.get("exited_at") else None,
            data.get("duration_seconds"),
            data.get("outcome"),
        )


def moved(phases: tuple[PhaseRecord, ...], event: ExecutionEvent) -> tuple[PhaseRecord, ...]:
    """`phases` after a `phase_change`: the last stay is over, and that in `event.phase` begins, where there is one."""
    over = closed(phases, event, event.details.get("outcome") or "completed")
    return over if event.phase is None else (*over, PhaseRecord(event.phase, event.timestamp))


def closed(phases: tuple[PhaseRecord, ...], event: ExecutionEvent, outcome: str) -> tuple[PhaseRecord, ...]:
    """`phases` with the stay that lasts ended by `event`."""
    if not phases or phases[-1].exited_at is not None:
        return phases
    last = phases[-1]
    duration = mapping(event.details.get("clock")).get("phase")
    return (*phases[:-1], last._replace(exited_at=event.timestamp, duration_seconds=duration, outcome=outcome))


def seconds_by_phase(stays: Iterable[PhaseRecord]) -> dict[ExecutionPhase, float]:
    """Seconds at work per phase, over the stays that have ended; in the order of the first of each."""
    spent: dict[ExecutionPhase, float] = {}
    for stay in stays:
        if stay.duration_seconds is not None:
            spent[stay.phase] = round(spent.get(stay.phase, 0.0) + stay.duration_seconds, 6)
    return spent
