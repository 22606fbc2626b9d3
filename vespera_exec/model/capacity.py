"""Capacity: what work asks for before it begins, what it was given, and what that was worth."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from vespera_exec.model.rows import Readers, iso, present, stamp

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from vespera_exec.model.events import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityRequirement:
    """So much of one type of capacity, all of it from one pool.

    `priority` 0 to 10, higher first; `duration_ms` is what is expected and limits nothing. `constraints` are
    compared with the attributes of a pool.
    """

    type: str
    amount: float
    duration_ms: float | None = None
    priority: int = 5
    constraints: Mapping[str, Json] = field(default_factory=dict[str, "Json"])


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityUse:
    """What one execution holds or held of one pool. `cost` and `ended_at` are None while it holds it.

    `efficiency` is what was measured against what was allocated, 0 to 1; None where nothing measures it.
    """

    allocation_id: str
    pool: str
    type: str
    amount: float
    started_at: datetime
    cost_per_unit_hour: float = 0.0
    ended_at: datetime | None = None
    cost: float | None = None
    efficiency: float | None = None

    def to_dict(self) -> dict[str, Json]:
        return {
            "allocation_id": self.allocation_id,
            "pool": self.pool,
            "type": self.type,
            "amount": self.amount,
            "started_at": iso(self.started_at),
            "cost_per_unit_hour": self.cost_per_unit_hour,
            "ended_at": iso(self.ended_at),
            "cost": self.cost,
            "efficiency": self.efficiency,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> CapacityUse:
        return cls(**present(data, _NAMES, _READERS))


_NAMES = tuple(each.name for each in fields(CapacityUse))
_READERS: Readers = {"started_at": stamp, "ended_at": stamp}
