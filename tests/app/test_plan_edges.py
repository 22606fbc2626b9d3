"""Plans where something goes wrong at the edge of a step: cancels that take long, limits, approvals, a full disk."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from deadlines import WITHIN
from planning import ME, ended, heard, standing, started, until

from roles.definition import Role
from vespera_exec.app.plans.steps import Steps
from vespera_exec.app.plans.views import CheckPlan, ExecutePlan
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import InputAnswer
from vespera_exec.engine.plans import outputs as plan_outputs
from vespera_exec.engine.plans.agenda import Agenda
from vespera_exec.engine.plans.checkpoints import CheckpointReader
from vespera_exec.engine.plans.going_back import GoingBack
from vespera_exec.engine.plans.taking_over import TakingOver
from vespera_exec.engine.plans.winding_up import WindingUp
from vespera_exec.errors import ExecutionError, InvalidPlan

if TYPE_CHECKING:
    from pathlib import Path

    from roles.definition import TaskLike
    from vespera_exec.app.views import Handle
    from vespera_exec.model.ledger import Batch

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]

calls: list[str] = []
"""What the roles below were called for, in order."""


async def nap(task: TaskLike) -> str:
    calls.append(task.title)
    await anyio.sleep(task.inputs.get("seconds", 0))
    return task.title


async def stubborn(task: TaskLike) -> str:
    calls.append(task.title)
    with anyio.CancelScope(shield=True):
        await anyio.sleep(task.inputs.get("seconds", 30))
    return task.title


async def boom(task: TaskLike) -> None:
    calls.append(task.title)
    raise ExecutionError("it broke", code="BROKEN")


async def fill(task: TaskLike) -> str:
    return "x" * task.inputs["size"]


ROLES = (
    Role.from_callable(nap, in_loop=True, grace_seconds=0.2),
    Role.from_callable(stubborn, in_loop=True),
    Role.from_callable(boom, in_loop=True),
    Role.from_callable(fill, in_loop=True),
)


@pytest.fixture
async def vespera(opening: Opening) -> AsyncIterator[Vespera]:
    calls.clear()
    async with opening() as made:
        for role in ROLES:
            made.roles.add(role)
        yield made


def step(name: str, role: str = "nap", *needs: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "role": role, "depends_on": list(needs), **more}


async def asked(vespera: Vespera, any_id: str) -> list[str]:
    """The keys of the questions that wait, once there are any."""

    async def is_asked() -> bool:
        return bool((await vespera.get_status(ME, any_id)).inputs)

    await until(is_asked)
    return [each.key for each in (await vespera.get_status(ME, any_id)).inputs or []]


# ends


async def test_a_plan_ends_after_a_step_that_takes_all_the_time_it_is_given(vespera: Vespera) -> None:
    handle = await started(vespera, step("deaf", "stubborn", inputs={"seconds": 5.6}))
    await until(lambda: calls == ["deaf"])
    child = (await vespera.list_steps(ME, handle.task_id)).steps[0].task_id or ""
    answer = await vespera.cancel(ME, handle.task_id, wait_ms=25_000)
    assert answer.status == "cancelled"
    assert await standing(vespera, handle) == {"deaf": "cancelled"}
    last = (await vespera.last_events(ME, child)).events
    end = next(each["cursor"] for each in last if each["type"] == "execution_cancelled")
    of_plan = (await vespera.last_events(ME, handle.session_id)).events
    assert end < next(each["cursor"] for each in of_plan if each["type"] == "execution_cancelled")


async def test_a_cancel_while_the_disk_is_full_settles_the_steps_before_the_plan(vespera: Vespera) -> None:
    handle = await started(vespera, step("a", inputs={"seconds": 30}), step("b", "nap", "a"))
    await until(lambda: calls == ["a"])
    coordinator = await vespera._engine.opened(handle.session_id)  # pyright: ignore[reportPrivateUsage]
    assert coordinator is not None
    journal = vespera._store.journal  # pyright: ignore[reportPrivateUsage]
    journal.limit_pages(1)
    with anyio.fail_after(WITHIN):
        await vespera.cancel(ME, handle.task_id, reason="Enough")
        await until(lambda: coordinator.board.session.lifecycle.status.is_terminal)
    assert [each.status.value for each in coordinator.board.states.values()] == ["cancelled", "cancelled"]
    journal.limit_pages(1_000_000)
    assert (await ended(vespera, handle)).status == "cancelled"
    assert await standing(vespera, handle) == {"a": "cancelled", "b": "cancelled"}


async def test_a_fault_of_ours_settles_all_steps(vespera: Vespera, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await started(vespera, step("a", inputs={"seconds": 30}), step("b"), max_parallel=1)
    await until(lambda: calls == ["a"])
    coordinator = await vespera._engine.opened(handle.session_id)  # pyright: ignore[reportPrivateUsage]
    assert coordinator is not None
    monkeypatch.setattr(coordinator, "_heed_time", lambda: 1 / 0)
    coordinator._loop.rouse()  # pyright: ignore[reportPrivateUsage]
    assert (await ended(vespera, handle, within=5)).status == "failed"
    assert await standing(vespera, handle) == {"a": "cancelled", "b": "cancelled"}


async def test_a_failure_that_dooms_many_steps_skips_them_in_portions(vespera: Vespera) -> None:
    journal = vespera._store.journal  # pyright: ignore[reportPrivateUsage]
    largest = 0

    class Measured:
        def append(self, batch: Batch) -> None:
            nonlocal largest
            largest = max(largest, sum(event.event_type == "step_skipped" for event in batch.events))
            journal.append(batch)

    handle = await started(
        vespera, step("gate", "boom", approval=True), *(step(f"s{n}", "nap", "gate") for n in range(300))
    )
    (key,) = await asked(vespera, handle.task_id)
    task = vespera._tasks.known(handle.task_id)  # pyright: ignore[reportPrivateUsage]
    assert task is not None
    task.ledger.sink = Measured()
    await vespera.answer_input(ME, handle.task_id, {key: InputAnswer(action="accept")})
    result = await ended(vespera, handle)
    assert result.result["counts"] == {"failed": 1, "skipped": 300}
    assert 0 < largest <= 64


async def test_a_cancel_is_heeded_while_a_step_is_made_for_the_second_time(
    vespera: Vespera, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await started(vespera, step("a", inputs={"seconds": 30}))
    await until(lambda: calls == ["a"])
    coordinator = await vespera._engine.opened(handle.session_id)  # pyright: ignore[reportPrivateUsage]
    assert coordinator is not None
    ready, begun, go = Steps.ready, anyio.Event(), anyio.Event()

    async def slow(*args: Any, **given: Any) -> Any:
        made = await ready(*args, **given)
        begun.set()
        await go.wait()
        return made

    monkeypatch.setattr(Steps, "ready", slow)
    child = coordinator._children._by_step.pop("a")  # pyright: ignore[reportPrivateUsage]
    child.run.session.request_cancellation("As if its owner had died before it was made")
    coordinator._agenda.put_unmade("a")  # pyright: ignore[reportPrivateUsage]
    coordinator._loop.rouse()  # pyright: ignore[reportPrivateUsage]
    with anyio.fail_after(WITHIN):
        await begun.wait()
        await vespera.cancel(ME, handle.task_id)
        go.set()
        assert (await ended(vespera, handle)).status == "cancelled"


async def test_a_pause_that_comes_while_the_plan_goes_back_takes_effect_there(vespera: Vespera) -> None:
    handle = await started(vespera, step("a", "stubborn", inputs={"seconds": 0.6}), step("b", "nap", "a"))
    place = await vespera.checkpoints.create(ME, handle.task_id)
    await until(lambda: calls == ["a"])
    async with anyio.create_task_group() as group:
        group.start_soon(vespera.checkpoints.restore, ME, place.checkpoint_id)

        async def goes_back() -> bool:
            return (await vespera.get_status(ME, handle.task_id)).status == "recovering"

        await until(goes_back)
        assert (await vespera.pause(ME, handle.task_id)).status == "paused"
    assert await standing(vespera, handle) == {"a": "pending", "b": "pending"}
    assert (await vespera.resume(ME, handle.task_id)).success
    assert (await ended(vespera, handle)).status == "completed"
    assert calls == ["a", "a", "b"]


# what is returned


async def test_outputs_beyond_the_most_that_are_given_are_counted(
    vespera: Vespera, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_outputs, "MOST_OUTPUTS", 10)
    handle = await started(vespera, *(step(f"s{n}") for n in range(13)))
    result = (await ended(vespera, handle)).result
    assert (list(result["output"]), result["more"]) == ([f"s{n}" for n in range(10)], 3)


async def test_outputs_that_are_too_large_together_are_left_out_and_counted(vespera: Vespera) -> None:
    sizes = {"whole": 1000, "cut": 2_000_000, "large": 500_000, "larger": 500_000}
    handle = await started(vespera, *(step(name, "fill", inputs={"size": size}) for name, size in sizes.items()))
    result = await ended(vespera, handle)
    assert (result.status, result.result_truncated) == ("completed", False)
    assert {name: len(each) for name, each in result.result["output"].items()} == {"whole": 1000, "large": 500_000}
    assert result.result["more"] == 2


# approvals


async def test_a_step_is_approved_once_its_fallback_included(vespera: Vespera) -> None:
    handle = await started(vespera, step("a", "boom", approval="Really?", fallback="nap"))
    (key,) = await asked(vespera, handle.task_id)
    await vespera.answer_input(ME, handle.task_id, {key: InputAnswer(action="accept")})
    assert (await ended(vespera, handle)).result["output"] == {"a": "a"}
    assert calls == ["a", "a"]


async def test_a_step_that_somebody_refused_has_no_fallback(vespera: Vespera) -> None:
    handle = await started(vespera, step("a", "nap", approval="Really?", fallback="nap"))
    (key,) = await asked(vespera, handle.task_id)
    await vespera.answer_input(ME, handle.task_id, {key: InputAnswer(action="decline")})
    result = await ended(vespera, handle)
    assert (result.status, result.result["failed"][0]["code"]) == ("failed", "APPROVAL_REJECTED")
    assert calls == []


async def test_a_question_is_there_and_is_answered_from_the_first_moment_of_the_next_owner(opening: Opening) -> None:
    async with opening() as first:
        handle = await started(first, step("a", "command", approval=True, inputs={"argv": ["true"]}))
        (key,) = await asked(first, handle.task_id)
    async with opening() as vespera:
        assert [each.key for each in (await vespera.get_status(ME, handle.task_id)).inputs or []] == [key]
        answered = await vespera.answer_input(ME, handle.task_id, {key: InputAnswer(action="accept")})
        assert (answered.success, answered.accepted) == (True, [key])
        assert (await ended(vespera, handle)).status == "completed"


# over owners


async def test_steps_that_a_pause_had_reached_go_on_where_its_owner_died_before_the_others(opening: Opening) -> None:
    calls.clear()
    argv = ["sh", "-c", "sleep 0.5"]
    resumable = step("a", "command", inputs={"argv": argv}, on_interrupt="resume")
    async with opening() as first:
        for role in ROLES:
            first.roles.add(role)
        handle = await started(first, resumable, step("deaf", "stubborn", on_interrupt="resume", inputs={"seconds": 3}))
        await until(lambda: "deaf" in calls)
        (a, _) = (await first.list_steps(ME, handle.task_id)).steps

        async def has(status: str) -> bool:
            return (await first.get_status(ME, a.task_id or "")).status == status

        await until(lambda: has("running"))
        assert (await first.pause(ME, handle.task_id, wait_ms=0)).pending
        await until(lambda: has("paused"))
    async with opening() as vespera:
        for role in ROLES:
            vespera.roles.add(role)
        result = await ended(vespera, handle)
        assert result.result["counts"].get("completed", 0) >= 1
        assert (await standing(vespera, handle))["a"] == "completed"


async def test_a_plan_that_was_to_end_with_a_failure_does_so_under_the_next_owner(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the owner had died between the failure of the step and the ends of the others."""

    async def forget(*_: object) -> None:
        await anyio.sleep_forever()

    async with opening() as first:
        for role in ROLES:
            first.roles.add(role)
        with monkeypatch.context() as patch:
            patch.setattr(WindingUp, "abort", forget)
            long = step("long", "command", inputs={"argv": ["sleep", "60"]}, on_interrupt="resume")
            handle = await started(first, step("bad", "boom"), long, step("next"), max_parallel=2, on_failure="abort")
            await heard(first, handle, "step_failed", "bad")
    calls.clear()
    async with opening() as vespera:
        for role in ROLES:
            vespera.roles.add(role)
        result = await ended(vespera, handle, within=10)
        assert (result.status, (result.error or {})["message"]) == ("failed", "Step bad failed: BROKEN: it broke")
        assert await standing(vespera, handle) == {"bad": "failed", "long": "cancelled", "next": "cancelled"}
    assert calls == []


