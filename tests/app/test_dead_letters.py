"""What has failed for good stands in a list, and is put back or taken off: real store, engine and processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import pytest
from deadlines import WITHIN

from vespera_exec.app.plans.views import ExecutePlan
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute, Handle, NewTask
from vespera_exec.errors import InvalidInput, PermissionDenied
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from pathlib import Path

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]
Failing = Callable[..., None]
ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})
ANN = Caller(principal="token:ann", over_tcp=True, scopes=frozenset({"read", "operate"}), sees_only="token:ann")
READER = replace(ANN, scopes=frozenset({"read"}))

# Fails until the file that it is given exists; then says where it stands, and with what priority it was asked for.
_TRYING = """
import json, os, sys
task = json.load(open(os.environ["VESPERA_TASK_FILE"]))
if not os.path.exists(sys.argv[1]):
    print("the well is dry", file=sys.stderr)
    sys.exit(3)
out = os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w", buffering=1)
out.write(json.dumps({"result": {"cwd": os.getcwd(), "inputs": task["inputs"]}}) + "\\n")
"""


@pytest.fixture
def failing(tmp_path: Path) -> Failing:
    """`failing("try")`: a role whose work fails until the file `water` is there, tried twice."""

    def make(name: str = "try", *lines: str) -> None:
        roles = tmp_path / "roles"
        roles.mkdir(exist_ok=True)
        (tmp_path / "trying.py").write_text(_TRYING)
        text = "\n".join(
            (
                f"name: {name}",
                "runner: process",
                f'argv: ["{sys.executable}", "{tmp_path}/trying.py", "{tmp_path}/water"]',
                "inputs: {n: {type: integer, default: 1}}",
                "retry: {max_retries: 9, retry_on: [EXIT_NONZERO], backoff_seconds: 0}",
                *lines,
            )
        )
        (roles / f"{name}.yaml").write_text(text + "\n")

    make()
    return make


def running(tmp_path: Path, name: str, line: str, *more: str) -> None:
    """A role that runs this line of the shell."""
    text = "\n".join((f"name: {name}", "runner: process", f'argv: [sh, -c, "{line}"]', *more))
    (tmp_path / "roles" / f"{name}.yaml").write_text(text + "\n")


async def failed(vespera: Vespera, title: str, *, caller: Caller = ME, role: str = "try", n: int = 1) -> Handle:
    """A task that has failed for good."""
    task = await vespera.create_task(caller, NewTask(title=title, role=role, inputs={"n": n}, max_retries=2))
    handle = await vespera.execute_task(caller, Execute(task_id=task.task_id, priority=7, timeout_seconds=60.0))
    await ended(vespera, handle.task_id)
    return handle


async def ended(vespera: Vespera, task_id: str) -> None:
    cursor = 0
    with anyio.fail_after(WITHIN):
        while True:
            page = await vespera.read_events(Caller(), task_id, cursor=cursor, wait_ms=25_000)
            if page.done:
                return
            cursor = page.next_cursor


async def titles(vespera: Vespera, caller: Caller = ME) -> list[str]:
    return [each.title for each in (await vespera.dead_letters.list(caller)).dead_letters]


async def test_a_task_that_has_used_up_its_retries_stands_in_the_list_with_its_last_error(
    vespera: Vespera, failing: Failing
) -> None:
    assert (await vespera.dead_letters.list(ME)).total == 0
    handle = await failed(vespera, "Fetch water")
    page = await vespera.dead_letters.list(ME)
    (letter,) = page.dead_letters
    status = await vespera.get_status(ME, handle.task_id)
    assert (page.total, page.next_page) == (1, None)
    assert (letter.task_id, letter.title, letter.role) == (handle.task_id, "Fetch water", "try")
    assert (letter.run_id, letter.session_id) == (handle.run_id, status.session_id)
    assert (letter.attempts, letter.retry_count, letter.is_plan) == (2, 2, False)
    assert letter.error["code"] == "EXIT_NONZERO"
    assert "the well is dry" in letter.error["message"]


async def test_whatever_nobody_tries_again_by_itself_stands_in_the_list(
    vespera: Vespera, failing: Failing, tmp_path: Path
) -> None:
    """Its task is open, since it has retries left: but those are a person's."""
    running(tmp_path, "slow", "sleep 60")
    running(tmp_path, "once", "exit 3")
    late = await vespera.execute_task(ME, Execute(title="late", role="slow", timeout_seconds=0.2))
    await ended(vespera, late.task_id)
    bad = await vespera.execute_task(ME, Execute(title="bad", role="once"))
    await ended(vespera, bad.task_id)
    never = await vespera.create_task(ME, NewTask(title="never executed", role="once"))
    gone = await vespera.execute_task(ME, Execute(title="cancelled", role="slow"))
    await vespera.cancel(ME, gone.task_id)
    await ended(vespera, gone.task_id)
    assert {(await vespera.get_task(ME, each.task_id)).status for each in (late, bad, never)} == {"todo"}

    found = (await vespera.dead_letters.list(ME)).dead_letters
    assert [(each.title, each.error["code"], each.retry_count) for each in found] == [
        ("bad", "EXIT_NONZERO", 1),
        ("late", "TIMEOUT", 1),
    ]
    answer = await vespera.dead_letters.requeue(ME, [each.task_id for each in (bad, never, gone)])
    assert [each.task_id for each in answer.requeued] == [bad.task_id]
    assert [each.error_code for each in answer.refused] == ["CONFLICT", "CONFLICT"]
    await ended(vespera, bad.task_id)
    (again, _) = (await vespera.dead_letters.list(ME)).dead_letters
    assert (again.title, again.run_id, again.retry_count) == ("bad", answer.requeued[0].run_id, 1)

    assert (await vespera.dead_letters.discard(ME, all=True)).left == 0
    assert {(await vespera.get_task(ME, each.task_id)).status for each in (late, bad)} == {"cancelled"}
    assert (await vespera.get_task(ME, never.task_id)).status == "todo"


