"""Questions, pauses, cancels, lost workers and new owners in any order: all ends, nothing is left, the log says why."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN
from worker_calls import ME, Defining, Opening, conclude, report

from roles.definition import Role
from vespera_exec.app.views import Execute, Handle, InputAnswer
from vespera_exec.app.workers.views import Claim, Claimed
from vespera_exec.errors import LeaseLost
from vespera_exec.model.events import ExecutionEvent
from vespera_exec.model.replay import replayed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vespera_exec.app.service import Vespera

ENDS = {"execution_completed", "execution_failed", "execution_cancelled", "execution_timeout"}
ACTIONS = ("accept", "accept", "accept", "decline")
WEIGHTS = {"start": 2, "answer": 3, "pause": 1, "resume": 2, "cancel": 1, "claim": 2, "report": 3, "end": 2, "rest": 2}


async def asks_thrice(context: Any) -> str:
    for number in range(3):
        await context.pause_point()
        context.progress(number * 10.0)
        context.checkpoint(number)
        await anyio.sleep(0.005)
        context.ask(f"q{number}", "More?")
    return "done"


async def wants_approval(context: Any) -> str:
    context.approve("go", "Go?")
    return "done"


class People:
    """Somebody starts, answers, pauses and cancels, somebody works; what they do next is drawn by `seed`."""

    def __init__(self, seed: int) -> None:
        self.drawn = random.Random(seed)
        self.handles: list[Handle] = []
        self.claims: list[Claimed] = []

    async def act(self, vespera: Vespera) -> None:
        do: dict[str, Callable[[Vespera], Awaitable[object]]] = {
            "start": self.start, "answer": self.answer, "pause": self.pause, "resume": self.resume,
            "cancel": self.cancel, "claim": self.claim, "report": self.report, "end": self.end, "rest": self.rest,
        }  # fmt: skip
        if not self.handles:
            await self.start(vespera)
        name = self.drawn.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        with suppress(LeaseLost):  # as of any worker that comes too late
            await do[name](vespera)

    async def start(self, vespera: Vespera) -> None:
        role = self.drawn.choice(["thrice", "approval", "review", "review"])
        self.handles.append(await vespera.execute_task(ME, Execute(title="Work", role=role)))

    async def answer(self, vespera: Vespera) -> None:
        if found := (await vespera.list_inputs(ME)).inputs:
            asked = self.drawn.choice(found)
            given = InputAnswer(action=self.drawn.choice(ACTIONS))
            await vespera.answer_input(ME, asked.run_id, {asked.input.key: given})

    async def pause(self, vespera: Vespera) -> None:
        await vespera.pause(ME, self.one().run_id, wait_ms=self.drawn.choice([0, 50]))

    async def resume(self, vespera: Vespera) -> None:
        await vespera.resume(ME, self.one().run_id)

    async def cancel(self, vespera: Vespera) -> None:
        if self.drawn.random() < 0.3:
            await vespera.cancel(ME, self.one().run_id)

    async def claim(self, vespera: Vespera) -> None:
        claim = await vespera.workers.claim(ME, Claim(wait_ms=self.drawn.choice([0, 20])))
        if claim.claimed:
            self.claims.append(claim)

    async def report(self, vespera: Vespera) -> None:
        said: dict[str, Any] = {"percentage": self.drawn.random() * 90, "checkpoint": 1}
        if self.drawn.random() < 0.4:
            said["state"] = "paused"
        if self.drawn.random() < 0.4:
            said["ask"] = {"key": self.drawn.choice("ab"), "message": "Which?", "kind": "form"}
        if self.claims:
            await report(vespera, self.drawn.choice(self.claims), **said)

    async def end(self, vespera: Vespera) -> None:
        """Of one claim: by its worker, or since that is never heard of again."""
        if self.claims:
            claim = self.claims.pop(self.drawn.randrange(len(self.claims)))
            if self.drawn.random() < 0.7:
                await conclude(vespera, claim)

    async def rest(self, vespera: Vespera) -> None:
        await anyio.sleep(self.drawn.random() * 0.1)

    def one(self) -> Handle:
        return self.drawn.choice(self.handles)

    async def finish(self, vespera: Vespera) -> None:
        """Let all go on until it has ended."""
        with anyio.fail_after(WITHIN):
            for handle in self.handles:
                while not (await vespera.get_status(ME, handle.run_id)).done:
                    await vespera.resume(ME, handle.run_id)
                    for asked in (await vespera.list_inputs(ME)).inputs:
                        await vespera.answer_input(ME, asked.run_id, {asked.input.key: InputAnswer(action="accept")})
                    claim = await vespera.workers.claim(ME, Claim(wait_ms=10))
                    with suppress(LeaseLost):
                        if claim.claimed:
                            await conclude(vespera, claim)


def begin(vespera: Vespera) -> None:
    for name, fn in (("thrice", asks_thrice), ("approval", wants_approval)):
        vespera.roles.add(Role.from_callable(fn, name=name, in_loop=True, inputs=None, on_interrupt="resume"))


async def check_end(vespera: Vespera, handle: Handle) -> None:
    told = (await vespera.read_events(ME, handle.run_id, max_events=1000)).events
    assert len([event for event in told if event["type"] in ENDS]) == 1
    stored = await vespera._store.queries.get_execution(handle.session_id)  # pyright: ignore[reportPrivateUsage]
    assert stored is not None
    assert replayed([ExecutionEvent.from_stream_message(event) for event in told], handle.session_id) == stored
    life = stored[0]
    assert life.completed_at is not None
    assert life.created_at is not None
    lived = (life.completed_at - life.created_at).total_seconds()
    assert life.active_seconds + life.paused_seconds + life.queue_seconds <= lived + 0.05


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_comes_in_whatever_order_all_of_it_ends_once(
    opening: Opening, define: Defining, seed: int
) -> None:
    define("review", "lease_seconds: 0.15", "wait_timeout_seconds: 60")
    people = People(seed)

    async def busy(vespera: Vespera) -> None:
        for _ in range(30):
            await people.act(vespera)

    for _ in range(2):
        async with opening(max_concurrent=2) as vespera:
            begin(vespera)
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(busy, vespera)
    async with opening(max_concurrent=2) as vespera:
        begin(vespera)
        await people.finish(vespera)
        assert vespera.is_idle
        view = vespera.describe()
        assert (view.running, view.queued, view.work) == (0, 0, [])
        assert (await vespera.list_inputs(ME)).total == 0
        for handle in people.handles:
            await check_end(vespera, handle)
