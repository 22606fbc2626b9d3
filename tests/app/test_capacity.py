"""Work that needs capacity waits for it, holds it while it runs, and always gives it back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN
from planning import until
from worker_calls import ANN, ME, Defining, Opening, became, claimed, conclude, events, recorded, started

from roles.definition import RetryPolicy, Role
from vespera_exec.app.capacity.file import configured_pools
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Handle, InputAnswer
from vespera_exec.app.workers.views import Claim
from vespera_exec.errors import CapacityTooLarge, CapacityUnavailable, CapacityUnknown, InvalidInput, PermissionDenied
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from roles.context import Context
    from vespera_exec.model.capacity import CapacityUse

EVE = Caller("eve", frozenset({"read"}), over_tcp=True, sees_only="eve")
GPU = {"gpu": 1.0}


class Bench:
    """A role in the loop whose runs end when they are told to."""

    def __init__(self, vespera: Vespera, **policy: Any) -> None:
        self.go = anyio.Event()
        self.fails = False
        self.began: list[str] = []

        async def work(context: Context) -> str:
            self.began.append(context.task.title)
            await self.go.wait()
            if self.fails:
                raise RuntimeError("it broke")
            return context.task.title

        policy = {"grace_seconds": 0.05, **policy}
        vespera.roles.add(Role.from_callable(work, name="bench", in_loop=True, inputs=None, **policy))


async def quick(vespera: Vespera) -> Handle:
    async def plain(context: Context) -> str:
        return "done"

    vespera.roles.add(Role.from_callable(plain, name="plain", in_loop=True, inputs=None))
    return await started(vespera, "plain", wait_ms=25_000)


async def over(vespera: Vespera, handle: Handle) -> list[Any]:
    """Its log, once its end is on disk."""
    cursor = 0
    with anyio.fail_after(WITHIN):
        while not (page := await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=25_000)).done:
            cursor = page.next_cursor
    return await events(vespera, handle)


async def uses(vespera: Vespera, handle: Handle) -> tuple[CapacityUse, ...]:
    found = await vespera._tasks.find(handle.session_id, ME)  # pyright: ignore[reportPrivateUsage]
    assert found.life is not None
    return found.life.capacity


def free(vespera: Vespera) -> dict[str, float]:
    return {pool.id: pool.available for pool in vespera.capacity.view(ME).pools}


def about_capacity(log: list[Any]) -> list[str]:
    return [event["type"] for event in log if event["type"].startswith("resource_")]


# waiting and holding


@pytest.mark.promise("capacity")
async def test_one_waits_for_the_gpu_of_another_and_what_needs_none_passes_it(opening: Opening) -> None:
    async with opening(capacity="gpu=1", max_concurrent=2) as vespera:
        bench = Bench(vespera)
        first = await started(vespera, "bench", title="first", capacity=GPU)
        await became(vespera, first, "running")
        second = await started(vespera, "bench", title="second", capacity=GPU)
        await recorded(vespera, second, "resource_waiting")
        status = await vespera.get_status(ME, second.task_id)
        assert (status.status, status.waiting_for) == ("pending", "gpu: 1 wanted, 0 of 1 free; held by first")
        assert (await quick(vespera)).status == "completed"
        assert bench.began == ["first"]
        bench.go.set()
        for handle in (first, second):
            await over(vespera, handle)
            status = await vespera.get_status(ME, handle.task_id)
            assert (status.status, status.waiting_for) == ("completed", None)
        assert free(vespera) == {"gpu": 1}
        assert about_capacity(await events(vespera, second)) == [
            "resource_waiting",
            "resource_allocated",
            "resource_released",
        ]


@pytest.mark.promise("capacity")
async def test_it_is_given_back_before_the_end_is_seen_and_the_log_says_what_it_cost(
    opening: Opening, tmp_path: Path
) -> None:
    (tmp_path / "pools.yaml").write_text("pools: {a100: {type: gpu, capacity: 2, cost_per_unit_hour: 3600}}\n")
    async with opening(capacity=str(tmp_path / "pools.yaml")) as vespera:
        bench = Bench(vespera)
        handle = await started(vespera, "bench", capacity={"gpu": 2})
        await became(vespera, handle, "running")
        assert free(vespera) == {"a100": 0}
        bench.go.set()
        log = await over(vespera, handle)
        types = [event["type"] for event in log]
        assert types.index("resource_released") < types.index("execution_completed")
        [given] = next(event for event in log if event["type"] == "resource_allocated")["details"]["allocations"]
        [back] = next(event for event in log if event["type"] == "resource_released")["details"]["allocations"]
        assert given["pool"] == "a100"
        assert back["allocation_id"] == given["allocation_id"]
        [use] = await uses(vespera, handle)
        assert use.ended_at is not None
        held = (use.ended_at - use.started_at).total_seconds()
        assert use.cost == pytest.approx(2 * held, abs=1e-6)
        assert use.efficiency is None
        assert free(vespera) == {"a100": 2}


@pytest.mark.promise("capacity")
async def test_failure_cancel_and_timeout_give_it_back_too(opening: Opening) -> None:
    async with opening(capacity="gpu=1") as vespera:
        bench = Bench(vespera)
        late = await started(vespera, "bench", capacity=GPU, timeout_seconds=0.05)
        await over(vespera, late)
        cancelled = await started(vespera, "bench", capacity=GPU)
        await became(vespera, cancelled, "running")
        waiting = await started(vespera, "bench", capacity=GPU)
        await recorded(vespera, waiting, "resource_waiting")
        await vespera.cancel(ME, waiting.task_id)
        await vespera.cancel(ME, cancelled.task_id, wait_ms=25_000)
        bench.fails = True
        bench.go.set()
        broken = await started(vespera, "bench", capacity=GPU)
        await over(vespera, broken)
        assert free(vespera) == {"gpu": 1}
        assert about_capacity(await events(vespera, waiting)) == ["resource_waiting"]
        for handle in (late, cancelled, broken):
            assert about_capacity(await events(vespera, handle)) == ["resource_allocated", "resource_released"]


async def test_while_a_retry_backs_off_others_have_it(opening: Opening) -> None:
    async with opening(capacity="gpu=1") as vespera:
        retry = RetryPolicy(max_retries=1, retry_on=("RuntimeError",), backoff_seconds=60)
        bench = Bench(vespera, retry=retry)
        bench.fails = True
        bench.go.set()
        handle = await started(vespera, "bench", capacity=GPU)
        await recorded(vespera, handle, "resource_released")
        await became(vespera, handle, "pending")
        assert free(vespera) == {"gpu": 1}


async def test_while_it_waits_for_an_answer_others_have_it_and_it_asks_again(opening: Opening) -> None:
    async with opening(capacity="gpu=1") as vespera:
        bench = Bench(vespera, approval=True)
        asking = await started(vespera, "bench", title="asking", capacity=GPU)
        await became(vespera, asking, "paused")
        assert free(vespera) == {"gpu": 1}
        other = await started(vespera, "bench", title="other", capacity=GPU)
        await became(vespera, other, "paused")
        for handle in (asking, other):
            await vespera.answer_input(ME, handle.task_id, {"approval": InputAnswer(action="accept")})
        await recorded(vespera, other, "resource_waiting")
        await became(vespera, asking, "running")
        assert (await vespera.get_status(ME, other.task_id)).waiting_for == "gpu: 1 wanted, 0 of 1 free; held by asking"
        bench.go.set()
        await over(vespera, other)
        kinds = about_capacity(await events(vespera, asking))
        assert kinds == ["resource_allocated", "resource_released"] * 2
        assert free(vespera) == {"gpu": 1}


async def test_what_is_put_back_after_a_failure_needs_what_it_was_asked_for_with(opening: Opening) -> None:
    async with opening(capacity="gpu=1") as vespera:
        bench = Bench(vespera)
        bench.fails = True
        bench.go.set()
        handle = await started(vespera, "bench", capacity=GPU)
        await over(vespera, handle)
        await vespera.dead_letters.requeue(ME, [handle.task_id])
        log = await over(vespera, handle)
        assert about_capacity(log) == ["resource_allocated", "resource_released"] * 2


async def test_what_begins_again_from_a_checkpoint_needs_what_it_was_asked_for_with(opening: Opening) -> None:
    async with opening(capacity="gpu=1") as vespera:
        bench = Bench(vespera)
        handle = await started(vespera, "bench", capacity=GPU)
        await became(vespera, handle, "running")
        await vespera.checkpoints.create(ME, handle.task_id)
        bench.go.set()
        await over(vespera, handle)
        await vespera.checkpoints.restore(ME, any_id=handle.task_id)
        log = await over(vespera, handle)
        assert about_capacity(log) == ["resource_allocated", "resource_released"] * 2


async def test_what_is_paused_keeps_it(opening: Opening, tmp_path: Path) -> None:
    (tmp_path / "roles").mkdir()
    (tmp_path / "roles" / "sleeping.yaml").write_text(
        "name: sleeping\nrunner: process\nargv: [sleep, '300']\ncapacity: {gpu: 1}\n"
    )
    async with opening(capacity="gpu=1") as vespera:
        handle = await started(vespera, "sleeping")
        await became(vespera, handle, "running")
        await vespera.pause(ME, handle.task_id)
        assert (await vespera.get_status(ME, handle.task_id)).status == "paused"
        assert free(vespera) == {"gpu": 0}
        await vespera.cancel(ME, handle.task_id, wait_ms=25_000)
        assert free(vespera) == {"gpu": 1}


async def test_who_measures_the_work_says_how_much_of_the_cpu_it_used(opening: Opening, tmp_path: Path) -> None:
    (tmp_path / "roles").mkdir()
    busy = "import time\nend = time.monotonic() + 0.4\nwhile time.monotonic() < end: pass"
    argv = json.dumps([sys.executable, "-S", "-c", busy])
    (tmp_path / "roles" / "busy.yaml").write_text(f"name: busy\nrunner: process\nargv: {argv}\n")
    async with opening(capacity="cpu=4,memory=1000", sample_seconds=0.1) as vespera:
        handle = await started(vespera, "busy", capacity={"cpu": 4, "memory": 1000})
        await over(vespera, handle)
        cpu, memory = await uses(vespera, handle)
        assert cpu.efficiency is not None
        assert 0 < cpu.efficiency <= 0.3  # of four cores it could use one
        assert memory.efficiency is not None
        assert 0 < memory.efficiency < 0.5


# refusals


async def test_what_no_pool_could_ever_give_is_refused_when_it_is_asked_for(opening: Opening) -> None:
    async with opening(capacity="gpu=1") as vespera:
        Bench(vespera, capacity=())
        with pytest.raises(CapacityUnknown, match="there is gpu"):
            await started(vespera, "bench", capacity={"tpu": 1})
        with pytest.raises(CapacityTooLarge):
            await started(vespera, "bench", capacity={"gpu": 2})
        with pytest.raises(InvalidInput):
            await started(vespera, "bench", capacity={"gpu": -1})
        assert vespera.is_idle


async def test_what_the_next_owner_can_never_give_fails_and_does_not_wait_for_ever(opening: Opening) -> None:
    async with opening(capacity="gpu=2", max_concurrent=1) as vespera:
        bench = Bench(vespera)
        await became(vespera, await started(vespera, "bench"), "running")
        handle = await started(vespera, "bench", capacity={"gpu": 2})
        assert bench.began == ["Look at it"]

    async def work(context: Context) -> str:
        return "done"

    role = Role.from_callable(work, name="bench", in_loop=True, inputs=None)
    settings = Settings.load({}, data_dir=vespera.settings.data_dir, roles_dir=vespera.settings.roles_dir)
    async with Vespera.open(settings=settings, roles=[role]) as after:
        status = await became(after, handle, "failed")
        assert status.session is not None
        assert status.session.error_context is not None
        assert status.session.error_context["code"] == "CAPACITY_UNKNOWN"


# workers


@pytest.mark.promise("capacity")
async def test_a_worker_gets_only_what_there_is_capacity_for(opening: Opening, define: Defining) -> None:
    define("review", "capacity: {gpu: 1}")
    define("audit")
    async with opening(capacity="gpu=1") as vespera:
        first, second = await started(vespera), await started(vespera)
        held = await claimed(vespera, ANN)
        assert held.task_id == first.task_id
        assert not (await vespera.workers.claim(ANN, Claim(wait_ms=50))).claimed
        await started(vespera, "audit")
        assert (await claimed(vespera, ANN)).role == "audit"
        status = await vespera.get_status(ME, second.task_id)
        assert status.waiting_for == "gpu: 1 wanted, 0 of 1 free; held by Look at it"

        async def claim_it() -> None:
            assert (await claimed(vespera, ANN)).task_id == second.task_id

        async with anyio.create_task_group() as group:
            group.start_soon(claim_it)
            await conclude(vespera, held, ANN)
        assert free(vespera) == {"gpu": 0}


async def test_what_a_worker_holds_counts_for_the_next_owner_as_well(opening: Opening, define: Defining) -> None:
    define("review", "capacity: {gpu: 1}")
    async with opening(capacity="gpu=1") as vespera:
        await started(vespera)
        held = await claimed(vespera, ANN)
    async with opening(capacity="gpu=1") as vespera:
        assert free(vespera) == {"gpu": 0}
        await conclude(vespera, held, ANN)
        assert free(vespera) == {"gpu": 1}


async def test_what_was_set_aside_for_a_worker_that_went_away_is_free_again(
    opening: Opening, define: Defining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vespera_exec.engine.capacity.grants.CLAIM_SECONDS", 0.1)
    define("review", "capacity: {gpu: 1}")
    async with opening(capacity="gpu=1") as vespera:
        bench = Bench(vespera)
        await became(vespera, await started(vespera, "bench", capacity=GPU), "running")
        passed = await started(vespera)
        for _ in range(2):
            assert not (await vespera.workers.claim(ANN, Claim(wait_ms=150))).claimed
        assert about_capacity(await events(vespera, passed)) == ["resource_waiting"]
        behind = await started(vespera, "bench", title="behind", capacity=GPU)
        bench.go.set()
        await over(vespera, behind)


async def test_what_stands_aside_for_a_worker_that_does_not_come_again_goes_to_the_next(
    opening: Opening, define: Defining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vespera_exec.engine.capacity.grants.CLAIM_SECONDS", 0.5)
    define("review", "capacity: {gpu: 1}")
    async with opening(capacity="gpu=1") as vespera:
        bench = Bench(vespera)
        first = await started(vespera, "bench", capacity=GPU)
        await became(vespera, first, "running")
        passed = await started(vespera)
        assert not (await vespera.workers.claim(ANN, Claim(wait_ms=0))).claimed
        bench.go.set()
        await over(vespera, first)
        await until(lambda: vespera._engine.grants.states()[0].holders == (passed.session_id,))  # pyright: ignore[reportPrivateUsage]
        behind = await started(vespera, "bench", capacity=GPU)
        assert about_capacity(await over(vespera, behind)) == [
            "resource_waiting",
            "resource_allocated",
            "resource_released",
        ]


# outside of executions


async def test_capacity_may_be_taken_outside_of_executions_and_is_given_back(opening: Opening) -> None:
    async with opening(capacity="gpu=1,cpu=4") as vespera:
        async with vespera.capacity.held({"gpu": 1, "cpu": 1}) as held:
            assert [(each.pool, each.amount, each.available) for each in held] == [("gpu", 1, 0), ("cpu", 1, 3)]
            with pytest.raises(CapacityUnavailable, match="gpu: 1 wanted, 0 of 1 free"):
                await vespera.capacity.allocate(ME, GPU)
            assert free(vespera) == {"gpu": 0, "cpu": 3}
        [mine] = await vespera.capacity.allocate(ME, GPU)
        operator = Caller("ann", frozenset({"operate"}), over_tcp=True, sees_only="ann")
        assert await vespera.capacity.release(operator, [mine.id]) == []
        assert await vespera.capacity.release(ME, [mine.id, "unknown"]) == [mine.id]
        assert free(vespera) == {"gpu": 1, "cpu": 4}
        with pytest.raises(PermissionDenied):
            await vespera.capacity.allocate(EVE, GPU)


async def test_whoever_waits_outside_gets_it_when_the_work_has_ended(opening: Opening) -> None:
    async with opening(capacity="gpu=1") as vespera:
        bench = Bench(vespera)
        await became(vespera, await started(vespera, "bench", capacity=GPU), "running")
        async with anyio.create_task_group() as group:

            async def take() -> None:
                async with vespera.capacity.held(GPU, wait_ms=25_000):
                    assert free(vespera) == {"gpu": 0}

            group.start_soon(take)
            bench.go.set()
        assert free(vespera) == {"gpu": 1}


async def test_work_and_whoever_waits_outside_behind_it_are_served_together(opening: Opening) -> None:
    """The same turn of the dispatcher has enough for both."""
    async with opening(capacity="gpu=2") as vespera:
        bench = Bench(vespera)
        mine = [each.id for each in await vespera.capacity.allocate(ME, {"gpu": 2})]
        work = await started(vespera, "bench", capacity=GPU)
        await recorded(vespera, work, "resource_waiting")
        served = anyio.Event()

        async def take() -> None:
            async with vespera.capacity.held(GPU, wait_ms=25_000):
                served.set()
                await bench.go.wait()

        async with anyio.create_task_group() as group:
            group.start_soon(take)
            await until(lambda: len(vespera._engine.grants._outsiders) == 1)  # pyright: ignore[reportPrivateUsage]
            assert await vespera.capacity.release(ME, mine) == mine
            with anyio.fail_after(WITHIN):
                await served.wait()
            await became(vespera, work, "running")
            bench.go.set()
        await over(vespera, work)
        assert free(vespera) == {"gpu": 2}


async def test_others_tasks_are_counted_and_not_named(opening: Opening) -> None:
    async with opening(capacity="gpu=1") as vespera:
        Bench(vespera)
        await became(vespera, await started(vespera, "bench", title="secret", capacity=GPU), "running")
        await recorded(vespera, await started(vespera, "bench", capacity=GPU), "resource_waiting")
        view = vespera.capacity.view(EVE)
        assert "secret" not in view.model_dump_json()
        assert (view.pools[0].other_holders, view.waiting, view.waiting_total) == (1, [], 1)
        mine = vespera.capacity.view(ME)
        assert [each.title for each in mine.pools[0].holders] == ["secret"]
        assert [each.waiting_for for each in mine.waiting] == ["gpu: 1 wanted, 0 of 1 free"]


# the owner dies


_TRAINING = "import os, time\ntime.sleep(300 if os.path.exists(os.sys.argv[1]) else 0)\n"


@pytest.mark.promise("capacity")
def test_after_a_kill_the_next_owner_has_all_of_it_and_whoever_waited_gets_it(tmp_path: Path) -> None:
    (tmp_path / "roles").mkdir()
    (tmp_path / "training.py").write_text(_TRAINING)
    (tmp_path / "slow").touch()
    argv = json.dumps([sys.executable, "-S", str(tmp_path / "training.py"), str(tmp_path / "slow")])
    definition = f"name: training\nrunner: process\nargv: {argv}\ncapacity: {{gpu: 1}}\n"
    (tmp_path / "roles" / "training.yaml").write_text(definition)
    program = [sys.executable, str(Path(__file__).with_name("capacity_owner.py")), str(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stderr is not None
        holder, waiter = owner.stdout.readline().strip(), owner.stdout.readline().strip()
        owner.kill()
        assert waiter, owner.stderr.read()
    (tmp_path / "slow").unlink()
    anyio.run(taken_over, tmp_path, holder, waiter)


async def taken_over(place: Path, holder: str, waiter: str) -> None:
    settings = Settings.load({"HOME": str(place)}, data_dir=place / "data", roles_dir=place / "roles", capacity="gpu=1")
    async with Vespera.open(settings=settings) as vespera:
        cursor = 0
        with anyio.fail_after(WITHIN):
            while not (page := await vespera.read_events(ME, waiter, cursor=cursor, wait_ms=25_000)).done:
                cursor = page.next_cursor
        held = (await vespera.read_events(ME, holder, max_events=1000)).events
        waited = (await vespera.read_events(ME, waiter, max_events=1000)).events
        assert about_capacity(held) == ["resource_allocated", "resource_released"]
        assert [event["message"] for event in held if event["type"] == "resource_released"] == ["Its owner ended"]
        assert "failed" in [event["status"]["new"] for event in held]
        assert about_capacity(waited) == ["resource_waiting", "resource_allocated", "resource_released"]
        assert "completed" in [event["status"]["new"] for event in waited]
        assert free(vespera) == {"gpu": 1}


# the setting


def test_pools_are_named_in_one_line_or_in_a_file(tmp_path: Path) -> None:
    assert configured_pools("") == []
    assert [(each.id, each.type, each.capacity) for each in configured_pools("cpu=4, gpu=0.5")] == [
        ("cpu", "cpu", 4),
        ("gpu", "gpu", 0.5),
    ]
    file = tmp_path / "pools.yaml"
    file.write_text(
        "pools:\n  a100: {type: gpu, capacity: 2, cost_per_unit_hour: 1.5, attributes: {memory_mb: 40960, model: a}}\n"
        "  calls: {capacity: 100, window_seconds: 60}\n"
    )
    gpu, calls = configured_pools(str(file))
    assert (gpu.type, gpu.capacity, gpu.cost_per_unit_hour) == ("gpu", 2, 1.5)
    assert gpu.attributes == {"memory_mb": 40960, "model": "a"}
    assert (calls.type, calls.capacity, calls.window_seconds) == ("calls", 100, 60)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("gpu", "TYPE=AMOUNT"),
        ("gpu=many", "TYPE=AMOUNT"),
        ("gpu=0", "the capacity of gpu"),
        ("gpu=-1", "the capacity of gpu"),
        ("gpu=nan", "the capacity of gpu"),
        ("gpu=1,gpu=2", "twice"),
        ("a b=1", "a type"),
        ("/nowhere/pools.yaml", "cannot be read"),
    ],
)
async def test_a_setting_that_cannot_be_meant_is_refused_at_the_start(
    opening: Opening, setting: str, complaint: str
) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        async with opening(capacity=setting):
            pass


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ("pools: {}\n", 1, "1 to 256"),
        ("pool: {gpu: {capacity: 1}}\n", 1, "unknown key 'pool'"),
        ("pools:\n  gpu: 1\n", 2, "mapping"),
        ("pools:\n  gpu:\n    capacity: 1\n    cost: 2\n", 4, "unknown key 'cost'"),
        ("pools:\n  gpu:\n    capacity: -2\n", 2, "the capacity of pool gpu"),
        ("pools:\n  gpu:\n    capacity: 1\n    window_seconds: soon\n", 4, "window_seconds is a number"),
        ("pools:\n  gpu:\n    capacity: 1\n    attributes: {a: [1]}\n", 4, "the attribute a"),
        ("pools: &a {gpu: {capacity: 1}}\n", 1, "anchors"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, complaint: str
) -> None:
    file = tmp_path / "pools.yaml"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=complaint) as refused:
        configured_pools(str(file))
    assert str(refused.value).startswith(f"{file}:{line}: ")
