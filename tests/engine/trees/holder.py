"""A stand-in for the daemon: `holder.py EXECUTION_ID KIND REGISTER ADOPTS`, which holds one launcher.

Writes one JSON line when the tree stands (`guardian`, `shim`, `pid`), one when it has ended (`returncode`, `rung`,
`children`: the processes that it still has).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import anyio

from vespera_exec.engine import proctree, shim
from vespera_exec.engine.processes import ProcessLauncher
from vespera_exec.engine.work import ProcessSpec


def say(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


async def main(execution_id: str, kind: str, register: str, adopts: bool) -> None:
    if adopts:
        proctree.become_subreaper()
    ready = anyio.Event()

    def report(line: bytes) -> None:
        ready.set()

    spec = ProcessSpec(
        argv=(sys.executable, "-S", str(Path(__file__).with_name("nasty.py")), kind, register),
        cwd=Path("/"),
        env={"PATH": os.defpath},
        on_output=lambda stream, chunk: None,
        on_report=report,
    )
    async with ProcessLauncher(execution_id=execution_id, adopts_orphans=adopts) as launcher:
        process = await launcher.launch(spec)
        await ready.wait()
        say(guardian=process.guardian_pid, shim=process.shim_pid, pid=process.pid)
        ended = await process.wait()
    children = [pid for pid, row in shim.table().items() if row[0] == os.getpid()]
    say(returncode=ended.returncode, rung=ended.rung, children=children)


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "yes")
