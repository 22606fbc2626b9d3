"""One execution: decides, records, and shows where it stands."""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from vespera_exec.errors import ExecutionError, InvalidInput, InvalidProgress, InvalidTransitionError
from vespera_exec.model import transitions
from vespera_exec.model.cancellation import CancellationToken
from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.enums import (
    RESOURCE_UNITS,
    EventType,
    ExecutionPhase,
    ExecutionStatus,
    MessageLevel,
    ProgressType,
    ResourceType,
)
from vespera_exec.model.events import ExecutionEvent, Json, new_id
from vespera_exec.model.ledger import Ledger, Part, ResultRecord
from vespera_exec.model.lifecycle import Lifecycle, PhaseRecord
from vespera_exec.model.listeners import Callback, Subscription
from vespera_exec.model.progress import (
    CustomMetric,
    Progress,
    ProgressReport,
    ProgressState,
    measured,
    rolled_up,
)
from vespera_exec.model.timing import TimeTracking

MAX_EVENTS = 1000
MAX_SAMPLES = 1000
_SHOWN_BEFORE_THE_END = 99.0

S = ExecutionStatus
_CLOCK_RUNS = frozenset({S.PREPARING, S.VALIDATING, S.RUNNING, S.RECOVERING, S.COMPLETING, S.CANCELLING})
_log = logging.getLogger(__name__)


