"""Writes groups of decisions: one transaction each, cursors given out, fenced decisions left out."""

from __future__ import annotations

import logging
import math
import sqlite3
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, assert_never

from vespera_exec.errors import Fenced, StoreError, VesperaError
from vespera_exec.model.jsonable import clean_text
from vespera_exec.model.ledger import (
    CacheRecord,
    CheckpointRecord,
    IdempotencyRecord,
    RequestRecord,
    ResultRecord,
    Row,
)
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.plans.steps import PlanState, StepState
from vespera_exec.model.progress import Progress
from vespera_exec.model.record import TaskRecord
from vespera_exec.store import database, statements
from vespera_exec.store.encoding import encode, encode_lifecycle, encode_progress, micros
from vespera_exec.store.statements import SqlRow, Statement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from pathlib import Path

    from vespera_exec.store.decisions import Decision, Fact


_REMEMBERED = 8192
_COMMIT_PAGES = 8
"""What a commit writes beside its texts."""
_PAGE_TEXT = 2048
"""Bytes of text for each page of 4096 that is written with them, those of the indexes included."""
_JOB_PAGES = 64
"""What a job may write beside the rows that it changes."""
_CHUNKS = (64, 16, 4, 1)
_SEGMENT = 32
"""Events of one log that stand together in the index. It may change at any time: a segment says where it begins."""
_FOLDED = 16
"""Events, more or less, that a reader may have to fold into a whole progress."""
_KNOWN = (
    "SELECT s.id, g.id, (SELECT max(sequence) FROM events WHERE segment = g.id), "
    "EXISTS (SELECT 1 FROM removals WHERE stream = s.id) "
    "FROM streams s JOIN segments g ON g.stream = s.id WHERE s.name = ? ORDER BY g.since DESC LIMIT 1"
)
_log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One measurement of one execution. Droppable."""

    execution_id: str
    at: datetime
    metric: str
    value: float


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a group: its facts as committed, and the decisions that were left out, by their place.

    The cursors of the facts have no gap and end at `Writer.head`.
    """

    facts: list[Fact]
    refused: list[tuple[int, VesperaError]]


@dataclass(slots=True)
class _Log:
    """Where the log of a task or an execution goes on: the integer of its id, its segment, its last event."""

    stream: int
    segment: int
    sequence: int
    documented: int = 0
    """The sequence of the last whole progress that was written; 0 where that is not known."""


@dataclass(slots=True)
class _Rows:
    """What one transaction will insert. Of each row the last state only."""

    streams: list[SqlRow] = field(default_factory=list[SqlRow])
    segments: list[SqlRow] = field(default_factory=list[SqlRow])
    ends: list[SqlRow] = field(default_factory=list[SqlRow])
    events: list[SqlRow] = field(default_factory=list[SqlRow])
    tasks: dict[int, TaskRecord] = field(default_factory=dict[int, TaskRecord])
    executions: dict[int, Lifecycle] = field(default_factory=dict[int, Lifecycle])
    progress: dict[str, Progress] = field(default_factory=dict[str, Progress])
    results: dict[int, ResultRecord] = field(default_factory=dict[int, ResultRecord])
    requests: list[SqlRow] = field(default_factory=list[SqlRow])
    keys: list[SqlRow] = field(default_factory=list[SqlRow])
    plans: dict[int, PlanState] = field(default_factory=dict[int, PlanState])
    steps: dict[tuple[int, int], StepState] = field(default_factory=dict[tuple[int, int], StepState])
    checkpoints: list[SqlRow] = field(default_factory=list[SqlRow])
    answers: dict[tuple[bytes, str], SqlRow] = field(default_factory=dict[tuple[bytes, str], SqlRow])


