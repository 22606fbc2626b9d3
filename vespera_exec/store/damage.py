"""What is wrong with a database: SQLite's own check, then the log against its checksums, its numbers and its fold."""

from __future__ import annotations

import sqlite3
import time
import zlib
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import orjson

from vespera_exec.errors import StoreDamaged, StoreError
from vespera_exec.model.events import ExecutionEvent
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.plans.steps import PlanState, StepState
from vespera_exec.model.progress import Progress
from vespera_exec.model.record import TaskRecord
from vespera_exec.model.replay import replayed, replayed_task
from vespera_exec.store import database as files
from vespera_exec.store.encoding import UNREADABLE, micros

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

_RESTORE = "move vespera.db away and `vespera-exec restore` a backup; this file was left as it is"
_SHOWN = 3
_BATCH = 256
_PAUSE_SECONDS = 0.02
_STEPS = 50_000
"""Of SQLite's machine, a few milliseconds."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `hint` says what to do; empty where nothing needs to be done."""

    severity: Literal["ok", "warning", "error"]
    what: str
    hint: str = ""


def examine(database: Path) -> list[Finding]:
    """Look at a database that nobody else uses: call it only while holding the owner's lock. Changes nothing.

    One finding for each thing looked at, never an error raised. Reads the whole file; blocking.
    """
    try:
        files.check_place(database)
        if not database.exists():
            hint = "it is made when the store is first opened"
            return [Finding("warning", f"there is no database at {database}", hint)]
        with closing(files.open_untouched(database)) as connection:
            version = files.check_ours(connection, database)
            if not version:
                return [Finding("ok", f"{database} is empty")]
            checks = _CHECKS if version == len(files.migrations()) else _CHECKS_OF_ANY_FORMAT
            return [_schema(connection, version), *(_looked(check, connection) for check in checks)]
    except files.FAULTS as fault:
        error = files.named(fault, database)
    except StoreError as fault:
        error = fault
    return [Finding("error", error.message, error.hint)]


def examine_in_use(database: Path, *, ask: Callable[[], None]) -> list[Finding]:
    """Look at a database while its owner writes it: SQLite's check table by table, then each event's checksum.

    In small pieces, so that neither the interpreter nor the WAL is held for long. `ask` is called every few
    milliseconds, and what it raises ends the look. Blocking.

    Raises:
        StoreUnavailable: the file cannot be read.
    """
    try:
        with closing(files.open_for_reading(database)) as connection:
            connection.set_progress_handler(ask, _STEPS)
            return [_tables(connection), _events(connection, ask)]
    except files.FAULTS as fault:
        ask()  # it may be what interrupted SQLite
        error = files.named(fault, database.name)
        if not isinstance(error, StoreDamaged):
            raise error from fault
        return [Finding("error", error.message, _RESTORE)]


def _finding_of(faults: list[str], fine: str, bad: str) -> Finding:
    """`fine` where there are no faults, else `bad` with the first of them."""
    if not faults:
        return Finding("ok", fine)
    more = f" and {len(faults) - _SHOWN:,} more" if len(faults) > _SHOWN else ""
    return Finding("error", f"{bad} {'; '.join(faults[:_SHOWN])[:400]}{more}", _RESTORE)