class ExecutionSession:
    """One attempt at a task, in memory or in an engine.

    `execution_id` is `session_id`. Thread-safe. Every public method either changes the state and records
    it, or raises and changes nothing. Alone it needs no loop, store or thread; within a task it shares
    the task's ledger, and so the task's order of facts.
    """

    def __init__(
        self,
        session_id: str | None = None,
        task_id: str = "",
        role_name: str | None = None,
        *,
        ledger: Ledger | None = None,
        clock: Clock = SYSTEM_CLOCK,
        max_events: int = MAX_EVENTS,
        max_samples: int = MAX_SAMPLES,
        max_recovery_attempts: int = 3,
        cancellation_token: CancellationToken | None = None,
        custom_metrics: Mapping[str, CustomMetric] | None = None,
        on_end: Callable[[ExecutionSession], None] | None = None,
    ) -> None:
        identity = session_id or new_id()
        self._ledger = ledger if ledger is not None else Ledger(clock=clock)
        self._life = Part(Lifecycle(execution_id=identity, task_id=task_id, run_id=identity, role_name=role_name))
        self._progress = Part(Progress(execution_id=identity))
        self._parts = (self._life, self._progress)
        self._events: deque[ExecutionEvent] = deque(maxlen=max_events)
        self._subscriptions: list[Subscription] = []
        self._samples: dict[ResourceType, deque[tuple[datetime, float]]] = {}
        self._peaks: dict[ResourceType, float] = {}
        self._max_samples = max_samples
        self._custom_metrics = dict(custom_metrics or {})
        self._on_end = on_end
        self._since: float | None = None
        self._paused_since: float | None = None
        self._queued_since: float | None = None
        self._phase_since = 0.0
        self._token: CancellationToken | None = None
        self._baseline: timedelta | None = None
        self.max_recovery_attempts = max_recovery_attempts
        self._unlisten = self._ledger.listen(self._heard)
        if cancellation_token is not None:
            self.cancellation_token = cancellation_token

    @classmethod
    def restored(
        cls, lifecycle: Lifecycle, progress: Progress, *, ledger: Ledger | None = None, **options: Any
    ) -> ExecutionSession:
        """The session that these stored values describe. Its clock goes on from what they say."""
        session = cls(lifecycle.execution_id, lifecycle.task_id, ledger=ledger, **options)
        session._life.value = lifecycle
        session._progress.value = progress
        session._ledger.resume_at(lifecycle.execution_id, max(lifecycle.sequence, progress.sequence))
        session._start_clock(lifecycle.status)
        return session

    def __repr__(self) -> str:
        return f"<ExecutionSession {self.session_id[:8]} {self.status.value}>"

    # identity and state, read from the fold

    @property
    def session_id(self) -> str:
        return self._life.value.execution_id

    @property
    def execution_id(self) -> str:
        return self._life.value.execution_id

    @property
    def task_id(self) -> str:
        return self._life.value.task_id

    @property
    def run_id(self) -> str:
        return self._life.value.run_id

    @property
    def attempt(self) -> int:
        return self._life.value.attempt

    @property
    def role_name(self) -> str | None:
        return self._life.value.role_name

    @property
    def lifecycle(self) -> Lifecycle:
        """The cold state: an immutable value, safe to keep."""
        return self._life.value

    @property
    def progress(self) -> Progress:
        """The hot state: an immutable value, safe to keep."""
        return self._progress.value

    @property
    def status(self) -> ExecutionStatus:
        if self._token is not None and self._token.deadline is not None:
            self._token.is_cancellation_requested()  # a deadline is judged when read
        return self._life.value.status

    @property
    def current_phase(self) -> ExecutionPhase | None:
        return self._life.value.current_phase

    @property
    def phase_history(self) -> list[PhaseRecord]:
        """Each stay in a phase; as a tuple it begins with the phase and the time it was entered."""
        return list(self._life.value.phases)

    @property
    def overall_progress(self) -> ProgressState:
        return self._progress.value.overall

    @property
    def phase_progress(self) -> Mapping[ExecutionPhase, ProgressState]:
        return self._progress.value.phases

    @property
    def custom_progress(self) -> Mapping[str, ProgressState]:
        return self._progress.value.custom

    @property
    def error_context(self) -> Mapping[str, Json]:
        return self._life.value.error

    @property
    def recovery_attempts(self) -> int:
        return self._life.value.recovery_attempts

    @property
    def status_events(self) -> list[ExecutionEvent]:
        """The last events, at most `max_events`; the log has all."""
        with self._ledger:
            return list(self._events)

    @property
    def is_cancellation_requested(self) -> bool:
        return self._life.value.cancellation_reason is not None or bool(self._token and self._token.is_cancelled)

    @property
    def cancellation_token(self) -> CancellationToken | None:
        return self._token

    @cancellation_token.setter
    def cancellation_token(self, token: CancellationToken | None) -> None:
        self._token = token
        if token is not None:
            token.on_cancel(self._token_cancelled)

    @property
    def time_tracking(self) -> TimeTracking:
        """The clock as it stands now; a view, changing it changes nothing here."""
        life = self._life.value
        return TimeTracking(
            started_at=life.started_at,
            paused_at=life.paused_at,
            resumed_at=life.resumed_at,
            completed_at=life.completed_at,
            paused_duration=timedelta(seconds=life.paused_seconds),
            performance_baseline=self._baseline,
            clock=self._ledger.clock,
            _active=life.active_seconds,
            _since=self._since,
            _driven=True,
        )

    @property
    def elapsed_seconds(self) -> float:
        """Time at work: since PREPARING, pauses excluded, frozen at the end."""
        running = self._ledger.clock.monotonic() - self._since if self._since is not None else 0.0
        return self._life.value.active_seconds + running

    # status

    def start_execution(self, role_name: str | None = None) -> None:
        """IDLE (or PENDING) to PREPARING. None keeps the role it was made with.

        Raises:
            InvalidTransitionError: it has been started before.
        """
        with self._ledger:
            if self._life.value.status not in (S.IDLE, S.PENDING):
                transitions.check(self._life.value.status, S.IDLE)
            self._transition(S.PREPARING, "Execution session started", role=role_name)

    def enqueue(
        self,
        *,
        run_id: str | None = None,
        attempt: int = 1,
        parent_execution_id: str | None = None,
        priority: int = 5,
        not_before: datetime | None = None,
        owner: str | None = None,
        message: str = "Queued",
    ) -> None:
        """IDLE to PENDING: accepted, and waiting for its turn."""
        made: dict[str, Json] = {"attempt": attempt, "parent": parent_execution_id, "priority": priority}
        made |= {"run_id": run_id or self.session_id, "owner": owner}
        made["not_before"] = not_before.isoformat() if not_before else None
        self._transition(S.PENDING, message, made=made)

    def update_status(self, new_status: ExecutionStatus, message: str = "") -> bool:
        """Change the status as the table allows; False, without an event, when it is that already.

        Raises:
            InvalidTransitionError: the table does not list the change. Nothing has changed.
        """
        error = None
        if new_status in (S.FAILED, S.TIMED_OUT):
            error = {"code": new_status.name, "type": None, "message": message}
        return self._transition(new_status, message, error=error)

    def pause(self, reason: str = "", *, details: Mapping[str, Json] | None = None) -> bool:
        """To PAUSED; the clock stops. Call it when the work has really stopped."""
        return self._transition(S.PAUSED, reason, details=details)

    def resume(self, reason: str = "") -> bool:
        """From PAUSED back to where it was paused."""
        with self._ledger:
            origin = self._life.value.paused_from
            if self._life.value.status is not S.PAUSED or origin is None:
                raise InvalidTransitionError(self.status.value, "resumed", ())
            return self._transition(origin, reason)

    def recover(self, reason: str, *, details: Mapping[str, Json] | None = None) -> bool:
        """To RECOVERING, from a fault or a dead owner.

        Raises:
            InvalidTransitionError: the recovery attempts are used up.
        """
        with self._ledger:
            if self._life.value.recovery_attempts >= self.max_recovery_attempts:
                raise InvalidTransitionError(self.status.value, S.RECOVERING.value, (S.FAILED.value,))
            return self._transition(S.RECOVERING, reason, details=details)

    def complete(
        self, message: str = "", *, outcome: Mapping[str, Json] | None = None, result: ResultRecord | None = None
    ) -> bool:
        """To COMPLETED, through COMPLETING where that was not entered. `result` is stored with it.

        Called while CANCELLING it ends CANCELLED: the request was first.
        """
        with self._ledger:
            status = self._life.value.status
            if status.is_terminal:
                return False
            if status is S.CANCELLING:
                return self.end_cancelled(outcome={**(outcome or {}), "finished_anyway": True}, result=result)
            if status is S.PAUSED:
                self.resume()
            if self._life.value.status is not S.COMPLETING:
                self._transition(S.COMPLETING, message)
            return self._transition(S.COMPLETED, message, outcome=outcome, result=result)

    def fail(
        self,
        error: BaseException | str,
        *,
        outcome: Mapping[str, Json] | None = None,
        result: ResultRecord | None = None,
    ) -> bool:
        """To FAILED, with the error kept in `error_context`; False when it had ended."""
        with self._ledger:
            status = self._life.value.status
            if status.is_terminal:
                return False
            if status is S.CANCELLING:
                return self.end_cancelled(outcome={**(outcome or {}), "cleanup_error": str(error)}, result=result)
            context = self._error_of(error)
            return self._transition(S.FAILED, context["message"], outcome=outcome, error=context, result=result)

    def time_out(
        self, message: str = "", *, outcome: Mapping[str, Json] | None = None, result: ResultRecord | None = None
    ) -> bool:
        """To TIMED_OUT; False when it had ended."""
        with self._ledger:
            if self._life.value.status.is_terminal:
                return False
            if self._life.value.status is S.CANCELLING:
                return self.end_cancelled(outcome=outcome, result=result)
            text = message or "Timed out"
            error = {"code": "TIMEOUT", "type": "Timeout", "message": text, "phase": self._phase_name()}
            return self._transition(S.TIMED_OUT, text, outcome=outcome, error=error, result=result)

    def end_cancelled(self, *, outcome: Mapping[str, Json] | None = None, result: ResultRecord | None = None) -> bool:
        """CANCELLING (or PENDING) to CANCELLED, once everything of it is gone."""
        reason = self._life.value.cancellation_reason or ""
        return self._transition(S.CANCELLED, reason, outcome=outcome, result=result)

    def request_cancellation(self, reason: str = "") -> bool:
        """Ask it to stop. True when the request is accepted or was made before; False when it is too late.

        PENDING ends at once; COMPLETING and the ended refuse.
        """
        with self._ledger:
            status = self._life.value.status
            if status is S.CANCELLING:
                return True
            if status.is_terminal or status in (S.COMPLETING, S.IDLE):
                return False
            if status is S.PENDING:
                self._transition(S.CANCELLED, reason, details={"reason": reason})
            else:
                text = f"Cancellation requested: {reason}" if reason else "Cancellation requested"
                self._transition(S.CANCELLING, text, details={"reason": reason})
        if self._token is not None:
            self._token.cancel(reason)
        return True

    # phases, progress, notes

    def enter_phase(self, phase: ExecutionPhase, message: str = "") -> None:
        """Close the phase that runs and enter `phase`. Entering the running one again does nothing.

        Raises:
            InvalidTransitionError: the execution has ended.
        """
        with self._ledger:
            life = self._life.value
            if life.status.is_terminal:
                raise InvalidTransitionError(life.status.value, f"phase {phase.value}", ())
            if life.current_phase is phase:
                return
            now = self._ledger.clock.monotonic()
            clock: dict[str, Json] = {"phase": round(now - self._phase_since, 6)} if life.current_phase else {}
            self._phase_since = now
            self._record(
                EventType.PHASE_CHANGE,
                phase=phase,
                message=message or f"Entered phase: {phase.value}",
                details={"clock": clock} if clock else {},
            )

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
            InvalidProgress: see `update_progress`.
        """
        with self._ledger:
            life, before = self._life.value, self._progress.value
            if life.status.is_terminal:
                raise InvalidProgress(f"the execution has ended ({life.status.value}); progress is final")
            now = self._ledger.clock.now()
            overall, details = before.overall, dict[str, Json]()
            if report.metric is not None:
                state = report.applied_to(before.custom.get(report.metric), now)
                details["custom"] = {report.metric: measured(state)}
            elif phase is not None:
                state = report.applied_to(before.phases.get(phase), now)
                details["phase_progress"] = measured(state)
                overall = rolled_up(before.overall, phase, state, reset=report.reset)
            else:
                state = overall = _capped(report.applied_to(before.overall, now))
                went_back = (overall.get_percentage() or 0.0) < (before.overall.get_percentage() or 0.0)
                if went_back and overall.total is not None and not report.reset:
                    raise InvalidProgress("the overall percentage would go back")
            if self._custom_metrics:
                computed = self._computed_metrics(before, overall)
                if computed:
                    details["custom"] = {**computed, **details.get("custom", {})}
            self._record(
                EventType.PROGRESS_UPDATE,
                phase=phase or life.current_phase,
                message=report.message or _progress_text(state, report.metric),
                progress_data={**measured(overall), "percentage": _shown(overall)},
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
            reached = max(percentage, self._progress.value.overall.get_percentage() or 0.0)
            self.report(ProgressReport(current=reached, message=message))

    def record_checkpoint(self, state: Json, message: str = "") -> None:
        """Keep a state that the work can go on from."""
        with self._ledger:
            if self._life.value.status.is_terminal:
                raise InvalidTransitionError(self._life.value.status.value, "checkpoint", ())
            self._record(EventType.CHECKPOINT_CREATED, message=message, details={"state": state})

    def note(self, level: MessageLevel, message: str, details: Mapping[str, Json] | None = None) -> None:
        """Add an `info`, `warning` or `error` to the log; it changes no state."""
        kinds = {MessageLevel.WARNING: EventType.WARNING, MessageLevel.ERROR: EventType.ERROR}
        self._annotate(kinds.get(level, EventType.INFO), message, details, level)

    def emit_status_event(self, event_type: str, message: str, /, details: Mapping[str, Json] | None = None) -> None:
        """Add an annotation of a known type.

        Raises:
            InvalidInput: the type is unknown, or one that changes state (those have methods of their own).
        """
        try:
            kind = EventType(event_type)
        except ValueError:
            raise InvalidInput(f"unknown event type {event_type!r}") from None
        folded = (EventType.STATUS_CHANGE, EventType.PHASE_CHANGE, EventType.PROGRESS_UPDATE)
        if kind in (*folded, EventType.OWNER_CHANGED, EventType.CHECKPOINT_CREATED):
            raise InvalidInput(f"{event_type} is recorded by its own method")
        self._annotate(kind, message, details, None)

    def change_owner(self, owner: str) -> None:
        """A new owner takes the execution over; `generation` fences the old one off."""
        with self._ledger:
            self._record(
                EventType.OWNER_CHANGED, details={"owner": owner, "generation": self._life.value.generation + 1}
            )

    # usage

    def record_resource_usage(self, resource_type: ResourceType, value: float) -> None:
        """Keep a measurement and its peak; the last `max_samples` per type. Not an event."""
        with self._ledger:
            samples = self._samples.setdefault(resource_type, deque(maxlen=self._max_samples))
            samples.append((self._ledger.clock.now(), value))
            self._peaks[resource_type] = max(value, self._peaks.get(resource_type, value))

    @property
    def resource_metrics(self) -> dict[ResourceType, list[tuple[datetime, float]]]:
        with self._ledger:
            return {kind: list(samples) for kind, samples in self._samples.items()}

    @property
    def peak_resource_usage(self) -> dict[ResourceType, float]:
        with self._ledger:
            return dict(self._peaks)

    # listening

    def add_event_callback(self, callback: Callback) -> Subscription:
        """Call `callback(event)` for every event from now on, off the thread that caused it, in order."""
        subscription = Subscription(callback)
        subscription.undo = lambda: self._drop(subscription)
        with self._ledger:
            self._subscriptions.append(subscription)
        return subscription

    def remove_event_callback(self, callback: Callback) -> bool:
        with self._ledger:
            found = [each for each in self._subscriptions if each.callback == callback]
        for subscription in found:
            subscription.unsubscribe()
        return bool(found)

    @property
    def event_callbacks(self) -> list[Callback]:
        with self._ledger:
            return [each.callback for each in self._subscriptions]

    def wait_for_callbacks(self, timeout: float = 5.0) -> bool:
        """True when every callback has heard all there was, within `timeout` seconds each."""
        with self._ledger:
            waiting = list(self._subscriptions)
        return all(each.wait_idle(timeout) for each in waiting)

    def get_execution_summary(self) -> dict[str, Json]:
        """The session at a glance: the keys of document 000, JSON-safe."""
        with self._ledger:
            life, progress, tracking = self._life.value, self._progress.value, self.time_tracking
            usage = {
                kind.value: {"current": samples[-1][1], "peak": self._peaks[kind], "unit": RESOURCE_UNITS[kind]}
                for kind, samples in self._samples.items()
            }
        percentage = progress.percentage
        eta = None
        if not life.status.is_terminal and life.status is not S.PAUSED:
            work = progress.phases.get(ExecutionPhase.EXECUTION)
            eta = tracking.calculate_eta(work.get_percentage() if work and work.current else percentage)
        return {
            "session_id": life.execution_id,
            "task_id": life.task_id,
            "status": life.status.value,
            "current_phase": life.current_phase.value if life.current_phase else None,
            "overall_progress": {"percentage": percentage, "message": progress.overall.message},
            "time_tracking": {
                "elapsed_seconds": tracking.get_elapsed_time().total_seconds(),
                "estimated_completion": eta.isoformat() if eta else None,
                "eta_confidence": None,
            },
            "resource_usage": usage,
            "custom_progress": {name: measured(state) for name, state in progress.custom.items()},
            "error_context": dict(life.error) if life.status in (S.FAILED, S.TIMED_OUT) else None,
        }

    # inside

    def _transition(
        self,
        new: ExecutionStatus,
        message: str,
        *,
        details: Mapping[str, Json] | None = None,
        made: dict[str, Json] | None = None,
        role: str | None = None,
        outcome: Mapping[str, Json] | None = None,
        error: Mapping[str, Json] | None = None,
        result: ResultRecord | None = None,
    ) -> bool:
        with self._ledger:
            life = self._life.value
            old = life.status
            if old is new:
                return False
            transitions.check(old, new, life.paused_from)
            noted = dict(details or {})
            if clock := self._turn_clock(new):
                noted["clock"] = clock
            if old is S.IDLE:
                noted["session"] = {
                    "run_id": self.session_id,
                    "attempt": 1,
                    "parent": None,
                    "priority": 5,
                    "not_before": None,
                    "owner": None,
                    "generation": 1,
                    **(made or {}),
                    "role": role or life.role_name,
                }
            if new.is_terminal:
                ended: dict[str, Json] = dict(outcome or {})
                if error is not None:
                    ended["error"] = dict(error)
                if self._peaks:
                    ended["peaks"] = {kind.value: peak for kind, peak in self._peaks.items()}
                noted["outcome"] = ended
            self._record(
                EventType.STATUS_CHANGE,
                old_status=old,
                new_status=new,
                phase=life.current_phase,
                message=message,
                details=noted,
            )
            for kind in transitions.milestones(old, new):
                level = MessageLevel.ERROR if kind is EventType.ERROR else None
                self._record(kind, phase=life.current_phase, message=message, level=level)
            if result is not None:
                self._ledger.keep(result)
            if new.is_terminal:
                self._ledger.afterwards(self._archived)
                if self._on_end is not None:
                    self._on_end(self)
            return True

    def _turn_clock(self, new: ExecutionStatus) -> dict[str, Json]:
        """Bring the durations up to now, and say them as the event keeps them."""
        life, now = self._life.value, self._ledger.clock.monotonic()
        clock: dict[str, Json] = {}
        if self._since is not None:
            clock["active"] = round(life.active_seconds + now - self._since, 6)
        if self._paused_since is not None:
            clock["paused"] = round(life.paused_seconds + now - self._paused_since, 6)
        if self._queued_since is not None:
            clock["queued"] = round(life.queue_seconds + now - self._queued_since, 6)
        if new.is_terminal and life.current_phase is not None:
            clock["phase"] = round(now - self._phase_since, 6)
        self._start_clock(new)
        return clock

    def _start_clock(self, status: ExecutionStatus) -> None:
        now = self._ledger.clock.monotonic()
        self._since = now if status in _CLOCK_RUNS else None
        self._paused_since = now if status is S.PAUSED else None
        self._queued_since = now if status is S.PENDING else None

    def _record(self, event_type: EventType, **fields: Any) -> ExecutionEvent:
        life = self._life.value
        return self._ledger.record(
            event_type, self._parts, task_id=life.task_id, execution_id=life.execution_id, **fields
        )

    def _annotate(
        self, kind: EventType, message: str, details: Mapping[str, Json] | None, level: MessageLevel | None
    ) -> None:
        with self._ledger:
            self._record(
                kind, phase=self._life.value.current_phase, message=message, details=dict(details or {}), level=level
            )

    def _heard(self, event: ExecutionEvent) -> None:
        """The ledger's listener, under the lock: keep the tail, hand over to the callbacks."""
        if event.execution_id != self._life.value.execution_id:
            return
        self._events.append(event)
        for subscription in tuple(self._subscriptions):
            subscription.offer(event)

    def _drop(self, subscription: Subscription) -> None:
        with self._ledger:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)

    def _archived(self) -> None:
        """Ended and heard: callbacks are let go of, and the ledger lets go of it."""
        self._unlisten()
        self._ledger.forget(self.session_id)
        for subscription in self._subscriptions:
            subscription.close_when_idle()

    def _token_cancelled(self, token: CancellationToken) -> None:
        if token.timed_out:
            self.time_out(token.cancellation_reason)
        else:
            self.request_cancellation(token.cancellation_reason)

    def _computed_metrics(self, before: Progress, overall: ProgressState) -> dict[str, Json]:
        seen = replace(before, overall=overall)
        computed: dict[str, Json] = {}
        for name, metric in self._custom_metrics.items():
            try:
                value = metric(seen, self.elapsed_seconds)
                if value is not None:
                    state = value if isinstance(value, ProgressState) else ProgressState(ProgressType.CUSTOM, value)
                    computed[name] = measured(state)
            except Exception:  # noqa: BLE001 - the boundary to a plugin: its fault is not the work's
                _log.exception("The progress metric %s failed", name)
        return computed

    def _error_of(self, error: BaseException | str) -> dict[str, Json]:
        if isinstance(error, str):
            return {"code": "EXECUTION_FAILED", "type": None, "message": error, "phase": self._phase_name()}
        context: dict[str, Json] = {
            "code": getattr(error, "failure_code", None) or getattr(error, "code", None) or "EXECUTION_FAILED",
            "type": type(error).__name__,
            "message": str(error) or type(error).__name__,
            "phase": self._phase_name(),
            "recoverable": getattr(error, "recoverable", True),
        }
        if isinstance(error, ExecutionError):
            if error.context:
                context["context"] = error.context
        elif error.__traceback__ is not None:
            context["traceback"] = "".join(traceback.format_exception(error))[-8000:]
        if not isinstance(context["code"], str):
            context["code"] = "EXECUTION_FAILED"
        return context

    def _phase_name(self) -> str | None:
        phase = self._life.value.current_phase
        return phase.value if phase else None


