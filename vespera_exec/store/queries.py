"""Questions to the database: read-only, off the loop, each its own snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import orjson

from vespera_exec.errors import InvalidInput
from vespera_exec.model.enums import ExecutionStatus, TaskStatus
from vespera_exec.model.inputs import Question
from vespera_exec.model.ledger import IdempotencyRecord, ResultRecord
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.record import TaskRecord
from vespera_exec.store.encoding import micros, moment_of
from vespera_exec.store.plan_queries import PlanQueries
from vespera_exec.store.reading import EVENTS, PROGRESS, Page, Where, go_on, one_of, progress_of, token_of
from vespera_exec.store.writer import Sample

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime

    from vespera_exec.model.progress import Progress
    from vespera_exec.store.feed import StoredEvent

PREFIX_LENGTH = 6
"""The shortest beginning of an id that stands for it."""
_TEXT_LIMIT = 200

TaskSort = Literal["updated", "created", "priority"]


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task, with its running execution or else its last one."""

    task: TaskRecord
    execution_id: str | None
    execution_status: ExecutionStatus | None
    percentage: float | None


@dataclass(frozen=True, slots=True)
class Known:
    """A task, and the execution that is meant: the one that was named, else its running or last one."""

    task: TaskRecord
    execution: tuple[Lifecycle, Progress] | None


@dataclass(frozen=True, slots=True)
class KnownRun:
    """The last attempt of a run, and whose its task is. `created_at` is of its first, `cursor` of its last event."""

    principal: str
    lifecycle: Lifecycle
    progress: Progress
    created_at: datetime | None
    cursor: int
    result: ResultRecord | None


