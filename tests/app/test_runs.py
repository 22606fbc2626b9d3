"""A run as a whole, by its id: what is told of it, and when it may have changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN

from roles.definition import Role
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute
from vespera_exec.errors import PermissionDenied, RunExpired, TaskNotFound
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from vespera_exec.app.views import Handle, Run

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]
ME = Caller(cwd="/")


async def held(vespera: Vespera) -> tuple[Handle, anyio.Event]:
    """A run whose work has reported 40 % and waits for the event."""
    go_on = anyio.Event()

    async def work(context: Any) -> dict[str, int]:
        context.progress(40, "half way")
        await go_on.wait()
        return {"made": 3}

    vespera.roles.add(Role.from_callable(work, name="held", in_loop=True, inputs=None, grace_seconds=0.1))
    return await vespera.execute_task(ME, Execute(title="Hold", role="held")), go_on


async def until(vespera: Vespera, run_id: str, claim: Callable[[Run], bool]) -> Run:
    with anyio.fail_after(WITHIN):
        while not claim(run := await vespera.get_run(ME, run_id)):
            await vespera.run_changed(run, within=5)
    return run


async def test_a_run_is_told_while_it_is_active_and_when_it_has_ended(vespera: Vespera) -> None:
    handle, go_on = await held(vespera)
    run = await until(vespera, handle.run_id, lambda run: run.message == "half way")
    assert (run.status, run.phase, run.role, run.done) == ("running", "execution", "held", False)
    assert (run.result, run.error, run.ended_at, run.expires_at) == (None, None, None, None)
    go_on.set()
    ended = await until(vespera, handle.run_id, lambda run: run.done)
    assert (ended.status, ended.percentage, ended.result) == ("completed", 100, {"made": 3})
    assert ended.created_at == run.created_at
    assert ended.ended_at == ended.updated_at
    page = await vespera.read_events(ME, handle.task_id, cursor=ended.cursor)
    assert not [event for event in page.events if event["execution_id"]]


async def test_no_event_lies_between_a_view_and_its_cursor(vespera: Vespera) -> None:
    handle, go_on = await held(vespera)
    seen = await vespera.get_run(ME, handle.run_id)
    go_on.set()
    ended = await until(vespera, handle.run_id, lambda run: run.done)
    page = await vespera.read_events(ME, handle.task_id, cursor=seen.cursor, max_events=1000)
    later = [event["progress"]["message"] for event in page.events if event["type"] == "progress_update"]
    assert "half way" in later or seen.message == "half way"
    assert max(event["cursor"] for event in page.events if event["execution_id"]) == ended.cursor


async def test_an_end_is_told_only_when_it_is_on_disk(vespera: Vespera) -> None:
    handle, go_on = await held(vespera)
    await until(vespera, handle.run_id, lambda run: run.message == "half way")
    go_on.set()
    statuses: list[str] = []

    def noted(run: Run) -> bool:
        statuses.append(run.status)
        return run.done

    ended = await until(vespera, handle.run_id, noted)
    assert statuses.count("completed") == 1
    assert ended.result == {"made": 3}


async def test_who_looked_before_the_end_is_not_left_waiting_for_what_has_come(vespera: Vespera) -> None:
    handle, go_on = await held(vespera)
    before = await until(vespera, handle.run_id, lambda run: run.message == "half way")
    go_on.set()
    await until(vespera, handle.run_id, lambda run: run.done)
    with anyio.fail_after(WITHIN):
        await vespera.run_changed(before, within=math.inf)


async def test_where_nothing_changes_the_wait_ends_by_itself(vespera: Vespera) -> None:
    handle, go_on = await held(vespera)
    run = await until(vespera, handle.run_id, lambda run: run.message == "half way")
    with anyio.fail_after(WITHIN):
        await vespera.run_changed(run, within=0.05)
    again = await vespera.get_run(ME, handle.run_id)
    assert again.model_copy(update={"cursor": run.cursor}) == run
    go_on.set()


async def test_events_of_a_task_are_waited_for_from_a_cursor(vespera: Vespera) -> None:
    handle, go_on = await held(vespera)
    run = await until(vespera, handle.run_id, lambda run: run.message == "half way")
    cursor = run.cursor
    with anyio.fail_after(WITHIN):  # what is on the way to the disk comes first
        while (heard := await vespera.event_after(ME, handle.task_id, cursor=cursor, within=0.1)) is not None:
            assert heard > cursor
            cursor = heard
    go_on.set()
    last = await vespera.event_after(ME, handle.session_id, cursor=cursor, within=10)
    assert last is not None
    assert last > cursor


async def test_only_a_whole_run_id_of_ones_own_is_found(vespera: Vespera) -> None:
    handle, go_on = await held(vespera)
    for unknown in (handle.task_id, handle.run_id[:12], "no-such-run", "", "ä", "x" * 5000):
        with pytest.raises(TaskNotFound):
            await vespera.get_run(ME, unknown)
    foreign = Caller(principal="token:ann", over_tcp=True, sees_only="token:ann")
    for _ in range(2):
        with pytest.raises(TaskNotFound):
            await vespera.get_run(foreign, handle.run_id)
        go_on.set()
        await until(vespera, handle.run_id, lambda run: run.done)
    with pytest.raises(PermissionDenied):
        await vespera.get_run(Caller(scopes=frozenset({"operate"})), handle.run_id)


async def test_an_expired_run_is_named_as_such_to_whom_it_belonged(opening: Opening) -> None:
    async with opening(mcp_task_ttl_seconds=0.001) as vespera:
        handle, go_on = await held(vespera)
        run = await vespera.get_run(ME, handle.run_id)
        go_on.set()
        with pytest.raises(RunExpired, match="expired"):
            await until(vespera, handle.run_id, lambda run: run.done)
        with anyio.fail_after(WITHIN):
            await vespera.run_changed(run, within=math.inf)
        foreign = Caller(principal="token:ann", over_tcp=True, sees_only="token:ann")
        with pytest.raises(TaskNotFound, match="not found"):
            await vespera.get_run(foreign, handle.run_id)
        assert (await vespera.get_status(ME, handle.task_id)).status == "completed"
