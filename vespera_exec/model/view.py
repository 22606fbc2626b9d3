"""What one execution shows of itself: its state read from the fold, its clock, its usage, its listeners."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from vespera_exec.model.ledger import Cell, Part
from vespera_exec.model.phases import PhaseManager
from vespera_exec.model.progress import untouched
from vespera_exec.model.stopwatch import Stopwatch
from vespera_exec.model.stream import StatusEventStream
from vespera_exec.model.summary import session_summary
from vespera_exec.model.timing import TimeTracking
from vespera_exec.model.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from vespera_exec.model.cancellation import CancellationToken
    from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus, ResourceType
    from vespera_exec.model.events import ExecutionEvent, Json
    from vespera_exec.model.ledger import Ledger
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.listeners import Callback, Subscription
    from vespera_exec.model.progress import Progress, ProgressState
    from vespera_exec.model.stays import PhaseRecord


class SessionView:
    """The readable side of an `ExecutionSession`; nothing here changes its state."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        *,
        ledger: Ledger,
        max_events: int,
        max_samples: int,
        baseline: timedelta | None,
        monitoring_enabled: bool,
    ) -> None:
        self._ledger = ledger
        self._life = Part(lifecycle)
        self._progress = Part(untouched(lifecycle.execution_id))
        self._parts = (self._life, self._progress)
        self._watch = Cell(Stopwatch())
        self._stream = StatusEventStream(ledger, *self._parts, limit=max_events)
        self._max_samples = max_samples
        self._usage: Usage | None = None
        """From the first measurement on."""
        self._baseline = baseline
        self._token: CancellationToken | None = None
        self.monitoring_enabled = monitoring_enabled
        """Whether an attached sampler is wanted; measurements that are handed in are kept all the same."""
        ledger.listen(self._stream.emit)

    def __repr__(self) -> str:
        return f"<ExecutionSession {self.session_id[:8]} {self.status.value}>"

    @property
    def ledger(self) -> Ledger:
        """`with session.ledger:` makes several changes one decision."""
        return self._ledger

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
        """Who works on it; None while nobody is named."""
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
        self._judge_deadline()
        return self._life.value.status

    @property
    def current_phase(self) -> ExecutionPhase | None:
        return self._life.value.current_phase

    @property
    def phases(self) -> PhaseManager:
        """Entry, exit and history of its phases."""
        return PhaseManager(self._ledger, self._watch, *self._parts)

    @property
    def phase_history(self) -> list[PhaseRecord]:
        """As `phases.history`."""
        return self.phases.history

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
        return self._stream.get_events()

    @property
    def is_cancellation_requested(self) -> bool:
        return self._life.value.cancellation_reason is not None or bool(self._token and self._token.is_cancelled)

    @property
    def time_tracking(self) -> TimeTracking:
        """The clock as it stands now; a view, changing it changes nothing here."""
        with self._ledger:  # the fold and the watch change together
            life, watch = self._life.value, self._watch.value
        now = self._ledger.clock.monotonic()
        paused = now - watch.paused if watch.paused is not None else 0.0
        return TimeTracking(
            started_at=life.started_at,
            paused_at=life.paused_at,
            resumed_at=life.resumed_at,
            completed_at=life.completed_at,
            paused_duration=timedelta(seconds=life.paused_seconds + paused),
            performance_baseline=self._baseline,
            clock=self._ledger.clock,
            _active=life.active_seconds,
            _since=watch.active,
            _paused_since=now if watch.paused is not None else None,
            _driven=True,
        )

    @property
    def elapsed_seconds(self) -> float:
        """Time at work: since PREPARING, pauses excluded, frozen at the end."""
        with self._ledger:  # the fold and the watch change together
            return self._watch.value.active_seconds(self._life.value, self._ledger.clock.monotonic())

    def to_dict(self) -> dict[str, Json]:
        """`{"lifecycle", "progress"}`, JSON-safe; `from_dict` makes an equal session of it."""
        with self._ledger:
            return {"lifecycle": self._life.value.to_dict(), "progress": self._progress.value.to_dict()}

    # usage

    def record_resource_usage(self, resource_type: ResourceType, value: float) -> None:
        """Keep a measurement and its peak; the last `max_samples` per type. Not an event.

        Raises:
            InvalidInput: the value is not finite.
        """
        with self._ledger:
            if self._usage is None:
                self._usage = Usage(self._max_samples)
            self._usage.add(resource_type, value, self._ledger.clock.now())

    @property
    def resource_metrics(self) -> dict[ResourceType, list[tuple[datetime, float]]]:
        with self._ledger:
            return self._usage.samples() if self._usage is not None else {}

    @property
    def peak_resource_usage(self) -> dict[ResourceType, float]:
        with self._ledger:
            return self._usage.peaks() if self._usage is not None else {}

    # listening

    @property
    def stream(self) -> StatusEventStream:
        """The events as memory holds them, to be read, subscribed to, or followed in a loop."""
        return self._stream

    def add_event_callback(self, callback: Callback) -> Subscription:
        """Call `callback(event)` for every event from now on, off the thread that caused it, in order."""
        return self._stream.subscribe(callback)

    def remove_event_callback(self, callback: Callback) -> bool:
        """Whether it was there; what it has not yet heard, it never will."""
        return self._stream.unsubscribe(callback)

    @property
    def event_callbacks(self) -> list[Callback]:
        return self._stream.callbacks

    def wait_for_callbacks(self, timeout: float = 5.0) -> bool:
        """True when every callback has heard all there was, within `timeout` seconds each."""
        return self._stream.wait_idle(timeout)

    def get_execution_summary(self) -> dict[str, Json]:
        """The session at a glance: see `session_summary`."""
        self._judge_deadline()
        with self._ledger:
            usage = self._usage.shown() if self._usage is not None else {}
            life = self._life.value
            tracking = None if life.status.is_terminal else self.time_tracking
            return session_summary(life, self._progress.value, tracking, usage)

    def _judge_deadline(self) -> None:
        token = self._token
        if token is not None and token.deadline is not None:
            token.is_cancellation_requested()
