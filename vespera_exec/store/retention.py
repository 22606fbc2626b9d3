"""Removes what ended long ago: a little at a time between commits, never anything unfinished.

A run goes whole, with its attempts' logs, progress, samples, results, requests, outputs and idempotency keys.
A task goes with its last run, whatever its status; one that was changed since, or never executed, stays. While it
lives on, the run that it shows stays too. The newest event of all stays,
so that the global cursor never runs backwards.

The tasks of a plan's steps go with the run of the plan that made them, never by themselves, and its checkpoints
with it. A run of a plan stays while one that is unfinished has taken the result of one of its steps.

What is removed is first hidden, in one transaction that notes its streams in `removals`; then the tasks of its
steps are hidden likewise, and then all parts go. A kill in between leaves the note, and the next call goes on from
there.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from vespera_exec.store import database
from vespera_exec.store.encoding import micros

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

    from vespera_exec.store.journal import Journal
    from vespera_exec.store.output import OutputFiles

_UNITS = 32
"""Tasks or runs that are hidden in one transaction."""
_CHILDREN = 256
"""Tasks of steps that are hidden in one transaction."""
_ROWS = 1500
"""Events, samples, steps or checkpoints that are deleted in one transaction."""
_PAGES = 64
_PAUSE_SECONDS = 0.01


@dataclass(slots=True, kw_only=True)
class RetentionReport:
    """What was removed, and how many pages of 4 KiB the file gave back."""

    tasks: int = 0
    executions: int = 0
    events: int = 0
    pages: int = 0


async def remove_ended(path: Path, journal: Journal, outputs: OutputFiles, *, before: datetime) -> RetentionReport:
    """Remove what ended before `before`. Cancelled, it goes on from there when called again.

    Raises:
        StoreError: the database cannot be read or written.
    """
    report = RetentionReport()
    stamp = micros(before) or 0
    await _finish(journal, outputs, report)
    for select, hide in ((_RUNS, _hide_runs), (_OLD_TASKS, _hide_tasks)):
        found = await anyio.to_thread.run_sync(_candidates, path, select, stamp)
        for begin in range(0, len(found), _UNITS):
            some = found[begin : begin + _UNITS]
            tasks, executions = await journal.perform(lambda db, some=some, hide=hide: hide(db, some, stamp))
            report.tasks += tasks
            report.executions += executions
            await _finish(journal, outputs, report)
    while freed := await journal.perform(_give_back):
        report.pages += freed
        await anyio.sleep(_PAUSE_SECONDS)
    return report


async def _finish(journal: Journal, outputs: OutputFiles, report: RetentionReport) -> None:
    """Let go of all that is hidden, and of what belongs to it."""
    hidden = True
    while hidden:
        tasks, executions, hidden = await journal.perform(_hide_children)
        report.tasks += tasks
        report.executions += executions
        await anyio.sleep(_PAUSE_SECONDS if hidden else 0)
    if executions := await journal.perform(_hidden_executions):
        await anyio.to_thread.run_sync(outputs.remove, executions)
    left = True
    while left:
        deleted, left = await journal.perform(_delete_some)
        report.events += deleted
        await anyio.sleep(_PAUSE_SECONDS)


def _candidates(path: Path, select: str, stamp: int) -> list[Any]:
    """The tasks or the runs that could be removed; looked for beside the writer, and looked at again by it."""
    try:
        with closing(database.open_for_reading(path)) as reader:
            return [row[0] for row in reader.execute(select, {"before": stamp})]
    except database.FAULTS as fault:
        raise database.named(fault, path.name) from fault


# in the writer's thread


def _hide_tasks(db: sqlite3.Connection, tasks: Sequence[int], stamp: int) -> tuple[int, int]:
    """How many tasks and executions nobody finds any more."""
    return _hide_whole(db, _still(db, _OLD_TASKS, "t.id", tasks, stamp))


def _hide_children(db: sqlite3.Connection) -> tuple[int, int, bool]:
    """How many tasks of steps, and executions of theirs, went after their plans; and whether there are more."""
    found = db.execute("SELECT id FROM tasks WHERE parent IN (SELECT stream FROM removals) LIMIT ?", (_CHILDREN,))
    children = [row[0] for row in found]
    return *_hide_whole(db, children), bool(children)


def _hide_whole(db: sqlite3.Connection, still: Sequence[int]) -> tuple[int, int]:
    executions = [row[0] for task in still for row in db.execute("SELECT id FROM executions WHERE task = ?", (task,))]
    for task in still:
        db.execute("DELETE FROM idempotency WHERE task_id = (SELECT name FROM streams WHERE id = ?)", (task,))
        db.execute("DELETE FROM tasks WHERE id = ?", (task,))
    _hide(db, [*executions, *still])
    return len(still), len(executions)


def _hide_runs(db: sqlite3.Connection, runs: Sequence[str], stamp: int) -> tuple[int, int]:
    still = _still(db, _OLD_RUNS, "e.run", runs, stamp)
    for execution in still:
        db.execute(
            "DELETE FROM idempotency WHERE task_id = (SELECT t.name FROM streams s JOIN streams t ON t.id = s.task "
            "WHERE s.id = :id) AND run_id = (SELECT run FROM executions WHERE id = :id)",
            {"id": execution},
        )
    _hide(db, still)
    return 0, len(still)


def _still(db: sqlite3.Connection, select: str, key: str, among: Sequence[str | int], stamp: int) -> list[int]:
    """The rows that may still be removed, now that nobody else writes."""
    sql = f"{select} AND {key} IN (SELECT value FROM json_each(:among))"
    return [row[0] for row in db.execute(sql, {"before": stamp, "among": json.dumps(among)})]


def _hide(db: sqlite3.Connection, streams: Sequence[int]) -> None:
    removed_to = database.removed_to(db)
    for stream in streams:
        last = db.execute(_LAST_CURSOR, (stream,))
        removed_to = max(removed_to, *(row[0] for row in last), 0)
        db.execute("INSERT INTO removals VALUES (?)", (stream,))
        db.execute("DELETE FROM ends WHERE stream = ?", (stream,))
        for table in ("executions", "progress", "progress_docs", "results", "requests", "plan_states"):
            db.execute(f"DELETE FROM {table} WHERE id = ?", (stream,))
        db.execute("DELETE FROM step_cache WHERE execution = ?", (stream,))
    if streams:
        db.execute("INSERT OR REPLACE INTO meta VALUES ('removed_to', ?)", (str(removed_to),))


def _hidden_executions(db: sqlite3.Connection) -> list[str]:
    sql = "SELECT s.name FROM removals r JOIN streams s ON s.id = r.stream WHERE s.task <> s.id"
    return [row[0] for row in db.execute(sql)]


def _delete_some(db: sqlite3.Connection) -> tuple[int, bool]:
    """How many events of hidden streams went, and whether there are more."""
    room, deleted = _ROWS, 0
    for (stream,) in db.execute("SELECT stream FROM removals").fetchall():
        for table, of, key in _PARTS:
            gone = db.execute(
                f"DELETE FROM {table} WHERE {of} AND {key} IN (SELECT {key} FROM {table} WHERE {of} LIMIT :room)",
                {"stream": stream, "room": room},
            ).rowcount
            room -= gone
            deleted += gone if table == "events" else 0
        if room <= 0:
            break
        db.execute("DELETE FROM segments WHERE stream = ?", (stream,))
        db.execute("DELETE FROM streams WHERE id = ?", (stream,))
        db.execute("DELETE FROM removals WHERE stream = ?", (stream,))
    return deleted, room <= 0


def _give_back(db: sqlite3.Connection) -> int:
    """Free pages that went back to the disk; a file from before this was possible keeps them for later use."""
    (before,) = db.execute("PRAGMA page_count").fetchone()
    for _ in range(_PAGES):  # the sqlite3 module takes one step of this statement, whatever number is given
        db.execute("PRAGMA incremental_vacuum(1)")
    return before - db.execute("PRAGMA page_count").fetchone()[0]


_PARTS = (
    ("events", "segment IN (SELECT id FROM segments WHERE stream = :stream)", "cursor"),
    ("segments", "stream = :stream AND id <> :stream", "id"),
    ("samples", "execution = :stream", "rowid"),
    ("steps", "execution = :stream", "position"),
    ("checkpoints", "execution = :stream", "id"),
)
"""Table, which of its rows are a stream's, what tells these apart. Events go before what says whose they are.

