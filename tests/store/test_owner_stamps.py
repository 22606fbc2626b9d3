"""Who owns a data directory is a held lock, never a stamp: no clock and no sleep takes it from anybody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from vespera_exec import paths
from vespera_exec.errors import DataDirectoryInUse
from vespera_exec.store.lock import OwnerLock, read_owner

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOLD = """
import sys
from pathlib import Path
from vespera_exec.store.lock import OwnerLock
with OwnerLock.acquire(Path(sys.argv[1]), purpose="daemon"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(data_dir: Path) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-P", "-c", HOLD, str(data_dir)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.promise("clock")
@pytest.mark.parametrize("hours", [-1, 1, 24 * 365])
@pytest.mark.parametrize("asleep", [False, True])
def test_an_owner_whose_stamp_is_off_and_that_sleeps_is_still_the_owner(
    data_dir: Path, holder: subprocess.Popen[str], hours: int, asleep: bool
) -> None:
    if asleep:
        holder.send_signal(signal.SIGSTOP)
    row = data_dir / paths.LOCK
    told = json.loads(row.read_text())
    stamp = datetime.fromisoformat(told["since"]) + timedelta(hours=hours)
    row.write_text(json.dumps(told | {"since": stamp.isoformat(timespec="milliseconds")}))
    with pytest.raises(DataDirectoryInUse, match=f"process {holder.pid} "):
        OwnerLock.acquire(data_dir, purpose="daemon", wait_seconds=0.1)
    owner = read_owner(data_dir)
    assert owner is not None
    assert (owner.pid, owner.is_alive) == (holder.pid, True)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with OwnerLock.acquire(data_dir, purpose="daemon") as lock:
        assert lock.owner.pid == os.getpid()
