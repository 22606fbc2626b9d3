"""Reading the log of a task that is executed again: what ended before keeps nobody waiting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN
from mcp_doors import ME, Doors, call, opened, waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    async with opened(tmp_path) as doors:
        yield doors


async def executed_again(doors: Doors) -> dict[str, Any]:
    """A task whose first run has ended, and whose second is at its gate."""
    doors.gate.open.set()
    async with doors.client("memory-modern") as client:
        first = await call(client, "execute_task", title="Twice", role="gated", wait_ms=25_000)
        assert first["done"]
        doors.gate.open = anyio.Event()
        again = await call(client, "execute_task", task_id=first["task_id"], inputs={"steps": 3})
        await waiting(doors.vespera, again["session_id"], "progress_update")
        return again


async def test_a_page_with_the_end_of_an_earlier_run_is_there_at_once(doors: Doors) -> None:
    again = await executed_again(doors)
    with anyio.fail_after(WITHIN):
        page = await doors.vespera.read_events(ME, again["task_id"], max_events=500)
    assert not page.done
    types = [event["type"] for event in page.events]
    assert types.count("execution_started") == 2
    assert types.count("execution_completed") == 1
    doors.gate.open.set()


async def test_a_full_page_ends_where_it_is_full(doors: Doors) -> None:
    again = await executed_again(doors)
    whole = (await doors.vespera.read_events(ME, again["task_id"], max_events=500)).events
    ends = [number for number, event in enumerate(whole, 1) if event["type"] == "execution_completed"]
    doors.gate.open.set()
    with anyio.fail_after(WITHIN):
        page = await doors.vespera.read_events(ME, again["task_id"], max_events=ends[0])
    assert page.events == whole[: ends[0]]
    assert not page.done
