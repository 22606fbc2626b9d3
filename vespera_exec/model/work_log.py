"""How the work reports into its session: phases, progress, checkpoints, notes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vespera_exec.errors import InvalidInput, InvalidProgress, InvalidTransitionError
from vespera_exec.model.enums import EventType, ExecutionPhase, MessageLevel, ProgressType
from vespera_exec.model.events import new_id
from vespera_exec.model.jsonable import details_of, exact_json
from vespera_exec.model.ledger import CheckpointRecord
from vespera_exec.model.progress import ProgressReport
from vespera_exec.model.reporting import accepted, check_metric, computed
from vespera_exec.model.rows import iso
from vespera_exec.model.stopwatch import Stopwatch
from vespera_exec.model.view import SessionView

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from vespera_exec.model.enums import ExecutionStatus
    from vespera_exec.model.events import ExecutionEvent, Json
    from vespera_exec.model.ledger import Part
    from vespera_exec.model.progress import CustomMetric

MAX_CHECKPOINT_BYTES = 256 * 1024
_NO_METRICS: Mapping[str, CustomMetric] = {}
_PROGRESS_UPDATE = EventType.PROGRESS_UPDATE  # looked up once: in Python 3.11 that takes as long as a function call
_FOLDED = frozenset(
    {
        EventType.STATUS_CHANGE,
        EventType.PHASE_CHANGE,
        EventType.PROGRESS_UPDATE,
        EventType.OWNER_CHANGED,
        EventType.CHECKPOINT_CREATED,
        EventType.LEASE_GRANTED,
        EventType.LEASE_ENDED,
        EventType.RESOURCE_WAITING,
        EventType.RESOURCE_ALLOCATED,
        EventType.RESOURCE_RELEASED,
        EventType.APPROVAL_REQUESTED,
        EventType.APPROVAL_APPROVED,
        EventType.APPROVAL_REJECTED,
        EventType.STEP_STARTED,
        EventType.STEP_PROGRESS,
        EventType.STEP_WAITING,
        EventType.STEP_COMPLETED,
        EventType.STEP_FAILED,
        EventType.STEP_SKIPPED,
        EventType.STEP_CANCELLED,
        EventType.STEP_RESET,
        EventType.VARIABLES_CHANGED,
    }
)


class WorkLog(SessionView):
    """The side of an `ExecutionSession` that its work writes to; no status changes here."""

    _custom_metrics: Mapping[str, CustomMetric] = _NO_METRICS

    def enter_phase(self, phase: ExecutionPhase, message: str = "") -> None:
        """Close the phase that runs and enter `phase`. Entering the running one again does nothing.

        Raises:
            InvalidTransitionError: the execution has ended.
        """
        self.phases.enter(phase, message)

    def update_progress(
        self,
        progress_value: float,
        total: float | None = None,
        message: str = "",
        phase: ExecutionPhase | None = None,
    ) -> None:
        """Set the overall progress, or that of one phase, which then rolls up into the overall.

        Without `total` the value is a percentage; with it, steps of that total.

        Raises:
            InvalidProgress: not a finite number, negative, backwards, or after the end. Nothing has changed.
        """
        kind = ProgressType.PERCENTAGE if total is None else ProgressType.STEPS
        self.report(ProgressReport(progress_type=kind, current=progress_value, total=total, message=message), phase)

    def report(self, report: ProgressReport, phase: ExecutionPhase | None = None) -> None:
        """Record progress of any type: overall, of a phase (`phase`), or of a custom metric (`report.metric`).

        Raises:
            InvalidProgress: see `update_progress`; or the metric is the 65th, or its name has more than 100 characters.
        """
        with self._ledger:
            life, before = self._life.value, self._progress.value
            if life.completed_at is not None:
                raise InvalidProgress(f"the execution has ended ({life.status.value}); progress is final")
            if report.metric is not None:
                check_metric(report.metric, {*before.custom, *self._custom_metrics})
            message, data, details = accepted(report, before, phase)
            if self._custom_metrics and (others := computed(self._custom_metrics, before, self.elapsed_seconds)):
                details["custom"] = {**others, **details.get("custom", {})}
            self._ledger.record(
                _PROGRESS_UPDATE,
                self._parts,
                task_id=life.task_id,
                execution_id=life.execution_id,
                phase=phase or life.current_phase,
                message=message,
                progress_data=data,
                details=details,
            )

    def set_custom_progress(self, name: str, value: float, total: float | None = None, *, unit: str = "") -> None:
        """Record a named metric of your own, beside the progress."""
        self.report(
            ProgressReport(progress_type=ProgressType.CUSTOM, current=value, total=total, unit=unit, metric=name)
        )

    def milestone(self, percentage: float, message: str = "") -> None:
        """Lift the overall percentage to a point of the way; a lower one only changes the message."""
        with self._ledger:
            reached = max(percentage, self._progress.value.reached)
            self.report(ProgressReport(current=reached, message=message))

    def record_checkpoint(self, state: Json, message: str = "") -> None:
        """Keep a state that the work can go on from.

        Raises:
            InvalidInput: it is not JSON, and so would not come back as it is; or it takes more than 256 KiB.
            InvalidTransitionError: the execution has ended.
        """
        kept = exact_json(state, "the checkpoint")
        if (size := len(json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode())) > MAX_CHECKPOINT_BYTES:
            raise InvalidInput(
                f"the checkpoint has {size:,} bytes; at most {MAX_CHECKPOINT_BYTES:,}",
                hint="keep the data in a file, and its name in the checkpoint",
            )
        with self._ledger:
            self._refuse_after_the_end("checkpoint")
            self._record(EventType.CHECKPOINT_CREATED, message=message, details={"state": kept})

    def mark_checkpoint(
        self,
        kind: str,
        *,
        metadata: Mapping[str, Json] | None = None,
        step: str | None = None,
        completed_steps: int | None = None,
    ) -> CheckpointRecord:
        """Mark this place in the log as one to go back to: all that was recorded before it, and nothing after.

        `kind` is "call", "interval" or "step". `step` and `completed_steps` are kept with the metadata.

        Raises:
            InvalidTransitionError: the execution has ended.
        """
        noted: dict[str, Json] = {"step": step, "completed_steps": completed_steps}
        noted = {name: value for name, value in noted.items() if value is not None}
        details: dict[str, Json] = {"checkpoint_id": new_id(), "kind": kind, **noted}
        with self._ledger:
            event = self.record_fact(EventType.CHECKPOINT_CREATED, (), step_id=step, details=details)
            record = CheckpointRecord(
                checkpoint_id=details["checkpoint_id"],
                execution_id=self._life.value.execution_id,
                sequence=event.sequence,
                kind=kind,
                created_at=event.timestamp,
                metadata={**details_of(metadata), **noted},
            )
            self._ledger.keep(record)
            return record

    def put_checkpoint_back(self, state: Json, at: datetime | None, *, checkpoint_id: str) -> None:
        """Keep an earlier state of the work, recorded at `at`, as the last one; `at` None: as if there were none.

        Raises:
            InvalidTransitionError: the execution has ended.
        """
        with self._ledger:
            self._refuse_after_the_end("checkpoint")
            details: dict[str, Json] = {"state": state, "at": iso(at), "restored_from": checkpoint_id}
            self._record(EventType.CHECKPOINT_CREATED, message=f"Back to checkpoint {checkpoint_id}", details=details)

    def note(self, level: MessageLevel, message: str, details: Mapping[str, Json] | None = None) -> None:
        """Add an `info`, `warning` or `error` to the log; it changes no state.

        Raises:
            InvalidTransitionError: the execution has ended, and its log with it.
        """
        kinds = {MessageLevel.WARNING: EventType.WARNING, MessageLevel.ERROR: EventType.ERROR}
        self._annotate(kinds.get(level, EventType.INFO), message, details, level)

    def emit_status_event(
        self, event_type: str, message: str, /, details: Mapping[str, Json] | None = None, **more: Json
    ) -> None:
        """Add an annotation of a known type; keyword arguments join its details.

        Raises:
            InvalidInput: the type is unknown, or one that changes state (those have methods of their own).
            InvalidTransitionError: the execution has ended, and its log with it.
        """
        try:
            kind = EventType(event_type)
        except ValueError:
            raise InvalidInput(f"unknown event type {event_type!r}") from None
        if kind in _FOLDED:
            raise InvalidInput(f"{event_type} is recorded by its own method")
        self._annotate(kind, message, {**(details or {}), **more}, None)

    def change_owner(self, owner: str) -> None:
        """A new owner takes the execution over; `generation` fences the old one off.

        Raises:
            InvalidTransitionError: the execution has ended.
        """
        with self._ledger:
            self._refuse_after_the_end("owner")
            life, now = self._life.value, self._ledger.clock.monotonic()
            details: dict[str, Json] = {"owner": owner, "generation": life.generation + 1}
            # Or the next restore would count the time without an owner.
            if clock := self._watch.value.reading(life, now):
                details["clock"] = clock
                self._ledger.put(self._watch, Stopwatch.of(life.status, now, parked=life.is_parked))
            self._record(EventType.OWNER_CHANGED, details=details)

    def record_fact(
        self,
        event_type: EventType,
        parts: tuple[Part[Any], ...],
        *,
        step_id: str | None = None,
        message: str = "",
        details: dict[str, Json] | None = None,
        level: MessageLevel | None = None,
    ) -> ExecutionEvent:
        """Record a fact about this execution that is folded into `parts` too: how the board of a plan changes.

        `step_id` names the step of its plan that it is about.

        Raises:
            InvalidTransitionError: the execution has ended, and its log with it.
        """
        with self._ledger:
            self._refuse_after_the_end(event_type.value)
            life = self._life.value
            return self._ledger.record(
                event_type,
                (*self._parts, *parts),
                task_id=life.task_id,
                execution_id=life.execution_id,
                step_id=step_id,
                message=message,
                phase=life.current_phase,
                details=details,
                level=level,
            )

    # inside

    def _record(
        self,
        event_type: EventType,
        *,
        message: str = "",
        phase: ExecutionPhase | None = None,
        details: dict[str, Json] | None = None,
        old_status: ExecutionStatus | None = None,
        new_status: ExecutionStatus | None = None,
        level: MessageLevel | None = None,
    ) -> None:
        life = self._life.value
        self._ledger.record(
            event_type,
            self._parts,
            task_id=life.task_id,
            execution_id=life.execution_id,
            message=message,
            phase=phase,
            details=details,
            old_status=old_status,
            new_status=new_status,
            level=level,
        )

    def _annotate(
        self, kind: EventType, message: str, details: Mapping[str, Json] | None, level: MessageLevel | None
    ) -> None:
        with self._ledger:
            self._refuse_after_the_end(kind.value)
            self._record(kind, phase=self.current_phase, message=message, details=details_of(details), level=level)

    def _refuse_after_the_end(self, what: str) -> None:
        status = self._life.value.status
        if status.is_terminal:
            raise InvalidTransitionError(status.value, what, ())
