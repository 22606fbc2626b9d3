"""What a pure role has answered is found by the same question, and by nothing else."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from planning import ME, ended, heard, started

from roles.definition import Role
from roles.registry import RoleRegistry
from vespera_exec.app.plans.step_cache import StepCache
from vespera_exec.app.views import InputAnswer
from vespera_exec.errors import InvalidInput, InvalidRoleFile
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.ledger import ResultRecord
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vespera_exec.app.service import Vespera


class Cached:
    """A store, a folder of role files, and the cache over both."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.roles = RoleRegistry.load(folder)
        self.cache = StepCache(store, self.roles)

    def define(self, name: str, *lines: str) -> None:
        self.folder.mkdir(exist_ok=True)
        text = "\n".join((f"name: {name}", "runner: process", "argv: [echo]", *lines))
        (self.folder / f"{name}.yaml").write_text(text + "\n")

    async def answered(self, principal: str, role: str, inputs: dict[str, Any], *, truncated: bool = False) -> str:
        """An execution that has completed, and was recorded if that may be."""
        task = Task(title="step", sink=self.store.journal)
        session = task.start_execution(role)
        session.update_status(ExecutionStatus.RUNNING)
        record = self.cache.record(principal, role, inputs, session.session_id)
        with task.ledger:
            session.complete(result=ResultRecord(execution_id=session.session_id, body=b"7", truncated=truncated))
            if record is not None:
                task.ledger.keep(record)
        await self.store.journal.sync()
        return session.session_id


@asynccontextmanager
async def cached(tmp_path: Path) -> AsyncGenerator[Cached]:
    async with Store.open(Settings.load({}, data_dir=tmp_path / "data")) as store:
        made = Cached(store, tmp_path / "roles")
        made.define("square", "pure: true")
        made.define("clock")
        yield made


async def test_the_same_inputs_of_the_same_role_are_answered_by_the_last_execution(tmp_path: Path) -> None:
    async with cached(tmp_path) as at:
        asked = {"n": 3, "how": {"a": [1, None], "b": "ü"}}
        assert await at.cache.lookup("ann", "square", asked) is None
        await at.answered("ann", "square", asked)
        last = await at.answered("ann", "square", asked)
        assert await at.cache.lookup("ann", "square", {"how": {"b": "ü", "a": [1, None]}, "n": 3}) == last


@pytest.mark.parametrize(
    ("principal", "role", "inputs"),
    [
        ("ben", "square", {"n": 3}),
        ("ann", "square", {"n": 4}),
        ("ann", "square", {"n": "3"}),
        ("ann", "square", {}),
        ("ann", "cube", {"n": 3}),
    ],
)
async def test_another_question_is_not_answered_by_it(
    tmp_path: Path, principal: str, role: str, inputs: dict[str, Any]
) -> None:
    async with cached(tmp_path) as at:
        at.define("cube", "pure: true")
        await at.answered("ann", "square", {"n": 3})
        assert await at.cache.lookup(principal, role, inputs) is None


async def test_a_role_that_is_not_pure_is_neither_kept_nor_looked_up(tmp_path: Path) -> None:
    async with cached(tmp_path) as at:
        assert at.cache.record("ann", "clock", {}, "e1") is None
        assert at.cache.record("ann", "nobody", {}, "e1") is None
        assert await at.cache.lookup("ann", "clock", {}) is None
        assert await at.cache.lookup("ann", "nobody", {}) is None


@pytest.mark.parametrize(
    "lines", [("pure: true", "timeout_seconds: 5"), ("pure: true", "env: {A: b}"), ("pure: false",), ("pure: 1",)]
)
async def test_a_changed_role_file_makes_another_role(tmp_path: Path, lines: tuple[str, ...]) -> None:
    async with cached(tmp_path) as at:
        source = await at.answered("ann", "square", {"n": 3})
        at.define("square", *lines)
        assert await at.cache.lookup("ann", "square", {"n": 3}) is None
        at.define("square", "pure: true", "# a comment says nothing of what it does")
        assert await at.cache.lookup("ann", "square", {"n": 3}) == source


async def test_it_is_known_to_the_next_owner(tmp_path: Path) -> None:
    async with cached(tmp_path) as at:
        source = await at.answered("ann", "square", {"n": 3})
    async with cached(tmp_path) as later:
        assert await later.cache.lookup("ann", "square", {"n": 3}) == source


async def test_a_result_that_was_cut_or_is_gone_answers_nothing(tmp_path: Path) -> None:
    async with cached(tmp_path) as at:
        await at.answered("ann", "square", {"n": 3}, truncated=True)
        assert await at.cache.lookup("ann", "square", {"n": 3}) is None
        source = await at.answered("ann", "square", {"n": 4})
        gone = "DELETE FROM results WHERE id = (SELECT id FROM streams WHERE name = ?)"
        await at.store.journal.perform(lambda db: db.execute(gone, (source,)).rowcount)
        assert await at.cache.lookup("ann", "square", {"n": 4}) is None


