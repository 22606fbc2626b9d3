"""The phases of one session: entering and leaving them, and what has been spent in each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.errors import InvalidTransitionError
from vespera_exec.model.enums import EventType, ExecutionPhase
from vespera_exec.model.stays import PhaseRecord, seconds_by_phase
from vespera_exec.model.stopwatch import Stopwatch

if TYPE_CHECKING:
    from vespera_exec.model.events import Json
    from vespera_exec.model.ledger import Cell, Ledger, Part
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.progress import Progress


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


_OUTCOMES = {ExecutionPhase.ERROR_HANDLING: "failed", ExecutionPhase.RECOVERY: "interrupted"}
