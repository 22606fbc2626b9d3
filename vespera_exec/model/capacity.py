"""Capacity: what there is of it, what work asks for before it begins, what it was given, and what that was worth."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, cast

from vespera_exec.errors import InvalidInput
from vespera_exec.model.enums import EventType
from vespera_exec.model.rows import Readers, iso, present, stamp

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from vespera_exec.model.events import ExecutionEvent, Json

MAX_REQUIREMENTS = 16
"""That one job may have."""
LEAST_AMOUNT = 1e-6
"""Amounts are counted in steps of this size."""
MOST_AMOUNT = 1e12
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
"""Of a pool, a type of capacity, an attribute."""
_BOUND = re.compile(r"(min|max)(?:_(?P<plain>\w+)|(?P<camel>[A-Z]\w*))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """So much capacity of one type, which those who hold some of it share.

    `window_seconds` is for a budget: what was taken comes back so long after it was granted, released or not; 0
    means at its release. `attributes` are what the constraints of a requirement are compared with.
    """

    id: str
    type: str
    capacity: float
    cost_per_unit_hour: float = 0.0
    attributes: Mapping[str, Json] = field(default_factory=dict[str, "Json"])
    window_seconds: float = 0.0

    def suits(self, requirement: CapacityRequirement) -> bool:
        """Whether it is of the type that is asked for and meets its constraints, however much of it is free."""
        return self.type == requirement.type and all(
            _meets(self.attributes, name, wanted) for name, wanted in requirement.constraints.items()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What one requirement was given. `capacity` and `available` are the pool's, the latter right afterwards."""

    id: str
    pool: str
    type: str
    amount: float
    capacity: float
    available: float
    cost_per_unit_hour: float
    attributes: Mapping[str, Json]

    def to_dict(self) -> dict[str, Json]:
        """As an event keeps it, and a `CapacityUse` begins."""
        return {
            "allocation_id": self.id,
            "pool": self.pool,
            "type": self.type,
            "amount": self.amount,
            "cost_per_unit_hour": self.cost_per_unit_hour,
        }


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

    def to_dict(self) -> dict[str, Json]:
        return {
            "type": self.type,
            "amount": self.amount,
            "duration_ms": self.duration_ms,
            "priority": self.priority,
            "constraints": dict(self.constraints),
        }


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

    def ended(self, at: datetime, measured: Measured | None) -> CapacityUse:
        """It as it is once it is given back; `measured` is what the work used meanwhile, where that is known."""
        hours = max(0.0, (at - self.started_at).total_seconds()) / 3600
        cost = round(self.amount * self.cost_per_unit_hour * hours, 6)
        return replace(self, ended_at=at, cost=cost, efficiency=_efficiency(self, measured, hours))

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


@dataclass(frozen=True, slots=True)
class Measured:
    """What an execution used: its mean CPU in percent of one core, its highest memory in MB; None where unknown."""

    cpu_percent: float | None = None
    memory_mb: float | None = None


def folded(uses: tuple[CapacityUse, ...], event: ExecutionEvent) -> tuple[CapacityUse, ...]:
    """What an execution holds and held, after an event that changed it."""
    given: list[Mapping[str, Json]] = event.details.get("allocations") or []
    if event.event_type is EventType.RESOURCE_ALLOCATED:
        at = event.timestamp.isoformat()
        return (*uses, *(CapacityUse.from_dict({"started_at": at, **each}) for each in given))
    ended = {each["allocation_id"]: each for each in given}
    return tuple(
        CapacityUse.from_dict({**use.to_dict(), "ended_at": event.timestamp.isoformat(), **ended[use.allocation_id]})
        if use.allocation_id in ended and use.ended_at is None
        else use
        for use in uses
    )


def uses_of(stored: list[Mapping[str, Json]]) -> tuple[CapacityUse, ...]:
    return tuple(CapacityUse.from_dict(each) for each in stored)


def requirements(given: Json) -> tuple[CapacityRequirement, ...]:
    """What `{type: amount}`, or a list of requirements as mappings, asks for; nothing, where it is None.

    Raises:
        InvalidInput: says which part of it cannot be meant.
    """
    if given is None:
        return ()
    if isinstance(given, dict):
        amounts = cast("dict[str, Json]", given)
        entries: list[Json] = [{"type": name, "amount": amount} for name, amount in amounts.items()]
    elif isinstance(given, list):
        entries = cast("list[Json]", given)
    else:
        raise InvalidInput(
            "capacity is {type: amount}, or a list of {type, amount, priority, duration_ms, constraints}"
        )
    if len(entries) > MAX_REQUIREMENTS:
        raise InvalidInput(f"capacity has {len(entries)} requirements; at most {MAX_REQUIREMENTS}")
    return tuple(_requirement(each) for each in entries)


