"""A role asks, the run stands durably, and whoever may operate answers: real store, engine and processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN

from roles.definition import Role
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute, Handle, InputAnswer, Paused
from vespera_exec.errors import InvalidInput, PermissionDenied
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from pathlib import Path

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]
ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})
SOMEBODY = Caller(principal="token:ann", over_tcp=True, scopes=frozenset({"read", "operate"}), sees_only="token:ann")
READER = Caller(principal="token:eve", over_tcp=True, scopes=frozenset({"read"}))
YES = InputAnswer(action="accept")
NO = InputAnswer(action="decline")
COLOUR = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}, "coats": {"type": "integer", "default": 2}},
    "required": ["colour"],
}

# Asks until it has an answer to each of the questions named in its inputs; notes each time that it is called.
_ASKING = """
import json, os, sys
task = json.load(open(os.environ["VESPERA_TASK_FILE"]))
out = os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w", buffering=1)
with open(sys.argv[1], "a") as calls:
    calls.write(f"{task['checkpoint']} ")
for question in json.loads(sys.argv[2]):
    if question["key"] not in task["answers"]:
        out.write(json.dumps({"ask": question, "checkpoint": 7}) + "\\n")
out.write(json.dumps({"result": task["answers"]}) + "\\n")
"""


@pytest.fixture
def asking(tmp_path: Path) -> Callable[..., Execute]:
    """`asking({"key": ...}, on_interrupt="resume")`: a request for a role that asks these questions together."""

    def make(*questions: dict[str, Any], definition: str = "", **more: Any) -> Execute:
        roles = tmp_path / "roles"
        roles.mkdir(exist_ok=True)
        (tmp_path / "asking.py").write_text(_ASKING)
        told = json.dumps(questions).replace("{", "{{").replace("}", "}}")
        argv = json.dumps([sys.executable, str(tmp_path / "asking.py"), str(tmp_path / "calls"), told])
        (roles / "asker.yaml").write_text(f"name: asker\nrunner: process\nargv: {argv}\n{definition}\n")
        return Execute(title="Ask", role="asker", **more)

    return make


def question(key: str, *, kind: str = "form", **more: Any) -> dict[str, Any]:
    return {"key": key, "kind": kind, "message": f"What about {key}?", **more}


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().split()


async def event_types(vespera: Vespera, any_id: str) -> list[str]:
    page = await vespera.read_events(ME, any_id, max_events=1000)
    return [event["type"] for event in page.events]


async def until_it_says(vespera: Vespera, handle: Handle, *types: str) -> None:
    """Returns when all of these events are in the log."""
    missing, cursor = set(types), 0
    with anyio.fail_after(WITHIN):
        while missing:
            page = await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=25_000)
            missing -= {event["type"] for event in page.events}
            cursor = page.next_cursor


async def asked(vespera: Vespera, request: Execute) -> Handle:
    """A run that stands, and waits for its answers."""
    handle = await vespera.execute_task(ME, request)
    await until_it_says(vespera, handle, "execution_paused")
    return handle


async def ended(vespera: Vespera, handle: Handle) -> Any:
    """Its result, once it is done."""
    cursor = 0
    with anyio.fail_after(WITHIN):
        while True:
            page = await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=25_000)
            if page.done:
                return await vespera.get_result(ME, handle.task_id)
            cursor = page.next_cursor


async def test_a_run_that_asks_stands_without_a_slot_and_goes_on_with_the_answer(
    vespera: Vespera, asking: Callable[..., Execute], tmp_path: Path
) -> None:
    handle = await asked(vespera, asking(question("paint", schema=COLOUR)))
    status = await vespera.get_status(ME, handle.task_id)
    assert status.status == "paused"
    assert status.inputs is not None
    assert [(each.key, each.message, each.schema_) for each in status.inputs] == [
        ("paint", "What about paint?", COLOUR)
    ]
    assert vespera.describe().running == 0

    answered = await vespera.answer_input(
        ME, handle.task_id, {"paint": InputAnswer(action="accept", content={"colour": "red"})}
    )
    assert (answered.success, answered.accepted, answered.open) == (True, ["paint"], [])
    result = await ended(vespera, handle)
    assert result.status == "completed"
    assert result.result["result"] == {"paint": {"action": "accept", "content": {"colour": "red", "coats": 2}}}
    assert calls(tmp_path) == ["None", "7"]  # called again, with its checkpoint
    assert (await vespera.get_status(ME, handle.task_id)).inputs is None


async def test_the_log_tells_the_question_before_the_pause_and_the_answer_before_the_resume(
    vespera: Vespera, asking: Callable[..., Execute]
) -> None:
    handle = await asked(vespera, asking(question("go", kind="approval")))
    await vespera.answer_input(ME, handle.task_id, {"go": YES})
    await ended(vespera, handle)
    page = await vespera.read_events(ME, handle.task_id, max_events=1000)
    told = [
        (each["type"], each["status"]["new"])
        for each in page.events
        if each["type"].startswith(("approval", "execution_paused", "execution_resumed"))
        or "paused" in (each["status"]["new"], each["status"]["old"])
    ]
    assert told == [
        ("approval_requested", None),
        ("status_change", "paused"),
        ("execution_paused", None),
        ("approval_approved", None),
        ("status_change", "running"),
        ("execution_resumed", None),
    ]
    approved = next(each for each in page.events if each["type"] == "approval_approved")
    assert approved["details"] == {"key": "go", "action": "accept", "content": {}, "by": "local"}


async def test_a_rejected_approval_ends_the_run_and_its_work_is_never_called_again(
    vespera: Vespera, asking: Callable[..., Execute], tmp_path: Path
) -> None:
    request = asking(
        question("go", kind="approval"), definition="retry: {max_retries: 2, retry_on: [APPROVAL_REJECTED]}"
    )
    handle = await asked(vespera, request)
    answered = await vespera.answer_input(ME, handle.task_id, {"go": NO})
    assert (answered.success, answered.status) == (True, "failed")
    result = await ended(vespera, handle)
    assert result.error is not None
    assert (result.status, result.error["code"]) == ("failed", "APPROVAL_REJECTED")
    assert calls(tmp_path) == ["None"]
    assert vespera.is_idle


async def test_a_declined_form_is_told_to_the_role(vespera: Vespera, asking: Callable[..., Execute]) -> None:
    handle = await asked(vespera, asking(question("name")))
    await vespera.answer_input(ME, handle.task_id, {"name": InputAnswer(action="decline", content={"ignored": 1})})
    result = await ended(vespera, handle)
    assert result.result["result"] == {"name": {"action": "decline", "content": None}}


async def test_of_two_questions_the_last_answer_lets_it_go_on(
    vespera: Vespera, asking: Callable[..., Execute], tmp_path: Path
) -> None:
    handle = await asked(vespera, asking(question("a"), question("b")))
    first = await vespera.answer_input(ME, handle.task_id, {"b": YES, "unknown": YES})
    assert (first.accepted, first.ignored, first.open, first.status) == (["b"], ["unknown"], ["a"], "paused")
    again = await vespera.answer_input(ME, handle.task_id, {"b": NO})
    assert (again.success, again.ignored, again.reason) == (False, ["b"], "it asks a")
    await vespera.answer_input(ME, handle.session_id, {"a": YES})
    result = await ended(vespera, handle)
    assert [each["action"] for each in result.result["result"].values()] == ["accept", "accept"]
    assert len(calls(tmp_path)) == 2


async def test_an_answer_that_does_not_fit_is_refused_with_all_that_came_with_it(
    vespera: Vespera, asking: Callable[..., Execute]
) -> None:
    handle = await asked(vespera, asking(question("a"), question("paint", schema=COLOUR)))
    with pytest.raises(InvalidInput, match="the answer to paint: field 'colour' is one of red, blue"):
        await vespera.answer_input(
            ME, handle.task_id, {"a": YES, "paint": InputAnswer(action="accept", content={"colour": "green"})}
        )
    status = await vespera.get_status(ME, handle.task_id)
    assert [each.key for each in status.inputs or ()] == ["a", "paint"]
    assert "approval_approved" not in await event_types(vespera, handle.task_id)


async def test_of_two_who_answer_at_once_one_is_heard(vespera: Vespera, asking: Callable[..., Execute]) -> None:
    handle = await asked(vespera, asking(question("a")))
    taken: list[bool] = []

    async def answer() -> None:
        taken.append((await vespera.answer_input(ME, handle.task_id, {"a": YES})).success)

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(answer)
    assert sorted(taken) == [False] * 7 + [True]
    await ended(vespera, handle)
    assert (await event_types(vespera, handle.task_id)).count("approval_approved") == 1


async def test_what_waits_for_somebody_is_listed_over_all_tasks_oldest_first(
    vespera: Vespera, asking: Callable[..., Execute]
) -> None:
    request = asking(question("a", kind="approval"), question("b"))
    first = await asked(vespera, request)
    second = await asked(vespera, request)
    found = await vespera.list_inputs(ME, limit=3)
    assert [(each.run_id, each.input.key) for each in found.inputs] == [
        (first.run_id, "a"),
        (first.run_id, "b"),
        (second.run_id, "a"),
    ]
    assert (found.total, found.inputs[0].title, found.inputs[0].role) == (4, "Ask", "asker")
    assert (await vespera.list_inputs(SOMEBODY)).total == 0
    await vespera.answer_input(ME, first.run_id, {"a": YES, "b": YES})
    await vespera.cancel(ME, second.run_id, wait_ms=25_000)
    assert (await vespera.list_inputs(ME)).inputs == []


async def test_who_may_only_read_may_not_answer(vespera: Vespera, asking: Callable[..., Execute]) -> None:
    handle = await asked(vespera, asking(question("a")))
    with pytest.raises(PermissionDenied, match="operate"):
        await vespera.answer_input(READER, handle.task_id, {"a": YES})
    with pytest.raises(InvalidInput, match="limit"):
        await vespera.list_inputs(ME, limit=0)


async def test_a_resume_does_not_answer_for_anybody_and_a_pause_changes_nothing(
    vespera: Vespera, asking: Callable[..., Execute]
) -> None:
    handle = await asked(vespera, asking(question("a")))
    resumed = await vespera.resume(ME, handle.task_id)
    assert (resumed.success, resumed.reason) == (False, "it waits for an answer: a")
    paused = await vespera.pause(ME, handle.task_id)
    assert (paused.success, paused.already) == (True, True)
    await vespera.answer_input(ME, handle.task_id, {"a": YES})
    assert (await ended(vespera, handle)).status == "completed"


async def test_a_run_that_waits_is_cancelled_at_once(vespera: Vespera, asking: Callable[..., Execute]) -> None:
    handle = await asked(vespera, asking(question("a")))
    cancelled = await vespera.cancel(ME, handle.task_id, wait_ms=25_000)
    assert cancelled.status == "cancelled"
    late = await vespera.answer_input(ME, handle.task_id, {"a": YES})
    assert (late.success, late.reason) == (False, "it has ended (cancelled)")


async def test_a_run_waits_no_longer_than_its_role_allows(vespera: Vespera, asking: Callable[..., Execute]) -> None:
    handle = await asked(vespera, asking(question("a"), definition="wait_timeout_seconds: 0.3"))
    result = await ended(vespera, handle)
    assert result.status == "timed_out"
    assert "Waiting for an answer: a" in result.error["message"]
    assert (await vespera.list_inputs(ME)).total == 0


async def test_the_time_of_the_wait_is_no_time_at_work(vespera: Vespera, asking: Callable[..., Execute]) -> None:
    handle = await asked(vespera, asking(question("a"), timeout_seconds=5.0))
    before = await vespera.get_status(ME, handle.task_id)
    await anyio.sleep(0.5)  # time that must not be counted
    after = await vespera.get_status(ME, handle.task_id)
    assert before.session is not None
    assert after.session is not None
    assert before.session.time_tracking.elapsed_seconds == after.session.time_tracking.elapsed_seconds


async def test_a_role_that_wants_an_approval_begins_after_it(
    vespera: Vespera, asking: Callable[..., Execute], tmp_path: Path
) -> None:
    handle = await asked(vespera, asking(definition="approval: Touch the wall?"))
    assert not (tmp_path / "calls").exists()
    status = await vespera.get_status(ME, handle.task_id)
    assert [(each.key, each.kind, each.message) for each in status.inputs or ()] == [
        ("approval", "approval", "Touch the wall?")
    ]
    await vespera.answer_input(ME, handle.task_id, {"approval": YES})
    assert (await ended(vespera, handle)).status == "completed"
    assert (await event_types(vespera, handle.task_id)).count("approval_requested") == 1


@pytest.mark.promise("answers")
@pytest.mark.parametrize("on_interrupt", ["fail", "resume"])
async def test_a_question_outlives_any_number_of_owners(
    opening: Opening, asking: Callable[..., Execute], tmp_path: Path, on_interrupt: str
) -> None:
    async with opening() as vespera:
        handle = await asked(vespera, asking(question("a"), definition=f"on_interrupt: {on_interrupt}"))
    for _ in range(4):
        async with opening() as vespera:
            status = await vespera.get_status(ME, handle.task_id)
            assert (status.status, [each.key for each in status.inputs or ()]) == ("paused", ["a"])
            assert [each.kept for each in vespera.describe().work] == [True]
    async with opening() as vespera:
        assert (await vespera.list_inputs(ME)).total == 1
        await vespera.answer_input(ME, handle.task_id, {"a": YES})
        result = await ended(vespera, handle)
        assert result.status == "completed"
        assert "recovery_initiated" not in await event_types(vespera, handle.task_id)
    assert len(calls(tmp_path)) == 2


@pytest.mark.promise("answers")
async def test_an_answered_run_that_waits_for_its_turn_goes_on_under_the_next_owner(
    opening: Opening, asking: Callable[..., Execute], tmp_path: Path
) -> None:
    """Its role does not resume; but nothing of it ran when the owner went."""
    request = asking(question("a"))
    held = Execute(title="Hold", role="command", inputs={"argv": ["sleep", "60"]})
    async with opening(max_concurrent=1) as vespera:
        handle = await asked(vespera, request)
        await until_it_says(vespera, await vespera.execute_task(ME, held), "execution_started")
        answered = await vespera.answer_input(ME, handle.task_id, {"a": YES})
        assert answered.status == "running"
        assert len(calls(tmp_path)) == 1
    async with opening(max_concurrent=1) as vespera:
        result = await ended(vespera, handle)
        assert result.status == "completed"
        assert result.session_id == handle.session_id
    assert len(calls(tmp_path)) == 2


async def test_an_answered_run_may_be_paused_before_its_turn_and_stays_so(
    opening: Opening, asking: Callable[..., Execute]
) -> None:
    request = asking(question("a"))
    held = Execute(title="Hold", role="command", inputs={"argv": ["sleep", "60"]})
    async with opening(max_concurrent=1) as vespera:
        handle = await asked(vespera, request)
        await until_it_says(vespera, await vespera.execute_task(ME, held), "execution_started")
        await vespera.answer_input(ME, handle.task_id, {"a": YES})
        assert (await vespera.pause(ME, handle.task_id)).success
    async with opening(max_concurrent=1) as vespera:
        assert (await vespera.get_status(ME, handle.task_id)).status == "paused"
        assert (await vespera.resume(ME, handle.task_id)).success
        assert (await ended(vespera, handle)).status == "completed"


async def test_the_next_attempt_knows_what_was_answered(
    vespera: Vespera, asking: Callable[..., Execute], tmp_path: Path
) -> None:
    request = asking(question("a"), definition="retry: {max_retries: 1, retry_on: [EXIT_NONZERO], backoff_seconds: 0}")
    script = tmp_path / "asking.py"
    fails_once = "if task['attempt'] == 1 and 'a' in task['answers']: sys.exit(3)\n"
    script.write_text(script.read_text().replace("for question", f"{fails_once}for question"))
    handle = await asked(vespera, request)
    await vespera.answer_input(ME, handle.task_id, {"a": YES})
    result = await ended(vespera, handle)
    assert (result.status, result.session_id != handle.session_id) == ("completed", True)
    types = await event_types(vespera, handle.task_id)
    assert (types.count("approval_requested"), types.count("execution_failed")) == (1, 1)


async def test_a_pause_that_meets_a_question_finds_it_standing_still(vespera: Vespera) -> None:
    begun, may_ask = anyio.Event(), anyio.Event()

    async def asks(context: Any) -> None:
        for number in range(2000):  # they take a moment to go, in which all that was said before reaches the disk
            (context.scratch / str(number)).touch()
        begun.set()
        await may_ask.wait()
        context.ask("a", "What about a?")

    vespera.roles.add(Role.from_callable(asks, name="asks", in_loop=True, inputs=None))
    handle = await vespera.execute_task(ME, Execute(title="Ask", role="asks"))
    await begun.wait()
    answers: list[Paused] = []

    async def pause() -> None:
        answers.append(await vespera.pause(ME, handle.run_id, wait_ms=25_000))

    async with anyio.create_task_group() as group:
        group.start_soon(pause)
        await anyio.wait_all_tasks_blocked()
        may_ask.set()
    assert [(each.success, each.status, each.pending) for each in answers] == [(True, "paused", False)]
    assert [each.key for each in (await vespera.get_status(ME, handle.run_id)).inputs or ()] == ["a"]
