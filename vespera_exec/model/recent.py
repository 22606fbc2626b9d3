"""What is in memory of a task's executions: the one that runs, the last ones, and what they took."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.timing import HISTORY_LIMIT

if TYPE_CHECKING:
    from vespera_exec.model.events import Json
    from vespera_exec.model.record import TaskRecord
    from vespera_exec.model.session import ExecutionSession


@dataclass(frozen=True, slots=True)
class Recent:
    """With a store, the database has all of them; this has the last."""

    current: ExecutionSession | None = None
    last: ExecutionSession | None = None
    archive: tuple[ExecutionSession, ...] = ()
    durations: tuple[float, ...] = ()
    """Active seconds of the last ten that completed."""
    phase_seconds: tuple[tuple[str, float], ...] = ()
    """Seconds at work per phase, over all that ended while this was in memory."""

    @property
    def baseline(self) -> timedelta | None:
        """The median of the durations; None without any."""
        return timedelta(seconds=statistics.median(self.durations)) if self.durations else None

    def after(self, session: ExecutionSession, limit: int) -> Recent:
        """When `session` has ended; `limit` ended ones are kept."""
        life, phase_seconds = session.lifecycle, dict(self.phase_seconds)
        for phase in life.phases:
            if phase.duration_seconds is not None:
                seconds = phase_seconds.get(phase.phase.value, 0.0) + phase.duration_seconds
                phase_seconds[phase.phase.value] = round(seconds, 6)
        durations = self.durations
        if life.status is ExecutionStatus.COMPLETED:
            durations = (*durations, life.active_seconds)[-HISTORY_LIMIT:]
        return replace(
            self,
            current=None,
            last=session,
            archive=(*self.archive, session)[-limit:],
            durations=durations,
            phase_seconds=tuple(phase_seconds.items()),
        )


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
