"""What the writer inserts: the tables, and their rows as SQLite takes them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from vespera_exec.store.encoding import encode, micros

if TYPE_CHECKING:
    from vespera_exec.model.inputs import Question
    from vespera_exec.model.ledger import CheckpointRecord, ResultRecord
    from vespera_exec.model.plans.steps import PlanState, StepState

SqlRow = tuple[Any, ...]


class Statement(NamedTuple):
    table: str
    columns: str
    key: int = 0
    """How many columns, the first ones, tell the row that is updated where it exists; 0: none may exist."""

    @property
    def ends_in_text(self) -> bool:
        """Its last column is as long as it likes."""
        return self.columns.endswith(("doc", "body", "metadata"))


STREAMS = Statement("streams", "id, name, task")
SEGMENTS = Statement("segments", "id, stream, since")
ENDS = Statement("ends", "stream")
EVENTS = Statement("events", "cursor, segment, sequence, type, at, ends, checksum, body")
TASKS = Statement(
    "tasks", "id, title, role, status, priority, principal, created, updated, shown, parent, step, doc", key=1
)
EXECUTIONS = Statement(
    "executions",
    "id, task, run, attempt, role, status, ended, priority, owner, generation, created, started, completed, "
    "active_us, queue_us, error_code, doc",
    key=1,
)
PROGRESS = Statement("progress", "id, percentage", key=1)
PROGRESS_DOCS = Statement("progress_docs", "id, sequence, doc", key=1)
RESULTS = Statement("results", "id, truncated, size, body", key=1)
REQUESTS = Statement("requests", "id, body")
KEYS = Statement("idempotency", "principal, operation, key, task_id, run_id, digest")
INPUTS = Statement("input_requests", "execution, key, task, kind, message, schema, asked")
PLANS = Statement("plan_states", "id, doc", key=1)
STEPS = Statement("steps", "execution, position, step, status, doc", key=2)
CHECKPOINTS = Statement("checkpoints", "id, execution, sequence, kind, created, metadata")
ANSWERS = Statement("step_cache", "key, principal, role, execution", key=2)
SAMPLES = Statement("samples", "execution, at, metric, value")


@cache
def sql_of(statement: Statement, rows: int) -> str:
    names = statement.columns.split(", ")
    row = f"({', '.join('?' * len(names))})"
    # OR FAIL: whoever inserts undoes the decision or the transaction. Else SQLite, in order to undo the
    # statement, copies each page before it is changed, and from 64 KiB on into a file.
    sql = f"INSERT OR FAIL INTO {statement.table} ({statement.columns}) VALUES {', '.join([row] * rows)}"
    if key := statement.key:
        news = ", ".join(f"{name} = excluded.{name}" for name in names[key:])
        sql += f" ON CONFLICT ({', '.join(names[:key])}) DO UPDATE SET {news}"
    return sql


def result_row(stream: int, result: ResultRecord) -> SqlRow:
    return (stream, int(result.truncated), len(result.body), result.body)


def input_row(stream: int, task: int, question: Question) -> SqlRow:
    schema = encode(dict(question.schema)).decode()
    return (stream, question.key, task, question.kind, question.message, schema, micros(question.asked_at) or 0)


def plan_row(stream: int, plan: PlanState) -> SqlRow:
    return (stream, encode(plan.to_dict()).decode())


def step_row(key: tuple[int, int], step: StepState) -> SqlRow:
    return (*key, step.step_id, step.status.value, encode(step.to_dict()).decode())


def checkpoint_row(stream: int, made: CheckpointRecord) -> SqlRow:
    metadata = encode(dict(made.metadata)).decode()
    return (made.checkpoint_id, stream, made.sequence, made.kind, micros(made.created_at) or 0, metadata)
