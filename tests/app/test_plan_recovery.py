"""A plan whose owner is killed: what has ended is not done again, what runs goes on as its role says."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from planning import ME, Opening, ended, heard, standing, until

from roles.definition import Role
from vespera_exec.app.plans.views import ExecutePlan
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Handle, InputAnswer
from vespera_exec.errors import ExecutionError
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from roles.definition import TaskLike

# Says in the file `began` that it began; waits for the file that it is told, if any; says in `done` that it is.
_MARK = """
import json, os, sys, time
place = sys.argv[1]
task = json.load(open(os.environ["VESPERA_TASK_FILE"]))
with open(place + "/began", "a") as out:
    out.write(task["title"] + " ")
waits = task["inputs"].get("waits_for")
while waits and not os.path.exists(place + "/" + waits):
    time.sleep(0.01)
if task["inputs"].get("fails"):
    sys.exit(3)
with open(place + "/done", "a") as out:
    out.write(task["title"] + " ")
os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w").write(json.dumps({"result": task["title"]}) + "\\n")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the roles `mark`, which fails when it is interrupted, and `again`, which goes on."""
    roles = tmp_path / "roles"
    roles.mkdir()
    (tmp_path / "mark.py").write_text(_MARK)
    argv = json.dumps([sys.executable, str(tmp_path / "mark.py"), str(tmp_path)])
    inputs = "inputs: {waits_for: {type: string}, fails: {type: boolean}, got: {type: string}}"
    for name, resumes in (("mark", "fail"), ("again", "resume")):
        text = f"name: {name}\nrunner: process\nargv: {argv}\non_interrupt: {resumes}\n{inputs}\n"
        (roles / f"{name}.yaml").write_text(text)
    return tmp_path


def said(place: Path, file: str) -> list[str]:
    path = place / file
    return path.read_text().split() if path.exists() else []


class Owner:
    """The process that owns the directory."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.handle = Handle.model_validate_json(self._line())

    def ask(self, what: str, reason: str = "Asked") -> str:
        """`what` is a method of `Vespera`, and answers a status; or "heard": once a step has the status `reason`;
        or "restore": once the plan is on its way back to the checkpoint `reason`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {reason}\n")
        self._process.stdin.flush()
        return self._line().strip()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def wait(self) -> None:
        """Until it has killed itself."""
        assert self._process.wait(20) == -signal.SIGKILL

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the owner has ended"
        return line


