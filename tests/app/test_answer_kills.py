"""The owner is killed before, at and after answers: none that was acknowledged is lost, none is taken twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from deadlines import WITHIN

from vespera_exec.app.service import Vespera
from vespera_exec.app.views import InputAnswer
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})
Said = dict[str, dict[str, str]]
"""By run and key."""

# Asks one thing after the other.
_ASKER = """
import json, os
task = json.load(open(os.environ["VESPERA_TASK_FILE"]))
out = os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w", buffering=1)
form = {"type": "object", "properties": {"said": {"type": "string"}}}
for key in ("first", "second"):
    if key not in task["answers"]:
        out.write(json.dumps({"ask": {"key": key, "message": key, "schema": form}}) + "\\n")
        break
out.write(json.dumps({"result": {key: each["content"]["said"] for key, each in task["answers"].items()}}) + "\\n")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "roles").mkdir()
    (tmp_path / "asker.py").write_text(_ASKER)
    argv = json.dumps([sys.executable, "-I", "-S", str(tmp_path / "asker.py")])
    definition = f"name: asker\nrunner: process\nargv: {argv}\non_interrupt: resume\n"
    (tmp_path / "roles" / "asker.yaml").write_text(definition)
    return tmp_path


@pytest.mark.promise("answers")
def test_an_answer_that_was_acknowledged_at_the_moment_of_death_is_kept(place: Path) -> None:
    answered: Said = {}
    for turn in range(3):
        for line in owner(place, turn, answers=1 + turn % 2):
            noted(answered, line)
    assert sum(map(len, answered.values())) == 4
    anyio.run(settle, place, answered)


@pytest.mark.promise("answers")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
def test_whenever_the_owner_is_killed_no_answer_is_lost_or_taken_twice(place: Path, seed: int) -> None:
    killed_again_and_again(place, random.Random(seed), kills=3)


@pytest.mark.promise("answers")
@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 110))
def test_at_a_hundred_moments_of_death_no_answer_is_lost_or_taken_twice(place: Path, seed: int) -> None:
    killed_again_and_again(place, random.Random(seed), kills=10)


def killed_again_and_again(place: Path, chance: random.Random, *, kills: int) -> None:
    answered: Said = {}
    for turn in range(kills):
        for line in owner(place, turn, answers=-1, after=chance.uniform(0.0, 0.5)):
            noted(answered, line)
    anyio.run(settle, place, answered)


def owner(place: Path, turn: int, *, answers: int, after: float | None = None) -> Iterator[str]:
    """What an owner says until it is dead: by its own hand, or `after` so many seconds from when it is open."""
    script = Path(__file__).with_name("answering_owner.py")
    argv = [sys.executable, str(script), str(place), str(place), str(turn), str(answers)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        if after is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(after)  # until the moment of its death
            process.send_signal(signal.SIGKILL)
        yield from process.stdout


def noted(answered: Said, line: str) -> None:
    match line.split():
        case ["started", run_id]:
            answered.setdefault(run_id, {})
        case ["answered", run_id, key, said]:
            known = answered.setdefault(run_id, {})  # its owner may have died before it said that it was started
            assert key not in known, "one question was answered twice"
            known[key] = said
        case _:
            pytest.fail(f"unexpected: {line}")


async def settle(place: Path, answered: Said) -> None:
    """The last owner answers what is still open. Every run ends with what it was told first."""
    settings = Settings.load({"HOME": str(place)}, data_dir=place / "data", roles_dir=place / "roles")
    async with Vespera.open(settings=settings) as vespera:
        with anyio.fail_after(2 * WITHIN):
            while not vespera.is_idle:
                for waiting in (await vespera.list_inputs(ME, limit=200)).inputs:
                    late = {waiting.input.key: InputAnswer(action="accept", content={"said": "late"})}
                    await vespera.answer_input(ME, waiting.run_id, late)
                await anyio.sleep(0.02)
        for run_id, said in answered.items():
            await check(vespera, run_id, said)


async def check(vespera: Vespera, run_id: str, said: dict[str, str]) -> None:
    page = await vespera.read_events(ME, run_id, max_events=1000)
    told = [each["details"] for each in page.events if each["type"] == "approval_approved"]
    heard = {each["key"]: each["content"]["said"] for each in told}
    assert len(heard) == len(told), "one question was answered twice"
    assert heard | said == heard
    result = await vespera.get_result(ME, run_id)
    if result.error is not None:  # its work, too, was at work when an owner died, and that four times
        assert result.error["code"] == "INTERRUPTED"
    else:
        assert list(heard) == ["first", "second"]
        assert result.result["result"] == heard
