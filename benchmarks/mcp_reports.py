"""A worker's reports over MCP, durable, against a bare SDK tool that takes the same arguments and does nothing.

    python benchmarks/mcp_reports.py [--calls 60] [--rounds 5] [--way stdio|memory]

32 callers in one session each report on a claim of their own, one report a call, and 100 a call. Over stdio: our bridge
and the daemon behind it, against the SDK's own stdio server, by the same small client. In memory: the SDK's client in
the process of the server, for both; there the client's time is in both figures.

Budgets: single reports >= 0.75x the bare tool's calls/s; in batches of 100 >= 30x the reports/s of singles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import psutil
from pydantic import BaseModel

if TYPE_CHECKING:
    from mcp import Client
    from mcp.server.mcpserver import MCPServer

CALLERS = 32
BATCH = 100
BRIDGE = "from vespera_exec.cli.entry import main; raise SystemExit(main())"
ROLE = "name: review\nrunner: external\n"

Call = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""One call of a tool: its structured answer."""
Cpu = Callable[[], float]
"""The seconds of CPU that the server has used."""


class Answer(BaseModel):
    ok: bool
    cancel: bool = False
    pause: bool = False
    reason: str = ""
    parked: bool = False
    lease_seconds: float = 60.0
    refused: list[str] = []


def bare_server() -> MCPServer[Any]:
    """A tool made as the SDK's own examples make them."""
    from mcp.server.mcpserver import MCPServer

    server: MCPServer[Any] = MCPServer("bare", log_level="WARNING")

    async def report(
        session_id: str,
        lease: str,
        percentage: float | None = None,
        done: float | None = None,
        total: float | None = None,
        unit: str = "",
        phase: str = "",
        message: str = "",
        reset: bool = False,
        log: str | None = None,
        reports: list[dict[str, Any]] | None = None,
        state: str = "working",
    ) -> Answer:
        return Answer(ok=True)

    server.add_tool(report, name="report")
    return server


@dataclass
class Side:
    """One server, and what is called in it. `held` has the ids of each caller's claim."""

    tool: str
    call: Call
    cpu: Cpu
    held: list[dict[str, str]] = field(default_factory=lambda: [{"session_id": "s" * 36, "lease": "l" * 43}] * CALLERS)
    done: int = 0


@dataclass
class Figures:
    """Of one round. `seconds` of each call; `cpu_ms` of the server for each."""

    calls_per_second: float
    cpu_ms: float
    seconds: list[float]


async def measured(side: Side, calls: int, *, batch: int = 0) -> Figures:
    """So many calls by each caller, one after the other, all callers at once."""
    seconds: list[float] = []
    first = side.done
    side.done += calls * (batch or 1)

    async def caller(held: dict[str, str]) -> None:
        for number in range(calls):
            if batch:
                reports = [_said(first + number * batch + place) for place in range(batch)]
                arguments: dict[str, Any] = {**held, "reports": reports}
            else:
                arguments = {**held, **_said(first + number)}
            began = time.perf_counter()
            answer = await side.call(side.tool, arguments)
            seconds.append(time.perf_counter() - began)
            assert answer["ok"], answer

    before, began = side.cpu(), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for held in side.held:
            group.create_task(caller(held))
    elapsed = time.perf_counter() - began
    made = calls * len(side.held)
    return Figures(made / elapsed, (side.cpu() - before) / made * 1e3, seconds)


def _said(done: int) -> dict[str, Any]:
    return {"done": done, "total": 10_000_000, "unit": "pieces", "message": f"piece {done}"}


