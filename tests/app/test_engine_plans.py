"""Plans in the engine of document 003: executed, monitored, paused, put back, recovered, given capacity."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN
from engine_harness import Held, collected, engine_over

from roles.definition import Role
from vespera_exec.app.executions.engine import DefaultExecutionEngine
from vespera_exec.app.service import Vespera
from vespera_exec.engine.plans.strategies import RecoveryContext, RecoveryResult
from vespera_exec.errors import Conflict, ExecutionError, InvalidPlan, NotFound
from vespera_exec.model.capacity import CapacityRequirement
from vespera_exec.model.enums import EventType, ExecutionStatus, RecoveryAction
from vespera_exec.model.plans.plan import ExecutionPlan, PlanStep

if TYPE_CHECKING:
    from pathlib import Path

    from vespera_exec.app.executions.result import ExecutionUpdate

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]
S = ExecutionStatus


@pytest.fixture
def engine(vespera: Vespera) -> DefaultExecutionEngine:
    return engine_over(vespera)


DIAMOND: dict[str, Any] = {
    "name": "Diamond",
    "variables": {"a": 1},
    "steps": [
        {"id": "top", "role": "add", "inputs": {"a": "${variables.a}", "b": 1}},
        {"id": "left", "role": "add", "inputs": {"a": "${steps.top.output.sum}", "b": 10}},
        {"id": "right", "role": "add", "inputs": {"a": "${steps.top.output.sum}", "b": 100}},
        {"id": "down", "role": "add", "inputs": {"a": "${steps.left.output.sum}", "b": "${steps.right.output.sum}"}},
    ],
    "output": {"sum": "${steps.down.output.sum}", "quality_score": 0.25},
}


async def test_a_plan_is_executed_and_its_result_is_whole(engine: DefaultExecutionEngine) -> None:
    result = await engine.execute(DIAMOND, variables={"a": 4})
    assert result.status is S.COMPLETED
    assert result.output == {"sum": 120, "quality_score": 0.25}
    assert result.result["counts"] == {"completed": 4}
    assert result.plan_id not in (result.task_id, result.execution_id)
    ended = [event.step_id for event in result.timeline if event.event_type is EventType.STEP_COMPLETED]
    assert (ended[0], set(ended[1:3]), ended[3]) == ("top", {"left", "right"}, "down")
    assert [event.sequence for event in result.timeline] == list(range(1, len(result.timeline) + 1))
    metrics = result.metrics
    assert (metrics.success_rate, metrics.error_rate, metrics.quality_score) == (1.0, 0.0, 0.25)
    assert metrics.total_duration is not None
    assert metrics.throughput == pytest.approx(4 / (metrics.total_duration / 1000))
    assert metrics.effective_duration is not None
    assert 0 < metrics.effective_duration <= metrics.total_duration


async def test_a_plan_may_be_an_object_or_a_file_too(engine: DefaultExecutionEngine, tmp_path: Path) -> None:
    plan = ExecutionPlan(
        id="two",
        steps=(
            PlanStep(id="one", role="add", inputs={"a": "${variables.a}", "b": 2}),
            PlanStep(id="two", role="add", inputs={"a": "${steps.one.output.sum}", "b": 3}),
        ),
        variables={"a": 1},
    )
    result = await engine.execute(plan, variables={"a": 5})
    assert (result.plan_id, result.output["two"]["sum"]) == ("two", 10)
    file = tmp_path / "plan.yaml"
    file.write_text("name: In a file\nsteps:\n  - {id: only, role: add, inputs: {a: 2, b: 2}}\n")
    for given in (file, str(file)):
        assert (await engine.execute(given)).output["only"]["sum"] == 4
    broken: tuple[dict[str, Any], ...] = ({"steps": []}, {"steps": [{"id": "a", "role": "add", "depends_on": ["b"]}]})
    for wrong in broken:
        with pytest.raises(InvalidPlan):
            await engine.submit(wrong)


async def test_a_plan_that_fails_says_which_step_and_gives_what_there_is(engine: DefaultExecutionEngine) -> None:
    plan = {
        "steps": [
            {"id": "good", "role": "add", "inputs": {"a": 1, "b": 1}},
            {"id": "bad", "role": "fail"},
            {"id": "after", "role": "add", "inputs": {"a": 1, "b": 1}, "depends_on": ["bad"]},
        ]
    }
    result = await engine.execute(plan)
    assert result.status is S.FAILED
    assert result.error is not None
    assert (result.error.failure_code, result.error.task_id) == ("STEP_FAILED", "bad")
    assert result.result["counts"] == {"completed": 1, "failed": 1, "skipped": 1}
    assert (result.metrics.success_rate, result.metrics.error_rate) == (0.5, 0.5)
    (last,) = await collected(engine, result.execution_id)
    assert last.metrics == result.metrics
    assert (last.progress.completed_tasks, last.progress.total_tasks) == (1, 3)


async def test_attempts_at_a_step_that_is_tried_again_count_as_errors(engine: DefaultExecutionEngine) -> None:
    tries: list[int] = []

    async def flaky(context: Any) -> str:
        tries.append(1)
        if len(tries) < 3:
            raise ExecutionError("once more", code="FLAKY")
        return "there"

    engine.vespera.roles.add(Role.from_callable(flaky, in_loop=True, inputs=None))
    retries = {"max_retries": 2, "retry_on": ["FLAKY"], "backoff_seconds": 0.01}
    result = await engine.execute({"steps": [{"id": "a", "role": "flaky", "retries": retries}]})
    assert result.output == {"a": "there"}
    assert result.metrics.success_rate == 1.0
    assert result.metrics.error_rate == pytest.approx(2 / 3)


async def test_a_plan_is_monitored_step_by_step_and_paused_and_resumed_as_a_whole(
    engine: DefaultExecutionEngine,
) -> None:
    held = Held(engine)
    plan = {
        "steps": [
            {"id": "first", "role": "add", "inputs": {"a": 1, "b": 1}},
            {"id": "second", "role": "held", "depends_on": ["first"]},
        ]
    }
    execution_id = await engine.submit(plan)
    await held.begun.wait()
    await engine.pause(execution_id)
    assert await engine.get_status(execution_id) is S.PAUSED
    await engine.resume(execution_id)
    updates: list[ExecutionUpdate] = []
    with anyio.fail_after(WITHIN):
        async for update in engine.monitor(execution_id):
            updates.append(update)
            if update.current_task == "second":
                held.go_on.set()
    assert updates[0].progress.total_tasks == 2
    assert "second" in {update.current_task for update in updates}
    assert [update.status.is_terminal for update in updates] == [False] * (len(updates) - 1) + [True]
    result = await engine.get_result(execution_id)
    assert result is not None
    assert [event.event_id for update in updates for event in update.events] == [
        event.event_id for event in result.timeline[-sum(len(update.events) for update in updates) :]
    ]
    assert updates[-1].metrics == result.metrics


async def test_cancelling_a_plan_ends_its_steps(engine: DefaultExecutionEngine) -> None:
    held = Held(engine)
    execution_id = await engine.submit({"steps": [{"id": "a", "role": "held"}]})
    await held.begun.wait()
    with anyio.fail_after(WITHIN):
        await engine.cancel(execution_id)
    result = await engine.get_result(execution_id)
    assert result is not None
    assert result.status is S.CANCELLED
    assert [event.step_id for event in result.timeline if event.event_type is EventType.STEP_CANCELLED] == ["a"]
    assert engine.vespera.is_idle


async def test_a_plan_goes_back_to_a_checkpoint_after_its_end(engine: DefaultExecutionEngine) -> None:
    held = Held(engine)
    plan = {
        "variables": {"a": 7},
        "steps": [
            {"id": "first", "role": "add", "inputs": {"a": "${variables.a}", "b": 1}},
            {"id": "second", "role": "held", "depends_on": ["first"]},
        ],
    }
    execution_id = await engine.submit(plan)
    await held.begun.wait()
    checkpoint = await engine.create_checkpoint(execution_id, metadata={"why": "a test"})
    assert (checkpoint.execution_id, checkpoint.metadata["why"]) == (execution_id, "a test")
    assert checkpoint.state.completed_tasks == ("first",)
    assert checkpoint.state.current_task_id == "second"
    assert checkpoint.state.variables == {"a": 7}
    await engine.cancel(execution_id)
    held.go_on.set()
    again = await engine.restore_from_checkpoint(checkpoint.id)
    assert again != execution_id
    with anyio.fail_after(WITHIN):
        await engine.vespera.executions.ended(again, engine.caller)
    result = await engine.get_result(again)
    assert result is not None
    assert (result.status, result.output) == (S.COMPLETED, {"second": "made"})
    assert "first" not in {event.step_id for event in result.timeline if event.event_type is EventType.STEP_STARTED}
    earlier = await engine.get_result(execution_id)
    assert earlier is not None
    assert earlier.status is S.CANCELLED
    with pytest.raises(Conflict):
        await engine.create_checkpoint(execution_id)
    with pytest.raises(NotFound):
        await engine.restore_from_checkpoint("no-such-checkpoint")


async def test_a_strategy_of_the_program_decides_about_a_failed_step_until_it_is_removed(
    engine: DefaultExecutionEngine,
) -> None:
    class Skip:
        id, name, description = "skip_it", "Skip it", "The line may be down"
        applicable_errors = ("NETWORK",)

        async def execute(self, context: RecoveryContext) -> RecoveryResult:
            return RecoveryResult(success=True, action=RecoveryAction.SKIP, message=f"{context.step_id} can wait")

    plan = {"steps": [{"id": "a", "role": "fail"}]}
    engine.add_recovery_strategy(Skip())
    with pytest.raises(Conflict):
        engine.add_recovery_strategy(Skip())
    assert (await engine.execute(plan)).status is S.COMPLETED
    engine.remove_recovery_strategy("skip_it")
    engine.remove_recovery_strategy("skip_it")
    assert (await engine.execute(plan)).status is S.FAILED


async def test_capacity_is_in_the_result_of_who_held_it_and_can_be_taken_by_hand(opening: Opening) -> None:
    async with opening(capacity="gpu=2") as vespera:
        engine = DefaultExecutionEngine(vespera)

        async def brief(context: Any) -> int:
            return 1

        vespera.roles.add(Role.from_callable(brief, in_loop=True, inputs=None))
        taken = await engine.allocate_resources([CapacityRequirement(type="gpu", amount=2)])
        execution_id = await engine.submit({"steps": [{"id": "a", "role": "brief", "capacity": {"gpu": 1}}]})
        with pytest.raises(Conflict):
            await engine.allocate_resources([CapacityRequirement(type="gpu", amount=1)])
        assert await engine.get_result(execution_id) is None
        await engine.release_resources([each.id for each in taken])
        with anyio.fail_after(WITHIN):
            await vespera.executions.ended(execution_id, engine.caller)
        result = await engine.get_result(execution_id)
        assert result is not None
        (use,) = result.resource_usage
        assert (use.resource_type, use.amount_used, use.task_id, use.cost) == ("gpu", 1, "a", 0.0)
        assert use.end_time is not None
        assert result.metrics.total_cost == 0.0
        assert result.metrics.resource_efficiency is None
