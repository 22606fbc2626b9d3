"""Roles that ask: what ends their work for now, what they are told when they are called again, what is refused."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import question_callables
from role_harness import bench

from roles.definition import Role
from roles.execution import RoleExecutor
from roles.rolefile import parse_role
from roles.runners import process, python
from vespera_exec.engine.work import InputNeeded
from vespera_exec.errors import ExecutionError, InvalidRoleFile
from vespera_exec.model.enums import EventType
from vespera_exec.model.inputs import Answer, Question
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vespera_exec.engine.work import WorkResult

SEVEN = Answer(action="accept", content={"n": 7})
NO = Answer(action="decline")
TELL = """
import json, os, sys
task = json.load(open(os.environ["VESPERA_TASK_FILE"]))
out = os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w", buffering=1)
for line in json.loads(sys.argv[1]):
    out.write(json.dumps(line) + "\\n")
out.write(json.dumps({"result": task["answers"]}) + "\\n")
sys.exit(int(sys.argv[2]))
"""


async def run(tmp_path: Path, fn: Callable[..., Any], *, in_loop: bool = False, **answers: Answer) -> WorkResult:
    async with bench(tmp_path, answers=answers) as made:
        return await python.run(Role.from_callable(fn, in_loop=in_loop), made.work)


async def questions(tmp_path: Path, fn: Callable[..., Any], **more: Any) -> tuple[Question, ...]:
    """What it asked, where that ended it."""
    with pytest.raises(InputNeeded) as asked:
        await run(tmp_path, fn, **more)
    return asked.value.questions


async def told(tmp_path: Path, *lines: dict[str, Any], code: int = 0, **answers: Answer) -> WorkResult:
    """What becomes of a program that says these lines, and exits."""
    argv = [sys.executable, "-I", "-S", "-c", TELL, json.dumps(lines), str(code)]
    text = f"name: check\nrunner: process\nargv: {json.dumps(argv).replace('{', '{{').replace('}', '}}')}\n"
    async with bench(tmp_path, answers=answers) as made:
        return await process.run(parse_role(text.encode(), file="check.yaml"), made.work)


async def test_a_callable_ends_with_its_question_and_what_it_did_before_is_kept(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        with pytest.raises(InputNeeded) as asked:
            await python.run(Role.from_callable(question_callables.asks_one), made.work)
        assert made.session.lifecycle.checkpoint == "before"
    number = Question.made("number", "Which number?", schema=question_callables.NUMBER)
    assert asked.value.questions == (number,)


async def test_a_callable_that_is_called_again_has_its_answer_at_once(tmp_path: Path) -> None:
    result = await run(tmp_path, question_callables.asks_one, number=SEVEN)
    assert result.output == {"accepted": True, "content": {"n": 7}}


async def test_a_callable_is_told_that_its_form_was_declined(tmp_path: Path) -> None:
    result = await run(tmp_path, question_callables.asks_one, number=NO)
    assert result.output == {"accepted": False, "content": None}


async def test_several_questions_are_open_together_and_only_those_that_are_not_answered(tmp_path: Path) -> None:
    both = await questions(tmp_path, question_callables.asks_together)
    assert [(each.key, each.kind) for each in both] == [("a", "form"), ("b", "form")]


async def test_of_several_questions_only_those_without_an_answer_are_asked_again(tmp_path: Path) -> None:
    assert [each.key for each in await questions(tmp_path, question_callables.asks_together, a=NO)] == ["b"]


async def test_an_approval_that_was_given_lets_the_callable_go_on(tmp_path: Path) -> None:
    approved = Answer(action="accept", content={})
    assert (await run(tmp_path, question_callables.wants_approval, deploy=approved)).output == "deployed"


async def test_an_approval_is_asked_as_one(tmp_path: Path) -> None:
    (asked,) = await questions(tmp_path, question_callables.wants_approval)
    assert (asked.key, asked.kind, asked.message) == ("deploy", "approval", "Deploy it?")


async def test_a_form_of_the_same_name_that_was_declined_is_no_approval(tmp_path: Path) -> None:
    result = await run(tmp_path, question_callables.wants_approval, deploy=NO)
    assert (result.success, result.error_code, result.recoverable) == (False, "APPROVAL_REJECTED", False)


@pytest.mark.parametrize(
    "fn",
    [
        question_callables.catches_all_exceptions,
        question_callables.asks_in_a_thread,
        question_callables.asks_and_fails,
        question_callables.asks_async,
    ],
)
async def test_no_callable_swallows_its_question(tmp_path: Path, fn: Callable[..., Any]) -> None:
    assert [each.key for each in await questions(tmp_path, fn)] == ["number"]


async def test_a_callable_that_catches_all_exceptions_does_not_go_on_without_its_answer(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        with pytest.raises(InputNeeded):
            await python.run(Role.from_callable(question_callables.catches_all_exceptions), made.work)
    assert made.messages(EventType.INFO) == []


@pytest.mark.parametrize("in_loop", [False, True])
async def test_questions_out_of_a_group_of_tasks_are_heard(tmp_path: Path, in_loop: bool) -> None:
    asked = await questions(tmp_path, question_callables.asks_in_a_group, in_loop=in_loop)
    assert {each.key for each in asked} <= {"a", "b"}
    assert asked


async def test_a_callable_in_the_loop_asks_and_is_told(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        with pytest.raises(InputNeeded):
            await python.run(Role.from_callable(question_callables.asks_async, in_loop=True), made.work)


async def test_a_callable_in_the_loop_that_is_called_again_has_its_answer(tmp_path: Path) -> None:
    assert (await run(tmp_path, question_callables.asks_async, in_loop=True, number=SEVEN)).output == {"n": 7}


@pytest.mark.parametrize(
    ("fn", "problem"),
    [
        (question_callables.asks_what_is_no_question, "'a b' is no name of a question"),
        (question_callables.asks_with_a_form_that_is_none, "question a: field 'x' of its schema is not of type"),
    ],
)
async def test_what_is_no_question_fails_the_work_and_says_why(
    tmp_path: Path, fn: Callable[..., Any], problem: str
) -> None:
    with pytest.raises(ExecutionError, match=problem) as failed:
        await run(tmp_path, fn)
    assert (failed.value.failure_code, failed.value.recoverable) == ("BAD_QUESTION", False)


@pytest.mark.parametrize("fn", [question_callables.asks_one, question_callables.asks_async])
async def test_in_memory_there_is_nobody_to_ask(fn: Callable[..., Any]) -> None:
    task = Task(title="Alone")
    with pytest.raises(ExecutionError, match="needs the engine") as refused:
        await RoleExecutor().execute_task_with_tracking(task, Role.from_callable(fn))
    assert refused.value.failure_code == "NEEDS_ENGINE"


async def test_in_memory_there_is_nobody_to_approve() -> None:
    role = Role.from_callable(question_callables.asks_async, approval=True)
    with pytest.raises(ExecutionError, match="An approval needs the engine"):
        await RoleExecutor().execute_task_with_tracking(Task(title="Alone"), role)


@pytest.mark.parametrize("code", [0, 3])
async def test_a_program_that_asked_has_asked_whatever_it_exits_with(tmp_path: Path, code: int) -> None:
    line = {"ask": {"key": "name", "message": "Who?"}, "progress": 10}
    with pytest.raises(InputNeeded) as asked:
        await told(tmp_path, line, {"error": {"code": "X", "message": "x"}}, code=code)
    assert asked.value.questions == (Question.made("name", "Who?"),)


async def test_a_program_finds_its_answers_and_what_it_asks_again_is_answered(tmp_path: Path) -> None:
    result = await told(tmp_path, {"ask": {"key": "name", "message": "Who?"}}, name=SEVEN)
    assert result.output["result"] == {"name": {"action": "accept", "content": {"n": 7}}}


async def test_the_first_question_of_a_name_counts(tmp_path: Path) -> None:
    first, second = ({"ask": {"key": "name", "message": text}} for text in ("Who?", "What?"))
    with pytest.raises(InputNeeded) as asked:
        await told(tmp_path, first, second)
    assert [each.message for each in asked.value.questions] == ["Who?"]


@pytest.mark.parametrize("ask", [None, 7, [], {}, {"key": "a"}, {"key": "a", "message": "?", "kind": "poll"}])
async def test_a_program_that_asks_nonsense_fails(tmp_path: Path, ask: object) -> None:
    with pytest.raises(ExecutionError) as failed:
        await told(tmp_path, {"ask": ask})
    assert failed.value.failure_code == "BAD_QUESTION"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("approval: true", "Role check is to work on: a title"),
        ("approval: May it?", "May it?"),
    ],
)
async def test_a_role_that_wants_an_approval_asks_before_anything_is_set_up(
    tmp_path: Path, line: str, message: str
) -> None:
    role = parse_role(f"name: check\nrunner: process\nargv: [touch, ran]\n{line}\n".encode(), file="check.yaml")
    async with bench(tmp_path) as made:
        with pytest.raises(InputNeeded) as asked:
            await RoleExecutor().execute_task_with_tracking(made.work, role, made.work)
    assert asked.value.questions == (Question.made("approval", message, kind="approval"),)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("line", ["approval: ''", "approval: 7", "approval: [a]", f"approval: {'x' * 2001}"])
def test_an_approval_in_a_role_file_is_true_or_a_text(line: str) -> None:
    with pytest.raises(InvalidRoleFile, match=r"check\.yaml:4: approval is true"):
        parse_role(f"name: check\nrunner: process\nargv: [ls]\n{line}\n".encode(), file="check.yaml")
