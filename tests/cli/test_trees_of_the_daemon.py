"""Trees that role `command` has grown under the real daemon: cancelled, and left by a daemon that is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cli_harness import until

if TYPE_CHECKING:
    from cli_harness import Cli

NASTY = Path(__file__).parents[1] / "engine" / "trees" / "nasty.py"
OTHERS = ("deaf", "spinning", "new_session", "cleared_environment", "holds_stdout", "stopped", "traps_signals")
REST = [pytest.param(kind, marks=pytest.mark.full) for kind in OTHERS]


def plant(cli: Cli, kind: str, register: Path, *options: str) -> str:
    """The task id of a tree that stands."""
    register.touch()
    task_id = cli.task(*options, "--", sys.executable, "-S", str(NASTY), kind, str(register))
    # Its first line and the last one of its children.
    expected = 3 if kind in ("new_session", "respawner") else 1 if kind == "deaf" else 2
    until(lambda: len(register.read_text().splitlines()) >= expected, "the tree stands")
    return task_id


def left(register: Path) -> list[int]:
    return [pid for pid in map(int, register.read_text().split()) if _lives(pid)]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def pids_of(cli: Cli) -> dict[str, int]:
    """The daemon, the guardian and the shim of the only execution."""
    parents: dict[int, int] = {}
    daemon = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"vespera_exec.server.daemon" in arguments and str(cli.data_dir).encode() in arguments:
            daemon = int(entry.name)
    (guardian,) = [pid for pid, parent in parents.items() if parent == daemon]
    (shim,) = [pid for pid, parent in parents.items() if parent == guardian]
    return {"daemon": daemon, "guardian": guardian, "shim": shim}


@pytest.mark.parametrize(
    "kind", ["daemonized", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("vanished", "respawner")), *REST]
)
@pytest.mark.parametrize(
    "victims", [pytest.param(("daemon",), marks=pytest.mark.full), ("daemon", "shim")], ids=" and ".join
)
def test_a_killed_daemon_leaves_nothing_of_a_detached_command(
    victims: tuple[str, ...], kind: str, fresh: Cli, tmp_path: Path
) -> None:
    register = tmp_path / "register"
    task_id = plant(fresh, kind, register)
    pids = pids_of(fresh)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for victim in victims:
            os.kill(pids[victim], number)
    until(lambda: not left(register), "the tree is gone")
    assert fresh.status(task_id) == "failed"


@pytest.mark.parametrize("kind", ["respawner", *REST])
def test_a_cancelled_command_says_which_rung_ended_its_tree(kind: str, fresh: Cli, tmp_path: Path) -> None:
    register = tmp_path / "register"
    task_id = plant(fresh, kind, register)
    done = fresh.run("cancel", task_id, "--json")
    assert left(register) == []
    assert json.loads(done.stdout)["rung"] == ("sigterm" if kind == "stopped" else "sigkill")
