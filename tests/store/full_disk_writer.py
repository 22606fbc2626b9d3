"""A program on a disk that is full again and again: `RLIMIT_FSIZE` refuses its files every byte more.

Says on stdout, a line of JSON each: `["acked", n]` when decision n is on disk, `["refused", n, code, message]` when
it was told that n cannot be written now, `["read", count]` for what a query finds meanwhile, `["output", lost_bytes]`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import anyio

from vespera_exec.errors import StoreUnavailable
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.store import Store


def say(*what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


async def main(data_dir: Path, rounds: int) -> None:
    async with Store.open(Settings.load({}, data_dir=data_dir)) as store:
        task = Task(title="on a full disk", sink=store.journal)
        await store.journal.sync()
        output = store.open_output("run")
        for number in range(rounds):
            limit_files(1)
            task.execution.change(execution_context={"number": number})
            output.write("stdout", b"%04d\n" % number)
            output.flush()
            try:
                await store.journal.sync()
                say("acked", number)
            except StoreUnavailable as fault:
                say("refused", number, fault.error_code, fault.message)
            say("read", (await store.queries.list_tasks()).total)
            limit_files(resource.RLIM_INFINITY)
            with anyio.fail_after(60):
                while store.journal.fault is not None:  # noqa: ASYNC110 - it resumes by itself
                    await anyio.sleep(0.005)
            await store.journal.sync()
            say("acked", number)
        limit_files(1)
        output.write("stdout", b"last\n")
        output.close()
        say("output", output.lost_bytes, output.state_loss())
        limit_files(resource.RLIM_INFINITY)
        with anyio.fail_after(60):
            while not output.state_loss():  # noqa: ASYNC110 - it is stated by itself when there is room
                await anyio.sleep(0.005)


if __name__ == "__main__":
    anyio.run(main, Path(sys.argv[1]), int(sys.argv[2]))