async def test_what_is_executed_again_or_has_a_retry_to_come_is_not_in_the_list(
    vespera: Vespera, failing: Failing, tmp_path: Path
) -> None:
    running(tmp_path, "later", "exit 3", "retry: {max_retries: 3, retry_on: [EXIT_NONZERO], backoff_seconds: 60}")
    retried = await vespera.execute_task(ME, Execute(title="retried", role="later"))
    with anyio.fail_after(WITHIN):
        while True:
            if (await vespera.get_status(ME, retried.task_id)).session_id != retried.session_id:
                break
            await anyio.sleep(0.02)
    failed_once = await failed(vespera, "Fetch water")
    assert await titles(vespera) == ["Fetch water"]
    running(tmp_path, "try", "sleep 60")
    await vespera.execute_task(ME, Execute(task_id=failed_once.task_id, inputs={}))
    assert await titles(vespera) == []
    for verb in (vespera.dead_letters.requeue, vespera.dead_letters.discard):
        answer = await verb(ME, [failed_once.task_id, retried.task_id])
        assert [each.error_code for each in answer.refused] == ["CONFLICT", "CONFLICT"]
    assert {(await vespera.get_task(ME, each.task_id)).status for each in (retried, failed_once)} == {"doing"}
    for each in (retried, failed_once):
        await vespera.cancel(ME, each.task_id)
        await ended(vespera, each.task_id)


async def test_one_that_is_put_back_runs_as_it_was_asked_for_and_leaves_the_list(
    vespera: Vespera, failing: Failing, tmp_path: Path
) -> None:
    handle = await failed(vespera, "Fetch water", caller=replace(ME, cwd=str(tmp_path)), n=5)
    await failed(vespera, "Another")
    (tmp_path / "water").touch()
    answer = await vespera.dead_letters.requeue(ME, [handle.task_id])
    (put_back,) = answer.requeued
    assert (put_back.task_id, answer.refused, answer.left) == (handle.task_id, [], None)
    assert put_back.run_id != handle.run_id
    await ended(vespera, handle.task_id)
    result = await vespera.get_result(ME, handle.task_id)
    # Where who asked first stood, not who put it back; with its inputs, and the limits of its last run.
    assert result.result["result"] == {"cwd": str(tmp_path), "inputs": {"n": 5}}
    life = (await vespera._store.queries.get_execution(put_back.session_id) or (None,))[0]  # pyright: ignore[reportPrivateUsage]
    assert life is not None
    assert life.priority == 7
    body = await vespera._store.queries.last_request(handle.task_id)  # pyright: ignore[reportPrivateUsage]
    assert b'"timeout_seconds":60.0' in (body or b"")
    assert await titles(vespera) == ["Another"]


async def test_its_retries_begin_anew_when_it_is_put_back(vespera: Vespera, failing: Failing) -> None:
    handle = await failed(vespera, "Fetch water")
    answer = await vespera.dead_letters.requeue(ME, [handle.task_id])
    await ended(vespera, handle.task_id)
    (letter,) = (await vespera.dead_letters.list(ME)).dead_letters
    assert (letter.attempts, letter.retry_count) == (2, 2)
    assert letter.run_id == answer.requeued[0].run_id