@contextmanager
def owner(place: Path, *steps: dict[str, Any], dies_at: Path | None = None, **plan: Any) -> Generator[Owner]:
    """A process that has started a plan of these steps; `dies_at` as in `killed_planner`."""
    (place / "plan.json").write_text(json.dumps({"name": "Plan", **plan, "steps": list(steps)}))
    argv = [sys.executable, str(Path(__file__).with_name("killed_planner.py")), str(place), str(place)]
    process = subprocess.Popen(
        [*argv, str(place / "plan.json"), *([str(dies_at)] if dies_at else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Owner(process)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


@asynccontextmanager
async def next_owner(place: Path, *own: Role) -> AsyncGenerator[Vespera]:
    settings = Settings.load({"HOME": str(place)}, data_dir=place / "data", roles_dir=place / "roles")
    async with Vespera.open(settings=settings, roles=own) as vespera:
        yield vespera


async def began(place: Path, *names: str) -> None:
    await until(lambda: set(names) <= set(said(place, "began")))


@pytest.mark.promise("plans")
async def test_what_has_ended_is_not_done_again_and_what_runs_goes_on(place: Path) -> None:
    steps = (
        {"id": "a", "role": "mark"},
        {"id": "b", "role": "mark", "inputs": {"got": "${steps.a.output.result}"}},
        {"id": "long", "role": "again", "depends_on": ["b"], "inputs": {"waits_for": "go"}},
        {"id": "c", "role": "mark", "inputs": {"got": "${steps.long.output.result}"}},
    )
    with owner(place, *steps) as dead:
        await began(place, "long")
        await anyio.sleep(0.1)
        dead.kill()
    assert said(place, "done") == ["a", "b"]
    async with next_owner(place) as vespera:
        (place / "go").touch()
        result = await ended(vespera, dead.handle)
        assert (result.status, result.result["output"]["c"]["result"]) == ("completed", "c")
        assert [each.attempt for each in (await vespera.list_steps(ME, dead.handle.task_id)).steps] == [1, 1, 1, 1]
        kinds = [each["type"] for each in (await vespera.last_events(ME, dead.handle.session_id, limit=200)).events]
        assert "owner_changed" in kinds
        assert "recovery_initiated" not in kinds
    assert said(place, "began") == ["a", "b", "long", "long", "c"]
    assert said(place, "done") == ["a", "b", "long", "c"]


async def test_a_step_that_does_not_resume_has_failed_and_its_fallback_does_it(place: Path) -> None:
    steps: tuple[dict[str, Any], ...] = (
        {"id": "lost", "role": "mark", "inputs": {"waits_for": "never"}},
        {"id": "after", "role": "mark", "depends_on": ["lost"]},
        {"id": "other", "role": "mark", "inputs": {"waits_for": "never"}, "fallback": {"role": "mark", "inputs": {}}},
    )
    with owner(place, *steps) as dead:
        await began(place, "lost", "other")
        dead.kill()
    async with next_owner(place) as vespera:
        result = await ended(vespera, dead.handle)
        assert [(each["step"], each["code"]) for each in result.result["failed"]] == [("lost", "INTERRUPTED")]
        assert await standing(vespera, dead.handle) == {"lost": "failed", "after": "skipped", "other": "completed"}
    assert said(place, "done") == ["other"]


async def test_a_step_says_itself_that_it_goes_on(place: Path) -> None:
    with owner(place, {"id": "a", "role": "mark", "on_interrupt": "resume", "inputs": {"waits_for": "go"}}) as dead:
        await began(place, "a")
        dead.kill()
    (place / "go").touch()
    async with next_owner(place) as vespera:
        assert (await ended(vespera, dead.handle)).status == "completed"


async def test_a_paused_plan_stays_paused_and_begins_nothing(place: Path) -> None:
    steps = (
        {"id": "long", "role": "again", "inputs": {"waits_for": "go"}},
        {"id": "next", "role": "mark", "depends_on": ["long"]},
    )
    with owner(place, *steps) as dead:
        await began(place, "long")
        assert dead.ask("pause") == "paused"
        dead.kill()
    (place / "go").touch()
    async with next_owner(place) as vespera:
        await anyio.sleep(0.3)
        assert (await vespera.get_status(ME, dead.handle.task_id)).status == "paused"
        assert said(place, "began") == ["long"]
        assert (await vespera.resume(ME, dead.handle.task_id)).success
        assert (await ended(vespera, dead.handle)).status == "completed"
    assert said(place, "done") == ["long", "next"]


async def test_what_waits_for_its_turn_in_a_paused_plan_waits_under_the_next_owner_too(
    opening: Opening, place: Path
) -> None:
    steps = [{"id": each, "role": "again", "inputs": {"waits_for": "go"}} for each in ("a", "b")]
    async with opening(max_concurrent=1) as vespera:
        handle = await vespera.plans.execute(ME, ExecutePlan(plan={"steps": steps}))
        await until(lambda: said(place, "began") != [])
        assert (await vespera.pause(ME, handle.task_id)).status == "paused"
        first = said(place, "began")
    (place / "go").touch()
    async with opening(max_concurrent=1) as vespera:
        await anyio.sleep(0.3)
        assert said(place, "began") == first
        await vespera.resume(ME, handle.task_id)
        assert (await ended(vespera, handle)).status == "completed"
    assert sorted(said(place, "done")) == ["a", "b"]


async def test_a_plan_that_was_being_cancelled_ends_so_and_its_steps_with_it(place: Path) -> None:
    steps = ({"id": "long", "role": "again", "inputs": {"waits_for": "go"}}, {"id": "next", "role": "mark"})
    with owner(place, *steps, max_parallel=1) as dead:
        await began(place, "long")
        dead.kill()
    async with next_owner(place) as vespera:
        vespera._store.cancels.note(dead.handle.session_id)  # pyright: ignore[reportPrivateUsage]
    (place / "go").touch()
    async with next_owner(place) as vespera:
        assert (await ended(vespera, dead.handle)).status == "cancelled"
        assert await standing(vespera, dead.handle) == {"long": "cancelled", "next": "cancelled"}
        child = (await vespera.list_steps(ME, dead.handle.task_id)).steps[0].task_id
        kinds = [each["type"] for each in (await vespera.last_events(ME, child or "", limit=200)).events]
        assert kinds.count("recovery_initiated") == 1  # of the owner before: this one let nothing of it go on
    assert said(place, "done") == []


async def is_asked(vespera: Vespera, handle: Handle) -> bool:
    return bool((await vespera.get_status(ME, handle.task_id)).inputs)


async def test_a_question_of_a_step_outlives_the_owner(place: Path) -> None:
    with owner(place, {"id": "ask", "role": "mark", "approval": "Really?"}) as dead:
        assert dead.ask("heard", "waiting") == "waiting"
        dead.kill()
    async with next_owner(place) as vespera:
        await until(lambda: is_asked(vespera, dead.handle))
        asked = (await vespera.get_status(ME, dead.handle.task_id)).inputs or []
        await vespera.answer_input(ME, dead.handle.task_id, {asked[0].key: InputAnswer(action="accept")})
        assert (await ended(vespera, dead.handle)).status == "completed"
    assert said(place, "began") == ["ask"]


async def test_a_question_of_a_step_outlives_an_owner_that_goes_in_order(opening: Opening, place: Path) -> None:
    async with opening() as vespera:
        step = {"id": "ask", "role": "mark", "approval": True}
        handle = await vespera.plans.execute(ME, ExecutePlan(plan={"steps": [step]}))
        await until(lambda: is_asked(vespera, handle))
    async with opening() as vespera:
        await until(lambda: is_asked(vespera, handle))
        asked = (await vespera.get_status(ME, handle.task_id)).inputs or []
        await vespera.answer_input(ME, handle.task_id, {asked[0].key: InputAnswer(action="accept")})
        assert (await ended(vespera, handle)).status == "completed"
    assert said(place, "done") == ["ask"]


async def test_a_retry_that_waits_for_its_time_does_so_over_the_owner(place: Path) -> None:
    moments: list[datetime] = []

    async def reach(task: TaskLike) -> str:
        moments.append(datetime.now(UTC))
        if len(moments) == 1:
            raise ExecutionError("no answer", code="NETWORK_TIMEOUT")
        return task.title

    role = Role.from_callable(reach, in_loop=True)
    plan = {"steps": [{"id": "a", "role": "reach", "recovery": ["network_timeout_recovery"]}]}
    async with next_owner(place, role) as vespera:
        handle = await vespera.plans.execute(ME, ExecutePlan(plan=plan))
        await heard(vespera, handle, "recovery_initiated", "a", strategy="network_timeout_recovery")
        (shown,) = (await vespera.list_steps(ME, handle.task_id)).steps
        assert (shown.status, shown.waiting_for, shown.recoveries) == ("pending", "backoff", 1)
        due = shown.not_before
        assert due is not None
    async with next_owner(place, role) as vespera:
        assert (await ended(vespera, handle)).result["output"] == {"a": "a"}
        assert (await vespera.list_steps(ME, handle.task_id)).steps[0].attempt == 2
    assert len(moments) == 2
    assert moments[1] >= due


@pytest.mark.parametrize("paused", [False, True], ids=["at work", "paused"])
async def test_what_was_on_its_way_back_to_a_checkpoint_gets_there_under_the_next_owner(
    place: Path, paused: bool
) -> None:
    """What ran is being ended when the owner dies: that end is no failure of the plan."""
    clings = (place / "mark.py").read_text().replace("import json", "import signal; signal.signal(15, 1); import json")
    (place / "clings.py").write_text(clings)
    mark = (place / "roles" / "mark.yaml").read_text()
    text = mark.replace("name: mark", "name: clings").replace("mark.py", "clings.py") + "grace_seconds: 4\n"
    (place / "roles" / "clings.yaml").write_text(text)
    steps: tuple[dict[str, Any], ...] = (
        {"id": "a", "role": "mark"},
        {"id": "b", "role": "clings", "depends_on": ["a"], "inputs": {"waits_for": "go"}},
        {"id": "c", "role": "mark", "depends_on": ["b"]},
    )
    with owner(place, *steps, variables={"colour": "red"}) as dead:
        await began(place, "b")
        with closing(sqlite3.connect(f"file:{place / 'data' / 'vespera.db'}?mode=ro", uri=True)) as reader:
            (checkpoint_id,) = reader.execute("SELECT id FROM checkpoints").fetchone()
        if paused:
            assert dead.ask("pause") == "paused"
        assert dead.ask("restore", checkpoint_id) == ("paused" if paused else "recovering")
        dead.kill()
    (place / "go").touch()
    async with next_owner(place) as vespera:
        if paused:
            await until(lambda: restored_to(vespera, dead.handle, checkpoint_id))
            assert await standing(vespera, dead.handle) == {"a": "completed", "b": "pending", "c": "pending"}
            await vespera.resume(ME, dead.handle.task_id)
        result = await ended(vespera, dead.handle)
        assert result.status == "completed", result.error
        assert [each.attempt for each in (await vespera.list_steps(ME, dead.handle.task_id)).steps] == [1, 2, 1]
        assert await restored_to(vespera, dead.handle, checkpoint_id)
    assert said(place, "done") == ["a", "b", "c"]


async def restored_to(vespera: Vespera, handle: Handle, checkpoint_id: str) -> bool:
    head = await vespera._store.queries.plan_head(handle.session_id)  # pyright: ignore[reportPrivateUsage]
    return head is not None and (head.restored_from, head.restoring) == (checkpoint_id, {})


async def test_a_child_that_was_announced_and_never_made_is_made(place: Path) -> None:
    with owner(place, {"id": "a", "role": "mark"}, dies_at=place / "announced") as dead:
        reader = sqlite3.connect(f"file:{place / 'data' / 'vespera.db'}?mode=ro", uri=True)
        with closing(reader):
            running = "SELECT count(*) FROM steps WHERE status = 'running'"
            await until(lambda: reader.execute(running).fetchone() == (1,))
        (place / "announced").touch()
        dead.wait()
    async with next_owner(place) as vespera:
        assert (await ended(vespera, dead.handle)).status == "completed"
        (shown,) = (await vespera.list_steps(ME, dead.handle.task_id)).steps
    assert shown.attempt == 1
    assert said(place, "began") == ["a"]


async def test_a_step_that_had_to_wait_and_need_not_under_the_next_owner_is_seen_at_work(
    opening: Opening, place: Path
) -> None:
    steps = [{"id": each, "role": "again", "inputs": {"waits_for": "go"}} for each in ("a", "b")]
    async with opening(max_concurrent=1) as vespera:
        handle = await vespera.plans.execute(ME, ExecutePlan(plan={"steps": steps}))
        await heard(vespera, handle, "step_waiting", **{"for": "slot"})
    async with opening(max_concurrent=2) as vespera:
        await until(lambda: said(place, "began").count("a") + said(place, "began").count("b") == 3)
        await until(lambda: are_at_work(vespera, handle))
        (place / "go").touch()
        assert (await ended(vespera, handle)).status == "completed"


async def are_at_work(vespera: Vespera, handle: Handle) -> bool:
    return set((await standing(vespera, handle)).values()) == {"running"}
