"""What the engine takes for being on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from deadlines import WITHIN

from vespera_exec.engine.disk import Disk
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.store import Store

if TYPE_CHECKING:
    from pathlib import Path


async def test_what_was_decided_beside_a_refused_decision_is_waited_for(data_dir: Path) -> None:
    async with Store.open(Settings.load({"HOME": str(data_dir)}, data_dir=data_dir)) as store:
        fenced = Task(title="Somebody else writes on it", sink=store.journal)
        session = fenced.enqueue_execution("test", owner="test")
        await store.journal.sync()
        fenced.ledger.resume_at(session.session_id, 1000)
        session.start_execution()
        with anyio.fail_after(WITHIN):
            async with anyio.create_task_group() as group:
                group.start_soon(store.journal.sync)  # it is refused by then, and we have not asked
        beside = Task(title="A task", sink=store.journal).enqueue_execution("test", owner="test")
        with anyio.fail_after(WITHIN):
            await Disk(store.journal).has(session.session_id, beside.session_id)
        assert store.journal.statistics().queued == 0
        assert await store.queries.get_execution(beside.session_id) is not None