A stream's first segment goes with the stream itself: the writer finds both by it, and gives its integer to no other.
"""
_LAST_CURSOR = "SELECT cursor FROM log WHERE stream = ? ORDER BY since DESC, sequence DESC LIMIT 1"
_LAST = "(SELECT stream FROM log ORDER BY cursor DESC LIMIT 1)"
_NOT_OLD = "({0}.ended = 0 OR {0}.completed IS NULL OR {0}.completed >= :before)"
_NEEDED = (
    "(SELECT c.parent FROM executions u JOIN steps p ON p.execution = u.id "
    "JOIN streams r ON r.name = json_extract(p.doc, '$.result_of') JOIN tasks c ON c.id = r.task WHERE u.ended = 0 "
    f"UNION SELECT c.parent FROM streams r JOIN tasks c ON c.id = r.task WHERE r.id = {_LAST})"
)
"""The runs of plans that unfinished plans have results of, and the one that a step's newest event belongs to."""
_STAYS = (
    f"({_NOT_OLD.format('o')} OR o.id IN {_NEEDED} OR EXISTS (SELECT 1 FROM tasks c LEFT JOIN executions x "
    f"ON x.task = c.id WHERE c.parent = o.id AND (c.updated >= :before OR x.id AND {_NOT_OLD.format('x')})))"
)
"""Of an execution `o`: it is not old enough, or something that needs it is not."""
_OLD_TASKS = (
    "SELECT t.id FROM tasks t WHERE t.updated < :before AND t.parent IS NULL "
    "AND EXISTS (SELECT 1 FROM executions o WHERE o.task = t.id) "
    f"AND NOT EXISTS (SELECT 1 FROM executions o WHERE o.task = t.id AND {_STAYS}) "
    f"AND t.id <> (SELECT task FROM streams WHERE id = {_LAST})"
)
_OLD_RUNS = (
    "SELECT e.id FROM executions e JOIN tasks t ON t.id = e.task WHERE e.ended = 1 AND t.parent IS NULL "
    "AND e.completed < :before AND NOT EXISTS (SELECT 1 FROM executions o WHERE o.run = e.run AND "
    f"({_STAYS} OR o.id = t.shown OR o.id = {_LAST}))"
)
_RUNS = f"SELECT run FROM executions WHERE id IN ({_OLD_RUNS}) GROUP BY run ORDER BY min(id)"
