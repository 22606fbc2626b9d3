"""The scenarios of document 003 as a program meets them: watching, recovering, going back, sharing, counting."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN
from planning import ME, ended, heard, started, until
from worker_calls import claimed, conclude

from roles.definition import Role
from vespera_exec.app.executions.engine import DefaultExecutionEngine
from vespera_exec.app.plans.views import ExecutePlan
from vespera_exec.app.views import Handle
from vespera_exec.engine.plans.strategies import NetworkTimeoutRecovery, RecoveryContext, RecoveryResult
from vespera_exec.errors import ExecutionError
from vespera_exec.model.enums import EventType, ExecutionStatus, RecoveryAction
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from collections.abc import Generator

    from planning import Opening
    from worker_calls import Defining

    from vespera_exec.app.executions.result import ExecutionUpdate
    from vespera_exec.app.service import Vespera

ANN = Caller("ann", frozenset({"read", "operate"}), over_tcp=True, sees_only="ann")
E = EventType
S = ExecutionStatus


class Gates:
    """The role `gated`, which says that it begins and ends when its step is let through."""

    def __init__(self, vespera: Vespera) -> None:
        self._open: dict[str, anyio.Event] = {}
        self.begun: list[str] = []
        vespera.roles.add(Role.from_callable(self._work, name="gated", in_loop=True, inputs=None, grace_seconds=0.1))

    async def _work(self, context: Any) -> str:
        step: str = context.task.title
        self.begun.append(step)
        context.log(f"{step} is at work")
        await self._gate(step).wait()
        return f"{step} is made"

    def _gate(self, step: str) -> anyio.Event:
        return self._open.setdefault(step, anyio.Event())

    def let(self, step: str) -> None:
        self._gate(step).set()

    async def began(self, step: str) -> None:
        await until(lambda: step in self.begun)


def chain(*steps: str, role: str = "gated") -> list[dict[str, Any]]:
    first = [{"id": steps[0], "role": role}]
    return first + [{"id": step, "role": role, "depends_on": [before]} for before, step in pairwise(steps)]


async def log(vespera: Vespera, handle: Handle) -> list[dict[str, Any]]:
    return (await vespera.read_events(ME, handle.session_id, max_events=1000)).events


# F-048: who watches


async def test_a_plan_is_watched_step_by_step_by_its_monitor_and_by_a_subscriber(vespera: Vespera) -> None:
    engine, gates = DefaultExecutionEngine(vespera), Gates(vespera)
    steps = ("draw", "build", "ship")
    execution_id = await engine.submit({"name": "A boat", "steps": chain(*steps)})
    called: list[ExecutionUpdate] = []
    engine.subscribe(execution_id, called.append)
    await gates.began("draw")
    seen: list[ExecutionUpdate] = []
    with anyio.fail_after(WITHIN):
        async for update in engine.monitor(execution_id):
            seen.append(update)
            if update.current_task is not None:
                gates.let(update.current_task)
    await until(lambda: not len(vespera.executions.subscriptions))

    result = await engine.get_result(execution_id)
    assert result is not None
    for told in (seen, called):
        assert [update.status.is_terminal for update in told] == [False] * (len(told) - 1) + [True]
        counted = [(update.progress.completed_tasks, update.progress.percentage) for update in told]
        assert counted == sorted(counted)
        assert counted[-1] == (3, 100)
        assert told[-1].metrics == result.metrics
        events = [event.sequence for update in told for event in update.events]
        assert events == [event.sequence for event in result.timeline]
        notes = [(note.task_id, note.message) for update in told for note in update.messages]
        assert [note for note in notes if note[1].endswith("at work")] == [
            (each, f"{each} is at work") for each in steps
        ]
    assert [
        update.current_task for update, after in pairwise(seen) if update.current_task != after.current_task
    ] == list(steps)

    (only,) = [update async for update in engine.monitor(execution_id)]
    assert (only.status, only.progress.completed_tasks, only.metrics) == (S.COMPLETED, 3, result.metrics)


# F-050: what becomes of a step that fails


NETWORK = """
import os
from pathlib import Path


class Unreachable(Exception):
    failure_code = "NETWORK_TIMEOUT"


def reach(context):
    with Path(os.environ["CALLS"]).open("a") as calls:
        calls.write("x")
    raise Unreachable("no answer")
