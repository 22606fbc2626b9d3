"""The database is moved away under its owner: nothing new is promised until it is back."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vespera_exec.app.views import Execute
from vespera_exec.errors import StoreUnavailable
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from vespera_exec.app.service import Vespera

ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})


def command(*argv: str) -> Execute:
    return Execute(title="command", role="command", inputs={"argv": list(argv)})


async def test_no_id_is_answered_for_what_nobody_would_find_again(vespera: Vespera) -> None:
    runs = await vespera.execute_task(ME, command("sleep", "300"))
    database = vespera.settings.database
    elsewhere = database.rename(database.with_name("elsewhere"))
    with pytest.raises(StoreUnavailable, match="removed or replaced"):
        await vespera.execute_task(ME, command("true"))
    assert "removed or replaced" in str(vespera.describe().store_fault)
    (check,) = [each for each in (await vespera.doctor(ME)).checks if each.name == "database"]
    assert (check.level, "removed while in use" in check.what) == ("error", True)
    elsewhere.rename(database)
    assert vespera.describe().store_fault is None
    ended = await vespera.execute_task(ME, command("true").model_copy(update={"wait_ms": 10_000}))
    assert ended.status == "completed"
    assert (await vespera.cancel(ME, runs.task_id, wait_ms=25_000)).status == "cancelled"
    assert (await vespera.list_tasks(ME)).total == 2
