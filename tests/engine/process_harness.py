"""Processes under shims as tests see them: what they say, which trees they grow, and who of them still lives."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from deadlines import WITHIN

from vespera_exec.engine import shim
from vespera_exec.engine.work import ProcessSpec

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from vespera_exec.engine.processes import ProcessLauncher, RunningProcess

TREES = Path(__file__).with_name("trees")
KINDS = [
    "deaf",
    "spinning",
    "new_session",
    "daemonized",
    "cleared_environment",
    "vanished",
    "respawner",
    "holds_stdout",
    "stopped",
    "traps_signals",
]
PATH = {"PATH": os.environ.get("PATH", os.defpath)}


class Heard:
    """What came out of a process."""

    def __init__(self) -> None:
        self.chunks: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self.reports: list[bytes] = []
        self._changed = anyio.Event()

    @property
    def stdout(self) -> bytes:
        return bytes(self.chunks["stdout"])

    @property
    def stderr(self) -> bytes:
        return bytes(self.chunks["stderr"])

    def output(self, stream: str, chunk: bytes) -> None:
        self.chunks[stream] += chunk
        self._change()

    def report(self, line: bytes) -> None:
        self.reports.append(line)
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, predicate: Callable[[], bool]) -> None:
        with anyio.fail_after(WITHIN):
            while not predicate():
                await self._changed.wait()


class Register:
    """The pids that a tree has written down, and their start times as soon as they are looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def processes(self) -> dict[int, int]:
        rows = {pid: shim.look(pid) for pid in map(int, self.path.read_text().splitlines())}
        return {pid: row[3] for pid, row in rows.items() if row is not None}

    def left(self, known: Mapping[int, int], execution_id: str) -> set[int]:
        """Who still lives: of `known`, of those written down since, and of those with the marker."""
        since = set(map(int, self.path.read_text().splitlines())) - set(known)
        found = {pid for pid, start in known.items() if lives(pid, start)}
        found |= {pid for pid in since if lives(pid, None)}
        return found | set(shim.marked([shim.MARKER + execution_id.encode()]))


def lives(pid: int, start: int | None) -> bool:
    row = shim.look(pid)
    return row is not None and row[4] not in "ZX" and start in (None, row[3])


def state_of(pid: int) -> str:
    row = shim.look(pid)
    return row[4] if row else ""


def sh(script: str, *args: str, heard: Heard | None = None, stdin: bytes = b"", grace: float = 3.0) -> ProcessSpec:
    return command(("sh", "-c", script, "sh", *args), heard, stdin=stdin, grace=grace)


def py(script: str, *args: str, heard: Heard | None = None, stdin: bytes = b"") -> ProcessSpec:
    return command((sys.executable, "-S", "-c", script, *args), heard, stdin=stdin)


def command(argv: tuple[str, ...], heard: Heard | None, *, stdin: bytes = b"", grace: float = 3.0) -> ProcessSpec:
    return ProcessSpec(
        argv=argv,
        cwd=Path("/"),
        env=PATH,
        stdin=stdin,
        on_output=heard.output if heard else None,
        on_report=heard.report if heard else None,
        grace_seconds=grace,
    )


def nasty(kind: str, register: Register, heard: Heard | None = None) -> ProcessSpec:
    """A tree that does not want to die."""
    return command((sys.executable, "-S", str(TREES / "nasty.py"), kind, str(register.path)), heard)


async def eventually(predicate: Callable[[], bool]) -> float:
    """Seconds until it was true."""
    began = time.monotonic()
    with anyio.fail_after(WITHIN):
        while not predicate():  # noqa: ASYNC110 - /proc has no events
            await anyio.sleep(0.005)
    return time.monotonic() - began


async def plant(launcher: ProcessLauncher, kind: str, register: Register) -> tuple[RunningProcess, dict[int, int]]:
    """The tree, standing, and who is in it."""
    heard = Heard()
    process = await launcher.launch(nasty(kind, register, heard))
    await heard.until(lambda: bool(heard.reports))
    if kind == "stopped":
        await eventually(lambda: state_of(process.pid) == "T")
    return process, register.processes()


@asynccontextmanager
async def holder(
    execution_id: str, kind: str, register: Register, *, adopts: bool
) -> AsyncGenerator[tuple[Any, Callable[[], Any]]]:
    """A daemon's stand-in whose tree stands; yields its process and what reads its next fact."""
    argv = [sys.executable, str(TREES / "holder.py"), execution_id, kind, str(register.path), "yes" if adopts else "no"]
    async with await anyio.open_process(argv, stderr=None) as process:
        assert process.stdout is not None
        stream = process.stdout
        buffer = b""

        async def fact() -> dict[str, Any]:
            nonlocal buffer
            with anyio.fail_after(WITHIN):
                while b"\n" not in buffer:
                    buffer += await stream.receive()
            line, _, buffer = buffer.partition(b"\n")
            return json.loads(line)

        try:
            yield process, fact
        finally:
            if process.returncode is None:
                process.kill()


def kill_at_once(*pids: int) -> None:
    """SIGKILL for all of them before any can do something about the death of another."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
