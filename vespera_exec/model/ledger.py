"""The order of facts: one lock, whole decisions, one way out to the log."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, Self, TypeVar

from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.events import ExecutionEvent, Json, recorded_event
from vespera_exec.model.jsonable import clean_text
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.plans.steps import PlanState, StepState
from vespera_exec.model.progress import Progress
from vespera_exec.model.record import TaskRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime
    from types import TracebackType

    from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus, MessageLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRecord:
    """What an execution returned; kept apart from the log. `body` is JSON text, already capped."""

    execution_id: str
    body: bytes
    truncated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """Who asked for a run, from where and with which limits; kept apart from the log, which others read.

    `body` is JSON text: what a later owner needs in order to start the run as it was asked for.
    """

    run_id: str
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyRecord:
    """That a principal's key has been used, and for what.

    `digest` tells the request that used it from others; None where it was not kept.
    """

    principal: str
    key: str
    operation: str
    task_id: str
    run_id: str | None = None
    digest: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """A place in an execution's log that it can go back to: its state is the fold of the events up to `sequence`."""

    checkpoint_id: str
    execution_id: str
    sequence: int
    kind: str
    """"call", "interval" or "step"."""
    created_at: datetime
    metadata: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRecord:
    """That a pure role has answered: whose result stands under `key`, for one principal."""

    key: bytes
    principal: str
    role: str
    execution_id: str


State = TaskRecord | Lifecycle | Progress | StepState | PlanState
Row = State | ResultRecord | RequestRecord | IdempotencyRecord | CheckpointRecord | CacheRecord


class Batch(NamedTuple):
    """One decision: its events in order, and the rows they leave behind. Stored whole or not at all.

    Of the folded values only those that the decision changed are among the rows, each once.
    """

    events: tuple[ExecutionEvent, ...]
    rows: tuple[Row, ...] = ()


class Sink(Protocol):
    def append(self, batch: Batch) -> None:
        """Take a decision; called under the ledger's lock, from any thread, and never blocks.

        An exception undoes the decision and reaches whoever made it.
        """
        ...


class _Evolving(Protocol):
    def evolve(self, event: ExecutionEvent) -> Self: ...


T = TypeVar("T")
V = TypeVar("V", bound=_Evolving)


