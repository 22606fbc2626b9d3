"""Whatever is done with work that shares capacity, its logs never hold more than there is, and all of it comes back."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN
from worker_calls import ME, Defining, Opening, conclude, started

from roles.definition import RetryPolicy, Role
from vespera_exec.app.views import InputAnswer
from vespera_exec.app.workers.views import Claim
from vespera_exec.errors import ExecutionError, VesperaError

if TYPE_CHECKING:
    from roles.context import Context
    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import Handle

POOLS = {"gpu": 2.0, "cpu": 1.0}
ASKED: tuple[dict[str, float], ...] = ({"gpu": 1.0}, {"gpu": 2.0}, {"cpu": 0.3}, {"cpu": 0.7, "gpu": 1.0}, {})
ACTS = ("start",) * 6 + ("ask",) * 2 + ("worker",) * 2 + (
    "claim", "outsider", "pause", "resume", "cancel", "answer", "back", "requeue", "pass"
)  # fmt: skip
LARGE = pytest.mark.full


class History:
    """Does things, one after the other, as a seed has it."""

    def __init__(self, vespera: Vespera, seed: int) -> None:
        self.vespera = vespera
        self.dice = random.Random(seed)
        self.handles: list[Handle] = []

        async def work(context: Context) -> str:
            for _ in range(self.dice.randint(0, 3)):
                await context.pause_point()
                await anyio.sleep(self.dice.random() * 0.02)
            if self.dice.random() < 0.3:
                raise ExecutionError("it broke", code="BROKE")
            return "done"

        retry = RetryPolicy(max_retries=2, retry_on=("BROKE",), backoff_seconds=0.02)
        common: dict[str, Any] = {"in_loop": True, "inputs": None, "grace_seconds": 0.05, "retry": retry}
        vespera.roles.add(Role.from_callable(work, name="work", **common))
        vespera.roles.add(Role.from_callable(work, name="asking", approval=True, **common))

    async def play(self, acts: int) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(acts):
                act = self.dice.choice(ACTS)
                if act in ("claim", "outsider"):
                    group.start_soon(self.do, act)
                else:
                    await self.do(act)
            with anyio.fail_after(WITHIN):
                while not self.vespera.is_idle:
                    await self.let_all_go_on()
                    await anyio.sleep(0.02)

    async def do(self, act: str) -> None:
        vespera, handle = self.vespera, self.dice.choice(self.handles) if self.handles else None
        capacity = self.dice.choice(ASKED)
        try:
            match act:
                case "start" | "ask" | "worker":
                    role = {"start": "work", "ask": "asking", "worker": "review"}[act]
                    limit = self.dice.choice((None, None, 0.03))
                    self.handles.append(await started(vespera, role, capacity=capacity, timeout_seconds=limit))
                case "claim":
                    await vespera.workers.claim(ME, Claim(wait_ms=0))  # and never heard of again
                case "outsider":
                    async with vespera.capacity.held(capacity, wait_ms=self.dice.randint(0, 200)):
                        await anyio.sleep(0.02)
                case "pass":
                    await anyio.sleep(0.02)
                case _ if handle is not None:
                    await self._act_on(act, handle.task_id)
                case _:
                    pass
        except VesperaError:
            pass  # it is not to be done with this one now

    async def _act_on(self, act: str, task_id: str) -> None:
        vespera = self.vespera
        match act:
            case "pause":
                await vespera.pause(ME, task_id, wait_ms=0)
            case "resume":
                await vespera.resume(ME, task_id)
            case "cancel":
                await vespera.cancel(ME, task_id)
            case "answer":
                await vespera.answer_input(ME, task_id, {"approval": InputAnswer(action="accept")})
            case "back":
                made = await vespera.checkpoints.create(ME, task_id)
                await vespera.checkpoints.restore(ME, made.checkpoint_id)
            case _:
                await vespera.dead_letters.requeue(ME, [task_id])

    async def let_all_go_on(self) -> None:
        for handle in self.handles:
            for act in ("resume", "answer"):
                try:
                    await self._act_on(act, handle.task_id)
                except VesperaError:
                    continue
        claim = await self.vespera.workers.claim(ME, Claim(wait_ms=0))
        if claim.claimed:
            await conclude(self.vespera, claim, result=1)


@pytest.mark.promise("capacity")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=LARGE) for seed in range(1, 100))])
async def test_no_log_ever_shows_more_in_use_than_there_is_and_all_comes_back(
    opening: Opening, define: Defining, seed: int
) -> None:
    define("review", "lease_seconds: 1", "inputs: {}", "on_interrupt: resume")
    async with opening(capacity="gpu=2,cpu=1", max_concurrent=3) as vespera:
        await History(vespera, seed).play(60)
        assert {pool.id: (pool.available, pool.holders) for pool in vespera.capacity.view(ME).pools} == {
            name: (amount, []) for name, amount in POOLS.items()
        }
        held: dict[str, tuple[str, float]] = {}
        kinds = ("resource_allocated", "resource_released")
        queries = vespera._store.queries  # pyright: ignore[reportPrivateUsage]
        for event in await queries.events_after(0, types=kinds, limit=10_000):
            told = event.message()["details"]["allocations"]
            if event.event_type == "resource_allocated":
                held |= {each["allocation_id"]: (each["pool"], each["amount"]) for each in told}
            else:
                for each in told:
                    del held[each["allocation_id"]]
            for name, amount in POOLS.items():
                assert sum(each for pool, each in held.values() if pool == name) <= amount + 1e-9, event
        assert held == {}