def _capped(state: ProgressState) -> ProgressState:
    """Nothing shows 100 before the completion event has set it."""
    if state.progress_type is ProgressType.PERCENTAGE and state.current > _SHOWN_BEFORE_THE_END:
        return replace(state, current=_SHOWN_BEFORE_THE_END)
    return state


def _shown(state: ProgressState) -> float | None:
    percentage = state.get_percentage()
    return None if percentage is None else min(percentage, _SHOWN_BEFORE_THE_END)


def _progress_text(state: ProgressState, metric: str | None) -> str:
    percentage = state.get_percentage()
    if metric is not None:
        return f"{metric}: {state.current:g}"
    if state.progress_type is ProgressType.PERCENTAGE or state.total is None:
        return f"Progress: {state.current:g}" + ("%" if percentage is not None else f" {state.unit}".rstrip())
    return f"Progress: {state.current:g}/{state.total:g}"


def replayed(events: Sequence[ExecutionEvent], execution_id: str) -> tuple[Lifecycle, Progress]:
    """The state that a stored log of one execution folds to."""
    life, progress = Lifecycle(execution_id=execution_id, run_id=execution_id), Progress(execution_id=execution_id)
    for event in events:
        if event.execution_id == execution_id:
            life, progress = life.evolve(event), progress.evolve(event)
    return life, progress
