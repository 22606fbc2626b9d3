"""What is shown of the capacity pools."""

from __future__ import annotations

from datetime import datetime

from vespera_exec.app.shapes import Json, View


class HolderView(View):
    """A task that holds some of a pool."""

    task_id: str
    session_id: str
    title: str


class PoolView(View):
    """A pool. `available` is what is free of `capacity`; those that hold the rest are counted where not shown."""

    id: str
    type: str
    capacity: float
    available: float
    cost_per_unit_hour: float
    attributes: dict[str, Json]
    window_seconds: float
    holders: list[HolderView]
    other_holders: int


class WaitingView(View):
    """A task that waits for capacity, and for what."""

    task_id: str
    session_id: str
    title: str
    waiting_for: str
    since: datetime | None


class CapacityView(View):
    """All pools. `waiting` are the first that the caller sees; `waiting_total` counts all that stand in line."""

    pools: list[PoolView]
    waiting: list[WaitingView]
    waiting_total: int
