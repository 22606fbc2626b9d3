"""The owner is killed at any moment, again and again: nothing accepted is lost, nobody is left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
from deadlines import KILL_SECONDS, WITHIN

from vespera_exec.app.service import Vespera
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})

# Counts pages, one checkpoint each, with a child in a session of its own.
_READER = """
import json, os, subprocess, sys, time
task = json.load(open(os.environ["VESPERA_TASK_FILE"]))
first = (task["checkpoint"] or {"page": 0})["page"]
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
out = os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w", buffering=1)
for page in range(first + 1, 41):
    out.write(json.dumps({"done": page, "total": 40, "checkpoint": {"page": page}}) + "\\n")
    time.sleep(0.01)
child.kill()
out.write(json.dumps({"result": {"began_after": first}}) + "\\n")
"""
# Ignores SIGTERM and SIGINT, and does not end by itself.
_STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(300)
"""


@pytest.mark.promise("acknowledged", "dead_owner")
@pytest.mark.parametrize("seed", ["0", pytest.param("1", marks=pytest.mark.full)])
def test_five_kills_at_any_moment_lose_nothing_and_leave_nobody(tmp_path: Path, seed: str) -> None:
    killed_again_and_again(tmp_path, random.Random(int(seed)), kills=5)


@pytest.mark.promise("dead_owner")
@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 120))
def test_two_hundred_kills_at_any_moment_lose_nothing_and_leave_nobody(tmp_path: Path, seed: int) -> None:
    killed_again_and_again(tmp_path, random.Random(seed), kills=10)


def killed_again_and_again(place: Path, chance: random.Random, *, kills: int) -> None:
    write_roles(place)
    accepted: dict[str, str] = {}
    for turn in range(kills):
        accepted |= owned_until_killed(place, turn, after=chance.uniform(0.0, 0.9))
        assert eventually_none_is_left(place), "processes of a killed owner's runs live on"
    (place / "roles" / "stubborn.yaml").write_text(role("stubborn", place, "fail"))
    anyio.run(settle, place, accepted)
    assert eventually_none_is_left(place)


def write_roles(place: Path) -> None:
    (place / "roles").mkdir()
    (place / "reader.py").write_text(_READER)
    (place / "stubborn.py").write_text(_STUBBORN)
    (place / "roles" / "reader.yaml").write_text(role("reader", place, "resume"))
    (place / "roles" / "stubborn.yaml").write_text(role("stubborn", place, "fail"))


def role(name: str, place: Path, on_interrupt: str) -> str:
    argv = json.dumps([sys.executable, str(place / f"{name}.py")])
    return f"name: {name}\nrunner: process\nargv: {argv}\non_interrupt: {on_interrupt}\n"


def owned_until_killed(place: Path, turn: int, *, after: float) -> dict[str, str]:
    """What an owner accepted, session to role, before it was killed `after` seconds of owning."""
    program = [sys.executable, str(Path(__file__).with_name("killed_owner.py")), str(place), str(place), str(turn)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stderr is not None
        opened = owner.stdout.readline().split()
        assert opened, owner.stderr.read()
        assert float(opened[1]) < WITHIN  # how fast it is, benchmarks say
        try:
            owner.wait(after)
        except subprocess.TimeoutExpired:
            owner.kill()
        lines = [line.split() for line in owner.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        assert owner.wait() == -signal.SIGKILL, owner.stderr.read()
    return {session: name for name, _, session in lines}


def eventually_none_is_left(place: Path) -> bool:
    """Whether in time no process is left that runs a program of this place."""
    until = time.monotonic() + KILL_SECONDS
    while left := of_place(place):
        if time.monotonic() > until:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.01)
    return True


def of_place(place: Path) -> list[int]:
    """Those whose environment names a task of this place: their `VESPERA_TASK_FILE` lies in it."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"VESPERA_TASK_FILE={place}/".encode() in environment:
                found.append(int(entry.name))
    return found


async def settle(place: Path, accepted: dict[str, str]) -> None:
    """A last owner lets everything come to its end; then what was accepted is looked at."""
    settings = Settings.load({"HOME": str(place)}, data_dir=place / "data", roles_dir=place / "roles", max_concurrent=6)
    async with Vespera.open(settings=settings, purpose="daemon") as vespera:
        with anyio.fail_after(2 * WITHIN):
            for session, name in accepted.items():
                if name == "stubborn":
                    await vespera.cancel(ME, session)
            for session, name in accepted.items():
                events = await all_events(vespera, session)
                check(events, name)


async def all_events(vespera: Vespera, session: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    cursor = 0
    while True:
        page = await vespera.read_events(ME, session, cursor=cursor, wait_ms=25_000, max_events=1000)
        events += page.events
        cursor = page.next_cursor
        if page.done:
            return events


def check(events: list[dict[str, Any]], name: str) -> None:
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    statuses = [event["status"]["new"] for event in events if event["type"] == "status_change"]
    ends = [status for status in statuses if status in ("completed", "failed", "cancelled", "timed_out")]
    assert len(ends) == 1
    ended = events[[event["status"]["new"] for event in events].index(ends[0])]
    if name == "stubborn":
        assert ends[0] in ("failed", "cancelled")
    elif ends[0] == "failed":
        # Three times in the middle of it is as often as a run is resumed.
        assert statuses.count("recovering") == 3
    else:
        assert ends[0] == "completed"
    if ends[0] == "failed":
        assert ended["details"]["outcome"]["error"]["code"] == "INTERRUPTED"
        assert "daemon:" in ended["message"]
    for number, event in enumerate(events):
        if event["type"] == "recovery_initiated":
            assert any(before["type"] == "owner_changed" for before in events[:number])
