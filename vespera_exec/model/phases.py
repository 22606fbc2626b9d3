"""The phases of one session: which one runs, which there were, and how long each took."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vespera_exec.errors import InvalidTransitionError
from vespera_exec.model.enums import EventType, ExecutionPhase
from vespera_exec.model.events import ExecutionEvent, Json, mapping
from vespera_exec.model.rows import iso, stamp
from vespera_exec.model.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from vespera_exec.model.ledger import Cell, Ledger, Part
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.progress import Progress


class PhaseRecord(NamedTuple):
    """One stay in a phase. `exited_at`, `duration_seconds` (at work) and `outcome` are None while it lasts."""

    phase: ExecutionPhase
    entered_at: datetime
    exited_at: datetime | None = None
    duration_seconds: float | None = None
    outcome: str | None = None
    """"completed", "failed" (ERROR_HANDLING followed), "interrupted" (RECOVERY followed), or how all ended."""

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


class PhaseManager:
    """Entry, exit and history of the phases of one session, as `session.phases`.

    It keeps nothing of its own: it decides, records in the session's ledger, and reads the fold. Thread-safe.
    """

    __slots__ = ("_ledger", "_life", "_parts", "_watch")

    def __init__(self, ledger: Ledger, watch: Cell[Stopwatch], life: Part[Lifecycle], progress: Part[Progress]) -> None:
        self._ledger = ledger
        self._watch = watch
        self._life = life
        self._parts = (life, progress)

    @property
    def current(self) -> ExecutionPhase | None:
        """The phase that runs; None before the first, after an exit, and after the end."""
        return self._life.value.current_phase

    @property
    def history(self) -> list[PhaseRecord]:
        """Each stay in a phase, oldest first; as a tuple it begins with the phase and the time it was entered."""
        return list(self._life.value.phases)

    @property
    def seconds(self) -> dict[ExecutionPhase, float]:
        """Seconds at work per phase over all stays, the one that lasts included."""
        with self._ledger:  # the fold and the watch change together
            life, active = self._life.value, self._active()
        spent = seconds_by_phase(life.phases)
        if life.current_phase is not None:
            lasting = active - life.phase_entered_active
            spent[life.current_phase] = round(spent.get(life.current_phase, 0.0) + lasting, 6)
        return spent

    def enter(self, phase: ExecutionPhase, message: str = "") -> bool:
        """Close the phase that runs and enter `phase`; False, without an event, when it is that already.

        Raises:
            InvalidTransitionError: the execution has ended.
        """
        with self._ledger:
            left = self._left_for(f"phase {phase.value}")
            if left is phase:
                return False
            outcome = _OUTCOMES.get(phase, "completed")
            self._record(left, phase, message or f"Entered phase: {phase.value}", outcome)
            return True

    def exit(self, message: str = "", *, outcome: str = "completed") -> bool:
        """Close the phase that runs and enter none; False, without an event, when none runs.

        Raises:
            InvalidTransitionError: the execution has ended.
        """
        with self._ledger:
            left = self._left_for("leaving a phase")
            if left is None:
                return False
            self._record(left, None, message or f"Left phase: {left.value}", outcome)
            return True

    def _left_for(self, what: str) -> ExecutionPhase | None:
        """The phase that runs, of an execution that has not ended."""
        life = self._life.value
        if life.status.is_terminal:
            raise InvalidTransitionError(life.status.value, what, ())
        return life.current_phase

    def _record(self, left: ExecutionPhase | None, entered: ExecutionPhase | None, message: str, outcome: str) -> None:
        life, now = self._life.value, self._ledger.clock.monotonic()
        details: dict[str, Json] = {} if left is None else {"left": left.value, "outcome": outcome}
        if clock := self._watch.value.reading(life, now, leaves_phase=True):
            details["clock"] = clock
            self._ledger.put(self._watch, Stopwatch.of(life.status, now))
        self._ledger.record(
            EventType.PHASE_CHANGE,
            self._parts,
            task_id=life.task_id,
            execution_id=life.execution_id,
            phase=entered,
            message=message,
            details=details,
        )

    def _active(self) -> float:
        return self._watch.value.active_seconds(self._life.value, self._ledger.clock.monotonic())


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


_OUTCOMES = {ExecutionPhase.ERROR_HANDLING: "failed", ExecutionPhase.RECOVERY: "interrupted"}
