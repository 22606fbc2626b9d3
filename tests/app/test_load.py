"""Many runs at once: each is acknowledged soon, and ends once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from crowd import ME, Crowd

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from vespera_exec.app.service import Vespera

ACK_SECONDS = 0.25
ENDS = {"completed", "failed", "cancelled", "timed_out"}


async def ends_of(vespera: Vespera, task_id: str) -> list[str]:
    page = await vespera.read_events(ME, task_id, max_events=1000)
    return [event["status"]["new"] for event in page.events if event["status"]["new"] in ENDS]


@pytest.mark.promise("load")
@pytest.mark.parametrize(
    ("tasks", "at_once"),
    [(200, 50), pytest.param(10_000, 1000, marks=(pytest.mark.full, pytest.mark.timeout(600)))],
)
async def test_a_crowd_of_runs_ends_completely_and_each_once(
    opening: Callable[..., AbstractAsyncContextManager[Vespera]], tasks: int, at_once: int
) -> None:
    crowd = Crowd(at_once=at_once)
    async with opening(max_concurrent=at_once, max_queued=tasks) as vespera:
        vespera.roles.add(crowd.role())
        with anyio.fail_after(500):
            await crowd.run(vespera, tasks)
        assert crowd.most == at_once
        assert len(set(crowd.task_ids)) == tasks
        ends = [await ends_of(vespera, task_id) for task_id in crowd.task_ids]
        assert ends == [["completed"]] * tasks
        assert vespera.is_idle
    if tasks == 10_000:
        assert sorted(crowd.acks)[int(tasks * 0.99)] < ACK_SECONDS
