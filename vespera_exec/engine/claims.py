"""What waits for a worker elsewhere: by role, the oldest of the highest priority first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from vespera_exec.engine.queue import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Collection

    from vespera_exec.engine.running import Job


class ClaimQueue:
    """The jobs that are open to claims. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._by_role: dict[str, WaitingQueue[Job]] = {}
        self._news = anyio.Event()

    def __len__(self) -> int:
        return sum(map(len, self._by_role.values()))

    def put(self, job: Job, *, priority: int, not_before: float | None = None) -> None:
        """Offer it, from `not_before` on."""
        queue = self._by_role.setdefault(_role(job), WaitingQueue())
        queue.put(job.key, job, priority=priority, not_before=not_before)
        self._news.set()

    def discard(self, job: Job) -> None:
        if (queue := self._by_role.get(_role(job))) is not None:
            queue.discard(job.key)
            if not len(queue):
                del self._by_role[_role(job)]

    def pop(self, roles: Collection[str], now: float) -> Job | None:
        """The next of these roles, or None; equals of several roles by age."""
        queues = [queue for role in roles if (queue := self._by_role.get(role)) is not None]
        offered = [found for queue in queues if (found := queue.first(now)) is not None]
        if not offered:
            return None
        _, job = min(offered, key=_rank)
        self.discard(job)
        return job

    async def news(self, roles: Collection[str], now: float) -> None:
        """Returns when there may be something new for these roles."""
        if self._news.is_set():
            self._news = anyio.Event()
        queues = [queue for role in roles if (queue := self._by_role.get(role)) is not None]
        times = [time for queue in queues if (time := queue.next_time()) is not None]
        with anyio.move_on_after(max(0.0, min(times) - now) if times else None):
            await self._news.wait()


def _role(job: Job) -> str:
    return job.session.lifecycle.role_name or ""


def _rank(offered: tuple[int, Job]) -> tuple[int, float]:
    priority, job = offered
    since = job.session.lifecycle.queued_at
    return -priority, since.timestamp() if since is not None else 0.0
