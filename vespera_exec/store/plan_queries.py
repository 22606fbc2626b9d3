"""What is asked about plans: where they and their steps stand, who does these, and what they can go back to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.lowlevel
import orjson

from vespera_exec.model.enums import EventType, StepStatus
from vespera_exec.model.ledger import CheckpointRecord
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.plans.steps import PlanState, StepState
from vespera_exec.model.record import TaskRecord
from vespera_exec.store.encoding import moment_of
from vespera_exec.store.reading import AND_THOSE_SINCE, EVENTS, Page, Reader, Where, go_on, token_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vespera_exec.model.events import ExecutionEvent

T = TypeVar("T")

_PORTION = 250
_STREAM = "(SELECT id FROM streams WHERE name = ?)"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A task that nobody tries again by itself, and its last execution, which failed or took too long."""

    task: TaskRecord
    lifecycle: Lifecycle


class PlanQueries(Reader):
    """Of an execution that is unknown, or has no plan, all answers are empty."""

    async def plan_head(self, execution_id: str) -> PlanState | None:
        """What an execution of a plan remembers beside its steps."""
        rows = await self._rows(f"SELECT doc FROM plan_states WHERE id = {_STREAM}", execution_id)
        with self._decoding():
            return PlanState.from_dict(orjson.loads(rows[0][0])) if rows else None

    async def plan_state(self, execution_id: str) -> tuple[PlanState, list[StepState]] | None:
        """All of it: some 10 µs for each step of the plan, in portions, between which others have their turn."""
        plan = await self.plan_head(execution_id)
        if plan is None:
            return None
        rows = await self._rows(f"SELECT doc FROM steps WHERE execution = {_STREAM} ORDER BY position", execution_id)
        return plan, await self._read(rows, _step)

    async def steps(
        self, execution_id: str, *, status: StepStatus | None = None, after: int = -1, limit: int = 100
    ) -> tuple[list[StepState], int]:
        """Steps beyond the position `after`, in the plan's order, and how many there are in all of this status."""
        where = Where()
        where.add(f"execution = {_STREAM}", execution_id)
        if status is not None:
            where.add("status = ?", status.value)
        total = await self._count("steps", where)
        where.add("position > ?", after)
        rows = await self._rows(f"SELECT doc FROM steps {where} ORDER BY position LIMIT ?", *where.values, limit)
        with self._decoding():
            return [_step(*row) for row in rows], total

    async def step(self, execution_id: str, step_id: str) -> StepState | None:
        rows = await self._rows(
            f"SELECT doc FROM steps WHERE execution = {_STREAM} AND step = ?", execution_id, step_id
        )
        with self._decoding():
            return _step(*rows[0]) if rows else None

    async def step_counts(self, execution_id: str) -> dict[StepStatus, int]:
        """How many steps have each status; only those that some have."""
        rows = await self._rows(
            f"SELECT status, count(*) FROM steps WHERE execution = {_STREAM} GROUP BY status", execution_id
        )
        with self._decoding():
            return {StepStatus(status): number for status, number in rows}

    async def children(self, execution_id: str, step_id: str | None = None) -> list[TaskRecord]:
        """The tasks that do the steps of a plan, or one of them; oldest first. Read in portions, as `plan_state`."""
        where = Where()
        where.add(f"t.parent = {_STREAM}", execution_id)
        if step_id is not None:
            where.add("t.step = ?", step_id)
        rows = await self._rows(f"SELECT t.doc FROM tasks t {where} ORDER BY t.id", *where.values)
        return await self._read(rows, _task)

    async def _read(self, rows: Sequence[tuple[Any, ...]], one: Callable[[str], T]) -> list[T]:
        """What each row says, in portions, between which others have their turn."""
        read: list[T] = []
        with self._decoding():
            for number, row in enumerate(rows, start=1):
                read.append(one(*row))
                if number % _PORTION == 0:
                    await anyio.lowlevel.checkpoint()
        return read

    # what was asked for

    async def request(self, run_id: str) -> bytes | None:
        """The body of a run's `RequestRecord`."""
        rows = await self._rows(f"SELECT body FROM requests WHERE id = {_STREAM}", run_id)
        return rows[0][0] if rows else None

    async def last_request(self, task_id: str) -> bytes | None:
        """That of the task's latest run."""
        rows = await self._rows(_LAST_REQUEST, task_id)
        return rows[0][0] if rows else None

    # going back

    async def checkpoint(self, checkpoint_id: str) -> CheckpointRecord | None:
        rows = await self._rows(f"{_CHECKPOINTS} WHERE c.id = ?", checkpoint_id)
        with self._decoding():
            return _checkpoint(rows[0]) if rows else None

    async def checkpoints(
        self, execution_id: str, *, limit: int = 50, before: str | None = None, kind: str | None = None
    ) -> list[CheckpointRecord]:
        """The newest first; those before the checkpoint `before`, where it is given."""
        where = Where()
        where.add(f"c.execution = {_STREAM}", execution_id)
        if before is not None:
            where.add("(c.sequence, c.id) < (SELECT sequence, id FROM checkpoints WHERE id = ?)", before)
        if kind is not None:
            where.add("c.kind = ?", kind)
        rows = await self._rows(
            f"{_CHECKPOINTS} {where} ORDER BY c.sequence DESC, c.id DESC LIMIT ?", *where.values, limit
        )
        with self._decoding():
            return [_checkpoint(row) for row in rows]

    async def events_of(
        self, execution_id: str, *, up_to: int, after: int = 0, limit: int = 1000
    ) -> list[ExecutionEvent]:
        """Those with a sequence above `after`, up to `up_to`, in order.

        Raises:
            StoreDamaged: an event does not match its checksum.
        """
        rows = await self._rows(
            f"{EVENTS} WHERE e.stream = {_STREAM} AND {AND_THOSE_SINCE.format(_STREAM, '?')} AND sequence <= ? "
            "ORDER BY since, sequence LIMIT ?",
            execution_id, execution_id, after, after, up_to, limit,
        )  # fmt: skip
        return [each.event() for each in self._stored(rows)]

    async def capacity_of_steps(self, execution_id: str) -> list[ExecutionEvent]:
        """What the log of a plan tells of the capacity that its steps were given and gave back, in order."""
        rows = await self._rows(
            f"{EVENTS} WHERE e.stream = {_STREAM} AND e.type IN (?, ?) ORDER BY since, sequence",
            execution_id, EventType.RESOURCE_ALLOCATED.value, EventType.RESOURCE_RELEASED.value,
        )  # fmt: skip
        return [event for event in (each.event() for each in self._stored(rows)) if event.step_id is not None]

    # the rest

    async def cached(self, key: bytes, principal: str) -> str | None:
        """The execution whose result stands under `key`, as long as that is kept whole."""
        rows = await self._rows(
            "SELECT s.name FROM step_cache c JOIN executions e ON e.id = c.execution JOIN streams s ON s.id = e.id "
            "JOIN results r ON r.id = e.id "
            "WHERE c.key = ? AND c.principal = ? AND e.status = 'completed' AND r.truncated = 0",
            key, principal,
        )  # fmt: skip
        return rows[0][0] if rows else None

    async def dead_letters(
        self,
        *,
        principal: str | None = None,
        role: str | None = None,
        limit: int = 50,
        page_token: str | None = None,
    ) -> Page[DeadLetter]:
        """The tasks whose last run failed and that are not executed, the latest first; steps stand with their plans.

        Raises:
            InvalidInput: `page_token` is none of ours, or of another list.
        """
        where = Where()
        where.add("t.status IN ('todo', 'failed') AND t.shown IS NOT NULL AND t.parent IS NULL")
        where.add("e.status IN ('failed', 'timed_out')")
        for column, value in (("principal", principal), ("role", role)):
            if value is not None:
                where.add(f"t.{column} = ?", value)
        total = await self._count(_LAST_RUNS, where)
        go_on(where, "t.updated", "t.id", _DEAD, page_token)
        rows = await self._rows(
            f"SELECT t.updated, t.id, t.doc, e.doc FROM {_LAST_RUNS} {where} "
            "ORDER BY t.updated DESC, t.id DESC LIMIT ?",
            *where.values, limit + 1,
        )  # fmt: skip
        with self._decoding():
            items = [
                DeadLetter(TaskRecord.from_dict(orjson.loads(task)), Lifecycle.from_dict(orjson.loads(life)))
                for _, _, task, life in rows[:limit]
            ]
        return Page(items, token_of(rows, limit, _DEAD), total)


_DEAD = "dead"
_LAST_RUNS = "tasks t CROSS JOIN executions e ON e.id = t.shown"
"""Along the index of the tasks, however SQLite would join them."""
_CHECKPOINTS = (
    "SELECT c.id, s.name, c.sequence, c.kind, c.created, c.metadata FROM checkpoints c "
    "JOIN executions e ON e.id = c.execution JOIN streams s ON s.id = c.execution"
)
_LAST_REQUEST = (
    "SELECT r.body FROM executions e JOIN streams first ON first.name = e.run JOIN requests r ON r.id = first.id "
    f"WHERE e.id = (SELECT max(id) FROM executions WHERE task = {_STREAM})"
)


def _task(doc: str) -> TaskRecord:
    return TaskRecord.from_dict(orjson.loads(doc))


def _step(doc: str) -> StepState:
    return StepState.from_dict(orjson.loads(doc))


def _checkpoint(row: Sequence[Any]) -> CheckpointRecord:
    checkpoint_id, execution_id, sequence, kind, created, metadata = row
    return CheckpointRecord(
        checkpoint_id=checkpoint_id,
        execution_id=execution_id,
        sequence=sequence,
        kind=kind,
        created_at=moment_of(created),
        metadata=orjson.loads(metadata),
    )
