"""An owner of a data directory that starts plans and does to them what its script says, until it is killed.

`python chaos_owner.py PLACE SCRIPT`; SCRIPT is a file with JSON: `plans`, `acts`, `death` (see `chaos_plans`), `seed`.
It says on stdout, as JSON, what it was answered, and every fault that it has seen.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

import anyio
from chaos_acts import (
    ME,
    answer_what_is_asked,
    call_role,
    perform_all,
    printed,
    settings,
    started,
    watch_boards,
    workers,
)
from chaos_plans import CAPACITY

from vespera_exec.app.service import Vespera

_WRITTEN_SECONDS = 0.05
"""In which the journal's thread has written what it has."""


class Told(logging.Handler):
    """An error in the log is a fault of ours: nothing here is to cause one."""

    def emit(self, record: logging.LogRecord) -> None:
        printed({"bug": "an error was logged", "text": self.format(record)})


def dies_at(vespera: Vespera, death: dict[str, Any]) -> None:
    """Have it kill itself at a decision: before or after it is handed to the journal, or once that is on disk."""
    journal: Any = vespera._store.journal  # pyright: ignore[reportPrivateUsage]
    append, left = journal.append, death["append"]

    def counted(batch: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0 and death["how"] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        append(batch)
        if left == 0:
            if death["how"] == "written":
                time.sleep(_WRITTEN_SECONDS)  # all else in this thread stands meanwhile
            os.kill(os.getpid(), signal.SIGKILL)

    journal.append = counted


async def main(place: Path, script: dict[str, Any]) -> None:
    async with Vespera.open(
        settings=settings(place, capacity=CAPACITY), purpose="daemon", roles=[call_role(place)]
    ) as vespera:
        printed({"open": True})
        if script["death"]["how"] in ("before", "after", "written"):
            dies_at(vespera, script["death"])
        leaves = script["death"]["seconds"] if script["death"]["how"] == "leaves" else None
        with anyio.move_on_after(leaves):
            async with anyio.create_task_group() as group:
                tasks = await started(vespera, script["plans"])
                printed({"standing": {name: (await vespera.get_status(ME, tasks[name])).status for name in tasks}})
                group.start_soon(answer_what_is_asked, vespera, Random(script["seed"]))
                group.start_soon(watch_boards, vespera, printed)
                for half in (script["acts"][::2], script["acts"][1::2]):
                    group.start_soon(perform_all, vespera, tasks, half, printed)
                async with workers(vespera, place):
                    await anyio.sleep_forever()


if __name__ == "__main__":
    logging.getLogger().addHandler(Told(logging.ERROR))
    try:
        anyio.run(main, Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
    except BaseException:
        printed({"bug": "the owner fell", "text": traceback.format_exc()})
        raise