class Writer:
    """The one connection that writes; used by one thread. `head` is the last cursor that is on disk."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            StoreUnavailable, StoreDamaged, StoreTooNew: as `database.open_for_writing`.
        """
        self._path = path
        self._db = database.open_for_writing(path)
        self._logs: dict[str, _Log] = {}
        self._next_segment = 1
        self._cursor = 0
        self._pages = 0
        self._checkpoint_failed = False
        self._recalled = False
        """False where the disk could not be read after a fault."""
        self.head = 0
        self.checkpoints = 0
        self.frames_in_wal = 0
        """How long the WAL was at the last checkpoint, in pages, those that were moved by then included."""
        self.tenure: int | None = None
        """The `owners.generation` on whose behalf it writes; once set, nothing is written after a later one."""
        try:
            self._recall()
        except database.FAULTS as fault:
            raise database.named(fault, path.name) from fault

    @property
    def pages_in_wal(self) -> int:
        """About how many pages were written since the last checkpoint; several times as many where rows lie apart."""
        return self._pages

    def write(self, decisions: Sequence[Decision]) -> Written:
        """Commit them in order. A decision that breaks a constraint is left out whole; the others are written.

        Raises:
            StoreUnavailable: nothing was written (disk full, I/O error); the same call may be repeated.
            StoreDamaged: nothing was written, and nothing will be.
            StoreError: another owner has taken the database over; nothing was written.
        """
        try:
            return Written(self._transaction(decisions), [])
        except sqlite3.Error as fault:
            self._roll_back()
            if not database.is_refusal(fault):
                raise database.named(fault, self._path.name) from fault
        except (Fenced, ArithmeticError, ValueError, TypeError, LookupError):
            self._roll_back()
        return self._one_by_one(decisions)

    def write_samples(self, samples: Sequence[Sample]) -> int:
        """Commit measurements; returns how many were kept. Those of unknown executions are dropped."""
        try:
            self._begin()
            rows = [
                (log.stream, micros(sample.at), sample.metric, sample.value)
                for sample in samples
                if (log := self._known(sample.execution_id)) is not None
            ]
            self._insert(statements.SAMPLES, rows)
            self._db.execute("COMMIT")
        except (sqlite3.Error, Fenced, ArithmeticError, ValueError, TypeError):
            self._roll_back()
            return 0
        self._pages += 4 + len(rows) // 30
        return len(rows)

    def perform(self, job: Callable[[sqlite3.Connection], Any]) -> Any:
        """What `job` returns of the write connection: one transaction, undone where it raises.

        Raises:
            StoreError: as SQLite said, or another owner has taken the database over.
        """
        before = self._db.total_changes
        try:
            self._begin()
            result = job(self._db)
            self._db.execute("COMMIT")
        except database.FAULTS as fault:
            raise database.named(fault, self._path.name) from fault
        finally:
            self._roll_back()
            self._pages += _JOB_PAGES + self._db.total_changes - before
        return result

    def checkpoint(self, mode: str = "PASSIVE", *, wait_ms: int = 50) -> int:
        """Move what is committed into the database file; returns the pages that a reader kept in the WAL.

        PASSIVE waits for nobody, the others up to `wait_ms` for readers. Never in the way of a commit: it is called
        when the acknowledgements are out.
        """
        try:
            self._db.execute(f"PRAGMA busy_timeout = {wait_ms:d}")
            _, pages, moved = self._db.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
            self._db.execute(f"PRAGMA busy_timeout = {database.BUSY_MS}")
        except sqlite3.Error as fault:
            if not self._checkpoint_failed:
                _log.warning("A checkpoint failed and will be repeated: %s", fault)
            self._checkpoint_failed = True
            return self._pages
        self._checkpoint_failed = False
        self.checkpoints += 1
        self.frames_in_wal = max(0, pages)
        self._pages = max(0, pages - moved)
        return self._pages

    def limit_pages(self, pages: int) -> None:
        """The database file may grow to so many pages; beyond, writing fails as on a full disk."""
        self._db.execute(f"PRAGMA max_page_count = {pages:d}")

    def close(self) -> None:
        """Leaves no WAL behind, and says that the file was closed properly."""
        try:
            self._begin()
            database.mark_clean(self._db, clean=True)
            self._db.execute("COMMIT")
            self.checkpoint("TRUNCATE")
        except (sqlite3.Error, StoreError) as fault:
            _log.warning("The database was not closed cleanly and will be checked when next opened: %s", fault)
        finally:
            self._db.close()

    # one transaction

    def _transaction(self, decisions: Sequence[Decision]) -> list[Fact]:
        self._begin()
        stored = self._put(decisions)
        self._db.execute("COMMIT")
        self._committed()
        return stored

    def _begin(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        if not self._recalled:
            self._recall()
        if self.tenure is None:
            return
        (latest,) = self._db.execute("SELECT max(generation) FROM owners").fetchone()
        if latest != self.tenure:
            self._db.execute("ROLLBACK")
            raise StoreError(
                f"{self._path.name} has been taken over by another owner", hint="end this process; the other one serves"
            )

    def _one_by_one(self, decisions: Sequence[Decision]) -> Written:
        stored: list[Fact] = []
        refused: list[tuple[int, VesperaError]] = []
        try:
            self._begin()
            for place, decision in enumerate(decisions):
                self._db.execute("SAVEPOINT decision")
                try:
                    stored += self._put([decision])
                except (Fenced, ArithmeticError, ValueError, TypeError, LookupError) as fault:
                    refused.append((place, fault if isinstance(fault, Fenced) else database.refusal(fault)))
                    self._undo_decision()
                except sqlite3.Error as fault:
                    if not database.is_refusal(fault):
                        raise
                    refused.append((place, database.refusal(fault)))
                    self._undo_decision()
                self._db.execute("RELEASE decision")
            self._db.execute("COMMIT")
        except sqlite3.Error as fault:
            self._roll_back()
            raise database.named(fault, self._path.name) from fault
        self._committed()
        return Written(stored, refused)

    def _committed(self) -> None:
        self.head = self._cursor
        self._pages += _COMMIT_PAGES
        if len(self._logs) > _REMEMBERED:
            self._logs.clear()

    def _undo_decision(self) -> None:
        self._db.execute("ROLLBACK TO decision")
        self._recall()

    def _roll_back(self) -> None:
        # After some faults SQLite has rolled back by itself, after others it cannot say so.
        with suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        with suppress(sqlite3.Error):  # then the next transaction does it
            self._recall()

    def _recall(self) -> None:
        """Know only what the database knows: what a rolled-back transaction taught is forgotten with it."""
        self._logs.clear()
        self._recalled = False
        (self._cursor,) = self._db.execute("SELECT coalesce(max(cursor), 0) FROM events").fetchone()
        (last,) = self._db.execute("SELECT coalesce(max(id), 0) FROM segments").fetchone()
        self._next_segment = last + 1
        self._recalled = True
        if not self._db.in_transaction:
            self.head = self._cursor

    def _put(self, decisions: Sequence[Decision]) -> list[Fact]:
        rows = _Rows()
        events = rows.events
        stored: list[Fact] = []
        logs = self._logs
        cursor = self._cursor
        for facts, states in decisions:
            stored += facts
            for name, kind, task_id, _, sequence, body, at, ends, checksum in facts:
                log = logs.get(name) or self._log_of(rows, name, task_id)
                if sequence != log.sequence + 1:
                    raise Fenced(
                        f"Event {sequence} of {name} does not follow the last one, {log.sequence}",
                        hint="another owner continued this log; read its state again",
                    )
                log.sequence = sequence
                if not sequence % _SEGMENT:
                    self._begin_segment(rows, log)
                if ends:
                    rows.ends.append((log.stream,))
                cursor += 1
                events.append((cursor, log.segment, sequence, kind, at, ends, checksum, body))
            for row in states:
                self._take(rows, row)
        self._flush(rows)
        self._cursor = cursor
        return stored

    def _take(self, rows: _Rows, row: Row) -> None:
        match row:
            case Progress():
                rows.progress[row.execution_id] = row
            case Lifecycle():
                rows.executions[self._stream(rows, row.execution_id, row.task_id)] = row
            case TaskRecord():
                rows.tasks[self._stream(rows, row.task_id, row.task_id)] = row
            case ResultRecord():
                rows.results[self._stream(rows, row.execution_id, "")] = row
            case RequestRecord():
                rows.requests.append((self._stream(rows, row.run_id, ""), row.body))
            case IdempotencyRecord():
                rows.keys.append((row.principal, row.operation, row.key, row.task_id, row.run_id, row.digest))
            case StepState():
                place = self._stream(rows, row.execution_id, ""), row.position
                # One that is only kept comes after what the same decision has changed.
                if (known := rows.steps.get(place)) is None or row.sequence >= known.sequence:
                    rows.steps[place] = row
            case PlanState():
                rows.plans[self._stream(rows, row.execution_id, "")] = row
            case CheckpointRecord():
                rows.checkpoints.append(statements.checkpoint_row(self._stream(rows, row.execution_id, ""), row))
            case CacheRecord():
                source = self._stream(rows, row.execution_id, "")
                rows.answers[row.key, row.principal] = (row.key, row.principal, row.role, source)
            case _:
                assert_never(row)

    def _flush(self, rows: _Rows) -> None:
        # Made before the streams are inserted, because they may name new ones.
        tasks = [self._task_row(rows, *each) for each in rows.tasks.items()]
        executions = [self._execution_row(rows, *each) for each in rows.executions.items()]
        progress, documents = self._progress_rows(rows)
        self._insert(statements.STREAMS, rows.streams)
        self._insert(statements.SEGMENTS, rows.segments)
        self._insert(statements.ENDS, rows.ends)
        self._insert(statements.EVENTS, rows.events)
        self._insert(statements.TASKS, tasks)
        self._insert(statements.EXECUTIONS, executions)
        self._insert(statements.PROGRESS, progress)
        self._insert(statements.PROGRESS_DOCS, documents)
        self._insert(statements.RESULTS, [statements.result_row(*each) for each in rows.results.items()])
        self._insert(statements.REQUESTS, rows.requests)
        self._insert(statements.KEYS, rows.keys)
        self._insert(statements.PLANS, [statements.plan_row(*each) for each in rows.plans.items()])
        self._insert(statements.STEPS, [statements.step_row(*each) for each in rows.steps.items()])
        self._insert(statements.CHECKPOINTS, rows.checkpoints)
        self._insert(statements.ANSWERS, list(rows.answers.values()))
        for stream, life in rows.executions.items():
            if life.inputs:
                self._put_inputs(rows, stream, life)

    def _put_inputs(self, rows: _Rows, stream: int, life: Lifecycle) -> None:
        """Those of its questions that are open now."""
        task = self._stream(rows, life.task_id, life.task_id)
        self._db.execute("DELETE FROM input_requests WHERE execution = ?", (stream,))
        self._insert(statements.INPUTS, [statements.input_row(stream, task, each) for each in life.open_inputs])

    def _insert(self, statement: Statement, rows: Sequence[SqlRow]) -> None:
        """A few long INSERTs: beside a busy loop, each single one would wait for the interpreter's lock."""
        begin = 0
        for size in _CHUNKS:
            while len(rows) - begin >= size:
                values = list(chain.from_iterable(rows[begin : begin + size]))
                self._db.execute(statements.sql_of(statement, size), values)
                begin += size
        if statement.ends_in_text:
            self._pages += math.ceil(sum([len(row[-1]) for row in rows]) / _PAGE_TEXT)

    # names and counters

    def _known(self, name: str) -> _Log | None:
        """The log of an id; None where it was never seen.

        Raises:
            Fenced: retention removes its log at this moment, and would remove what is added to it.
        """
        known = self._logs.get(name)
        if known is None:
            found = self._db.execute(_KNOWN, (name,)).fetchone()
            if found is not None:
                stream, segment, last, removed = found
                if removed:
                    raise Fenced(f"{name} ended long ago and is being removed", hint="make a new task")
                known = self._logs[name] = _Log(stream, segment, last or 0)
        return known

    def _log_of(self, rows: _Rows, name: str, task: str) -> _Log:
        """The log of an id; a new one where it was never seen."""
        known = self._known(name)
        if known is not None:
            return known
        of_task = self._stream(rows, task, task) if task != name else None
        stream = self._next_segment
        known = self._logs[name] = _Log(stream, stream, 0)
        rows.streams.append((stream, clean_text(name), of_task or stream))
        self._begin_segment(rows, known)
        return known

    def _stream(self, rows: _Rows, name: str, task: str) -> int:
        """The integer that stands for an id; a new one where it was never seen."""
        return (self._logs.get(name) or self._log_of(rows, name, task)).stream

    def _begin_segment(self, rows: _Rows, log: _Log) -> None:
        """With its event `log.sequence`, or the first."""
        log.segment = self._next_segment
        self._next_segment += 1
        rows.segments.append((log.segment, log.stream, log.sequence or 1))

    # rows

    def _task_row(self, rows: _Rows, stream: int, task: TaskRecord) -> SqlRow:
        shown = task.current_execution_id or task.last_execution_id
        return (
            stream,
            clean_text(task.title),
            task.assigned_role,
            task.status.value,
            task.priority,
            task.principal,
            micros(task.created_at) or 0,
            micros(task.updated_at) or 0,
            self._stream(rows, shown, task.task_id) if shown else None,
            self._parent(task.parent_execution_id) if task.parent_execution_id else None,
            task.step_id,
            encode(task.to_dict()).decode(),
        )

    def _parent(self, name: str) -> int:
        """The execution of a plan, which is written before the tasks of its steps are.

        Raises:
            LookupError: it is not there.
        """
        known = self._known(name)
        if known is None:
            raise LookupError(f"no execution {name}, of which a task is to be a step")
        return known.stream

    def _progress_rows(self, rows: _Rows) -> tuple[list[SqlRow], list[SqlRow]]:
        """How far each is; and the whole only now and then, since readers fold the events since then."""
        shown: list[SqlRow] = []
        whole: list[SqlRow] = []
        for name, progress in rows.progress.items():
            log = self._logs.get(name) or self._log_of(rows, name, "")
            shown.append((log.stream, progress.percentage))
            ended = (life := rows.executions.get(log.stream)) is not None and life.status.is_terminal
            if ended or not log.documented or progress.sequence >= log.documented + _FOLDED:
                log.documented = progress.sequence
                whole.append((log.stream, progress.sequence, encode_progress(progress).decode()))
        return shown, whole

    def _execution_row(self, rows: _Rows, stream: int, life: Lifecycle) -> SqlRow:
        code = life.error.get("code")
        return (
            stream,
            self._stream(rows, life.task_id, life.task_id),
            life.run_id,
            life.attempt,
            life.role_name,
            life.status.value,
            int(life.status.is_terminal),
            life.priority,
            life.owner,
            life.generation,
            micros(life.created_at),
            micros(life.started_at),
            micros(life.completed_at),
            round(life.active_seconds * 1e6),
            round(life.queue_seconds * 1e6),
            code if isinstance(code, str) else None,
            encode_lifecycle(life).decode(),
        )