def _tables(connection: sqlite3.Connection) -> Finding:
    """A snapshot is held for no longer than one table takes."""
    faults: list[str] = []
    for (table,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        found = connection.execute(f"PRAGMA integrity_check({table!r})")
        faults += [row[0] for row in found if row[0] != "ok"]
    return _finding_of(faults, "SQLite's integrity check found nothing", "SQLite's integrity check found")


def _events(connection: sqlite3.Connection, ask: Callable[[], None]) -> Finding:
    faults: list[str] = []
    after, more = 0, True
    while more:
        more = False
        for cursor, fault in _checksum_faults(connection, after=after, limit=_BATCH):
            after, more = cursor, True
            if fault:
                faults.append(f"event {cursor} {fault}")
        ask()
        time.sleep(_PAUSE_SECONDS)
    return _finding_of(faults, "all events match their checksums", "the log:")


def _checksum_faults(connection: sqlite3.Connection, *, after: int = 0, limit: int = -1) -> Iterator[tuple[int, str]]:
    """The cursor of each event above `after`, at most `limit` of them, and what does not fit ("" if all does)."""
    rows = connection.execute(
        "SELECT cursor, sequence, type, at, checksum, body FROM events WHERE cursor > ? ORDER BY cursor LIMIT ?",
        (after, limit),
    )
    while some := rows.fetchmany(_BATCH):
        for cursor, *row in some:
            yield cursor, _event_fault(*row)


def _event_fault(sequence: int, kind: str, at: int | None, checksum: int, body: object) -> str:
    if not isinstance(body, bytes) or zlib.crc32(body) != checksum:
        return "does not match its checksum"
    try:
        event = ExecutionEvent.from_stream_message(orjson.loads(body))
    except UNREADABLE as fault:
        return f"cannot be read: {fault!r:.80}"
    if (event.sequence, event.event_type.value, micros(event.timestamp)) != (sequence, kind, at):
        return "has another number, type or time than its text says"
    return ""


def _integrity(connection: sqlite3.Connection) -> Finding:
    faults = [row[0] for row in connection.execute("PRAGMA integrity_check(20)") if row[0] != "ok"]
    return _finding_of(faults, "SQLite's integrity check found nothing", "SQLite's integrity check found")


def _schema(connection: sqlite3.Connection, version: int) -> Finding:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        for script in files.migrations()[:version]:
            fresh.executescript(script)
        if _objects(fresh) == _objects(connection):
            return Finding("ok", f"the tables are those of format {version}")
    return Finding("error", f"the tables are not those of format {version}", _RESTORE)


def _objects(connection: sqlite3.Connection) -> set[tuple[str, ...]]:
    found = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'")
    return set(found.fetchall())


def _log(connection: sqlite3.Connection) -> Finding:
    looked_at = 0
    faults: list[str] = []
    for cursor, fault in _checksum_faults(connection):
        looked_at += 1
        if fault:
            faults.append(f"event {cursor} {fault}")
    return _finding_of(faults, f"{looked_at:,} events match their checksums", "the log:")


def _numbers(connection: sqlite3.Connection) -> Finding:
    """Cursors without a gap above what retention removed, sequences without one in each log."""
    faults: list[str] = []
    removed_to = files.removed_to(connection)
    found, highest, lowest = connection.execute(
        "SELECT count(*), max(cursor), min(cursor) FROM events WHERE cursor > ?", (removed_to,)
    ).fetchone()
    if found and (highest - removed_to != found or lowest <= 0):
        faults.append(f"{highest - removed_to - found} events are missing after {removed_to}")
    faults += [f"the log of stream {stream} has a gap or no name" for (stream,) in connection.execute(_BROKEN)]
    faults += [f"the end of stream {stream} is not what its log says" for (stream,) in connection.execute(_MISTOLD)]
    nameless = connection.execute(
        "SELECT id FROM executions WHERE task NOT IN (SELECT id FROM tasks) OR id NOT IN (SELECT id FROM streams) "
        "UNION SELECT id FROM results WHERE id NOT IN (SELECT id FROM executions) "
        "UNION SELECT id FROM progress WHERE id NOT IN (SELECT id FROM progress_docs) "
        "UNION SELECT id FROM progress_docs WHERE id NOT IN (SELECT id FROM executions) "
        "UNION SELECT id FROM plan_states WHERE id NOT IN (SELECT id FROM executions) "
        "UNION SELECT execution FROM step_cache WHERE execution NOT IN (SELECT id FROM executions) "
        "UNION SELECT segment FROM events WHERE segment NOT IN (SELECT id FROM segments) "
        "UNION SELECT execution FROM steps WHERE execution NOT IN (SELECT id FROM plan_states) "
        "AND execution NOT IN (SELECT stream FROM removals) LIMIT 100"
    )
    faults += [f"row {number} belongs to nothing" for (number,) in nameless]
    return _finding_of(faults, "no event is missing", "the order of events:")


def _executions(connection: sqlite3.Connection) -> Finding:
    rows = connection.execute(
        "SELECT e.id, s.name, e.doc, d.doc, d.sequence, p.percentage, e.status, e.ended FROM executions e "
        "JOIN streams s ON s.id = e.id LEFT JOIN progress_docs d ON d.id = e.id LEFT JOIN progress p ON p.id = e.id"
    )

    def fits(name: str, events: list[ExecutionEvent], row: tuple[Any, ...]) -> bool:
        return _execution_fits(name, events, row) and _plan_fits(connection, name, events)

    return _folded(connection, rows, fits, "executions")


def _execution_fits(name: str, events: list[ExecutionEvent], row: tuple[Any, ...]) -> bool:
    life_doc, progress_doc, documented, percentage, status, ended = row
    life, progress = replayed(events, name)
    kept = Lifecycle.from_dict(orjson.loads(life_doc)), status, ended
    if kept != (life, life.status.value, life.status.is_terminal):
        return False
    if progress_doc is None:
        return progress == Progress(execution_id=name)
    _, then = replayed(events[:documented], name)
    whole = Progress.from_dict(orjson.loads(progress_doc))
    return (whole, whole.sequence, percentage) == (then, documented, progress.percentage)


def _plan_fits(connection: sqlite3.Connection, name: str, events: list[ExecutionEvent]) -> bool:
    """The rows of its plan and of each step; of what has no plan there are none."""
    rows = connection.execute("SELECT doc FROM plan_states WHERE id = (SELECT id FROM streams WHERE name = ?)", (name,))
    if (found := rows.fetchone()) is None:
        return True
    steps = connection.execute(
        "SELECT position, step, status, doc FROM steps WHERE execution = (SELECT id FROM streams WHERE name = ?)",
        (name,),
    ).fetchall()
    states = {
        step: StepState(execution_id=name, step_id=step, position=position) for position, step, _status, _doc in steps
    }
    plan = PlanState(execution_id=name)
    for event in events:
        plan = plan.evolve(event)
        if (state := states.get(event.step_id or "")) is not None:
            states[state.step_id] = state.evolve(event)
    return PlanState.from_dict(orjson.loads(found[0])) == plan and all(
        (StepState.from_dict(orjson.loads(doc)), status) == (states[step], states[step].status.value)
        for _position, step, status, doc in steps
    )


def _tasks(connection: sqlite3.Connection) -> Finding:
    rows = connection.execute(
        "SELECT t.id, s.name, t.doc, t.status, t.title, t.step, p.name FROM tasks t JOIN streams s ON s.id = t.id "
        "LEFT JOIN streams p ON p.id = t.parent"
    )
    return _folded(connection, rows, _task_fits, "tasks")


def _task_fits(name: str, events: list[ExecutionEvent], row: tuple[Any, ...]) -> bool:
    doc, *columns = row
    record = replayed_task(events, name)
    folded = [record.status.value, record.title, record.step_id, record.parent_execution_id]
    return TaskRecord.from_dict(orjson.loads(doc)) == record and columns == folded


def _folded(
    connection: sqlite3.Connection,
    rows: Iterable[tuple[Any, ...]],
    fits: Callable[[str, list[ExecutionEvent], tuple[Any, ...]], bool],
    noun: str,
) -> Finding:
    """Whether the rows are what their logs fold to."""
    looked_at = 0
    faults: list[str] = []
    for stream, name, *row in rows:
        looked_at += 1
        bodies = connection.execute("SELECT body FROM log WHERE stream = ? ORDER BY since, sequence", (stream,))
        try:
            events = [ExecutionEvent.from_stream_message(orjson.loads(body)) for (body,) in bodies]
            if not fits(name, events, tuple(row)):
                faults.append(f"{name} is not what its log says")
        except UNREADABLE as fault:
            faults.append(f"{name} cannot be read: {fault!r:.80}")
    return _finding_of(faults, f"{looked_at:,} {noun} are what their logs say", noun)


def _results(connection: sqlite3.Connection) -> Finding:
    faults: list[str] = []
    looked_at = 0
    for number, truncated, size, body in connection.execute("SELECT id, truncated, size, body FROM results"):
        looked_at += 1
        try:
            whole = len(body) == size and (truncated or orjson.loads(body) is not ...)
        except ValueError:
            whole = False
        if not whole:
            faults.append(f"the result in row {number} cannot be read")
    return _finding_of(faults, f"{looked_at:,} results can be read", "results")


def _looked(check: Callable[[sqlite3.Connection], Finding], connection: sqlite3.Connection) -> Finding:
    try:
        return check(connection)
    except sqlite3.Error as fault:
        return Finding("error", f"the check of {check.__name__.strip('_')} ended early: {fault}", _RESTORE)
    except UNREADABLE as fault:
        return Finding("error", f"{check.__name__.strip('_')} cannot be read: {fault!r:.80}", _RESTORE)


_BROKEN = (
    "SELECT DISTINCT stream FROM (SELECT g.stream, s.name, g.since, count(e.cursor) AS held, "
    "min(e.sequence) AS first, max(e.sequence) AS last, "
    "lag(g.since, 1, 0) OVER along AS since_before, lag(count(e.cursor), 1, 1) OVER along AS held_before "
    "FROM segments g LEFT JOIN events e ON e.segment = g.id LEFT JOIN streams s ON s.id = g.stream "
    "GROUP BY g.id WINDOW along AS (PARTITION BY g.stream ORDER BY g.since)) "
    "WHERE stream NOT IN (SELECT stream FROM removals) AND (name IS NULL OR since <> since_before + held_before "
    "OR held > 0 AND (first <> since OR last <> since + held - 1)) LIMIT 100"
)
"""Logs in which a segment does not begin where the one before it ends, or does not hold all that is its own."""
_MISTOLD = (
    "SELECT stream FROM (SELECT stream FROM ends UNION ALL SELECT stream FROM log WHERE ends = 1) "
    "WHERE stream NOT IN (SELECT stream FROM removals) GROUP BY stream HAVING count(*) <> 2 LIMIT 100"
)
_CHECKS_OF_ANY_FORMAT = (_integrity, _log, _results)
_CHECKS = (_integrity, _log, _numbers, _executions, _tasks, _results)
