"""Capacity as its callers see it: what there is, who waits, and some of it for whoever is no execution."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

from vespera_exec.app.callers import require
from vespera_exec.app.capacity.views import CapacityView, HolderView, PoolView, WaitingView
from vespera_exec.errors import InvalidInput
from vespera_exec.model.capacity import CapacityRequirement, requirements
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Sequence

    from vespera_exec.engine.engine import Engine
    from vespera_exec.engine.jobs import Job
    from vespera_exec.model.capacity import Allocation
    from vespera_exec.model.events import Json

    Asked = Sequence[CapacityRequirement] | Mapping[str, float]

_SHOWN_HOLDERS = 20
_SHOWN_WAITING = 100
_LOOKED_AT = 1000
"""Of those that stand in line, for the ones to be shown."""
_NAMED_HOLDERS = 3
_LONGEST_WAIT_MS = 24 * 3600 * 1000


class Capacity:
    """The pools of one owner. In the loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._allocated: dict[str, tuple[str, str]] = {}
        """What was allocated here, by its id: the key that holds it, and whose it is."""

    def view(self, caller: Caller) -> CapacityView:
        """Every pool, what of it is free, and of those that hold or wait the ones that the caller sees.

        Raises:
            PermissionDenied: the caller lacks the scope.
        """
        require(caller, "read")
        waiting = self._engine.grants.waiting()
        return CapacityView(
            pools=[
                PoolView(
                    id=state.pool.id,
                    type=state.pool.type,
                    capacity=state.pool.capacity,
                    available=state.available,
                    cost_per_unit_hour=state.pool.cost_per_unit_hour,
                    attributes=dict(state.pool.attributes),
                    window_seconds=state.pool.window_seconds,
                    holders=(shown := self._holders(state.holders, caller)[:_SHOWN_HOLDERS]),
                    other_holders=len(state.holders) - len(shown),
                )
                for state in self._engine.grants.states()
            ],
            waiting=[
                WaitingView(
                    task_id=job.task.id,
                    session_id=job.key,
                    title=job.task.record.title,
                    waiting_for=short,
                    since=job.session.lifecycle.queued_at,
                )
                for job in self._seen(waiting[:_LOOKED_AT], caller)
                if (short := self._engine.waits_for(job.key)) is not None
            ][:_SHOWN_WAITING],
            waiting_total=len(waiting),
        )

    def waiting_for(self, session_id: str, caller: Caller) -> str | None:
        """What capacity a session waits for, and who holds it; others' tasks are counted, not named."""
        short = self._engine.waits_for(session_id)
        if short is None:
            return None
        keys = self._engine.grants.holders(session_id)
        named = [f"{each.title[:60]}" for each in self._holders(keys, caller)[:_NAMED_HOLDERS]]
        if (others := len(keys) - len(named)) > 0:
            named.append(f"{others} more" if named else f"{others}")
        return f"{short}; held by {', '.join(named)}" if named else short

    async def allocate(self, caller: Caller, asked: Asked, *, wait_ms: int = 0) -> list[Allocation]:
        """All of `asked` (requirements, or `{type: amount}`) or nothing, within `wait_ms`.

        It is held until `release`, or until this owner ends, and stands in no log.

        Raises:
            PermissionDenied: the caller lacks the scope.
            InvalidInput: it cannot be meant, or no pool could ever give it.
            CapacityUnavailable: it was not free in time.
        """
        require(caller, "operate")
        if not 0 <= wait_ms <= _LONGEST_WAIT_MS:
            raise InvalidInput(f"wait_ms is from 0 to {_LONGEST_WAIT_MS}")
        wanted = _requirements(asked)
        if not wanted:
            raise InvalidInput("nothing is asked for", hint="name a type and an amount, as {gpu: 1}")
        key, allocations = await self._engine.grants.allocate(wanted, within=wait_ms / 1000)
        self._allocated.update({each.id: (key, caller.principal) for each in allocations})
        return list(allocations)

    async def release(self, caller: Caller, ids: Iterable[str]) -> list[str]:
        """Give allocations back; which they were. Ids of others', or of none, are passed over.

        Raises:
            PermissionDenied: the caller lacks the scope.
        """
        require(caller, "operate")
        return self._give_back(caller.principal, ids)

    @asynccontextmanager
    async def held(
        self, asked: Asked, *, wait_ms: int = 0, caller: Caller | None = None
    ) -> AsyncGenerator[list[Allocation]]:
        """Hold capacity for as long as the context lasts; raises as `allocate` does."""
        caller = caller or Caller()
        allocations = await self.allocate(caller, asked, wait_ms=wait_ms)
        try:
            yield allocations
        finally:
            self._give_back(caller.principal, [each.id for each in allocations])

    def _give_back(self, principal: str, ids: Iterable[str]) -> list[str]:
        done: list[str] = []
        for each in ids:
            key, owner = self._allocated.get(each, ("", ""))
            if owner == principal and self._engine.grants.release(key, each):
                del self._allocated[each]
                done.append(each)
        return done

    def _holders(self, keys: Iterable[str], caller: Caller) -> list[HolderView]:
        return [
            HolderView(task_id=job.task.id, session_id=job.key, title=job.task.record.title)
            for job in self._seen(keys, caller)
        ]

    def _seen(self, keys: Iterable[str], caller: Caller) -> list[Job]:
        jobs = [job for key in keys if (job := self._engine.job(key)) is not None]
        return [job for job in jobs if caller.sees(job.task.record.principal)]


def _requirements(asked: Asked) -> tuple[CapacityRequirement, ...]:
    if isinstance(asked, Mapping):
        return requirements(dict(cast("Mapping[str, Json]", asked)))
    return requirements([each.to_dict() for each in asked])