async def test_many_are_put_back_together_and_each_refusal_names_its_task(
    vespera: Vespera, failing: Failing, tmp_path: Path
) -> None:
    failing("other")
    for title in ("a", "b"):
        await failed(vespera, title)
    gone = await failed(vespera, "c", role="other")
    (tmp_path / "roles" / "other.yaml").unlink()
    (tmp_path / "water").touch()
    answer = await vespera.dead_letters.requeue(ME, all=True)
    assert len(answer.requeued) == 2
    (refused,) = answer.refused
    assert (refused.task_id, refused.error_code, answer.left) == (gone.task_id, "ROLE_NOT_FOUND", 1)
    for each in answer.requeued:
        await ended(vespera, each.task_id)
    assert await titles(vespera) == ["c"]

    again = await vespera.dead_letters.requeue(ME, [answer.requeued[0].task_id, "nobody"])
    assert [each.error_code for each in again.refused] == ["CONFLICT", "TASK_NOT_FOUND"]


async def test_all_of_one_role_are_put_back_and_the_others_stay(
    vespera: Vespera, failing: Failing, tmp_path: Path
) -> None:
    failing("other")
    await failed(vespera, "a")
    for title in ("b", "c"):
        await failed(vespera, title, role="other")
    (tmp_path / "water").touch()
    answer = await vespera.dead_letters.requeue(ME, all=True, role="other", limit=1)
    assert (len(answer.requeued), answer.left) == (1, 1)
    await ended(vespera, answer.requeued[0].task_id)
    assert sorted(await titles(vespera)) == ["a", "b"]


async def test_the_same_task_asked_for_many_times_at_once_runs_once(
    vespera: Vespera, failing: Failing, tmp_path: Path
) -> None:
    handle = await failed(vespera, "Fetch water")
    (tmp_path / "water").touch()
    put_back: list[str] = []
    refused: list[str] = []

    async def ask() -> None:
        answer = await vespera.dead_letters.requeue(ME, [handle.task_id])
        put_back.extend(each.run_id for each in answer.requeued)
        refused.extend(each.error_code for each in answer.refused)

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(ask)
    assert (len(put_back), refused) == (1, ["CONFLICT"] * 4)
    await ended(vespera, handle.task_id)


async def test_one_that_is_discarded_is_cancelled_and_can_be_executed_all_the_same(
    vespera: Vespera, failing: Failing, opening: Opening, tmp_path: Path
) -> None:
    handle = await failed(vespera, "Fetch water")
    answer = await vespera.dead_letters.discard(ME, [handle.task_id])
    assert (answer.discarded, answer.refused) == ([handle.task_id], [])
    assert await titles(vespera) == []
    assert (await vespera.get_task(ME, handle.task_id)).status == "cancelled"
    assert (await vespera.get_status(ME, handle.task_id)).status == "failed"
    twice = await vespera.dead_letters.discard(ME, [handle.task_id])
    assert [each.error_code for each in twice.refused] == ["CONFLICT"]
    (tmp_path / "water").touch()
    await vespera.execute_task(ME, Execute(task_id=handle.task_id))
    await ended(vespera, handle.task_id)
    assert (await vespera.get_task(ME, handle.task_id)).status == "done"


async def test_the_list_is_there_for_the_next_owner(opening: Opening, failing: Failing, tmp_path: Path) -> None:
    async with opening() as first:
        handle = await failed(first, "Fetch water")
    (tmp_path / "water").touch()
    async with opening() as second:
        assert await titles(second) == ["Fetch water"]
        await second.dead_letters.requeue(ME, [handle.task_id[:8]])
        await ended(second, handle.task_id)
        assert await titles(second) == []


async def test_a_plan_is_put_back_with_what_it_has_done_and_its_steps_stand_in_no_list(
    vespera: Vespera, failing: Failing, tmp_path: Path
) -> None:
    failing("well")
    (tmp_path / "roles" / "once.yaml").write_text(
        f"name: once\nrunner: process\nargv: [sh, -c, 'echo x >> \"$1\"', sh, {tmp_path}/calls]\n"
    )
    plan = {
        "name": "Garden",
        "steps": [{"id": "dig", "role": "once"}, {"id": "water", "role": "well", "needs": ["dig"]}],
    }
    handle = await vespera.plans.execute(ME, ExecutePlan(plan=plan))
    await ended(vespera, handle.task_id)
    (letter,) = (await vespera.dead_letters.list(ME)).dead_letters
    assert (letter.task_id, letter.title, letter.is_plan) == (handle.task_id, "Garden", True)
    assert letter.error["code"] == "STEP_FAILED"
    (step,) = await vespera._store.queries.children(handle.session_id, "water")  # pyright: ignore[reportPrivateUsage]
    answer = await vespera.dead_letters.requeue(ME, [step.task_id])
    assert [(each.error_code, "step water of a plan" in each.reason) for each in answer.refused] == [("CONFLICT", True)]

    (tmp_path / "water").touch()
    answer = await vespera.dead_letters.requeue(ME, all=True)
    assert [each.task_id for each in answer.requeued] == [handle.task_id]
    await ended(vespera, handle.task_id)
    assert (await vespera.get_status(ME, handle.task_id)).status == "completed"
    assert (tmp_path / "calls").read_text().split() == ["x"]
    assert await titles(vespera) == []


