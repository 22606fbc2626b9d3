"""Plans made by chance, to which everything is done by chance, whose owner is killed again and again.

`pytest -m full -n0 tests/app/test_plan_chaos.py` runs many rounds.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from chaos_acts import ME, answer_what_is_asked, call_role, settings, started, workers
from chaos_checks import check
from chaos_daemon import Daemons, perform_all
from chaos_plans import CAPACITY, acts, death, plan, write_roles
from deadlines import WITHIN
from test_owner_kills import eventually_none_is_left

from vespera_exec.app.service import Vespera

if TYPE_CHECKING:
    from collections.abc import Iterator

Json = dict[str, Any]


@pytest.mark.promise("plans")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
def test_however_often_the_owner_is_killed_each_step_is_done_once_and_in_its_turn(tmp_path: Path, seed: int) -> None:
    killed_again_and_again(tmp_path, Random(seed), kills=2, plans=3)


@pytest.mark.promise("plans")
@pytest.mark.full
@pytest.mark.parametrize("seed", range(1000, 1060))
def test_sixty_rounds_of_ten_kills(tmp_path: Path, seed: int) -> None:
    killed_again_and_again(tmp_path, Random(seed), kills=10, plans=6)


@pytest.mark.promise("plans")
def test_a_real_daemon_is_killed_and_its_plans_come_to_their_ends(tmp_path: Path) -> None:
    daemons_killed(tmp_path, Random(7), kills=2)


@pytest.mark.promise("plans")
@pytest.mark.full
@pytest.mark.parametrize("seed", range(2000, 2020))
def test_twenty_rounds_of_six_daemons(tmp_path: Path, seed: int) -> None:
    daemons_killed(tmp_path, Random(seed), kills=6)


def daemons_killed(place: Path, chance: Random, *, kills: int) -> None:
    write_roles(place)
    given = [plan(chance, f"p{number}", roles=("toil",)) for number in range(2)]
    told: list[Json] = []
    daemons = Daemons(place)
    try:
        for _ in range(kills):
            with daemons.serving() as http:
                told += anyio.run(perform_all, http, given, acts(chance, given, 5), chance)
            assert eventually_none_is_left(place), "processes of a killed daemon's steps live on"
    finally:
        daemons.close()
    anyio.run(settle, place, given, told, chance)
    assert eventually_none_is_left(place)


def killed_again_and_again(place: Path, chance: Random, *, kills: int, plans: int) -> None:
    write_roles(place)
    given = [plan(chance, f"p{number}") for number in range(plans)]
    told: list[Json] = []
    for turn in range(kills):
        begun = given[: 1 + turn * plans // kills + plans // kills]
        script = {"plans": begun, "acts": acts(chance, begun, 8), "death": death(chance), "seed": turn}
        told += owned_until_killed(place, script)
        assert eventually_none_is_left(place), "processes of a killed owner's steps live on"
    anyio.run(settle, place, given, told, chance)
    assert eventually_none_is_left(place)


def owned_until_killed(place: Path, script: Json) -> Iterator[Json]:
    """What an owner says until it is dead, by its own hand or ours."""
    (place / "script").write_text(json.dumps(script))
    argv = [sys.executable, str(Path(__file__).with_name("chaos_owner.py")), str(place), str(place / "script")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stderr is not None
        if script["death"]["how"] != "opening":
            first = owner.stdout.readline()
            assert first, owner.stderr.read()
            yield json.loads(first)
        if script["death"]["how"] != "leaves":
            with suppress(subprocess.TimeoutExpired):
                owner.wait(script["death"]["seconds"])  # until the moment of its death
            owner.kill()
        said, faults = owner.communicate()
        for line in said.splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)
        assert owner.wait() == (0 if script["death"]["how"] == "leaves" else -signal.SIGKILL), faults


async def settle(place: Path, plans: list[Json], told: list[Json], chance: Random) -> None:
    """The last owner lets all of it come to its end; what has failed goes back once more, and then is looked at."""
    async with Vespera.open(settings=settings(place, capacity=CAPACITY), roles=[call_role(place)]) as vespera:
        tasks = await started(vespera, plans)
        async with workers(vespera, place):
            await all_ended(vespera, tasks, chance)
            for task_id in tasks.values():
                last = (await vespera.checkpoints.list(ME, task_id)).checkpoints
                if last and chance.random() < 0.4:
                    await vespera.checkpoints.restore(ME, chance.choice(last).checkpoint_id)
            if chance.random() < 0.5:
                await vespera.dead_letters.requeue(ME, all=True)
            await all_ended(vespera, tasks, chance)
        await check(vespera, place, plans, tasks, told)


async def all_ended(vespera: Vespera, tasks: dict[str, str], chance: Random) -> None:
    with anyio.move_on_after(2 * WITHIN) as scope:
        while not vespera.is_idle:
            await answer_what_is_asked(vespera, chance, once=True)
            for task_id in tasks.values():
                await vespera.resume(ME, task_id)
                for step in (await vespera.list_steps(ME, task_id, limit=1000)).steps:
                    if step.task_id and step.ended_at is None:
                        await vespera.plans.resume_step(task_id, step.id, ME)
            await anyio.sleep(0.03)
    assert not scope.cancelled_caught, await standing(vespera, tasks)


async def standing(vespera: Vespera, tasks: dict[str, str]) -> list[Any]:
    """What has not ended."""
    found: list[Any] = []
    for name, task_id in tasks.items():
        status = await vespera.get_status(ME, task_id)
        if not status.done:
            steps = (await vespera.list_steps(ME, task_id, limit=1000)).steps
            open_ones = [each.model_dump_json() for each in steps if each.ended_at is None]
            found.append((name, status.status, open_ones))
    return found
