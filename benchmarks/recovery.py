"""How long an owner takes to take over 1,000 executions that a dead one left running.

Run: `python benchmarks/recovery.py [EXECUTIONS]`. From the call of `Vespera.open` until it serves: the lock, the
check of the database after an unclean end, the sweep of all processes, the decisions, and their commit.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import anyio
import orjson

from vespera_exec.app.service import Vespera
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus
from vespera_exec.model.ledger import RequestRecord
from vespera_exec.model.principal import Caller
from vespera_exec.model.progress import ProgressReport
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.store import Store

ROUNDS = 3
BUDGET_SECONDS = 2.0
ROLES = {"command": "ends interrupted", "survey": "goes on"}


async def main(executions: int) -> None:
    for role, becomes in ROLES.items():
        took = [await taken_over(role, executions) for _ in range(ROUNDS)]
        median = statistics.median(took)
        kept = "within budget" if median < BUDGET_SECONDS else "BUDGET EXCEEDED"
        print(
            f"{executions} running, role {role} {becomes:16} {median:5.2f} s   budget < {BUDGET_SECONDS:g} s   {kept}"
        )


async def taken_over(role: str, executions: int) -> float:
    """Seconds until the next owner serves."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.load({"HOME": folder}, data_dir=Path(folder) / "data", roles_dir=Path(folder) / "roles")
        async with Vespera.open(settings=settings):
            pass  # makes the directory this user's own
        async with Store.open(settings) as store:
            for number in range(executions):
                leave_running(store, role, number, folder)
            await store.journal.sync()
        began = time.perf_counter()
        async with Vespera.open(settings=settings) as vespera:
            took = time.perf_counter() - began
            assert (await vespera.list_tasks(Caller())).total == executions
            assert (vespera.describe().queued > executions // 2) == (role == "survey")
    return took


def leave_running(store: Store, role: str, number: int, folder: str) -> None:
    inputs = {"argv": ["true"]} if role == "command" else {"path": folder}
    task = Task(title=f"Interrupted {number}", assigned_role=role, inputs=inputs, sink=store.journal)
    asked: dict[str, object] = {
        "principal": "local",
        "scopes": ["operate", "read"],
        "over_tcp": False,
        "cwd": folder,
        "env": {},
    }
    with task.ledger:
        session = task.enqueue_execution(role, owner="daemon:0:dead")
        task.ledger.keep(RequestRecord(run_id=session.run_id, body=orjson.dumps(asked)))
    session.start_execution()
    session.update_status(ExecutionStatus.RUNNING)
    session.enter_phase(ExecutionPhase.EXECUTION)
    session.report(ProgressReport(current=40.0, message="Half way"), ExecutionPhase.EXECUTION)
    session.record_checkpoint({"page": number})


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
