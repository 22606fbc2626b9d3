"""What is told of an execution whose end the disk has not taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
from deadlines import WITHIN

from roles.definition import Role
from vespera_exec.app.views import Execute
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vespera_exec.app.service import Vespera

ME = Caller(cwd="/")


async def until(claim: Callable[[], Awaitable[bool]]) -> None:
    """Returns when `claim` is true; fails after a deadline."""
    with anyio.fail_after(WITHIN):
        while True:
            if await claim():
                return
            await anyio.sleep(0.01)


async def test_an_end_that_the_disk_refuses_is_told_once_there_is_room(vespera: Vespera) -> None:
    begun, let, over = anyio.Event(), anyio.Event(), anyio.Event()

    async def work(context: Any) -> str:
        begun.set()
        await let.wait()
        over.set()
        return "done"

    vespera.roles.add(Role.from_callable(work, name="patient", in_loop=True, inputs=None))
    handle = await vespera.execute_task(ME, Execute(title="A task", role="patient"))
    journal = vespera._store.journal  # pyright: ignore[reportPrivateUsage]
    with anyio.fail_after(WITHIN):
        await begun.wait()
        journal.limit_pages(1)
        let.set()
        await over.wait()

    async def told(status: str) -> bool:
        return (await vespera.get_result(ME, handle.task_id)).status == status

    await until(lambda: told("completing"))
    assert journal.fault is not None
    for any_id in (handle.task_id, handle.session_id):
        result = await vespera.get_result(ME, any_id)
        assert (result.done, result.result) == (False, None)
    journal.limit_pages(1_000_000)
    await until(lambda: told("completed"))