async def test_a_plan_is_put_back_by_the_next_owner_too(opening: Opening, failing: Failing, tmp_path: Path) -> None:
    failing("well")
    async with opening() as first:
        plan = {"name": "Garden", "steps": [{"id": "water", "role": "well"}]}
        handle = await first.plans.execute(ME, ExecutePlan(plan=plan))
        await ended(first, handle.task_id)
    (tmp_path / "water").touch()
    async with opening() as second:
        answer = await second.dead_letters.requeue(ME, all=True)
        assert [each.task_id for each in answer.requeued] == [handle.task_id]
        await ended(second, handle.task_id)
        assert (await second.get_status(ME, handle.task_id)).status == "completed"


async def test_nobody_sees_or_decides_about_the_dead_letters_of_others(
    vespera: Vespera, failing: Failing, tmp_path: Path
) -> None:
    failing("shared", "permissions: {principals: [local], scopes: [operate]}")
    mine = await failed(vespera, "mine", role="shared")
    hers = await failed(vespera, "hers", role="shared", caller=ANN)
    assert await titles(vespera, ANN) == ["hers"]
    assert sorted(await titles(vespera)) == ["hers", "mine"]
    answer = await vespera.dead_letters.requeue(ANN, [mine.task_id])
    assert [each.error_code for each in answer.refused] == ["TASK_NOT_FOUND"]
    discarded = await vespera.dead_letters.discard(ANN, all=True)
    assert (discarded.discarded, discarded.refused, discarded.left) == ([hers.task_id], [], 0)
    assert await titles(vespera) == ["mine"]
    with pytest.raises(PermissionDenied):
        await vespera.dead_letters.requeue(READER, all=True)
    with pytest.raises(PermissionDenied):
        await vespera.dead_letters.discard(READER, all=True)


async def test_who_may_not_use_a_role_puts_back_nothing_of_it(vespera: Vespera, failing: Failing) -> None:
    """The holder of the first token sees every task, and may not use the roles of the local user."""
    handle = await failed(vespera, "mine")
    answer = await vespera.dead_letters.requeue(replace(ANN, sees_only=None), [handle.task_id])
    assert [each.error_code for each in answer.refused] == ["PERMISSION_DENIED"]
    assert await titles(vespera) == ["mine"]


async def test_what_is_put_back_waits_in_a_queue_that_has_room(
    opening: Opening, failing: Failing, tmp_path: Path
) -> None:
    async with opening(max_queued=2, max_concurrent=1) as vespera:
        for title in "abcd":
            await failed(vespera, title)
        (tmp_path / "water").touch()
        answer = await vespera.dead_letters.requeue(ME, all=True)
        assert len(answer.requeued) + len(answer.refused) == 4
        assert {each.error_code for each in answer.refused} == {"CONFLICT"}
        assert answer.left == len(answer.refused) >= 1
        for each in answer.requeued:
            await ended(vespera, each.task_id)


async def test_the_list_is_read_in_pages(vespera: Vespera, failing: Failing) -> None:
    for title in "abc":
        await failed(vespera, title)
    first = await vespera.dead_letters.list(ME, limit=2)
    assert ([each.title for each in first.dead_letters], first.total) == (["c", "b"], 3)
    rest = await vespera.dead_letters.list(ME, limit=2, page=first.next_page)
    assert [each.title for each in rest.dead_letters] == ["a"]
    with pytest.raises(InvalidInput):
        await vespera.dead_letters.list(ME, limit=0)


async def test_it_must_be_said_which_ones(vespera: Vespera) -> None:
    for ask in (vespera.dead_letters.requeue, vespera.dead_letters.discard):
        with pytest.raises(InvalidInput, match="either task_ids, or all"):
            await ask(ME)
        with pytest.raises(InvalidInput, match="either task_ids, or all"):
            await ask(ME, ["a"], all=True)
        with pytest.raises(InvalidInput, match="role narrows"):
            await ask(ME, ["a"], role="try")
        with pytest.raises(InvalidInput, match="1,000"):
            await ask(ME, ["a"] * 1001)