async def left_on_its_way(vespera: Vespera, handle: Handle, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is announced that the plan goes back to this checkpoint, and nothing follows: as if the owner had died."""

    async def forget(*_: object) -> None:
        await anyio.sleep_forever()

    async def goes_back() -> bool:
        return (await vespera.get_status(ME, handle.task_id)).status == "recovering"

    monkeypatch.setattr(GoingBack, "_go_back", forget)
    async with anyio.create_task_group() as group:
        group.start_soon(vespera.checkpoints.restore, ME, place)
        await until(goes_back)
        group.cancel_scope.cancel()


async def test_a_way_back_that_leads_nowhere_under_the_next_owner_ends_what_could_never_begin(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the owner had died before it skipped what needs a failed step."""

    async def not_yet(*_: object, **__: object) -> None:
        await anyio.lowlevel.checkpoint()

    async with opening() as first:
        for role in ROLES:
            first.roles.add(role)
        with monkeypatch.context() as patch:
            patch.setattr(Agenda, "skip_doomed", not_yet)
            long = step("long", "command", inputs={"argv": ["sleep", "60"]}, on_interrupt="resume")
            handle = await started(first, step("bad", "boom"), step("never", "nap", "bad"), long, max_parallel=2)
            place = await first.checkpoints.create(ME, handle.task_id)
            await heard(first, handle, "step_failed", "bad")
            await heard(first, handle, "step_started", "long")
            await left_on_its_way(first, handle, place.checkpoint_id, patch)
    monkeypatch.setattr(CheckpointReader, "at", not_yet)
    async with opening() as vespera:
        for role in ROLES:
            vespera.roles.add(role)
        result = await ended(vespera, handle, within=10)
        assert (result.error or {})["message"].endswith("it is not known any more")
        stand = await standing(vespera, handle)
        assert stand.pop("never") in ("skipped", "cancelled")
        assert stand == {"bad": "failed", "long": "cancelled"}


async def test_a_fault_while_a_plan_is_taken_over_leaves_none_of_its_steps_at_work(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opening() as first:
        argv = ["sleep", "60"]
        handle = await started(first, step("a", "command", inputs={"argv": argv}, on_interrupt="resume"))
        await heard(first, handle, "step_started", "a")
        child = (await first.list_steps(ME, handle.task_id)).steps[0].task_id or ""

    async def fail(_: TakingOver) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(TakingOver, "_find_children", fail)
    async with opening() as vespera:
        assert (await ended(vespera, handle)).status == "failed"
        assert (await vespera.get_status(ME, child)).done
        assert await standing(vespera, handle) == {"a": "cancelled"}


async def test_the_steps_of_a_plan_in_a_copied_directory_end_with_it_and_before(
    opening: Opening, tmp_path: Path
) -> None:
    async with opening() as first:
        argv = ["sleep", "60"]
        steps = [step(name, "command", inputs={"argv": argv}, on_interrupt="resume") for name in ("a", "b")]
        handle = await started(first, *steps, max_parallel=1)
        await heard(first, handle, "step_started", "a")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    async with opening(data_dir=tmp_path / "copy") as vespera:
        result = await ended(vespera, handle)
        assert (result.status, (result.error or {})["code"]) == ("failed", "INTERRUPTED")
        assert await standing(vespera, handle) == {"a": "cancelled", "b": "cancelled"}
        kinds = [each["type"] for each in (await vespera.last_events(ME, handle.session_id)).events]
        assert kinds.index("step_cancelled") < kinds.index("execution_failed")


async def test_what_a_step_waits_for_is_told_under_the_next_owner(opening: Opening) -> None:
    holding = {"inputs": {"argv": ["sleep", "60"]}, "capacity": {"gpu": 1}, "on_interrupt": "resume"}
    async with opening(capacity="gpu=1") as first:
        handle = await started(first, step("hold", "command", **holding), step("wait", "command", **holding))
        await heard(first, handle, "step_waiting", "wait", **{"for": "capacity"})
    async with opening(capacity="gpu=1") as vespera:
        cursor = (await vespera.last_events(ME, handle.session_id)).next_cursor
        await heard(vespera, handle, "step_waiting", "wait", **{"for": "capacity"})
        await anyio.sleep(0.7)  # longer than a step waits for its turn before it is said to
        page = await vespera.list_steps(ME, handle.task_id)
        assert [each.waiting_for for each in page.steps] == [None, "capacity"]
        later = (await vespera.read_events(ME, handle.session_id, cursor=cursor)).events
        assert {each["details"]["for"] for each in later if each["type"] == "step_waiting"} <= {"capacity"}
        await vespera.cancel(ME, handle.task_id, wait_ms=25_000)


# what is refused


async def test_unknown_roles_are_told_together_with_the_faults_of_the_form(vespera: Vespera) -> None:
    plan = {"steps": [step("a", "unheard-of"), step("b", "nap", "nobody", weight=-1)]}
    with pytest.raises(InvalidPlan) as refused:
        await vespera.plans.execute(ME, ExecutePlan(plan=plan))
    told = refused.value.problems
    assert {name for name, _ in told} == {"a", "b"}
    assert any("unheard-of" in problem for name, problem in told if name == "a")
    checked = await vespera.plans.check(ME, CheckPlan(plan=plan))
    assert {each.step for each in checked.problems} == {"a", "b"}
