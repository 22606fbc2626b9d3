"""A worker's calls and what becomes of them, for the tests of work that is done elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
from deadlines import WITHIN

from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute, Handle
from vespera_exec.app.workers.views import Claim, Claimed, Conclude, Concluded, Report, Reported
from vespera_exec.model.principal import Caller

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]
Defining = Callable[..., None]
ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})
ANN = Caller("ann", frozenset({"worker"}), over_tcp=True, sees_only="ann")
BEN = Caller("ben", frozenset({"worker"}), over_tcp=True, sees_only="ben")


async def started(vespera: Vespera, role: str = "review", **more: Any) -> Handle:
    return await vespera.execute_task(ME, Execute(title=more.pop("title", "Look at it"), role=role, **more))


async def claimed(vespera: Vespera, caller: Caller = ME, *, wait_ms: int = 10_000, **asked: Any) -> Claimed:
    claim = await vespera.workers.claim(caller, Claim(wait_ms=wait_ms, **asked))
    assert claim.claimed
    return claim


async def report(vespera: Vespera, claim: Claimed, caller: Caller = ME, **said: Any) -> Reported:
    asked = Report(session_id=claim.session_id or "", lease=claim.lease or "", **said)
    return await vespera.workers.report(caller, asked)


async def conclude(vespera: Vespera, claim: Claimed, caller: Caller = ME, **said: Any) -> Concluded:
    asked = Conclude(session_id=claim.session_id or "", lease=claim.lease or "", **said)
    return await vespera.workers.conclude(caller, asked)


async def events(vespera: Vespera, handle: Handle) -> list[Any]:
    return (await vespera.read_events(ME, handle.task_id, max_events=1000)).events


async def became(vespera: Vespera, handle: Handle, status: str) -> Any:
    """Its status, once it is that; fails after a deadline."""
    cursor = 0
    with anyio.fail_after(WITHIN):
        while True:
            now = await vespera.get_status(ME, handle.task_id)
            if now.status == status:
                return now
            cursor = (await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=25_000)).next_cursor


async def recorded(vespera: Vespera, handle: Handle, kind: str) -> None:
    """Returns once the log has an event of this kind."""
    cursor = 0
    with anyio.fail_after(WITHIN):
        while True:
            page = await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=25_000)
            if kind in [event["type"] for event in page.events]:
                return
            cursor = page.next_cursor


async def heard(vespera: Vespera, claim: Claimed, told: Callable[[Reported], bool], **said: Any) -> Reported:
    """The first answer to a report that tells this."""
    with anyio.fail_after(WITHIN):
        while True:
            answer = await report(vespera, claim, **said)
            if told(answer):
                return answer
            await anyio.sleep(0.01)


async def until_refused(vespera: Vespera, claim: Claimed) -> None:
    """Reports, one after the other, until one is refused."""
    while True:
        await report(vespera, claim)
