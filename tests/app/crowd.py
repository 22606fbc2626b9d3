"""Many runs at once, and what the process holds beside them."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from deadlines import WITHIN

from roles.definition import Role
from vespera_exec.app.views import Execute
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from vespera_exec.app.service import Vespera

ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})
_SUBMITTERS = 8


@dataclass
class Crowd:
    """Runs of a role in the loop; the first `at_once` of them wait for each other."""

    at_once: int = 1
    running: int = 0
    most: int = 0
    acks: list[float] = field(default_factory=list[float])
    """Seconds until each request was acknowledged."""
    task_ids: list[str] = field(default_factory=list[str])
    full: anyio.Event = field(default_factory=anyio.Event)

    def role(self) -> Role:
        async def work(context: Any) -> dict[str, int]:
            self.running += 1
            self.most = max(self.most, self.running)
            if self.running == self.at_once:
                self.full.set()
            await self.full.wait()
            for step in (1, 2, 3):
                context.progress(25 * step, f"step {step}")
                await anyio.lowlevel.checkpoint()
            self.running -= 1
            return {"steps": 3}

        return Role.from_callable(work, name="crowd", in_loop=True, inputs=None)

    async def run(self, vespera: Vespera, tasks: int, *, processes: int = 0) -> None:
        """Start so many runs, of which `processes` are commands; returns when all have ended."""
        wanted = iter(range(tasks))
        first = len(self.task_ids)

        async def submit() -> None:
            for number in wanted:
                request = Execute(title=f"Run {number}", role="crowd")
                if number < processes:
                    request = Execute(title=f"Run {number}", role="command", inputs={"argv": ["echo", "x"]})
                began = time.monotonic()
                handle = await vespera.execute_task(ME, request)
                self.acks.append(time.monotonic() - began)
                self.task_ids.append(handle.task_id)

        async with anyio.create_task_group() as group:
            for _ in range(_SUBMITTERS):
                group.start_soon(submit)
        for task_id in self.task_ids[first:]:
            while True:
                page = await vespera.read_events(ME, task_id, cursor=vespera.describe().head, wait_ms=25_000)
                if page.done:
                    break
            assert page.status == "completed"


async def warmed_up(vespera: Vespera, crowd: Crowd) -> None:
    """What is made once is made: threads, and what each connection to the database opens at its first question.

    Looking at the database by one more connection, as upkeep does, leaves a descriptor that SQLite keeps for the next.
    """
    await crowd.run(vespera, 24, processes=8)
    async with anyio.create_task_group() as group:
        for _ in range(32):
            group.start_soon(vespera.list_tasks, ME)
    await vespera.doctor(ME)
    with anyio.fail_after(WITHIN):
        while True:
            if not _children():
                return
            await anyio.sleep(0.02)


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a process holds: open files, threads other than anyio's idle workers, asyncio tasks, children, files."""

    descriptors: tuple[str, ...]
    threads: int
    tasks: int
    children: int
    files: int

    @classmethod
    def now(cls, *folders: Path) -> Held:
        """`files` are those below `folders`."""
        gc.collect()
        return cls(
            descriptors=_descriptors(),
            threads=sum(not each.name.startswith("AnyIO worker") for each in threading.enumerate()),
            tasks=len(asyncio.all_tasks()),
            children=len(_children()),
            files=sum(1 for folder in folders if folder.exists() for _ in folder.rglob("*")),
        )


async def settles(before: Held, *folders: Path) -> Held:
    """What is held now; waits a while for it to be `before` again, since upkeep and children come and go."""
    with anyio.move_on_after(WITHIN):
        while True:
            if Held.now(*folders) == before:
                break
            await anyio.sleep(0.02)
    return Held.now(*folders)


def resident_bytes() -> int:
    """Of this process, without what `malloc` keeps for later."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors() -> tuple[str, ...]:
    """What each open descriptor is: the name of its file, or "socket", "pipe" and the like."""
    found: list[str] = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of the listing itself
            found.append(link.readlink().name.partition(":")[0])
    return tuple(sorted(found))


def _children() -> list[str]:
    found: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            found += (task / "children").read_text().split()
    return found
