"""A plan from its request to its end: order, parallel branches, failures, cancels, pauses, questions."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, cast

import anyio
import pytest
from planning import ME, ended, heard, standing, started, until

from roles.definition import Role
from vespera_exec.app.plans.views import CheckPlan, ExecutePlan
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute, InputAnswer
from vespera_exec.errors import Conflict, ExecutionError, InvalidInput, InvalidPlan

if TYPE_CHECKING:
    from pathlib import Path

    from roles.definition import TaskLike

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]

calls: list[str] = []
"""What the roles below were called for, in order."""


async def double(task: TaskLike) -> dict[str, Any]:
    calls.append(task.title)
    return {"n": task.inputs["n"] * 2}


async def nap(task: TaskLike) -> str:
    calls.append(task.title)
    await anyio.sleep(task.inputs.get("seconds", 0.4))
    return task.title


async def boom(task: TaskLike) -> None:
    calls.append(task.title)
    raise ExecutionError("it broke", code=task.inputs.get("code", "BROKEN"), recoverable=True)


async def flaky(task: TaskLike) -> str:
    calls.append(task.title)
    if calls.count(task.title) < 3:
        raise ExecutionError("not yet", code="NOT_YET")
    return "at last"


ROLES = (
    Role.from_callable(double, in_loop=True, inputs={"n": {"type": "integer", "required": True}}),
    Role.from_callable(nap, in_loop=True, grace_seconds=0.3),
    Role.from_callable(boom, in_loop=True),
    Role.from_callable(flaky, in_loop=True),
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


async def test_outputs_go_into_the_inputs_of_later_steps_and_into_the_result(vespera: Vespera) -> None:
    handle = await started(
        vespera,
        step("a", "double", inputs={"n": "${variables.start}"}),
        step("b", "double", inputs={"n": "${steps.a.output.n}"}),
        variables={"start": 3},
        output={"last": "${steps.b.output.n}", "text": "a gave ${steps.a.output}"},
    )
    result = await ended(vespera, handle)
    assert result.status == "completed"
    assert result.result["output"] == {"last": 12, "text": 'a gave {"n":6}'}
    assert result.result["counts"] == {"completed": 2}
    assert calls == ["a", "b"]


async def test_branches_run_at_once_and_what_needs_them_waits(vespera: Vespera) -> None:
    handle = await started(
        vespera,
        step("left", inputs={"seconds": 0.7}),
        step("right", inputs={"seconds": 0.7}),
        step("join", "nap", "left", "right", inputs={"seconds": 0}),
    )
    assert (await ended(vespera, handle)).result["output"] == {"join": "join"}
    left, right, join = (await vespera.list_steps(ME, handle.task_id)).steps
    assert left.started_at is not None
    assert right.started_at is not None
    assert join.started_at is not None
    assert left.ended_at is not None
    assert right.ended_at is not None
    assert max(left.started_at, right.started_at) < min(left.ended_at, right.ended_at)
    assert max(left.ended_at, right.ended_at) <= join.started_at


async def test_no_more_steps_run_at_once_than_the_plan_allows(vespera: Vespera) -> None:
    at_work, most, go = 0, 0, anyio.Event()

    async def held(task: TaskLike) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await go.wait()
        await anyio.sleep(0.05)
        at_work -= 1

    vespera.roles.add(Role.from_callable(held, in_loop=True))
    handle = await started(vespera, *(step(f"s{n}", "held") for n in range(5)), max_parallel=2)
    await until(lambda: at_work == 2)
    counts = {"running": 2, "pending": 3}

    async def two_run() -> bool:
        plan = (await vespera.get_status(ME, handle.task_id)).plan
        return plan is not None and plan.counts == counts

    await until(two_run)
    go.set()
    assert (await ended(vespera, handle)).result["counts"] == {"completed": 5}
    assert most == 2


async def test_a_failed_branch_stops_only_what_depends_on_it(vespera: Vespera) -> None:
    handle = await started(
        vespera,
        step("bad", "boom"),
        step("after", "nap", "bad"),
        step("later", "nap", "after"),
        step("good", inputs={"seconds": 0.05}),
        step("fine", "nap", "good", inputs={"seconds": 0}),
    )
    result = await ended(vespera, handle)
    assert result.status == "failed"
    assert result.error is not None
    assert (result.error["code"], result.error["message"]) == ("STEP_FAILED", "Step bad failed: BROKEN: it broke")
    assert result.error["context"] == {
        "failed": [{"step": "bad", "code": "BROKEN", "message": "it broke"}],
        "skipped": 2,
    }
    assert result.result["output"] == {"fine": "fine"}
    assert result.result["skipped"] == [
        {"step": "after", "reason": "needs bad, which failed"},
        {"step": "later", "reason": "needs after, which was skipped"},
    ]
    assert sorted(calls) == ["bad", "fine", "good"]


async def test_a_failure_that_may_be_is_null_for_what_follows(vespera: Vespera) -> None:
    handle = await started(
        vespera,
        step("bad", "boom", continue_on_failure=True),
        step("next", "nap", inputs={"seconds": 0, "got": "${steps.bad.output}", "how": "${steps.bad.status}"}),
    )
    assert (await ended(vespera, handle)).status == "completed"
    assert await standing(vespera, handle) == {"bad": "failed", "next": "completed"}


async def test_the_first_failure_ends_a_plan_that_says_so(vespera: Vespera) -> None:
    handle = await started(
        vespera,
        step("bad", "boom"),
        step("long", inputs={"seconds": 30}),
        step("next", "nap", "long"),
        on_failure="abort",
    )
    result = await ended(vespera, handle)
    assert result.status == "failed"
    assert await standing(vespera, handle) == {"bad": "failed", "long": "cancelled", "next": "cancelled"}


async def test_a_fallback_does_what_the_role_could_not(vespera: Vespera) -> None:
    handle = await started(
        vespera, step("a", "boom", fallback={"role": "double", "inputs": {"n": 4}}), step("b", "boom", fallback="boom")
    )
    result = await ended(vespera, handle)
    assert result.result["output"] == {"a": {"n": 8}}
    page = await vespera.list_steps(ME, handle.task_id)
    assert [(each.status, each.role, each.attempt, each.is_fallback) for each in page.steps] == [
        ("completed", "double", 2, True),
        ("failed", "boom", 2, True),
    ]


async def test_the_retries_of_a_step_are_the_attempts_of_its_own_task(vespera: Vespera) -> None:
    handle = await started(vespera, step("a", "flaky", retries={"max_retries": 2, "backoff_seconds": 0.01}))
    assert (await ended(vespera, handle)).result["output"] == {"a": "at last"}
    (shown,) = (await vespera.list_steps(ME, handle.task_id)).steps
    assert shown.attempt == 1
    assert (await vespera.get_metrics(ME, shown.task_id or "")).failed == 2


async def test_a_step_that_outlasts_its_limit_has_timed_out(vespera: Vespera) -> None:
    handle = await started(vespera, step("slow", inputs={"seconds": 30}, timeout_seconds=0.1))
    result = await ended(vespera, handle)
    assert result.result["failed"][0]["code"] == "TIMEOUT"


async def test_a_plan_that_outlasts_its_limit_ends_its_steps_first(vespera: Vespera) -> None:
    handle = await started(
        vespera, step("slow", inputs={"seconds": 30}), step("next", "nap", "slow"), timeout_seconds=0.2
    )
    result = await ended(vespera, handle)
    assert result.status == "timed_out"
    assert await standing(vespera, handle) == {"slow": "cancelled", "next": "cancelled"}


async def test_a_reference_to_what_is_not_there_fails_its_step(vespera: Vespera) -> None:
    handle = await started(
        vespera,
        step("a", inputs={"seconds": 0}),
        step("b", "double", inputs={"n": "${steps.a.output.n}"}),
        step("c", "nap", "a", inputs={"seconds": 0, "x": "${steps.a.output.n?}"}),
    )
    result = await ended(vespera, handle)
    assert [each["code"] for each in result.result["failed"]] == ["REFERENCE_MISSING"]
    assert (await standing(vespera, handle))["c"] == "completed"


async def test_a_value_that_the_role_refuses_fails_its_step(vespera: Vespera) -> None:
    handle = await started(
        vespera, step("a", inputs={"seconds": 0}), step("b", "double", inputs={"n": "${steps.a.output}"})
    )
    (failed,) = (await ended(vespera, handle)).result["failed"]
    assert (failed["step"], failed["code"]) == ("b", "INVALID_INPUT")


async def test_a_number_becomes_text_where_the_role_wants_text(vespera: Vespera) -> None:
    argv = ["sh", "-c", 'printf "%s " "$@"', "sh", "${steps.a.output.n}", 5, 0.5, True, "${variables.none?}no"]
    steps = step("a", "double", inputs={"n": 3}), step("b", "command", inputs={"argv": argv})
    result = await ended(vespera, await started(vespera, *steps))
    assert result.result["output"]["b"]["output_tail"] == "6 5 0.5 true nullno "
    for wrong in (None, ["a"], {"a": 1}):
        with pytest.raises(InvalidPlan, match="item 1: expected a string"):
            await started(vespera, step("b", "command", inputs={"argv": ["echo", wrong]}))


async def test_all_that_is_wrong_with_the_roles_of_a_plan_is_told_at_once(vespera: Vespera) -> None:
    plan = {
        "steps": [
            step("a", "unheard-of"),
            step("b", "double", inputs={"n": "three"}),
            step("c", "double", inputs={"m": "${steps.b.output}"}),
            step("d", "nap", fallback="nobody", recovery=["no-such"]),
        ]
    }
    with pytest.raises(InvalidPlan) as refused:
        await vespera.plans.execute(ME, ExecutePlan(plan=plan))
    told = dict[str | None, str]()
    for name, problem in refused.value.problems:
        told[name] = told.get(name, "") + problem
    assert told.keys() == {"a", "b", "c", "d"}
    assert "n: required" in told["c"]
    assert "m: unknown input" in told["c"]
    assert "nobody" in told["d"]
    assert "no-such" in told["d"]
    checked = await vespera.plans.check(ME, CheckPlan(plan=plan))
    assert not checked.valid
    assert len(checked.problems) == len(refused.value.problems)
    assert (await vespera.list_tasks(ME)).total == 0


async def test_a_plan_that_is_fine_shows_its_levels(vespera: Vespera) -> None:
    plan = {"steps": [step("a"), step("b"), step("c", "nap", "a", "b")]}
    checked = await vespera.plans.check(ME, CheckPlan(plan=plan))
    assert checked.valid
    assert checked.order == [["a", "b"], ["c"]]


async def test_a_key_starts_one_plan(vespera: Vespera) -> None:
    plan = {"steps": [step("a", inputs={"seconds": 0})]}
    first = await vespera.plans.execute(ME, ExecutePlan(plan=plan, idempotency_key="k", wait_ms=25_000))
    again = await vespera.plans.execute(ME, ExecutePlan(plan=plan, idempotency_key="k"))
    assert again.repeated
    assert again.session_id == first.session_id
    with pytest.raises(Conflict):
        await vespera.plans.execute(ME, ExecutePlan(plan=plan, idempotency_key="k", title="Other"))


async def test_a_plan_without_a_name_has_a_title_all_the_same(vespera: Vespera) -> None:
    handle = await started(vespera, step("a"), step("b"), name="")
    assert (await vespera.get_status(ME, handle.task_id)).title == "Plan of 2 steps"


async def test_the_task_of_a_plan_is_executed_again_as_it_was(vespera: Vespera) -> None:
    first = await started(vespera, step("a", inputs={"seconds": 0}), wait_ms=25_000)
    again = await vespera.execute_task(ME, Execute(task_id=first.task_id, wait_ms=25_000))
    assert again.session_id != first.session_id
    assert (await ended(vespera, again)).result["output"] == {"a": "a"}
    with pytest.raises(InvalidInput) as refused:
        await vespera.execute_task(ME, Execute(title="No plan", role="plan"))
    assert refused.value.hint == "use execute_plan"


async def test_a_cancel_ends_the_steps_before_the_plan(vespera: Vespera) -> None:
    handle = await started(vespera, step("a", inputs={"seconds": 30}), step("b", "nap", "a"))
    await until(lambda: calls == ["a"])
    answer = await vespera.cancel(ME, handle.task_id, reason="Enough", wait_ms=25_000)
    assert answer.status == "cancelled"
    page = await vespera.list_steps(ME, handle.task_id)
    assert [(each.status, each.reason) for each in page.steps] == [("cancelled", "Enough"), ("cancelled", "Enough")]
    child = await vespera.get_status(ME, page.steps[0].task_id or "")
    assert child.status == "cancelled"
    events = (await vespera.last_events(ME, handle.task_id)).events
    kinds = [each["type"] for each in events]
    assert kinds.index("step_cancelled") < kinds.index("execution_cancelled")


async def test_one_step_is_cancelled_and_only_what_needs_it_is_skipped(vespera: Vespera) -> None:
    handle = await started(
        vespera,
        step("a", inputs={"seconds": 30}),
        step("b", "nap", "a"),
        step("c", inputs={"seconds": 0.2}),
        step("d", "nap", "c"),
    )
    await until(lambda: len(calls) == 2)
    assert (await vespera.plans.cancel_step(handle.task_id, "a", ME)).success
    assert (await vespera.plans.cancel_step(handle.task_id, "d", ME)).success
    assert not (await vespera.plans.cancel_step(handle.task_id, "d", ME)).success
    result = await ended(vespera, handle)
    assert (result.status, result.result["counts"]) == ("failed", {"completed": 1, "skipped": 1, "cancelled": 2})
    assert await standing(vespera, handle) == {"a": "cancelled", "b": "skipped", "c": "completed", "d": "cancelled"}


_TICKS = """
import sys, time
while True:
    with open(sys.argv[1], "a") as out:
        out.write("x")
    time.sleep(0.01)
