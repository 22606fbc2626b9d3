"""An idempotency key stands for one request: what its use again answers."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, closing
from typing import Any

import pytest

from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute, NewTask
from vespera_exec.errors import Conflict
from vespera_exec.model.principal import Caller

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]
ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})


def command(*argv: str, **more: Any) -> Execute:
    return Execute(title="a command", role="command", inputs={"argv": list(argv)}, **more)


async def test_a_key_that_stands_for_another_request_is_a_conflict(vespera: Vespera) -> None:
    first = await vespera.execute_task(ME, command("true", idempotency_key="k", wait_ms=25_000))
    for other in (
        command("false", idempotency_key="k"),
        command("true", idempotency_key="k", priority=9),
        command("true", idempotency_key="k", timeout_seconds=60),
        Execute(task_id=first.task_id, idempotency_key="k"),
    ):
        with pytest.raises(Conflict) as refused:
            await vespera.execute_task(ME, other)
        assert refused.value.error_code == "CONFLICT"
        assert "another key" in refused.value.hint
    assert (await vespera.execute_task(ME, command("true", idempotency_key="k"))).run_id == first.run_id
    assert (await vespera.list_tasks(ME)).total == 1

    made = await vespera.create_task(ME, NewTask(title="t", inputs={"a": 1, "b": 2}, idempotency_key="k"))
    again = NewTask(title="t", inputs={"b": 2, "a": 1}, idempotency_key="k")
    assert (await vespera.create_task(ME, again)).task_id == made.task_id
    with pytest.raises(Conflict):
        await vespera.create_task(ME, NewTask(title="t", inputs={"a": 1, "b": 3}, idempotency_key="k"))


async def test_a_key_kept_without_its_request_answers_whatever_is_asked(opening: Opening) -> None:
    async with opening() as vespera:
        first = await vespera.execute_task(ME, command("true", idempotency_key="k", wait_ms=25_000))
        database = vespera.settings.database
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE idempotency SET digest = NULL")
    async with opening() as vespera:
        assert (await vespera.execute_task(ME, command("false", idempotency_key="k"))).run_id == first.run_id
