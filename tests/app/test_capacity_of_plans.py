"""Steps of a plan share the pools with all other work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from planning import ME, ended, heard, started

from roles.definition import Role
from vespera_exec.app.plan_views import CheckPlan
from vespera_exec.errors import InvalidPlan
from vespera_exec.model.capacity import CapacityRequirement

if TYPE_CHECKING:
    from worker_calls import Opening

    from roles.context import Context


async def test_steps_run_side_by_side_as_far_as_there_is_capacity_and_the_plan_shows_it(opening: Opening) -> None:
    running, most = set[str](), 0

    async def train(context: Context) -> str:
        nonlocal most
        running.add(context.execution_id or "")
        most = max(most, len(running))
        await anyio.sleep(0.05)
        running.discard(context.execution_id or "")
        return "trained"

    async with opening(capacity="gpu=2", max_concurrent=6) as vespera:
        vespera.roles.add(Role.from_callable(train, name="train", in_loop=True, inputs=None))
        steps = [{"id": f"s{number}", "role": "train", "capacity": {"gpu": 1}} for number in range(6)]
        handle = await started(vespera, *steps)
        waiting = await heard(vespera, handle, "step_waiting")
        assert waiting["message"] == "Waiting for gpu: 1 wanted, 0 of 2 free"
        assert (await ended(vespera, handle)).status == "completed"
        assert most == 2
        log = (await vespera.read_events(ME, handle.session_id, max_events=1000)).events
        for kind in ("resource_allocated", "resource_released"):
            told = [event["step_id"] for event in log if event["type"] == kind]
            assert sorted(told) == [step["id"] for step in steps]
        [pool] = vespera.capacity.view(ME).pools
        assert (pool.available, pool.holders) == (2, [])


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
