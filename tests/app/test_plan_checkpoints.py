"""A plan goes back to a checkpoint: what was done is not done again, and variables are those of the place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN
from worker_calls import ME, became

from roles.definition import Role
from vespera_exec.app.plans.views import ExecutePlan
from vespera_exec.app.views import Execute
from vespera_exec.engine.plans.strategies import NetworkTimeoutRecovery, RecoveryContext, RecoveryResult
from vespera_exec.errors import AlreadyExecuting, Conflict, ExecutionError
from vespera_exec.model.enums import RecoveryAction

if TYPE_CHECKING:
    from collections.abc import Callable

    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import Handle

A = RecoveryAction
FOUR = [{"id": "s1", "role": "work"}] + [
    {"id": f"s{each}", "role": "work", "depends_on": [f"s{each - 1}"]} for each in (2, 3, 4)
]


class Workshop:
    """The role `work`, which says which step it did; a step may be held, or fail so many times with a code."""

    def __init__(self, vespera: Vespera) -> None:
        self.did: list[str] = []
        self.held: dict[str, anyio.Event] = {}
        self.faults: dict[str, list[str]] = {}
        self.clings: anyio.Event | None = None
        """What is cancelled does not end before."""
        for name in ("work", "spare"):
            vespera.roles.add(Role.from_callable(self._work, name=name, in_loop=True, grace_seconds=0.1))
        self._vespera = vespera

    async def _work(self, context: Any) -> dict[str, Any]:
        step = context.task.title
        self.did.append(step)
        if (faults := self.faults.get(step)) and (code := faults.pop(0)):
            raise ExecutionError("it broke", code=code)
        try:
            while (held := self.held.get(step)) is not None and not held.is_set():
                await context.pause_point()
                with anyio.move_on_after(0.01):
                    await held.wait()
        except BaseException:
            if self.clings is not None:
                with anyio.move_on_after(5, shield=True):
                    await self.clings.wait()
            raise
        return {"step": step, "times": self.did.count(step)}

    def hold(self, step: str) -> None:
        self.held[step] = anyio.Event()

    def let(self, step: str) -> None:
        self.held.pop(step).set()

    async def start(self, steps: list[dict[str, Any]], **plan: Any) -> Handle:
        asked = ExecutePlan(plan={"name": "A plan", "steps": steps, **plan})
        return await self._vespera.plans.execute(ME, asked)

    async def began(self, step: str, times: int = 1) -> None:
        await until(lambda: self.did.count(step) >= times)


@pytest.fixture
def shop(vespera: Vespera) -> Workshop:
    return Workshop(vespera)


async def until(fact: Callable[[], bool]) -> None:
    with anyio.fail_after(WITHIN):
        while True:
            if fact():
                return
            await anyio.sleep(0.01)


async def statuses(vespera: Vespera, handle: Handle) -> dict[str, str]:
    page = await vespera.list_steps(ME, handle.task_id)
    return {step.id: step.status for step in page.steps}


async def ended(vespera: Vespera, handle: Handle, status: str = "completed") -> Any:
    await became(vespera, handle, status)
    return await vespera.get_result(ME, handle.task_id)


async def variables(vespera: Vespera, handle: Handle) -> Any:
    made = await vespera.checkpoints.create(ME, handle.task_id)
    return (await vespera.checkpoints.get(ME, made.checkpoint_id)).state["variables"]


def board(vespera: Vespera, handle: Handle) -> Any:
    coordinator = vespera._engine.coordinator(handle.session_id)  # pyright: ignore[reportPrivateUsage]
    assert coordinator is not None
    return coordinator.board


async def test_a_live_plan_goes_back_in_place_and_repeats_only_what_came_after(
    vespera: Vespera, shop: Workshop
) -> None:
    shop.hold("s2")
    handle = await shop.start(FOUR, variables={"colour": "red"})
    await shop.began("s2")
    marked = await vespera.checkpoints.create(ME, handle.task_id, metadata={"why": "after one"})
    assert marked.completed_steps == 1
    shop.hold("s4")
    shop.let("s2")
    await shop.began("s4")
    board(vespera, handle).set_variables({"colour": "blue"})
    runs = {state.run_id for state in board(vespera, handle).states.values()}
    back = await vespera.checkpoints.restore(ME, marked.checkpoint_id)
    assert (back.in_place, back.session_id) == (True, handle.session_id)
    shop.let("s4")
    await shop.began("s4", 2)
    result = await ended(vespera, handle)
    assert result.session_id == handle.session_id
    assert shop.did == ["s1", "s2", "s3", "s4", "s2", "s3", "s4"]
    page = await vespera.list_steps(ME, handle.task_id)
    assert [step.attempt for step in page.steps] == [1, 2, 2, 2]
    stored = await vespera._store.queries.plan_state(handle.session_id)  # pyright: ignore[reportPrivateUsage]
    assert stored is not None
    state, steps = stored
    assert (state.variables, state.restored_from) == ({"colour": "red"}, marked.checkpoint_id)
    assert runs.isdisjoint({step.run_id for step in steps[1:]})
    told = (await vespera.read_events(ME, handle.session_id, max_events=1000)).events
    assert "recovering" in [event["status"]["new"] for event in told]


async def test_who_asked_to_go_back_may_leave_and_the_plan_goes_back_all_the_same(
    vespera: Vespera, shop: Workshop
) -> None:
    shop.clings = anyio.Event()
    shop.hold("s2")
    handle = await shop.start(FOUR[:3])
    await shop.began("s2")
    first = (await vespera.checkpoints.list(ME, handle.task_id)).checkpoints[-1]
    async with anyio.create_task_group() as group:
        group.start_soon(vespera.checkpoints.restore, ME, first.checkpoint_id)
        await until(lambda: bool(board(vespera, handle).state.restoring))
        group.cancel_scope.cancel()
    with pytest.raises(Conflict):
        await vespera.checkpoints.restore(ME, first.checkpoint_id)  # it is under way already
    with pytest.raises(Conflict):
        await vespera.checkpoints.create(ME, handle.task_id)  # which would hold a half of it
    shop.clings.set()
    shop.let("s2")
    await ended(vespera, handle)
    assert shop.did == ["s1", "s2", "s2", "s3"]


async def test_a_cancel_wins_over_the_way_back_and_who_asked_for_that_is_told(vespera: Vespera, shop: Workshop) -> None:
    shop.clings = anyio.Event()
    shop.hold("s2")
    handle = await shop.start(FOUR[:3])
    await shop.began("s2")

    async def go_back() -> None:
        with pytest.raises(Conflict, match="cancel"):
            await vespera.checkpoints.restore(ME, any_id=handle.task_id)

    async with anyio.create_task_group() as group:
        group.start_soon(go_back)
        await until(lambda: bool(board(vespera, handle).state.restoring))
        await vespera.cancel(ME, handle.task_id)
        shop.clings.set()
    await ended(vespera, handle, "cancelled")
    assert await statuses(vespera, handle) == {"s1": "completed", "s2": "cancelled", "s3": "cancelled"}


async def test_a_rollback_to_an_earlier_checkpoint_gives_the_variables_of_that_one(
    vespera: Vespera, shop: Workshop
) -> None:
    shop.hold("s1")
    handle = await shop.start(FOUR[:1], variables={"seen": {"pages": [1]}})
    await shop.began("s1")
    first = await vespera.checkpoints.create(ME, handle.task_id)
    board(vespera, handle).set_variables({"seen": {"pages": [1, 2]}})
    second = await vespera.checkpoints.create(ME, handle.task_id)
    board(vespera, handle).set_variables({})
    await vespera.checkpoints.restore(ME, second.checkpoint_id)
    assert await variables(vespera, handle) == {"seen": {"pages": [1, 2]}}
    await vespera.checkpoints.restore(ME, first.checkpoint_id)
    assert await variables(vespera, handle) == {"seen": {"pages": [1]}}
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)


async def test_a_checkpoint_is_made_at_the_end_of_each_step_and_holds_its_state(
    vespera: Vespera, shop: Workshop
) -> None:
    handle = await shop.start(FOUR)
    await ended(vespera, handle)
    listed = (await vespera.checkpoints.list(ME, handle.task_id)).checkpoints
    assert [(each.kind, each.step, each.completed_steps) for each in listed] == [
        ("step", f"s{number}", number) for number in (4, 3, 2, 1)
    ]
    third = (await vespera.checkpoints.get(ME, listed[1].checkpoint_id)).state
    assert third["completed_tasks"] == ["s1", "s2", "s3"]
    assert third["task_states"]["s4"]["status"] == "pending"


async def test_a_plan_that_failed_begins_again_from_a_checkpoint_as_a_new_execution(
    vespera: Vespera, shop: Workshop
) -> None:
    shop.faults["s3"] = ["BUG"]
    handle = await shop.start(FOUR, variables={"colour": "red"}, output="${steps.s1.output}")
    await ended(vespera, handle, "failed")
    last = (await vespera.checkpoints.list(ME, handle.task_id)).checkpoints[0]
    again = await vespera.checkpoints.restore(ME, any_id=handle.task_id)
    assert (again.in_place, again.checkpoint_id) == (False, last.checkpoint_id)
    assert again.session_id != handle.session_id
    result = await ended(vespera, handle)
    assert result.session_id == again.session_id
    assert shop.did == ["s1", "s2", "s3", "s3", "s4"]
    assert result.result["output"] == {"step": "s1", "times": 1}
    assert (await vespera.get_status(ME, handle.session_id)).status == "failed"


async def test_what_ended_before_its_first_checkpoint_goes_back_to_the_one_that_it_began_from(
    vespera: Vespera, shop: Workshop
) -> None:
    shop.faults["s2"] = ["BUG"]
    handle = await shop.start(FOUR[:2])
    await ended(vespera, handle, "failed")
    shop.hold("s2")
    first = await vespera.checkpoints.restore(ME, any_id=handle.task_id)
    await shop.began("s2", 2)
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)
    shop.let("s2")
    again = await vespera.checkpoints.restore(ME, any_id=handle.task_id)
    assert (again.checkpoint_id, again.session_id != first.session_id) == (first.checkpoint_id, True)
    await ended(vespera, handle)
    assert shop.did == ["s1", "s2", "s2", "s2"]


async def test_a_plan_that_failed_goes_on_from_where_it_ended(vespera: Vespera, shop: Workshop) -> None:
    shop.faults["s2"] = ["BUG"]
    handle = await shop.start(FOUR, step_checkpoints=False)
    await ended(vespera, handle, "failed")
    shop.hold("s3")
    again = await vespera.checkpoints.restore_ended(ME, handle.task_id)
    await shop.began("s3")
    with pytest.raises(AlreadyExecuting):
        await vespera.checkpoints.restore_ended(ME, handle.task_id)
    shop.let("s3")
    assert (await ended(vespera, handle)).session_id == again.session_id
    assert shop.did == ["s1", "s2", "s2", "s3", "s4"]
    plain = await vespera.execute_task(ME, Execute(title="Plain", role="spare"))
    await became(vespera, plain, "completed")
    with pytest.raises(Conflict, match="no plan"):
        await vespera.checkpoints.restore_ended(ME, plain.task_id)


async def test_what_refers_to_an_output_that_is_no_longer_kept_fails_and_does_not_read_null(
    vespera: Vespera, shop: Workshop
) -> None:
    """The step was done in an earlier run of the plan, which was removed since."""
    shop.faults["s2"] = ["BUG"]
    handle = await shop.start([FOUR[0], FOUR[1]], output="${steps.s1.output}")
    await ended(vespera, handle, "failed")
    done = (await vespera.list_steps(ME, handle.task_id)).steps[0].session_id
    store = vespera._store  # pyright: ignore[reportPrivateUsage]
    for table in ("results", "executions"):
        sql = f"DELETE FROM {table} WHERE id = (SELECT id FROM streams WHERE name = ?)"
        await store.journal.perform(lambda db, sql=sql: db.execute(sql, (done,)).rowcount)
    await vespera.checkpoints.restore_ended(ME, handle.task_id)
    result = await ended(vespera, handle, "failed")
    assert result.error["code"] == "OUTPUT_REMOVED"


async def test_the_task_of_a_step_is_executed_by_its_plan_alone(vespera: Vespera, shop: Workshop) -> None:
    shop.hold("s1")
    handle = await shop.start(FOUR[:1])
    await shop.began("s1")
    (step,) = (await vespera.list_steps(ME, handle.task_id)).steps
    assert step.task_id is not None
    made = await vespera.checkpoints.create(ME, step.task_id)
    shop.let("s1")
    await ended(vespera, handle)
    with pytest.raises(Conflict, match="step s1 of a plan"):
        await vespera.execute_task(ME, Execute(task_id=step.task_id))
    with pytest.raises(Conflict, match="step s1 of a plan"):
        await vespera.checkpoints.restore(ME, made.checkpoint_id)
    assert shop.did == ["s1"]


async def test_periodic_checkpoints_are_made_while_something_changes_and_end_with_the_run(
    vespera: Vespera, shop: Workshop
) -> None:
    shop.hold("s2")
    handle = await shop.start(FOUR[:2], checkpoint_interval_seconds=0.05, step_checkpoints=False)
    await shop.began("s2")

    async def made() -> int:
        return len((await vespera.checkpoints.list(ME, handle.task_id)).checkpoints)

    async def happened() -> int:
        told = (await vespera.read_events(ME, handle.session_id, max_events=1000)).events
        return len([each for each in told if each["type"] != "checkpoint_created"])

    with anyio.fail_after(WITHIN):
        while True:
            before = await happened(), await made()
            await anyio.sleep(0.3)  # six intervals
            after = await happened(), await made()
            if after[0] == before[0] and after[1]:
                break
    assert after[1] - before[1] <= 1
    shop.let("s2")
    await ended(vespera, handle)
    kinds = {each.kind for each in (await vespera.checkpoints.list(ME, handle.task_id)).checkpoints}
    assert kinds == {"interval"}
    before = await made()
    await anyio.sleep(0.2)
    assert await made() == before


# strategies


async def test_network_timeouts_are_retried_with_growing_delays_and_then_end_the_plan(
    vespera: Vespera, shop: Workshop
) -> None:
    vespera.strategies.remove("network_timeout_recovery")
    vespera.strategies.add(NetworkTimeoutRecovery(base_seconds=0.05, jitter=0.0))
    shop.faults["s1"] = ["NETWORK_TIMEOUT"] * 4
    handle = await shop.start([*FOUR[:2], {"id": "other", "role": "work"}])
    result = await ended(vespera, handle, "failed")
    assert "Max retries (3) exceeded for network timeout" in result.error["message"]
    assert shop.did.count("s1") == 4
    told = (await vespera.read_events(ME, handle.session_id, max_events=1000)).events
    initiated = [event["details"] for event in told if event["type"] == "recovery_initiated" and event["step_id"]]
    assert [each["action"] for each in initiated] == ["retry", "retry", "retry", "abort"]


async def test_a_step_that_recovers_completes_and_its_count_begins_anew(vespera: Vespera, shop: Workshop) -> None:
    vespera.strategies.remove("network_timeout_recovery")
    vespera.strategies.add(NetworkTimeoutRecovery(base_seconds=0.01))
    shop.faults["s1"] = ["NETWORK_TIMEOUT", "CONNECTION_REFUSED"]
    handle = await shop.start(FOUR[:1])
    await ended(vespera, handle)
    step = (await vespera.list_steps(ME, handle.task_id)).steps[0]
    assert (step.attempt, step.recoveries, step.status) == (3, 2, "completed")


@pytest.mark.parametrize(
    ("named", "step", "did"),
    [
        ("skip", {"id": "s1", "status": "skipped"}, ["s1", "s2"]),
        ("retry_once", {"id": "s1", "status": "completed"}, ["s1", "s1", "s2"]),
        ("fallback", {"id": "s1", "status": "completed", "is_fallback": True}, ["s1", "s1", "s2"]),
    ],
)
async def test_a_step_that_names_a_strategy_gets_its_action(
    vespera: Vespera, shop: Workshop, named: str, step: dict[str, Any], did: list[str]
) -> None:
    shop.faults["s1"] = ["BUG"]
    more = {"fallback": "spare"} if named == "fallback" else {}
    handle = await shop.start([{**FOUR[0], "recovery": [named], **more}, FOUR[1]])
    await ended(vespera, handle)
    found = (await vespera.list_steps(ME, handle.task_id)).steps[0].model_dump()
    assert {name: found[name] for name in step} == step
    assert shop.did == did


async def test_abort_ends_the_plan_and_what_else_runs_of_it(vespera: Vespera, shop: Workshop) -> None:
    shop.hold("other")
    shop.hold("s1")
    shop.faults["s2"] = ["BUG"]
    handle = await shop.start(
        [FOUR[0], {**FOUR[1], "recovery": ["abort"], "continue_on_failure": True}, {"id": "other", "role": "work"}]
    )
    await shop.began("other")
    shop.let("s1")
    result = await ended(vespera, handle, "failed")
    assert result.error["message"].startswith("End the plan")
    assert await statuses(vespera, handle) == {"s1": "completed", "s2": "failed", "other": "cancelled"}


async def test_a_strategy_that_goes_back_to_the_last_checkpoint_does_so_until_its_recoveries_are_used_up(
    vespera: Vespera, shop: Workshop
) -> None:
    shop.faults["s2"] = ["BUG"] * 9
    handle = await shop.start([FOUR[0], {**FOUR[1], "recovery": ["restore_last_checkpoint"]}])
    result = await ended(vespera, handle, "failed")
    assert shop.did == ["s1", *["s2"] * 4]
    assert result.error["code"] == "STEP_FAILED"


async def test_two_steps_that_fail_at_once_go_back_together(vespera: Vespera, shop: Workshop) -> None:
    shop.faults |= {"a": ["BUG"], "b": ["BUG"]}
    twins = [{"id": each, "role": "work", "recovery": ["restore_last_checkpoint"]} for each in ("a", "b")]
    handle = await shop.start([FOUR[0], *({**each, "depends_on": ["s1"]} for each in twins)])
    await ended(vespera, handle)
    assert shop.did.count("s1") == 1
    assert set((await statuses(vespera, handle)).values()) == {"completed"}


async def test_a_plan_that_stands_still_goes_back_and_stands_still(vespera: Vespera, shop: Workshop) -> None:
    shop.hold("s2")
    handle = await shop.start(FOUR[:3])
    await shop.began("s2")
    marked = await vespera.checkpoints.create(ME, handle.task_id)
    shop.hold("s3")
    shop.let("s2")
    await shop.began("s3")
    await vespera.pause(ME, handle.task_id)
    back = await vespera.checkpoints.restore(ME, marked.checkpoint_id)
    assert back.status == "paused"
    assert await statuses(vespera, handle) == {"s1": "completed", "s2": "pending", "s3": "pending"}
    shop.let("s3")
    await vespera.resume(ME, handle.task_id)
    await ended(vespera, handle)
    assert shop.did == ["s1", "s2", "s3", "s2", "s3"]


async def test_a_strategy_may_name_the_checkpoint_and_set_variables(vespera: Vespera, shop: Workshop) -> None:
    class GoBack:
        id = name = description = "go_back"
        applicable_errors = ("BUG",)

        async def execute(self, context: RecoveryContext) -> RecoveryResult:
            context.state.variables["colour"] = "blue"
            return RecoveryResult(
                success=True, action=A.CHECKPOINT_RESTORE, new_state=context.state, checkpoint_id=marked.checkpoint_id
            )

    vespera.strategies.add(GoBack())
    shop.hold("s1")
    shop.faults["s3"] = ["BUG"]
    handle = await shop.start(FOUR[:3], variables={"colour": "red"}, output="${variables.colour}")
    await shop.began("s1")
    marked = await vespera.checkpoints.create(ME, handle.task_id)
    shop.let("s1")
    result = await ended(vespera, handle)
    assert shop.did == ["s1", "s2", "s3"] * 2
    assert result.result["output"] == "blue"