async def compared(way: str, bare: Side, ours: Side, *, calls: int, rounds: int) -> None:
    """Prints the medians of the rounds; the first warms up. In turns, so that the machine's moods meet all."""
    seen: dict[str, list[Figures]] = {"bare": [], "single": [], "batch": []}
    for number in range(rounds + 1):
        turn = {
            "bare": await measured(bare, calls),
            "single": await measured(ours, calls),
            "batch": await measured(ours, max(1, calls // 6), batch=BATCH),
        }
        if number:
            for name, figures in turn.items():
                seen[name].append(figures)
    rate = {name: statistics.median(each.calls_per_second for each in took) for name, took in seen.items()}
    cpu = {name: statistics.median(each.cpu_ms for each in took) for name, took in seen.items()}
    singles = statistics.median(
        mine.calls_per_second / floor.calls_per_second for mine, floor in zip(seen["single"], seen["bare"], strict=True)
    )
    batches = statistics.median(
        many.calls_per_second * BATCH / one.calls_per_second
        for many, one in zip(seen["batch"], seen["single"], strict=True)
    )
    print(
        f"{way}: single reports {rate['single']:.0f}/s, bare SDK tool {rate['bare']:.0f}/s, "
        f"ratio {singles:.2f} (budget >= 0.75); p50 and p99 {_percentiles(seen['single'])}, bare "
        f"{_percentiles(seen['bare'])} ms with {CALLERS} callers; "
        f"CPU a call {cpu['single']:.2f} and {cpu['bare']:.2f} ms"
    )
    print(
        f"{way}: in batches of {BATCH} {rate['batch'] * BATCH:.0f} reports/s, {batches:.1f}x of singles "
        f"(budget >= 30); p50 and p99 of a batch {_percentiles(seen['batch'])} ms, CPU {cpu['batch']:.2f} ms"
    )


def _percentiles(rounds: list[Figures]) -> str:
    seconds = [each for figures in rounds for each in figures.seconds]
    return f"{statistics.median(seconds) * 1e3:.1f}, {statistics.quantiles(seconds, n=100)[-1] * 1e3:.1f}"


async def claims(call: Call) -> list[dict[str, str]]:
    """A claim for each caller."""
    held: list[dict[str, str]] = []
    for number in range(CALLERS):
        await call("execute_task", {"title": f"Piece work {number}", "role": "review"})
        claim = await call("claim_task", {"wait_ms": 10_000})
        held.append({"session_id": claim["session_id"], "lease": claim["lease"]})
    return held


# over stdio


class Session:
    """One stdio server process and a client of it that does as little as it can."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = count(1)

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            message = orjson.loads(line)
            if (waiter := self._waiting.pop(message.get("id"), None)) is not None:
                waiter.set_result(message)

    async def ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        waiter = self._waiting[number] = asyncio.get_running_loop().create_future()
        self.say({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
        return (await waiter)["result"]

    async def call(self, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return (await self.ask("tools/call", {"name": tool, "arguments": arguments}))["structuredContent"]

    def say(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(orjson.dumps(message) + b"\n")


@asynccontextmanager
async def session(command: list[str], environ: dict[str, str]) -> AsyncGenerator[Session]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, env=environ, limit=2**24)
    opened = Session(process)
    async with asyncio.TaskGroup() as group:
        group.create_task(opened.read())
        hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "bench", "version": "0"}}
        await opened.ask("initialize", hello)
        opened.say({"jsonrpc": "2.0", "method": "notifications/initialized"})
        yield opened
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


def used_by(*pids: int) -> Cpu:
    processes = [psutil.Process(pid) for pid in pids]

    def seconds() -> float:
        return sum(times.user + times.system for times in (each.cpu_times() for each in processes))

    return seconds


async def over_stdio(calls: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="vx-") as name:
        folder = Path(name)
        (folder / "roles").mkdir()
        (folder / "roles" / "review.yaml").write_text(ROLE)
        environ = os.environ | {
            "HOME": name,
            "VESPERA_DATA_DIR": f"{name}/data",
            "VESPERA_RUNTIME_DIR": name,
            "VESPERA_ROLES_DIR": f"{name}/roles",
            "VESPERA_TOOLSETS": "core,worker",
            "VESPERA_LOG_LEVEL": "error",
        }
        bridge, sdk = [sys.executable, "-P", "-c", BRIDGE], [sys.executable, __file__, "--serve"]
        async with session(sdk, environ) as theirs, session(bridge, environ) as mine:
            daemon = json.loads((folder / "data" / "owner.lock").read_text())["pid"]
            try:
                bare = Side("report", theirs.call, used_by(theirs.process.pid))
                cpu = used_by(mine.process.pid, daemon)
                ours = Side("report_task_progress", mine.call, cpu, await claims(mine.call))
                await compared("stdio", bare, ours, calls=calls, rounds=rounds)
            finally:
                ended = os.pidfd_open(daemon)
                os.kill(daemon, signal.SIGTERM)
                select.select([ended], [], [], 10)
                os.close(ended)


# in memory


async def in_memory(calls: int, rounds: int) -> None:
    from mcp import Client

    from vespera_exec.app.callers import current_caller
    from vespera_exec.app.service import Vespera
    from vespera_exec.model.principal import Caller
    from vespera_exec.server.mcp.server import build_mcp_server
    from vespera_exec.settings import Settings

    current_caller.set(Caller(cwd="/"))
    with tempfile.TemporaryDirectory(prefix="vx-") as name:
        folder = Path(name)
        (folder / "roles").mkdir()
        (folder / "roles" / "review.yaml").write_text(ROLE)
        settings = Settings.load(
            {"HOME": name}, data_dir=folder / "data", roles_dir=folder / "roles", toolsets="core,worker"
        )
        async with (
            Vespera.open(settings=settings) as vespera,
            Client(bare_server()) as theirs,
            Client(build_mcp_server(vespera)) as mine,
        ):
            bare = Side("report", called(theirs), time.process_time)
            call = called(mine)
            ours = Side("report_task_progress", call, time.process_time, await claims(call))
            await compared("in memory", bare, ours, calls=calls, rounds=rounds)


def called(client: Client) -> Call:
    async def call(tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return (await client.call_tool(tool, arguments)).structured_content or {}

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=60, help="of each caller, in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=("stdio", "memory"), help="only this one")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        bare_server().run("stdio")
        return
    if chosen.way != "memory":
        asyncio.run(over_stdio(chosen.calls, chosen.rounds))
    if chosen.way != "stdio":
        asyncio.run(in_memory(chosen.calls, chosen.rounds))


if __name__ == "__main__":
    main()
