"""Who is given capacity next: all that is asked for or nothing, by priority, and nobody waits for ever."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vespera_exec.engine.queue import WaitingQueue
from vespera_exec.errors import CapacityTooLarge, CapacityUnknown
from vespera_exec.model.capacity import LEAST_AMOUNT, Allocation
from vespera_exec.model.events import new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from vespera_exec.model.capacity import CapacityRequirement, CapacityUse, Pool

PATIENCE_SECONDS = 60.0
"""Whoever has waited longer goes first, whatever the priority of the others."""

_Types = frozenset[str]


@dataclass(frozen=True, slots=True)
class PoolState:
    """One pool, how much of it is free, and who holds the rest, by key."""

    pool: Pool
    available: float
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Shortage:
    """Of one type that somebody waits for: how much is wanted at once, and the best that a pool has free now."""

    type: str
    wanted: float
    free: float
    capacity: float

    def __str__(self) -> str:
        return f"{self.type}: {self.wanted:g} wanted, {self.free:g} of {self.capacity:g} free"


@dataclass(slots=True)
class _Account:
    """A pool with what was taken of it. Amounts are whole numbers of `LEAST_AMOUNT`, so that sums are exact."""

    pool: Pool
    total: int
    held: dict[str, tuple[str, int, float]] = field(default_factory=dict[str, tuple[str, int, float]])
    """Allocation id to key, amount, and when it was taken."""
    taken: int = 0
    spent: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """Of a budget: when how much of it comes back."""

    @property
    def free(self) -> int:
        return self.total - self.taken

    def take(self, allocation_id: str, key: str, amount: int, now: float) -> None:
        self.held[allocation_id] = (key, amount, now)
        self.taken += amount
        if self.pool.window_seconds:
            heapq.heappush(self.spent, (now + self.pool.window_seconds, amount))

    def give_back(self, allocation_id: str, *, unused: bool) -> None:
        _, amount, since = self.held.pop(allocation_id)
        if not self.pool.window_seconds:
            self.taken -= amount
        elif unused and (entry := (since + self.pool.window_seconds, amount)) in self.spent:
            self.spent.remove(entry)
            heapq.heapify(self.spent)
            self.taken -= amount

    def refill(self, now: float) -> None:
        while self.spent and self.spent[0][0] <= now:
            self.taken -= heapq.heappop(self.spent)[1]


@dataclass(frozen=True, slots=True)
class _Asking:
    key: str
    requirements: tuple[CapacityRequirement, ...]
    since: float
    types: _Types


class _Line:
    """Those that ask for the same types: by priority, and by age."""

    def __init__(self) -> None:
        self.by_rank: WaitingQueue[_Asking] = WaitingQueue()
        self.by_age: OrderedDict[str, _Asking] = OrderedDict()

    def first(self, now: float) -> tuple[tuple[bool, float, float], _Asking]:
        """Its rank among the first of all lines, the least is next, and who it is."""
        oldest = next(iter(self.by_age.values()))
        if now - oldest.since > PATIENCE_SECONDS:
            return (False, oldest.since, 0.0), oldest
        found = self.by_rank.first(now)
        assert found is not None
        return (True, -found[0], found[1].since), found[1]


class CapacityPools:
    """The pools, who holds what of them, and who asks for more. Nothing in it reads a clock or waits.

    Times are on the caller's monotonic scale, in seconds. A key stands for one who asks, and then for what that one
    holds. While the first who asks cannot be served, nobody behind takes of the types that it needs.
    """

    def __init__(self, pools: Iterable[Pool] = ()) -> None:
        self._accounts = {each.id: _Account(each, _units(each.capacity)) for each in pools}
        self._asking: dict[str, _Asking] = {}
        self._lines: dict[_Types, _Line] = {}
        self._holding: dict[str, dict[str, str]] = {}
        """Key to allocation ids, and the pool of each."""

    def __len__(self) -> int:
        """How many ask."""
        return len(self._asking)

    def __contains__(self, key: str) -> bool:
        """Whether it asks."""
        return key in self._asking

    def check(self, requirements: Sequence[CapacityRequirement]) -> None:
        """
        Raises:
            CapacityUnknown: no pool is of a type that is asked for, or meets its constraints.
            CapacityTooLarge: the pools could not give that much at once, were they all free.
        """
        if not requirements:
            return
        for each in requirements:
            suiting = [account.pool for account in self._accounts.values() if account.pool.suits(each)]
            if not suiting:
                known = ", ".join(sorted({account.pool.type for account in self._accounts.values()})) or "nothing"
                fits = " that meets its constraints" if each.constraints else ""
                raise CapacityUnknown(f"capacity {each.type}: there is no pool of it{fits}; there is {known}")
            if (most := max(pool.capacity for pool in suiting)) < each.amount:
                raise CapacityTooLarge(f"capacity {each.type}: {each.amount:g} wanted; the largest pool has {most:g}")
        if self._choice(requirements, {name: each.total for name, each in self._accounts.items()}) is None:
            raise CapacityTooLarge("all pools together could not give that capacity at once")

    def ask(self, key: str, requirements: Sequence[CapacityRequirement], *, now: float, priority: int = 0) -> None:
        """Stand in line, last among equals; it stays where it stands if it does so already.

        The highest priority of the requirements counts, then `priority`, 0 to 2,000,000, then who was first.
        """
        if key in self._asking:
            return
        types = frozenset(each.type for each in requirements)
        asking = self._asking[key] = _Asking(key, tuple(requirements), now, types)
        line = self._lines.setdefault(types, _Line())
        wanted = max((each.priority for each in requirements), default=0)
        line.by_rank.put(key, asking, priority=wanted * _ABOVE_ALL + priority)
        line.by_age[key] = asking

    def forget(self, key: str) -> bool:
        """It asks no longer; False when it did not."""
        asking = self._asking.pop(key, None)
        if asking is None:
            return False
        line = self._lines[asking.types]
        line.by_rank.discard(key)
        del line.by_age[key]
        if not line.by_age:
            del self._lines[asking.types]
        return True

    def next(self, now: float, *, stands: Callable[[str], bool] = lambda _: False) -> str | None:
        """Who is to be served next, and can be; or None.

        Of whom `stands` is true is not served, though there may be enough, and nobody behind gets what that one needs.
        """
        if not self._asking:
            return None
        self._refill(now)
        blocked: set[str] = set()
        for asking in self._in_order(now):
            if blocked.isdisjoint(asking.types):
                if not stands(asking.key) and self._choice(asking.requirements, self._free()) is not None:
                    return asking.key
                blocked |= asking.types
        return None

    def firsts(self, now: float) -> list[str]:
        """The first of each line, who can hold others up, in the order in which they are served."""
        return [asking.key for asking in self._in_order(now)]

    def take(self, key: str, now: float) -> tuple[Allocation, ...] | None:
        """Give it all that it asks for, and out of the line; None, and nothing has changed, where that is not free."""
        self._refill(now)
        asking = self._asking[key]
        chosen = self._choice(asking.requirements, self._free())
        if chosen is None:
            return None
        self.forget(key)
        allocations: list[Allocation] = []
        for requirement, name in zip(asking.requirements, chosen, strict=True):
            account, allocation_id = self._accounts[name], new_id()
            account.take(allocation_id, key, _units(requirement.amount), now)
            self._holding.setdefault(key, {})[allocation_id] = name
            allocations.append(_allocation(allocation_id, account, requirement.amount))
        return tuple(allocations)

    def adopt(self, key: str, uses: Collection[CapacityUse], now: float) -> bool:
        """Count what a log says that `key` holds; False, and nothing has changed, where there is no room for it."""
        self._refill(now)
        wanted: dict[str, int] = {}
        for use in uses:
            wanted[use.pool] = wanted.get(use.pool, 0) + _units(use.amount)
        if any(name not in self._accounts or self._accounts[name].free < amount for name, amount in wanted.items()):
            return False
        for use in uses:
            self._accounts[use.pool].take(use.allocation_id, key, _units(use.amount), now)
            self._holding.setdefault(key, {})[use.allocation_id] = use.pool
        return True

    def release(self, key: str, *, unused: bool = False) -> bool:
        """All that it holds is given back, of a budget only what is `unused`; False where it holds nothing."""
        held = self._holding.pop(key, None)
        for allocation_id, name in (held or {}).items():
            self._accounts[name].give_back(allocation_id, unused=unused)
        return held is not None

    def release_one(self, key: str, allocation_id: str) -> bool:
        """One allocation of it is given back; False where it holds no such."""
        held = self._holding.get(key, {})
        name = held.pop(allocation_id, None)
        if name is None:
            return False
        self._accounts[name].give_back(allocation_id, unused=False)
        if not held:
            del self._holding[key]
        return True

    def could_have(self, key: str, now: float) -> bool:
        """Whether what it asks for is free, whoever stands before it."""
        self._refill(now)
        return self._choice(self._asking[key].requirements, self._free()) is not None

    def shortages(self, key: str) -> tuple[Shortage, ...]:
        """Of each requirement, how much there is for it; empty where it asks for nothing."""
        asking = self._asking.get(key)
        return tuple(self._shortage(each) for each in asking.requirements) if asking is not None else ()

    def holders(self, types: Collection[str]) -> list[str]:
        """The keys that hold some of these types, each once, whoever was first first."""
        accounts = [each for each in self._accounts.values() if each.pool.type in types]
        return list(dict.fromkeys(key for account in accounts for key, *_ in account.held.values()))

    def types_of(self, key: str) -> _Types:
        """What it asks for; nothing, where it does not ask."""
        asking = self._asking.get(key)
        return asking.types if asking is not None else frozenset()

    def states(self, now: float) -> list[PoolState]:
        """The pools in their order."""
        self._refill(now)
        return [
            PoolState(each.pool, _amount(each.free), tuple(dict.fromkeys(key for key, *_ in each.held.values())))
            for each in self._accounts.values()
        ]

    def next_time(self, now: float) -> float | None:
        """When something of a budget comes back, or somebody's patience ends, while somebody asks; or None."""
        if not self._asking:
            return None
        times = [each.spent[0][0] for each in self._accounts.values() if each.spent]
        for line in self._lines.values():
            end = next(iter(line.by_age.values())).since + PATIENCE_SECONDS
            if end >= now:
                times.append(end + _MOMENT)
        return min(times, default=None)

    def _in_order(self, now: float) -> list[_Asking]:
        """The first of each line, in the order in which they are served."""
        found = [line.first(now) for line in self._lines.values()]
        return [asking for _, asking in sorted(found, key=lambda each: (each[0], each[1].key))]

    def _refill(self, now: float) -> None:
        for account in self._accounts.values():
            account.refill(now)

    def _free(self) -> dict[str, int]:
        return {name: each.free for name, each in self._accounts.items()}

    def _choice(self, requirements: Sequence[CapacityRequirement], free: dict[str, int]) -> list[str] | None:
        """A pool for each requirement, or None where they cannot all be met.

        The pickiest and the largest choose first, each the pool of which the largest share is free.
        """
        options = [[pool for pool in self._accounts.values() if pool.pool.suits(each)] for each in requirements]
        order = sorted(range(len(requirements)), key=lambda n: (len(options[n]), -requirements[n].amount, n))
        chosen = [""] * len(requirements)
        for number in order:
            amount = _units(requirements[number].amount)
            fitting = [each for each in options[number] if free[each.pool.id] >= amount]
            if not fitting:
                return None
            best = max(fitting, key=lambda each: free[each.pool.id] / each.total)
            free[best.pool.id] -= amount
            chosen[number] = best.pool.id
        return chosen

    def _shortage(self, requirement: CapacityRequirement) -> Shortage:
        suiting = [each for each in self._accounts.values() if each.pool.suits(requirement)]
        best = max(suiting, key=lambda each: each.free, default=None)
        free, capacity = (_amount(best.free), best.pool.capacity) if best is not None else (0.0, 0.0)
        return Shortage(requirement.type, requirement.amount, free, capacity)


_ABOVE_ALL = 2_000_001
_MOMENT = 0.001


def _units(amount: float) -> int:
    return round(amount / LEAST_AMOUNT)


def _amount(units: int) -> float:
    return units / _units(1.0)  # the nearest float; a product with 0.000001 would not be that


def _allocation(allocation_id: str, account: _Account, amount: float) -> Allocation:
    pool = account.pool
    return Allocation(
        id=allocation_id,
        pool=pool.id,
        type=pool.type,
        amount=amount,
        capacity=pool.capacity,
        available=_amount(account.free),
        cost_per_unit_hour=pool.cost_per_unit_hour,
        attributes=dict(pool.attributes),
    )
