"""What is in memory of a task's executions: the one that runs, the last ones, and what they took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.profile import PerformanceProfiler
from vespera_exec.model.values import copier

if TYPE_CHECKING:
    from vespera_exec.model.events import Json
    from vespera_exec.model.record import TaskRecord
    from vespera_exec.model.session import ExecutionSession


_NOTHING_ENDED = PerformanceProfiler()


@dataclass(frozen=True, slots=True)
class Recent:
    """With a store, the database has all of them; this has the last."""

    current: ExecutionSession | None = None
    last: ExecutionSession | None = None
    archive: tuple[ExecutionSession, ...] = ()
    profiler: PerformanceProfiler = _NOTHING_ENDED
    """What they took, of all that ended while this was in memory."""

    def after(self, session: ExecutionSession, limit: int) -> Recent:
        """When `session` has ended; `limit` ended ones are kept."""
        return copy(
            self,
            current=None,
            last=session,
            archive=(*self.archive, session)[-limit:],
            profiler=self.profiler.after(session.lifecycle),
        )


copy = copier(Recent)


def counted(record: TaskRecord, session: ExecutionSession) -> dict[str, Json]:
    """The fields of `record` that change when `session` has ended. A cancelled one costs no retry."""
    life = session.lifecycle
    fields: dict[str, Json] = {"current_execution_id": None, "last_execution_id": life.execution_id}
    match life.status:
        case ExecutionStatus.COMPLETED:
            fields |= {"completed": record.completed + 1, "retry_count": 0, "last_error": None}
            fields["duration_sum"] = round(record.duration_sum + life.active_seconds, 6)
        case ExecutionStatus.CANCELLED:
            fields["cancelled"] = record.cancelled + 1
        case _:
            counter = "timed_out" if life.status is ExecutionStatus.TIMED_OUT else "failed"
            fields |= {counter: getattr(record, counter) + 1, "retry_count": record.retry_count + 1}
            fields["last_error"] = life.error.get("message") or life.status_message
    return fields