@dataclass(frozen=True, slots=True)
class OpenInput:
    """A question that waits for an answer, and who asks it."""

    question: Question
    task_id: str
    title: str
    role: str | None
    run_id: str
    execution_id: str
    parent_task_id: str | None = None
    """Of a step: the plan's task, and the step's id there."""
    step_id: str | None = None


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An execution that has not ended, with its task. `request` is the body of the run's `RequestRecord`, or None.

    `measured_at` is when its work was last measured, and so was there; None where it never was.
    """

    task: TaskRecord
    lifecycle: Lifecycle
    progress: Progress
    request: bytes | None
    measured_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatistics:
    """Over all executions of a task that have ended. Seconds at work of the completed ones; None without any.

    Percentiles are interpolated linearly between the two nearest.
    """

    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    average_seconds: float | None = None
    min_seconds: float | None = None
    max_seconds: float | None = None
    p50_seconds: float | None = None
    p95_seconds: float | None = None
    p99_seconds: float | None = None


class Queries(PlanQueries):
    """All that is asked of the database."""

    # one thing

    async def get_task(self, task_id: str) -> TaskRecord | None:
        rows = await self._rows("SELECT t.doc FROM streams s JOIN tasks t ON t.id = s.id WHERE s.name = ?", task_id)
        with self._decoding():
            return TaskRecord.from_dict(orjson.loads(rows[0][0])) if rows else None

    async def get_execution(self, execution_id: str) -> tuple[Lifecycle, Progress] | None:
        rows = await self._rows(f"{_EXECUTIONS} WHERE s.name = ?", execution_id)
        with self._decoding():
            return _execution(rows[0]) if rows else None

    async def get_result(self, execution_id: str) -> ResultRecord | None:
        rows = await self._rows(
            "SELECT r.body, r.truncated FROM streams s JOIN results r ON r.id = s.id WHERE s.name = ?", execution_id
        )
        if not rows:
            return None
        body, truncated = rows[0]
        return ResultRecord(execution_id=execution_id, body=body, truncated=bool(truncated))

    async def find_idempotent(self, principal: str, operation: str, key: str) -> IdempotencyRecord | None:
        """What this principal's key has been used for, or None."""
        rows = await self._rows(
            "SELECT task_id, run_id, digest FROM idempotency WHERE principal = ? AND operation = ? AND key = ?",
            principal, operation, key,
        )  # fmt: skip
        if not rows:
            return None
        task_id, run_id, digest = rows[0]
        return IdempotencyRecord(
            principal=principal, key=key, operation=operation, task_id=task_id, run_id=run_id, digest=digest
        )

    async def get_known(self, any_id: str) -> Known | None:
        """What a whole task id or session id stands for, by one statement; None where it is neither."""
        rows = await self._rows(_KNOWN, any_id)
        if not rows:
            return None
        task_id, task, *row = rows[0]
        if row[0] is None and task_id != any_id:
            return None
        with self._decoding():
            return Known(TaskRecord.from_dict(orjson.loads(task)), _execution(row) if row[0] is not None else None)

    async def locate(self, given: str, *, principal: str | None = None) -> tuple[str, str | None] | None:
        """`(task_id, execution_id)` of an id or of its beginning (at least six characters); None when unknown.

        `execution_id` is None where a task is meant. With `principal`, only that one's tasks are looked at.

        Raises:
            InvalidInput: more than one id begins so.
        """
        if not given:
            return None
        sql = (
            "SELECT s.name, t.name FROM streams s JOIN streams t ON t.id = s.task WHERE {} AND "
            "(EXISTS (SELECT 1 FROM tasks WHERE id = s.id) OR EXISTS (SELECT 1 FROM executions WHERE id = s.id)) "
            "AND (? IS NULL OR (SELECT principal FROM tasks WHERE id = s.task) = ?) LIMIT 3"
        )
        rows = await self._rows(sql.format("s.name = ?"), given, principal, principal)
        if not rows and len(given) >= PREFIX_LENGTH:
            end = given + "\U0010ffff"
            rows = await self._rows(sql.format("s.name >= ? AND s.name < ?"), given, end, principal, principal)
        if len(rows) > 1:
            some = ", ".join(row[0] for row in rows[:2])
            raise InvalidInput(f"more than one id begins with {given!r}: {some}", hint="give more of it")
        if not rows:
            return None
        name, task = rows[0]
        return (task, None) if name == task else (task, name)

    # lists

    async def attempts_of(self, run_id: str) -> list[tuple[Lifecycle, Progress]]:
        """The attempts of a run, first to last."""
        rows = await self._rows(f"{_EXECUTIONS} WHERE e.run = ? ORDER BY e.attempt", run_id)
        with self._decoding():
            return [_execution(row) for row in rows]

    async def get_run(self, run_id: str) -> KnownRun | None:
        rows = await self._rows(_RUN, run_id)
        if not rows:
            return None
        *row, principal, created, cursor, body, truncated = rows[0]
        with self._decoding():
            lifecycle, progress = _execution(row)
            result = None
            if body is not None:
                result = ResultRecord(execution_id=lifecycle.execution_id, body=body, truncated=bool(truncated))
            return KnownRun(
                principal,
                lifecycle,
                progress,
                moment_of(created) if created else None,
                cursor or 0,
                result,
            )

    async def unfinished(self) -> list[Unfinished]:
        """What the last owner left, oldest first; damaged progress of one keeps none of them from going on."""
        rows = await self._rows(_UNFINISHED)
        with self._decoding():
            return [
                Unfinished(
                    TaskRecord.from_dict(orjson.loads(task)),
                    *_execution(row, spare=True),
                    request,
                    moment_of(at) if at else None,
                )
                for *row, task, request, at in rows
            ]

    async def list_tasks(
        self,
        *,
        status: TaskStatus | ExecutionStatus | None = None,
        role: str | None = None,
        principal: str | None = None,
        text: str | None = None,
        since: datetime | None = None,
        parent: str | None = None,
        sort: TaskSort = "updated",
        limit: int = 50,
        page_token: str | None = None,
    ) -> Page[TaskRow]:
        """Tasks, highest of `sort` first. `text` is sought in titles and descriptions, `since` is of the last change.

        An `ExecutionStatus` is that of the execution that the row shows. `parent` is an execution of a plan: the
        tasks of its steps, which stand in no other list.

        Raises:
            InvalidInput: `text` has more than 200 characters; `page_token` is none of ours, or of another order.
        """
        if text and len(text) > _TEXT_LIMIT:
            raise InvalidInput(f"the text to search for has {len(text):,} characters; at most {_TEXT_LIMIT}")
        where = Where()
        if parent is None:
            where.add("t.parent IS NULL")
        else:
            where.add("t.parent = (SELECT id FROM streams WHERE name = ?)", parent)
        of_status = "e.status" if isinstance(status, ExecutionStatus) else "t.status"
        for column, value in ((of_status, status), ("t.role", role), ("t.principal", principal)):
            if value is not None:
                where.add(f"{column} = ?", str(value))
        if text:
            pattern = "%" + text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
            where.add(
                "(t.title LIKE ? ESCAPE '\\' OR json_extract(t.doc, '$.description') LIKE ? ESCAPE '\\')",
                pattern,
                pattern,
            )
        if since is not None:
            where.add("t.updated >= ?", micros(since))
        shown = " LEFT JOIN executions e ON e.id = t.shown"
        total = await self._count("tasks t" + (shown if of_status == "e.status" else ""), where)
        key = f"t.{one_of(sort, ('updated', 'created', 'priority'))}"
        go_on(where, key, "t.id", f"tasks:{sort}", page_token)
        rows = await self._rows(
            f"SELECT {key}, t.id, t.doc, s.name, e.status, p.percentage FROM tasks t{shown} "
            "LEFT JOIN streams s ON s.id = e.id "
            f"LEFT JOIN progress p ON p.id = e.id {where} ORDER BY {key} DESC, t.id DESC LIMIT ?",
            *where.values, limit + 1,
        )  # fmt: skip
        with self._decoding():
            items = [
                TaskRow(
                    TaskRecord.from_dict(orjson.loads(doc)),
                    execution_id,
                    ExecutionStatus(execution_status) if execution_status else None,
                    percentage,
                )
                for _, _, doc, execution_id, execution_status, percentage in rows[:limit]
            ]
        return Page(items, token_of(rows, limit, f"tasks:{sort}"), total)

    async def open_inputs(self, *, principal: str | None = None, limit: int = 50) -> tuple[list[OpenInput], int]:
        """Questions that wait for an answer, oldest first, and how many there are in all; of `principal`'s tasks."""
        where = Where()
        if principal is not None:
            where.add("t.principal = ?", principal)
        total = await self._count("input_requests i JOIN tasks t ON t.id = i.task", where)
        rows = await self._rows(
            f"{_OPEN_INPUTS} {where} ORDER BY i.asked, i.execution, i.key LIMIT ?", *where.values, limit
        )
        with self._decoding():
            found = [
                OpenInput(
                    Question(
                        key=key,
                        kind=kind,
                        message=message,
                        schema=orjson.loads(schema),
                        asked_at=moment_of(asked),
                    ),
                    *who,
                )
                for key, kind, message, schema, asked, *who in rows
            ]
        return found, total

    # numbers

    async def durations(self, *, role: str | None = None, task_id: str | None = None, limit: int = 50) -> list[float]:
        """Seconds at work of the last `limit` executions that completed, newest first."""
        where = Where()
        where.add("status = 'completed'")
        if role is not None:
            where.add("role = ?", role)
        if task_id is not None:
            where.add("task = (SELECT id FROM streams WHERE name = ?)", task_id)
        rows = await self._rows(
            f"SELECT active_us FROM executions {where} ORDER BY completed DESC LIMIT ?", *where.values, limit
        )
        return [row[0] / 1e6 for row in rows]

    async def task_statistics(self, task_id: str) -> TaskStatistics:
        rows = await self._rows(
            "SELECT status, active_us FROM executions "
            "WHERE task = (SELECT id FROM streams WHERE name = ?) AND ended = 1 ORDER BY active_us",
            task_id,
        )
        ends = [row[0] for row in rows]
        seconds = [row[1] / 1e6 for row in rows if row[0] == ExecutionStatus.COMPLETED]
        return TaskStatistics(
            completed=len(seconds),
            failed=ends.count(ExecutionStatus.FAILED),
            cancelled=ends.count(ExecutionStatus.CANCELLED),
            timed_out=ends.count(ExecutionStatus.TIMED_OUT),
            average_seconds=sum(seconds) / len(seconds) if seconds else None,
            min_seconds=percentile(seconds, 0),
            max_seconds=percentile(seconds, 100),
            p50_seconds=percentile(seconds, 50),
            p95_seconds=percentile(seconds, 95),
            p99_seconds=percentile(seconds, 99),
        )

    async def samples(self, execution_id: str, *, limit: int = 10_000) -> list[Sample]:
        """The measurements that were kept, oldest first."""
        rows = await self._rows(
            "SELECT at, metric, value FROM samples WHERE execution = (SELECT id FROM streams WHERE name = ?) "
            "ORDER BY at LIMIT ?",
            execution_id, limit,
        )  # fmt: skip
        return [Sample(execution_id, moment_of(at), metric, value) for at, metric, value in rows]

    # the log

    async def events_after(
        self,
        after: int,
        *,
        task_id: str | None = None,
        execution_id: str | None = None,
        types: Collection[str] | None = None,
        limit: int = 500,
    ) -> list[StoredEvent]:
        """As `Feed.read`, from the database alone.

        Raises:
            StoreDamaged: an event does not match its checksum.
        """
        where = Where()
        where.add("cursor > ?", after)
        _of(where, task_id, execution_id)
        if types is not None:
            where.add(f"type IN ({', '.join('?' * len(types))})", *map(str, types))
        rows = await self._rows(
            f"{EVENTS} WHERE e.cursor IN (SELECT cursor FROM log {where} ORDER BY cursor LIMIT ?) "
            "ORDER BY e.cursor",
            *where.values, limit,
        )  # fmt: skip
        return self._stored(rows)

    async def last_events(
        self, *, task_id: str | None = None, execution_id: str | None = None, limit: int = 10
    ) -> list[StoredEvent]:
        """The last `limit` events, oldest first."""
        where = Where()
        _of(where, task_id, execution_id)
        rows = await self._rows(
            f"{EVENTS} WHERE e.cursor IN (SELECT cursor FROM log {where} ORDER BY cursor DESC LIMIT ?) "
            "ORDER BY e.cursor",
            *where.values, limit,
        )  # fmt: skip
        return self._stored(rows)

    async def removed_before(self, task_id: str, after: int) -> int | None:
        """A cursor above `after` below which runs of this task may have been removed; None where none was.

        Of other tasks' runs that were removed this says nothing: a log without gaps has None.
        """
        rows = await self._rows(_REMOVED_BEFORE, task_id, after)
        return rows[0][0] + 1 if rows else None


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Of values in ascending order, interpolated linearly; None of none."""
    if not ordered:
        return None
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


_ENDED = " + ".join(f"json_extract(t.doc, '$.{each}')" for each in ("completed", "failed", "cancelled", "timed_out"))
_REMOVED_BEFORE = (
    "SELECT CAST(m.value AS INTEGER) FROM streams s JOIN tasks t ON t.id = s.id JOIN meta m ON m.key = 'removed_to' "
    "WHERE s.name = ? AND CAST(m.value AS INTEGER) > ? "
    f"AND (SELECT count(*) FROM executions e WHERE e.task = t.id AND e.ended = 1) < {_ENDED}"
)
_EXECUTIONS = (
    f"SELECT e.doc, {PROGRESS}, s.name "
    "FROM executions e JOIN streams s ON s.id = e.id LEFT JOIN progress_docs p ON p.id = e.id"
)
_RUN = (
    f"SELECT e.doc, {PROGRESS}, s.name, k.principal, (SELECT min(created) FROM executions WHERE run = e.run), "
    "(SELECT cursor FROM log WHERE stream = e.id ORDER BY since DESC, sequence DESC LIMIT 1), r.body, r.truncated "
    "FROM executions e JOIN streams s ON s.id = e.id JOIN tasks k ON k.id = e.task "
    "LEFT JOIN progress_docs p ON p.id = e.id LEFT JOIN results r ON r.id = e.id "
    "WHERE e.run = ? ORDER BY e.attempt DESC LIMIT 1"
)
_OPEN_INPUTS = (
    "SELECT i.key, i.kind, i.message, i.schema, i.asked, k.name, t.title, e.role, e.run, s.name, "
    "(SELECT k.name FROM streams p JOIN streams k ON k.id = p.task WHERE p.id = t.parent), t.step "
    "FROM input_requests i JOIN tasks t ON t.id = i.task JOIN streams k ON k.id = i.task "
    "JOIN executions e ON e.id = i.execution JOIN streams s ON s.id = i.execution"
)
_KNOWN = (
    f"SELECT t.name, k.doc, e.doc, {PROGRESS}, x.name FROM streams s JOIN streams t ON t.id = s.task "
    "JOIN tasks k ON k.id = t.id LEFT JOIN executions e ON e.id = CASE s.id WHEN t.id THEN k.shown ELSE s.id END "
    "LEFT JOIN progress_docs p ON p.id = e.id LEFT JOIN streams x ON x.id = e.id WHERE s.name = ?"
)
_UNFINISHED = (
    f"SELECT e.doc, {PROGRESS}, s.name, t.doc, r.body, (SELECT max(at) FROM samples WHERE execution = e.id) "
    "FROM executions e JOIN streams s ON s.id = e.id "
    "JOIN tasks t ON t.id = e.task LEFT JOIN progress_docs p ON p.id = e.id "
    "LEFT JOIN streams first ON first.name = e.run LEFT JOIN requests r ON r.id = first.id "
    "WHERE e.ended = 0 ORDER BY e.id"
)


def _execution(row: Sequence[Any], *, spare: bool = False) -> tuple[Lifecycle, Progress]:
    lifecycle, document, since, name = row[:4]
    return Lifecycle.from_dict(orjson.loads(lifecycle)), progress_of(name, document, since, spare=spare)


def _of(where: Where, task_id: str | None, execution_id: str | None) -> None:
    if execution_id is not None:
        where.add("stream = (SELECT id FROM streams WHERE name = ?)", execution_id)
    elif task_id is not None:
        where.add("stream IN (SELECT id FROM streams WHERE task = (SELECT id FROM streams WHERE name = ?))", task_id)
