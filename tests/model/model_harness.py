"""A clock that stands until it is told to go on, and a log that keeps what a ledger sends."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from vespera_exec.model.clock import Clock
from vespera_exec.model.enums import EventType, ExecutionStatus
from vespera_exec.model.ledger import Ledger
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.progress import Progress
from vespera_exec.model.record import TaskRecord
from vespera_exec.model.session import ExecutionSession

if TYPE_CHECKING:
    from collections.abc import Generator

    from vespera_exec.model.events import ExecutionEvent
    from vespera_exec.model.ledger import Batch

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


class HandClock:
    """Time that moves when it is told to; `clock` is what the model takes."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.clock = Clock(now=self.now, monotonic=lambda: self.seconds)

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds - 1000.0)

    def pass_(self, seconds: float) -> None:
        self.seconds += seconds


class KeptLog:
    """A sink in memory: all batches, and the last row of each kind and id."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.tasks: dict[str, TaskRecord] = {}
        self.lives: dict[str, Lifecycle] = {}
        self.progress: dict[str, Progress] = {}

    def append(self, batch: Batch) -> None:
        self.batches.append(batch)
        for row in batch.rows:
            match row:
                case TaskRecord():
                    self.tasks[row.task_id] = row
                case Lifecycle():
                    self.lives[row.execution_id] = row
                case Progress():
                    self.progress[row.execution_id] = row
                case _:
                    pass

    @property
    def events(self) -> list[ExecutionEvent]:
        return [event for batch in self.batches for event in batch.events]

    def of(self, stream: str) -> list[ExecutionEvent]:
        return [event for event in self.events if event.stream == stream]

    def types(self, stream: str) -> list[EventType]:
        return [event.event_type for event in self.of(stream)]


class _UndoneError(Exception):
    pass


@contextlib.contextmanager
def undone(ledger: Ledger) -> Generator[None]:
    """A decision that fails at its end."""
    with contextlib.suppress(_UndoneError), ledger:
        yield
        raise _UndoneError


def session_with_log(role: str = "builder", *, hand: HandClock | None = None) -> tuple[ExecutionSession, KeptLog]:
    log, hand = KeptLog(), hand or HandClock()
    return ExecutionSession("e1", "t1", role, ledger=Ledger(sink=log, clock=hand.clock)), log


def running_session(*, hand: HandClock | None = None) -> tuple[ExecutionSession, KeptLog]:
    session, log = session_with_log(hand=hand)
    session.start_execution()
    session.update_status(ExecutionStatus.RUNNING)
    return session, log


def types_of(session: ExecutionSession) -> list[EventType]:
    return [event.event_type for event in session.status_events]
