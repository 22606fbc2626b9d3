"""The sweep at boot ends what dead owners left, and nothing of anybody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid

import anyio
import pytest
from deadlines import WITHIN
from process_harness import PATH, TREES, Register, eventually, lives

from vespera_exec.engine import proctree, shim


def test_the_boot_sweep_ends_the_tree_and_the_shim_of_a_dead_owner(register: Register) -> None:
    dead = uuid.uuid4().hex
    stray = [sys.executable, "-S", str(TREES / "nasty.py"), "cleared_environment", str(register.path)]
    with (
        subprocess.Popen(stray, env={"VESPERA_EXECUTION_ID": dead}, start_new_session=True) as one,
        subprocess.Popen(["sleep", "50"], env={"VESPERA_SHIM_OF": dead, **PATH}) as old_shim,
    ):
        anyio.run(lambda: eventually(lambda: len(register.processes()) == 2))
        known = register.processes()
        assert proctree.sweep([dead]) == 3
        assert register.left(known, dead) == set()
        assert old_shim.wait() == one.wait() == -signal.SIGKILL
        assert proctree.sweep([dead]) == 0
        assert proctree.sweep([]) == 0


@pytest.mark.parametrize(
    "environment",
    [
        {"VESPERA_EXECUTION_ID": "another"},
        {"VESPERA_EXECUTION_ID": "dead-and-more"},
        {"VESPERA_EXECUTION_ID": "dea"},
        {"NOT_VESPERA_EXECUTION_ID": "dead"},
        {"NOTE": "VESPERA_EXECUTION_ID=dead"},
    ],
    ids=str,
)
def test_the_boot_sweep_spares_what_does_not_carry_the_very_marker(environment: dict[str, str]) -> None:
    with subprocess.Popen(["sleep", "50"], env={**environment, **PATH}) as other:
        try:
            assert proctree.sweep(["dead"]) == 0
            assert other.poll() is None
        finally:
            other.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_the_boot_sweep_spares_the_process_of_another_user() -> None:
    dead = uuid.uuid4().hex
    with subprocess.Popen(["sleep", "50"], env={"VESPERA_EXECUTION_ID": dead, **PATH}, user=65534) as other:
        try:
            assert proctree.sweep([dead]) == 0
            assert other.poll() is None
        finally:
            other.kill()


def test_a_signal_never_reaches_a_later_process_of_the_same_pid() -> None:
    with subprocess.Popen(["sleep", "50"], env=PATH) as later:
        try:
            row = shim.look(later.pid)
            assert row is not None
            start = row[3]
            assert not shim.strike(later.pid, start - 1, signal.SIGKILL)
            assert lives(later.pid, start)
            assert shim.strike(later.pid, start, signal.SIGKILL)
            assert later.wait() == -signal.SIGKILL
        finally:
            later.kill()


def test_the_boot_sweep_spares_the_process_that_sweeps() -> None:
    """A server that the work of another has started carries the marker of that work itself."""
    dead = uuid.uuid4().hex
    code = (
        "import sys\n"
        "from vespera_exec.engine import proctree\n"
        "print(proctree.sweep([sys.argv[1]]), flush=True)"
    )  # fmt: skip
    environment = {**os.environ, "VESPERA_EXECUTION_ID": dead}
    done = subprocess.run(
        [sys.executable, "-c", code, dead], env=environment, capture_output=True, text=True, timeout=WITHIN
    )
    assert (done.returncode, done.stdout) == (0, "0\n")
