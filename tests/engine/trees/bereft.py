"""A stand-in for the daemon that loses its shims: `bereft.py EXECUTION_ID VICTIM COUNT`, VICTIM `shim` or `guardian`.

Writes one JSON line: how many it has started and lost (`killed`), and which processes it still has (`children`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import anyio

from vespera_exec.engine import proctree, shim
from vespera_exec.engine.processes import ProcessLauncher
from vespera_exec.engine.work import ProcessSpec


async def main(execution_id: str, victim: str, count: int) -> None:
    proctree.become_subreaper()
    killed = 0
    spec = ProcessSpec(argv=("sh", "-c", "(setsid sleep 60 &); sleep 60"), cwd=Path("/"), env={"PATH": os.defpath})
    async with ProcessLauncher(execution_id=execution_id, adopts_orphans=True) as launcher:
        for _ in range(count):
            process = await launcher.launch(spec)
            os.kill(process.shim_pid if victim == "shim" else process.guardian_pid, signal.SIGKILL)
            killed += (await process.wait()).returncode == -signal.SIGKILL
    children = [pid for pid, row in shim.table().items() if row[0] == os.getpid()]
    sys.stdout.write(json.dumps({"killed": killed, "children": children}) + "\n")


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2], int(sys.argv[3]))