async def test_what_a_run_left_that_failed_answers_nothing(tmp_path: Path) -> None:
    async with cached(tmp_path) as at:
        task = Task(title="step", sink=at.store.journal)
        session = task.start_execution("square")
        session.update_status(ExecutionStatus.RUNNING)
        record = at.cache.record("ann", "square", {"n": 3}, session.session_id)
        assert record is not None
        with task.ledger:
            session.fail("broken", result=ResultRecord(execution_id=session.session_id, body=b"7"))
            task.ledger.keep(record)
        await at.store.journal.sync()
        assert await at.cache.lookup("ann", "square", {"n": 3}) is None


async def test_the_role_of_a_program_may_be_pure(tmp_path: Path) -> None:
    def square(context: Any) -> int:
        return context.inputs["n"] ** 2

    async with cached(tmp_path) as at:
        at.roles.add(Role(name="mine", fn=square, target="somewhere:square", inputs=None, pure=True))
        source = await at.answered("ann", "mine", {"n": 3})
        assert await at.cache.lookup("ann", "mine", {"n": 3}) == source


@pytest.fixture
def squaring(tmp_path: Path) -> Path:
    """A pure role `square` that notes each call in the file that is returned."""
    calls = tmp_path / "calls"
    folder = tmp_path / "roles"
    folder.mkdir()
    (tmp_path / "square.py").write_text(
        "import json, os, sys\n"
        'n = json.load(open(os.environ["VESPERA_TASK_FILE"]))["inputs"]["n"]\n'
        f'open("{calls}", "a").write(f"{{n}} ")\n'
        'os.write(int(os.environ["VESPERA_PROGRESS_FD"]), json.dumps({"result": n * n}).encode() + b"\\n")\n'
    )
    argv = f'["{sys.executable}", "{tmp_path}/square.py"]'
    (folder / "square.yaml").write_text(
        f"name: square\nrunner: process\nargv: {argv}\npure: true\ninputs: {{n: {{type: integer, default: 2}}}}\n"
    )
    return calls


def called(calls: Path) -> list[str]:
    return calls.read_text().split()


async def test_a_step_of_a_later_plan_takes_what_an_earlier_one_returned(vespera: Vespera, squaring: Path) -> None:
    first = {"id": "a", "role": "square", "inputs": {"n": 3}}
    then = {"id": "b", "role": "square", "inputs": {"n": "${steps.a.output.result}"}}
    before = await ended(vespera, await started(vespera, first))
    assert before.result["output"]["a"]["result"] == 9
    handle = await started(vespera, first, then)
    result = await ended(vespera, handle)
    assert result.result["output"]["b"]["result"] == 81
    assert called(squaring) == ["3", "9"]
    page = await vespera.list_steps(ME, handle.task_id)
    assert [(each.id, each.cached) for each in page.steps] == [("a", True), ("b", False)]


async def test_a_step_takes_what_an_earlier_one_of_its_own_plan_returned(vespera: Vespera, squaring: Path) -> None:
    steps = [{"id": each, "role": "square", "needs": needs} for each, needs in (("a", []), ("b", ["a"]), ("c", ["b"]))]
    handle = await started(vespera, *steps)
    assert (await ended(vespera, handle)).result["output"]["c"]["result"] == 4
    assert called(squaring) == ["2"]


async def test_a_step_that_wants_an_approval_or_no_cache_is_done_again(vespera: Vespera, squaring: Path) -> None:
    step = {"id": "a", "role": "square"}
    await ended(vespera, await started(vespera, step))
    await ended(vespera, await started(vespera, {**step, "cache": False}))
    handle = await started(vespera, {**step, "approval": "May it?"})
    await heard(vespera, handle, "step_waiting", "a")
    await vespera.answer_input(ME, handle.task_id, {"a/approval": InputAnswer(action="accept")})
    assert (await ended(vespera, handle)).status == "completed"
    assert called(squaring) == ["2", "2", "2"]


def test_a_result_that_is_kept_cannot_pass_an_approval_over(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="approval"):
        Role(name="check", pure=True, approval="May it?")
    tmp_path.joinpath("check.yaml").write_text(
        "name: check\nrunner: process\nargv: [echo]\napproval: true\npure: true\n"
    )
    with pytest.raises(InvalidRoleFile, match=r"check\.yaml:5: .*approval"):
        RoleRegistry.load(tmp_path).get("check")