"""


async def test_a_paused_plan_stands_still_with_all_its_steps(opening: Opening, tmp_path: Path) -> None:
    (tmp_path / "roles").mkdir()
    (tmp_path / "ticks.py").write_text(_TICKS)
    ticks = tmp_path / "ticks"
    argv = json.dumps([sys.executable, str(tmp_path / "ticks.py"), str(ticks)])
    (tmp_path / "roles" / "ticker.yaml").write_text(f"name: ticker\nrunner: process\nargv: {argv}\n")

    def written() -> int:
        return ticks.stat().st_size if ticks.exists() else 0

    async with opening(max_concurrent=1) as vespera:
        handle = await started(vespera, step("a", "ticker"), step("b", "ticker"))
        await until(lambda: written() > 3)
        paused = await vespera.pause(ME, handle.task_id)
        assert (paused.success, paused.status) == (True, "paused")
        page = await vespera.list_steps(ME, handle.task_id)
        assert (await vespera.get_status(ME, page.steps[0].task_id or "")).status == "paused"
        before = written()
        await vespera.cancel(ME, page.steps[0].task_id or "", wait_ms=25_000)  # its slot is free, and nobody takes it
        await anyio.sleep(0.1)
        assert written() == before
        assert (await vespera.get_status(ME, page.steps[1].task_id or "")).status == "pending"
        assert (await vespera.resume(ME, handle.task_id)).success
        await until(lambda: written() > before)
        await vespera.cancel(ME, handle.task_id, wait_ms=25_000)


async def test_one_step_is_paused_and_the_others_go_on(vespera: Vespera, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(30)"]
    handle = await started(vespera, step("a", "command", inputs={"argv": argv}), step("b", inputs={"seconds": 0.1}))
    await heard(vespera, handle, "step_started", "a")
    (a, _) = (await vespera.list_steps(ME, handle.task_id)).steps

    async def is_running() -> bool:
        return (await vespera.get_status(ME, a.task_id or "")).status == "running"

    await until(is_running)
    assert (await vespera.plans.pause_step(handle.task_id, "a", ME)).status == "paused"
    await heard(vespera, handle, "step_waiting", "a", **{"for": "pause"})
    await heard(vespera, handle, "step_completed", "b")
    assert (await vespera.get_status(ME, handle.task_id)).status == "running"
    assert await standing(vespera, handle) == {"a": "waiting", "b": "completed"}
    assert (await vespera.plans.resume_step(handle.task_id, "a", ME)).status == "running"
    await heard(vespera, handle, "step_waiting", "a", **{"for": None})
    assert await standing(vespera, handle) == {"a": "running", "b": "completed"}
    assert (await vespera.cancel(ME, handle.task_id, wait_ms=25_000)).status == "cancelled"


async def test_a_step_that_asks_holds_only_itself_up(vespera: Vespera) -> None:
    handle = await started(
        vespera, step("ask", inputs={"seconds": 0}, approval="Really?"), step("other", inputs={"seconds": 0})
    )
    await heard(vespera, handle, "step_waiting", "ask", **{"for": "answer"})
    await heard(vespera, handle, "step_completed", "other")
    status = await vespera.get_status(ME, handle.task_id)
    assert status.inputs is not None
    (key,) = [each.key for each in status.inputs]
    assert key.startswith("ask/")
    await vespera.answer_input(ME, handle.task_id, {key: InputAnswer(action="accept")})
    assert (await ended(vespera, handle)).status == "completed"


async def test_waiting_for_a_person_is_not_in_the_time_of_the_plan(vespera: Vespera) -> None:
    handle = await started(vespera, step("ask", inputs={"seconds": 0}, approval=True), timeout_seconds=3)
    await heard(vespera, handle, "phase_change", outcome="parked")
    await anyio.sleep(3.1)  # longer than all its time
    status = await vespera.get_status(ME, handle.task_id)
    assert status.inputs is not None
    await vespera.answer_input(ME, handle.task_id, {status.inputs[0].key: InputAnswer(action="accept")})
    assert (await ended(vespera, handle)).status == "completed"


async def test_a_fault_of_ours_in_one_plan_is_its_failure_and_leaves_nobody(vespera: Vespera) -> None:
    handle = await started(vespera, step("a", inputs={"seconds": 30}), step("b", "nap", "a"))
    await until(lambda: calls == ["a"])
    coordinator = vespera._engine.coordinator(handle.session_id)  # pyright: ignore[reportPrivateUsage]
    assert coordinator is not None
    coordinator._children.heard(cast("Any", "no child"))  # pyright: ignore[reportPrivateUsage]
    result = await ended(vespera, handle)
    assert (result.status, result.error is not None) == ("failed", True)
    page = await vespera.list_steps(ME, handle.task_id)
    assert (await vespera.get_status(ME, page.steps[0].task_id or "")).status == "cancelled"
    other = await started(vespera, step("c", inputs={"seconds": 0}))
    assert (await ended(vespera, other)).status == "completed"