"""


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """The role `reach`, which never gets an answer, and the file that counts its calls."""
    (tmp_path / "roles").mkdir()
    (tmp_path / "network.py").write_text(NETWORK)
    environ = f"{{PYTHONPATH: {tmp_path}, CALLS: {tmp_path}/calls}}"
    (tmp_path / "roles" / "reach.yaml").write_text(
        f"name: reach\nrunner: python\ntarget: network:reach\nenv: {environ}\n"
    )
    return tmp_path / "calls"


async def test_a_network_timeout_backs_off_1_2_4_over_a_killed_owner_and_then_ends_the_plan(
    opening: Opening, network: Path, tmp_path: Path
) -> None:
    (tmp_path / "plan.json").write_text('{"steps": [{"id": "fetch", "role": "reach"}]}')
    with backing_off(tmp_path) as dead:
        pass
    unit = 0.05
    async with opening() as vespera:
        vespera.strategies.remove("network_timeout_recovery")
        vespera.strategies.add(NetworkTimeoutRecovery(base_seconds=unit, jitter=0.0))
        result = await ended(vespera, dead)
        assert (result.status, result.session_id) == ("failed", dead.session_id)
        assert result.error is not None
        assert "Max retries (3) exceeded for network timeout" in result.error["message"]
        told = await log(vespera, dead)
    began = [datetime.fromisoformat(each["timestamp"]) for each in told if each["type"] == "step_started"]
    failed = [each for each in told if each["type"] == "step_failed"]
    due = [datetime.fromisoformat(each["details"]["not_before"]) for each in failed[:-1]]
    delays = [
        (moment - datetime.fromisoformat(each["timestamp"])).total_seconds()
        for moment, each in zip(due, failed, strict=False)
    ]
    assert delays[0] + 0.05 >= 1.0  # asked for by the owner that was killed, in full seconds
    assert delays[1:] == [pytest.approx(2 * unit, abs=0.02), pytest.approx(4 * unit, abs=0.02)]
    assert all(moment >= earliest for moment, earliest in zip(began[1:], due, strict=True))
    decided = [each["details"]["action"] for each in told if each["type"] == "recovery_initiated" and each["step_id"]]
    assert decided == ["retry", "retry", "retry", "abort"]
    assert (tmp_path / "calls").read_text() == "xxxx"


@contextmanager
def backing_off(place: Path) -> Generator[Handle]:
    """A plan whose only step has failed and waits for its next try, when its owner is killed."""
    program = [sys.executable, str(Path(__file__).with_name("killed_planner.py"))]
    arguments = [str(place), str(place), str(place / "plan.json")]
    with subprocess.Popen([*program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        handle = Handle.model_validate_json(owner.stdout.readline())
        with closing(sqlite3.connect(f"file:{place / 'data' / 'vespera.db'}?mode=ro", uri=True)) as reader:
            backs_off = "SELECT 1 FROM steps WHERE status = 'pending' AND CAST(doc AS TEXT) LIKE '%NETWORK_TIMEOUT%'"
            deadline = time.monotonic() + WITHIN
            while reader.execute(backs_off).fetchone() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        owner.kill()
        yield handle


@pytest.mark.parametrize(("whole", "status"), [(True, "cancelled"), (False, "failed")])
async def test_a_back_off_ends_with_a_cancel_and_not_with_its_time(vespera: Vespera, whole: bool, status: str) -> None:
    async def reach(context: Any) -> None:
        raise ExecutionError("no answer", code="NETWORK_TIMEOUT")

    vespera.strategies.remove("network_timeout_recovery")
    vespera.strategies.add(NetworkTimeoutRecovery(base_seconds=3600))
    vespera.roles.add(Role.from_callable(reach, in_loop=True, inputs=None))
    handle = await started(vespera, {"id": "fetch", "role": "reach"})
    due = datetime.fromisoformat((await heard(vespera, handle, "step_failed", "fetch"))["details"]["not_before"])
    if whole:
        await vespera.cancel(ME, handle.task_id)
    else:
        await vespera.plans.cancel_step(handle.task_id, "fetch", ME)
    assert (await ended(vespera, handle)).status == status
    assert datetime.now(UTC) < due
    (step,) = (await vespera.list_steps(ME, handle.task_id)).steps
    assert (step.status, step.attempt) == ("cancelled", 1)


# F-051: going back


class Finds:
    """Each failure with the code FOUND is a find: it goes into the variables, and the step runs again."""

    id = name = description = "finds"
    applicable_errors = ("FOUND",)

    async def execute(self, context: RecoveryContext) -> RecoveryResult:
        context.state.variables["found"]["pages"].append({"at": context.step_id, "ü": None})
        return RecoveryResult(success=True, action=RecoveryAction.RETRY, new_state=context.state)


async def test_a_plan_that_is_rolled_back_has_the_variables_of_that_checkpoint_and_of_no_later_one(
    vespera: Vespera,
) -> None:
    engine, gates, finds = DefaultExecutionEngine(vespera), Gates(vespera), ["dig", "sift"]
    engine.add_recovery_strategy(Finds())

    async def search(context: Any) -> str:
        if context.task.title in finds:
            finds.remove(context.task.title)
            raise ExecutionError("something is there", code="FOUND")
        return "nothing more"

    vespera.roles.add(Role.from_callable(search, in_loop=True, inputs=None))
    variables: dict[str, Any] = {"found": {"pages": [1, 2.5, 2**60]}, "by": "Ann"}
    dig, rest, sift, end = chain("dig", "rest", "sift", "end")
    steps = [dig | {"role": "search"}, rest, sift | {"role": "search"}, end]
    plan = {"name": "A dig", "variables": variables, "steps": steps, "output": "${variables.found}"}
    execution_id = await engine.submit(plan)
    await gates.began("rest")
    earlier = await engine.create_checkpoint(execution_id)
    gates.let("rest")
    await gates.began("end")
    later = await engine.create_checkpoint(execution_id)

    of_dig, of_sift = ({"at": step, "ü": None} for step in ("dig", "sift"))
    assert earlier.state.variables == {"found": {"pages": [1, 2.5, 2**60, of_dig]}, "by": "Ann"}
    assert later.state.variables == {"found": {"pages": [1, 2.5, 2**60, of_dig, of_sift]}, "by": "Ann"}
    assert variables == {"found": {"pages": [1, 2.5, 2**60]}, "by": "Ann"}

    assert await engine.restore_from_checkpoint(earlier.id) == execution_id
    gates.let("end")
    with anyio.fail_after(WITHIN):
        await vespera.executions.ended(execution_id, engine.caller)
    result = await engine.get_result(execution_id)
    assert result is not None
    assert (result.status, result.output) == (S.COMPLETED, earlier.state.variables["found"])
    again = await engine.restore_from_checkpoint(later.id)
    assert again != execution_id
    with anyio.fail_after(WITHIN):
        await vespera.executions.ended(again, engine.caller)
    restored = await engine.get_result(again)
    assert restored is not None
    assert restored.output == later.state.variables["found"]


# F-053: what is known already, and who does the rest


async def test_a_cached_step_says_so_and_neither_another_principal_nor_a_changed_role_gets_it(
    vespera: Vespera, tmp_path: Path
) -> None:
    (tmp_path / "maps.py").write_text(
        "def draw(context):\n"
        f'    open("{tmp_path}/drawn", "a").write("x")\n'
        '    return "a map of " + context.inputs["of"]\n'
    )
    role = "\n".join(
        (
            "name: draw",
            "runner: python",
            "target: maps:draw",
            f"env: {{PYTHONPATH: {tmp_path}}}",
            "inputs: {of: string}",
            "pure: true",
        )
    )
    folder = tmp_path / "roles"
    folder.mkdir()
    (folder / "draw.yaml").write_text(f"{role}\n")
    plan = {"steps": [{"id": "map", "role": "draw", "inputs": {"of": "Ys"}}]}

    async def drawn(caller: Caller) -> tuple[bool, int]:
        """Whether the event of the step says that it was known, and how many maps were drawn by now."""
        handle = await vespera.plans.execute(caller, ExecutePlan(plan=plan, wait_ms=25_000))
        result = await vespera.get_result(caller, handle.task_id)
        assert (result.status, result.result["output"]) == ("completed", {"map": "a map of Ys"})
        read = await vespera.read_events(caller, handle.session_id, max_events=1000)
        (done,) = [event for event in read.events if event["type"] == "step_completed"]
        return done["details"].get("cached", False), len((tmp_path / "drawn").read_text())

    assert await drawn(ME) == (False, 1)
    assert await drawn(ME) == (True, 1)
    assert await drawn(ANN) == (False, 2)
    assert await drawn(ANN) == (True, 2)
    (folder / "draw.yaml").write_text(f"{role}\ntimeout_seconds: 60\n")
    assert await drawn(ME) == (False, 3)


async def test_three_workers_receive_an_even_load(vespera: Vespera, define: Defining) -> None:
    define("review")
    loads: dict[str, int] = dict.fromkeys(("ann", "ben", "cas"), 0)
    steps = [{"id": f"s{number}", "role": "review"} for number in range(12)]

    async def work(name: str) -> None:
        me = Caller(name, frozenset({"worker"}), over_tcp=True, sees_only=name)
        while True:
            claim = await claimed(vespera, me)
            await conclude(vespera, claim, me, result=name)
            loads[name] += 1

    async with anyio.create_task_group() as group:
        for name in loads:
            group.start_soon(work, name)
        assert (await ended(vespera, await started(vespera, *steps))).result["counts"] == {"completed": 12}
        group.cancel_scope.cancel()
    assert loads == {"ann": 4, "ben": 4, "cas": 4}


async def test_three_pools_of_one_kind_receive_an_even_load(opening: Opening, tmp_path: Path) -> None:
    pools = "".join(f"  {name}: {{type: gpu, capacity: 3}}\n" for name in ("left", "middle", "right"))
    (tmp_path / "capacity.yaml").write_text(f"pools:\n{pools}")
    async with opening(capacity=str(tmp_path / "capacity.yaml"), max_concurrent=9) as vespera:
        gates = Gates(vespera)
        names = [f"s{number}" for number in range(6)]
        handle = await started(vespera, *({"id": each, "role": "gated", "capacity": {"gpu": 1}} for each in names))
        await until(lambda: len(gates.begun) == 6)
        assert {pool.id: pool.available for pool in vespera.capacity.view(ME).pools} == {
            "left": 1, "middle": 1, "right": 1,
        }  # fmt: skip
        for each in names:
            gates.let(each)
        assert (await ended(vespera, handle)).status == "completed"


# F-054: what it took


async def test_the_metrics_of_a_plan_are_those_that_its_timeline_gives_by_hand(
    opening: Opening, tmp_path: Path
) -> None:
    (tmp_path / "capacity.yaml").write_text("pools:\n  oven: {capacity: 2, cost_per_unit_hour: 7200}\n")

    async def bake(context: Any) -> dict[str, Any]:
        await anyio.sleep(0.1)
        calls.append(context.task.title)
        if context.task.title == "tart" or calls == ["bread"]:
            raise ExecutionError("burnt", code="BURNT")
        return {"quality_score": 0.8}

    calls: list[str] = []
    async with opening(capacity=str(tmp_path / "capacity.yaml")) as vespera:
        engine = DefaultExecutionEngine(vespera)
        vespera.roles.add(Role.from_callable(bake, in_loop=True, inputs=None))
        bread, cake, tart = chain("bread", "cake", "tart", role="bake")
        retries = {"max_retries": 1, "backoff_seconds": 1.5}
        steps = [bread | {"retries": retries, "capacity": {"oven": 2}}, cake | {"capacity": {"oven": 1}}, tart]
        result = await engine.execute({"name": "Bake", "steps": steps})

    at: dict[str, list[datetime]] = {}
    for event in result.timeline:
        at.setdefault(f"{event.step_id} {event.event_type.value}", []).append(event.timestamp)
    [burnt, again], metrics = at["bread step_waiting"], result.metrics
    at_work = [
        (at["bread step_started"][0], burnt),
        (again, at["bread step_completed"][0]),
        (at["cake step_started"][0], at["cake step_completed"][0]),
        (at["tart step_started"][0], at["tart step_failed"][0]),
    ]
    effective = sum((until - since).total_seconds() for since, until in at_work)
    assert (again - burnt).total_seconds() >= 0.5
    assert metrics.effective_duration is not None
    assert metrics.effective_duration == pytest.approx(effective * 1000, abs=1)
    total = (result.timeline[-1].timestamp - result.timeline[0].timestamp).total_seconds()
    assert metrics.total_duration is not None
    assert metrics.effective_duration < metrics.total_duration <= total * 1000 + 1
    assert metrics.efficiency == metrics.effective_duration / metrics.total_duration
    assert (metrics.success_rate, metrics.error_rate) == (2 / 3, 2 / 4)
    assert metrics.throughput == pytest.approx(2 / (metrics.total_duration / 1000))
    ovens = {"bread": 2, "cake": 1}
    held = [(since, until, step) for step in ovens for since, until in zip(
        at[f"{step} resource_allocated"], at[f"{step} resource_released"], strict=True
    )]  # fmt: skip
    assert [step for _, _, step in held] == ["bread", "bread", "cake"]
    cost = sum(ovens[step] * 2 * (until - since).total_seconds() for since, until, step in held)
    assert metrics.total_cost == pytest.approx(cost, abs=1)  # held over the back-off it would cost 2 more at least
    assert metrics.resource_efficiency is None  # nobody measures an oven
    assert metrics.quality_score is None  # a plan that failed returns nothing that speaks of it
