"""What waits for a worker elsewhere: by role, the oldest of the highest priority first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from vespera_exec.engine.queue import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from vespera_exec.engine.jobs import Job

_Types = frozenset[str]


class ClaimQueue:
    """The jobs that are open to claims. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[_Types, WaitingQueue[Job]]] = {}
        """By role, and by the types of capacity that they need: one that waits for its own is passed by others."""
        self._news = anyio.Event()

    def __len__(self) -> int:
        return sum(len(queue) for queues in self._queues.values() for queue in queues.values())

    def put(self, job: Job, *, priority: int, not_before: float | None = None) -> None:
        """Offer it, from `not_before` on."""
        queue = self._queues.setdefault(_role(job), {}).setdefault(_types(job), WaitingQueue())
        queue.put(job.key, job, priority=priority, not_before=not_before)
        self._news.set()

    def discard(self, job: Job) -> None:
        queues = self._queues.get(_role(job), {})
        if (queue := queues.get(_types(job))) is not None:
            queue.discard(job.key)
            if not len(queue):
                del queues[_types(job)]
            if not queues:
                del self._queues[_role(job)]

    def pop(self, roles: Collection[str], now: float, may: Callable[[Job], bool] = lambda _: True) -> Job | None:
        """The next of these roles that `may` be claimed, or None; equals of several roles by age."""
        offered = [found for queue in self._of(roles) if (found := queue.first(now)) is not None]
        for _, job in sorted(offered, key=_rank):
            if may(job):
                self.discard(job)
                return job
        return None

    def stir(self) -> None:
        """There may be something new."""
        self._news.set()

    async def news(self, roles: Collection[str], now: float) -> None:
        """Returns when there may be something new for these roles."""
        if self._news.is_set():
            self._news = anyio.Event()
        times = [time for queue in self._of(roles) if (time := queue.next_time()) is not None]
        with anyio.move_on_after(max(0.0, min(times) - now) if times else None):
            await self._news.wait()

    def _of(self, roles: Collection[str]) -> list[WaitingQueue[Job]]:
        return [queue for role in roles for queue in self._queues.get(role, {}).values()]


def _role(job: Job) -> str:
    return job.session.lifecycle.role_name or ""


def _types(job: Job) -> _Types:
    return frozenset(each.type for each in job.capacity)


def _rank(offered: tuple[int, Job]) -> tuple[int, float]:
    priority, job = offered
    since = job.session.lifecycle.queued_at
    return -priority, since.timestamp() if since is not None else 0.0
