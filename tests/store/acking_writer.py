"""A program that appends to a journal and says on stdout what has been acknowledged, until it is killed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio

from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.progress import ProgressReport
from vespera_exec.model.task import Task
from vespera_exec.store.journal import Journal


async def work(journal: Journal) -> None:
    task = Task(title="Killed in the middle", sink=journal)
    session = task.start_execution("role")
    session.update_status(ExecutionStatus.RUNNING)
    await journal.sync()
    step = 0
    while True:
        step += 1
        session.report(ProgressReport.steps(step))
        await journal.sync()
        # One write, so that the reader sees a whole line or none.
        os.write(1, f"{session.session_id} {task.ledger.sequence(session.session_id)} {step}\n".encode())


async def main(database: Path) -> None:
    async with Journal.open(database) as journal, anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(work, journal)


if __name__ == "__main__":
    anyio.run(main, Path(sys.argv[1]))
