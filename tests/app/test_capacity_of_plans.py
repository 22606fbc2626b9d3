"""Steps of a plan share the pools with all other work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from planning import ME, ended, heard, started, until

from roles.definition import Role
from vespera_exec.app.plans.views import CheckPlan
from vespera_exec.engine.plans.strategies import RecoveryContext, RecoveryResult
from vespera_exec.errors import ExecutionError, InvalidPlan
from vespera_exec.model.capacity import CapacityRequirement
from vespera_exec.model.enums import RecoveryAction

if TYPE_CHECKING:
    from worker_calls import Opening

    from roles.context import Context
    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import Handle


async def test_steps_run_side_by_side_as_far_as_there_is_capacity_and_the_plan_shows_it(opening: Opening) -> None:
    running, most, go = set[str](), 0, anyio.Event()

    async def train(context: Context) -> str:
        nonlocal most
        running.add(context.execution_id or "")
        most = max(most, len(running))
        await go.wait()
        await anyio.sleep(0.05)
        running.discard(context.execution_id or "")
        return "trained"

    async with opening(capacity="gpu=2", max_concurrent=6) as vespera:
        vespera.roles.add(Role.from_callable(train, name="train", in_loop=True, inputs=None))
        steps = [{"id": f"s{number}", "role": "train", "capacity": {"gpu": 1}} for number in range(6)]
        handle = await started(vespera, *steps)
        waiting = await heard(vespera, handle, "step_waiting")
        assert waiting["message"] == "Waiting for gpu: 1 wanted, 0 of 2 free"
        await until(lambda: len(running) == 2)
        go.set()
        assert (await ended(vespera, handle)).status == "completed"
        assert most == 2
        log = (await vespera.read_events(ME, handle.session_id, max_events=1000)).events
        for kind in ("resource_allocated", "resource_released"):
            told = [event["step_id"] for event in log if event["type"] == kind]
            assert sorted(told) == [step["id"] for step in steps]
        [pool] = vespera.capacity.view(ME).pools
        assert (pool.available, pool.holders) == (2, [])


async def test_a_recovery_strategy_sees_what_is_free(opening: Opening) -> None:
    seen: list[object] = []

    class Looking:
        id = name = description = "looking"
        applicable_errors = ("NO_ROOM",)

        async def execute(self, context: RecoveryContext) -> RecoveryResult:
            seen.extend(context.resources)
            return RecoveryResult(success=True, action=RecoveryAction.SKIP)

    async def train(context: Context) -> str:
        raise ExecutionError("no room", code="NO_ROOM")

    async with opening(capacity="gpu=2,cpu=4") as vespera:
        vespera.strategies.add(Looking())
        vespera.roles.add(Role.from_callable(train, name="train", in_loop=True, inputs=None))
        async with vespera.capacity.held({"gpu": 0.5}):
            handle = await started(vespera, {"id": "a", "role": "train", "capacity": {"cpu": 4}})
            assert (await ended(vespera, handle)).status == "completed"
    assert seen == [
        {"name": "gpu", "type": "gpu", "total": 2, "free": 1.5},
        {"name": "cpu", "type": "cpu", "total": 4, "free": 4},
    ]


async def test_a_plan_is_refused_whose_step_or_role_needs_what_no_pool_has(opening: Opening) -> None:
    async def train(context: Context) -> str:
        return "trained"

    async with opening(capacity="gpu=2") as vespera:
        greedy = (CapacityRequirement(type="tpu", amount=1),)
        vespera.roles.add(Role.from_callable(train, name="train", in_loop=True, inputs=None))
        vespera.roles.add(Role.from_callable(train, name="greedy", in_loop=True, inputs=None, capacity=greedy))
        steps = [
            {"id": "small", "role": "train", "capacity": {"gpu": 2}},
            {"id": "large", "role": "train", "capacity": {"gpu": 3}},
            {"id": "strange", "role": "greedy"},
            {"id": "tamed", "role": "greedy", "capacity": {"gpu": 1}},
        ]
        checked = await vespera.plans.check(ME, CheckPlan(plan={"name": "Plan", "steps": steps}))
        assert [(each.step, each.problem) for each in checked.problems] == [
            ("large", "capacity gpu: 3 wanted; the largest pool has 2"),
            ("strange", "capacity tpu: there is no pool of it; there is gpu"),
        ]
        with pytest.raises(InvalidPlan):
            await started(vespera, *steps)


async def allocations(vespera: Vespera, handle: Handle) -> list[tuple[str, str]]:
    """What the plan's log tells of them: which were given and which came back, in order, each by its first letters."""
    log = (await vespera.read_events(ME, handle.session_id, max_events=1000)).events
    told = [event for event in log if event["type"] in ("resource_allocated", "resource_released")]
    return [(event["type"], each["allocation_id"]) for event in told for each in event["details"]["allocations"]]


async def test_what_a_step_held_when_its_owner_went_comes_back_in_the_log_of_its_plan(opening: Opening) -> None:
    goes_on = anyio.Event()

    async def train(context: Context) -> str:
        await goes_on.wait()
        return "trained"

    role = Role.from_callable(train, name="train", in_loop=True, on_interrupt="resume")
    async with opening(capacity="gpu=1") as vespera:
        vespera.roles.add(role)
        handle = await started(vespera, {"id": "a", "role": "train", "capacity": {"gpu": 1}})
        await heard(vespera, handle, "resource_allocated", "a")
    goes_on.set()
    async with opening(capacity="gpu=1", roles=[role]) as vespera:
        assert (await ended(vespera, handle)).status == "completed"
        told = await allocations(vespera, handle)
    (_, first), _, (_, second), _ = told
    assert [kind for kind, _ in told] == ["resource_allocated", "resource_released"] * 2
    assert [each for _, each in told] == [first, first, second, second]


async def test_what_a_step_held_when_its_plan_went_back_comes_back_in_the_log_of_the_plan(opening: Opening) -> None:
    waits, began = [True, False], anyio.Event()

    async def train(context: Context) -> str:
        began.set()
        if waits.pop(0):
            await anyio.sleep_forever()
        return "trained"

    async with opening(capacity="gpu=1") as vespera:
        vespera.roles.add(Role.from_callable(train, name="train", in_loop=True, grace_seconds=0.05))
        handle = await started(vespera, {"id": "a", "role": "train", "capacity": {"gpu": 1}})
        await heard(vespera, handle, "resource_allocated", "a")
        await began.wait()
        made = await vespera.checkpoints.create(ME, handle.task_id)
        await vespera.checkpoints.restore(ME, made.checkpoint_id)
        assert (await ended(vespera, handle)).status == "completed"
        kinds = [kind for kind, _ in await allocations(vespera, handle)]
    assert kinds == ["resource_allocated", "resource_released"] * 2
