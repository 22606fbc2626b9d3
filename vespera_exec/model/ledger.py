"""The order of facts: one lock, whole decisions, one way out to the log."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.enums import EventType
from vespera_exec.model.events import ExecutionEvent
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.progress import Progress
from vespera_exec.model.record import TaskRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRecord:
    """What an execution returned; kept apart from the log. `body` is JSON text, already capped."""

    execution_id: str
    body: bytes
    truncated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyRecord:
    """That a principal's key has been used, and for what."""

    principal: str
    key: str
    operation: str
    task_id: str
    run_id: str | None = None


State = TaskRecord | Lifecycle | Progress
Row = State | ResultRecord | IdempotencyRecord


@dataclass(frozen=True, slots=True)
class Batch:
    """One decision: its events in order, and the rows they leave behind. Stored whole or not at all."""

    events: tuple[ExecutionEvent, ...]
    rows: tuple[Row, ...] = ()


class Sink(Protocol):
    def append(self, batch: Batch) -> None:
        """Take a decision; called under the ledger's lock, from any thread, and never blocks."""
        ...


class _Evolving(Protocol):
    def evolve(self, event: ExecutionEvent) -> Self: ...


V = TypeVar("V", bound=_Evolving)


class Part(Generic[V]):
    """A place for one folded value. Only its ledger writes it."""

    __slots__ = ("value",)

    def __init__(self, value: V) -> None:
        self.value: V = value


class Ledger:
    """Orders the facts of one aggregate (a task and its sessions, or a session alone).

    `with ledger:` is one decision. Nested decisions join the outermost; when that ends, its events go
    to the sink together. An exception undoes all that the decision had recorded. Listeners hear of it
    after the lock is released.
    """

    __slots__ = ("_after", "_depth", "_events", "_extra", "_listeners", "_lock", "_sequences", "_undo", "clock", "sink")

    def __init__(self, *, sink: Sink | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        self.clock = clock
        self.sink = sink
        self._lock = threading.RLock()
        self._depth = 0
        self._events: list[ExecutionEvent] = []
        self._extra: list[Row] = []
        self._undo: dict[Part[Any], Any] = {}
        self._sequences: dict[str, int] = {}
        self._listeners: list[Callable[[ExecutionEvent], None]] = []
        self._after: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        self._lock.acquire()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._depth > 1:
            self._depth -= 1
            self._lock.release()
            return
        try:
            if kind is not None:
                self._roll_back()
            elif self._events or self._extra:
                self._close()
        finally:
            self._events, self._extra = [], []
            self._undo, self._after = {}, []
            self._depth = 0
            self._lock.release()

    def record(
        self,
        event_type: EventType,
        parts: tuple[Part[Any], ...] = (),
        *,
        task_id: str = "",
        execution_id: str | None = None,
        **fields: Any,
    ) -> ExecutionEvent:
        """Add one fact to the running decision and fold it into `parts` at once."""
        stream = execution_id or task_id
        sequence = self._sequences.get(stream, 0) + 1
        event = ExecutionEvent(
            event_type=event_type,
            timestamp=self.clock.now(),
            task_id=task_id,
            execution_id=execution_id,
            sequence=sequence,
            **fields,
        )
        evolved = [(part, part.value.evolve(event)) for part in parts]
        self._sequences[stream] = sequence
        for part, value in evolved:
            self._undo.setdefault(part, part.value)
            part.value = value
        self._events.append(event)
        return event

    def keep(self, row: ResultRecord | IdempotencyRecord) -> None:
        """Store a row in the same transaction as the running decision."""
        self._extra.append(row)

    def afterwards(self, call: Callable[[], None]) -> None:
        """Call once the running decision is closed and heard, still under the lock; not at all if it is undone."""
        self._after.append(call)

    def resume_at(self, stream: str, sequence: int) -> None:
        """Go on counting a stream that an earlier owner wrote."""
        self._sequences[stream] = max(sequence, self._sequences.get(stream, 0))

    def sequence(self, stream: str) -> int:
        return self._sequences.get(stream, 0)

    def forget(self, stream: str) -> None:
        """Drop the counter of a stream that has ended."""
        self._sequences.pop(stream, None)

    def listen(self, listener: Callable[[ExecutionEvent], None]) -> Callable[[], None]:
        """Hear every event once its decision is closed; under the lock, so hand over, do not work. Returns the undo."""
        with self._lock:
            self._listeners.append(listener)

        def undo() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return undo

    def _close(self) -> None:
        if self.sink is not None:
            rows: tuple[Row, ...] = (*(part.value for part in self._undo), *self._extra)
            self.sink.append(Batch(tuple(self._events), rows))
        for listener in tuple(self._listeners):
            for event in self._events:
                listener(event)
        for call in self._after:
            call()

    def _roll_back(self) -> None:
        for part, value in self._undo.items():
            part.value = value
        for event in self._events:
            self._sequences[event.stream] -= 1
