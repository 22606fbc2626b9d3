"""What an execution holds of the capacity there is, as its log has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.model.capacity import Measured
from vespera_exec.model.enums import EventType, ResourceType
from vespera_exec.model.work_log import WorkLog

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from vespera_exec.model.capacity import Allocation
    from vespera_exec.model.events import Json


class HoldingLog(WorkLog):
    """The side of an `ExecutionSession` that records capacity; who grants it is no matter of the model."""

    def wait_for_capacity(self, message: str, details: Mapping[str, Json]) -> None:
        """Say that it waits for capacity, and for which.

        Raises:
            InvalidTransitionError: the execution has ended.
        """
        with self._ledger:
            self._refuse_after_the_end("capacity")
            self._record(EventType.RESOURCE_WAITING, message=message, details=dict(details))

    def hold_capacity(self, allocations: Sequence[Allocation]) -> None:
        """Record what it was given.

        Raises:
            InvalidTransitionError: the execution has ended.
        """
        if not allocations:
            return
        with self._ledger:
            self._refuse_after_the_end("capacity")
            text = ", ".join(f"{each.amount:g} {each.type} of {each.pool}" for each in allocations)
            given: list[Json] = [each.to_dict() for each in allocations]
            self._record(EventType.RESOURCE_ALLOCATED, message=text, details={"allocations": given})

    def release_capacity(self, reason: str, *, at: datetime | None = None) -> bool:
        """Record that what it holds is given back, and what that was worth; False where it holds nothing.

        `at` is when its work is last known to have run, where that was not now: nobody pays for what came after.

        Raises:
            InvalidTransitionError: the execution has ended, and with it what it held.
        """
        with self._ledger:
            held = self._life.value.held_capacity
            if not held:
                return False
            self._refuse_after_the_end("capacity")
            measured, until = self._measured(), at or self._ledger.clock.now()
            given: list[Json] = []
            for use in held:
                ended = use.ended(max(until, use.started_at), measured).to_dict()
                given.append({key: ended[key] for key in ("allocation_id", "ended_at", "cost", "efficiency")})
            self._record(EventType.RESOURCE_RELEASED, message=reason, details={"allocations": given})
            return True

    def _measured(self) -> Measured | None:
        if self._usage is None:
            return None
        peak = self._usage.peaks().get(ResourceType.MEMORY_RSS)
        return Measured(cpu_percent=self._usage.means().get(ResourceType.CPU_USAGE), memory_mb=peak)