class Cell(Generic[T]):
    """A place for a value that a decision may change and an undone one gets back. Only its ledger writes it."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value: T = value


class Part(Cell[V]):
    """A place for one folded value; it becomes a row of the batch that changed it."""

    __slots__ = ()


# A plain tuple: one is made for every nested decision.
_Calls = tuple["Callable[[], None]", ...]
_Mark = tuple[int, int, int, _Calls, _Calls]
"""How far the running decision was when a nested one began: events, undo, rows, settling, afterwards."""
_START: _Mark = (0, 0, 0, (), ())


class _Decision:
    """What the running decision has come to; there is none between two of them.

    `marks` has one for each decision that is nested in it now. The calls are few, and mostly none.
    """

    __slots__ = ("afterwards", "at", "closing", "events", "marks", "rows", "settling", "undo")

    def __init__(self) -> None:
        self.at: datetime | None = None
        self.closing = False
        self.marks: list[_Mark] = []
        self.events: list[ExecutionEvent] = []
        self.undo: list[tuple[Cell[Any], Any]] = []
        self.rows: list[Row] = []
        self.settling: _Calls = ()
        self.afterwards: _Calls = ()

    def changed(self) -> list[Row]:
        """The parts that it changed, each once, as they are now."""
        undo = self.undo
        cells = [undo[0][0]] if len(undo) == 1 else dict.fromkeys([cell for cell, _ in undo])
        return [cell.value for cell in cells if isinstance(cell, Part)]


class Ledger:
    """Orders the facts of one aggregate (a task and its sessions, or a session alone).

    `with ledger:` is one decision. Nested decisions join the outermost; when that ends, its events go
    to the sink together. An exception that leaves a decision, nested or not, undoes all that this decision
    had recorded; one from the sink undoes the whole. Listeners hear of it under the lock, calls that
    were put off with `afterwards` come when it is released. Never await within a decision.
    """

    __slots__ = ("_listeners", "_lock", "_running", "_sequences", "clock", "sink")

    def __init__(self, *, sink: Sink | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        self.clock = clock
        self.sink = sink
        self._lock = threading.RLock()
        self._running: _Decision | None = None
        self._sequences: dict[str, int] = {}
        self._listeners: tuple[Callable[[ExecutionEvent], None], ...] = ()

    def __enter__(self) -> Self:
        self._lock.acquire()
        running = self._running
        if running is None:
            self._running = _Decision()
        else:
            reached = len(running.events), len(running.undo), len(running.rows), running.settling, running.afterwards
            running.marks.append(reached)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        running = self._decision()
        if running.marks:
            mark = running.marks.pop()
            if kind is not None:
                self._roll_back(running, mark)
            self._lock.release()
            return
        try:
            if kind is not None:
                self._roll_back(running, _START)
            elif running.events or running.rows or running.settling:
                self._close(running)
        finally:
            self._running = None
            self._lock.release()
        for call in running.afterwards:
            call()

    def record(
        self,
        event_type: EventType,
        parts: tuple[Part[Any], ...] = (),
        *,
        task_id: str = "",
        execution_id: str | None = None,
        step_id: str | None = None,
        message: str = "",
        phase: ExecutionPhase | None = None,
        details: dict[str, Json] | None = None,
        progress_data: dict[str, Json] | None = None,
        old_status: ExecutionStatus | None = None,
        new_status: ExecutionStatus | None = None,
        level: MessageLevel | None = None,
    ) -> ExecutionEvent:
        """Add one fact to the running decision and fold it into `parts` at once. `details` are JSON already.

        All facts of one decision have one time: that of the first.
        """
        running = self._running
        if running is None or running.closing:
            raise RuntimeError("a fact is recorded within a decision, and never by a listener")
        at = running.at
        if at is None:
            at = running.at = self.clock.now()
        stream = execution_id or task_id
        sequence = self._sequences.get(stream, 0) + 1
        event = recorded_event(
            event_type, at, task_id, execution_id, sequence, step_id, old_status, new_status,
            message if message.isascii() else clean_text(message), phase, progress_data, details, level,
        )  # fmt: skip
        undo = running.undo
        reached = len(undo)
        try:
            for part in parts:
                before = part.value
                after = before.evolve(event)
                if after is not before:
                    undo.append((part, before))
                    part.value = after
        except BaseException:
            _put_back(undo, reached)
            raise
        self._sequences[stream] = sequence
        running.events.append(event)
        return event

    def put(self, cell: Cell[T], value: T) -> None:
        """Change a value that is not stored, within the running decision."""
        self._decision().undo.append((cell, cell.value))
        cell.value = value

    def keep(self, row: Row) -> None:
        """Store a row in the same transaction as the running decision."""
        self._decision().rows.append(row)

    def settling(self, call: Callable[[], None]) -> None:
        """Call when the sink has the running decision and nobody has heard of it; not at all if it is undone."""
        self._decision().settling += (call,)

    def afterwards(self, call: Callable[[], None]) -> None:
        """Call when the running decision is closed, heard, and the lock is free; not at all if it is undone."""
        self._decision().afterwards += (call,)

    def resume_at(self, stream: str, sequence: int) -> None:
        """Go on counting a stream that an earlier owner wrote."""
        self._sequences[stream] = max(sequence, self._sequences.get(stream, 0))

    def sequence(self, stream: str) -> int:
        """That of the last event of `stream`; 0 before the first."""
        return self._sequences.get(stream, 0)

    def forget(self, stream: str) -> None:
        """Drop the counter of a stream that has ended."""
        with self._lock:
            self._sequences.pop(stream, None)

    def listen(self, listener: Callable[[ExecutionEvent], None]) -> Callable[[], None]:
        """Hear every event once its decision is closed; under the lock, so hand over, do not work. Returns the undo."""
        with self._lock:
            self._listeners = (*self._listeners, listener)
        return lambda: self.unlisten(listener)

    def unlisten(self, listener: Callable[[ExecutionEvent], None]) -> None:
        """As the undo of `listen`, for whoever does not want to keep one."""
        with self._lock:
            left = list(self._listeners)
            if listener in left:
                left.remove(listener)
                self._listeners = tuple(left)

    def _decision(self) -> _Decision:
        running = self._running
        if running is None:
            raise RuntimeError("there is no decision that this could belong to; make one with `with ledger:`")
        return running

    def _close(self, running: _Decision) -> None:
        running.closing = True
        events = running.events
        if self.sink is not None and (events or running.rows):
            try:
                self.sink.append(Batch(tuple(events), (*running.changed(), *running.rows)))
            except BaseException:
                self._roll_back(running, _START)
                raise
        for call in running.settling:
            call()
        for listener in self._listeners:
            for event in events:
                listener(event)

    def _roll_back(self, running: _Decision, mark: _Mark) -> None:
        events, undo, rows, running.settling, running.afterwards = mark
        _put_back(running.undo, undo)
        for event in running.events[events:]:
            self._sequences[event.stream] -= 1
        del running.events[events:]
        del running.rows[rows:]


def _put_back(undo: list[tuple[Cell[Any], Any]], reached: int) -> None:
    """Take back the changes after the first `reached`."""
    for cell, value in reversed(undo[reached:]):
        cell.value = value
    del undo[reached:]