def checked_amount(given: Json, what: str) -> float:
    """
    Raises:
        InvalidInput: it is no number between the least and the most that can be counted.
    """
    if isinstance(given, bool) or not isinstance(given, int | float) or not LEAST_AMOUNT <= given <= MOST_AMOUNT:
        raise InvalidInput(f"{what} is a number from {LEAST_AMOUNT:g} to {MOST_AMOUNT:g}, not {given!r}")
    return given


def checked_name(given: Json, what: str) -> str:
    """
    Raises:
        InvalidInput: it is no name.
    """
    if not isinstance(given, str) or not NAME.fullmatch(given):
        raise InvalidInput(f"{what} is a letter, then letters, digits, _, . or - (64 at most), not {given!r:.80}")
    return given


def _requirement(given: Json) -> CapacityRequirement:
    if not isinstance(given, dict):
        raise InvalidInput("a requirement of capacity is a mapping with `type` and `amount`")
    asked = cast("dict[str, Json]", given)
    if unknown := sorted(asked.keys() - {each.name for each in fields(CapacityRequirement)}):
        raise InvalidInput(f"a requirement of capacity has no `{unknown[0][:64]}`")
    name = checked_name(asked.get("type"), "the type of a requirement of capacity")
    duration, priority = asked.get("duration_ms"), asked.get("priority", 5)
    if duration is not None and (isinstance(duration, bool) or not isinstance(duration, int | float) or duration < 0):
        raise InvalidInput(f"capacity {name}: duration_ms is a number from 0 on, not {duration!r:.80}")
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 10:
        raise InvalidInput(f"capacity {name}: priority is 0 to 10, not {priority!r:.80}")
    return CapacityRequirement(
        type=name,
        amount=checked_amount(asked.get("amount"), f"capacity {name}: the amount"),
        duration_ms=duration,
        priority=priority,
        constraints=_constraints(name, asked.get("constraints")),
    )


def _constraints(name: str, given: Json) -> dict[str, Json]:
    if given is None:
        return {}
    if not isinstance(given, dict) or len(cast("dict[str, Json]", given)) > MAX_REQUIREMENTS:
        raise InvalidInput(f"capacity {name}: constraints are a mapping of at most {MAX_REQUIREMENTS} attributes")
    constraints = cast("dict[str, Json]", given)
    for key, value in constraints.items():
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise InvalidInput(f"capacity {name}: the constraint {key!r:.80} is a text, a number, true or false")
    return constraints


def _meets(attributes: Mapping[str, Json], name: str, wanted: Json) -> bool:
    """One constraint. `min_x` and `max_x`, also `minX` and `maxX`, bound the number `x`; any other name is equality.

    Names are compared without case and underscores. What the pool does not say of itself, it does not meet.
    """
    known = {_folded_name(key): value for key, value in attributes.items()}
    has = known.get(_folded_name(name))
    if has is None and (bound := _BOUND.fullmatch(name)) is not None:
        has = known.get(_folded_name(bound["plain"] or bound["camel"]))
        if not _is_number(has) or not _is_number(wanted):
            return False
        return has >= wanted if bound[1] == "min" else has <= wanted
    return has == wanted and (type(has) is type(wanted) or (_is_number(has) and _is_number(wanted)))


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _folded_name(name: str) -> str:
    return name.replace("_", "").lower()


def _efficiency(use: CapacityUse, measured: Measured | None, hours: float) -> float | None:
    if measured is None or hours <= 0:
        return None
    match use.type:
        case "cpu" if measured.cpu_percent is not None:
            share = measured.cpu_percent / 100 / use.amount
        case "memory" if measured.memory_mb is not None:
            share = measured.memory_mb / use.amount
        case _:
            return None
    return round(min(1.0, max(0.0, share)), 4)


_NAMES = tuple(each.name for each in fields(CapacityUse))
_READERS: Readers = {"started_at": stamp, "ended_at": stamp}
