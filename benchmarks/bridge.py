"""The stdio bridge in front of a daemon, against the SDK's own stdio server with the same tools, in one run.

    python benchmarks/bridge.py                 a stand-in daemon with one no-op tool
    python benchmarks/bridge.py --daemon real   the daemon itself, asked for the status of a task that runs
    python benchmarks/bridge.py --daemon real --ask unknown     of one that it looks for in the database, in vain
    python benchmarks/bridge.py --daemon real --ask roles

Budgets (ratio to the SDK's stdio server): start to first `tools/list` <= 0.15 with a running daemon and <= 1.3
without one, call p50 <= 1.0, calls/s with 16 callers >= 2.5. The client is the same small raw one for both.
"""

from __future__ import annotations

import argparse
import asyncio
import compileall
import json
import os
import select
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

import vespera_exec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

BRIDGE = "import sys; from vespera_exec.server import bridge; sys.exit(bridge.main(sys.argv[1:] or None))"


class Status(BaseModel):
    status: str
    progress: float


@dataclass(frozen=True, slots=True)
class Call:
    tool: str
    arguments: dict[str, str]


RUNNING = Call("get_task_execution_status", {})
CALLS = {
    "running": RUNNING,
    "unknown": Call("get_task_execution_status", {"task_id": "0000-unknown"}),
    "roles": Call("list_roles", {}),
}


class Session:
    """One stdio server process and a client of it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next = 0

    @classmethod
    async def start(cls, command: Sequence[str], environ: dict[str, str]) -> Session:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=environ, limit=2**24
        )
        return cls(process)

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            message = json.loads(line)
            waiter = self._waiting.pop(message.get("id"), None)
            if waiter is not None:
                waiter.set_result(message)

    async def ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._next += 1
        waiter = self._waiting[self._next] = asyncio.get_running_loop().create_future()
        self.say({"jsonrpc": "2.0", "id": self._next, "method": method, "params": params})
        answer = await waiter
        if "error" in answer:
            raise RuntimeError(str(answer["error"]))
        return answer["result"]

    def say(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def open(self) -> None:
        hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "bench", "version": "0"}}
        await self.ask("initialize", hello)
        self.say({"jsonrpc": "2.0", "method": "notifications/initialized"})
        await self.ask("tools/list", {})

    async def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.process.wait()


async def with_session(
    command: Sequence[str], environ: dict[str, str], use: Callable[[Session], Awaitable[dict[str, float]]]
) -> dict[str, float]:
    started = time.perf_counter()
    session = await Session.start(command, environ)
    async with asyncio.TaskGroup() as group:
        group.create_task(session.read())
        await session.open()
        figures = {"start ms": (time.perf_counter() - started) * 1000}
        figures |= await use(session)
        await session.close()
    return figures


async def started(session: Session) -> dict[str, str]:
    work = {"title": "nap", "role": "command", "inputs": {"argv": ["sleep", "600"]}}
    answer = await session.ask("tools/call", {"name": "execute_task", "arguments": work})
    return {"task_id": answer["structuredContent"]["task_id"]}


async def calls(session: Session, call: Call, count: int) -> dict[str, float]:
    params = {"name": call.tool, "arguments": await started(session) if call is RUNNING else call.arguments}
    for _ in range(50):
        await session.ask("tools/call", params)
    times: list[float] = []
    for _ in range(count):
        before = time.perf_counter()
        await session.ask("tools/call", params)
        times.append(time.perf_counter() - before)

    async def caller() -> None:
        for _ in range(count // 4):
            await session.ask("tools/call", params)

    before = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(caller())
    elapsed = time.perf_counter() - before
    return {
        "call p50 ms": statistics.median(times) * 1000,
        "calls/s, 16 callers": 16 * (count // 4) / elapsed,
        "rss MB": rss(session.process.pid),
    }


async def nothing(_: Session) -> dict[str, float]:
    return {}


def rss(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


async def compare(*, real: bool, call: Call, repeats: int, count: int) -> None:
    own = [sys.executable, "-P", __file__]
    sdk = [*own, "--serve", "sdk"]
    compile_own_modules()
    floor_call = Call("status", {} if call.tool == "list_roles" else {"task_id": "0000-unknown"})
    ours: list[dict[str, float]] = []
    floor: list[dict[str, float]] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            data_dir = Path(folder) / "data"
            environ = dict(os.environ) | {"VESPERA_DATA_DIR": str(data_dir), "VESPERA_RUNTIME_DIR": folder}
            daemon = [] if real else [*own, "--serve", "daemon", "--data-dir", str(data_dir)]
            bridge = [sys.executable, "-P", "-c", BRIDGE, *daemon]
            cold = await with_session(bridge, environ, nothing)
            pid = json.loads((data_dir / "owner.lock").read_text())["pid"]
            try:
                figures = await with_session(bridge, environ, lambda session: calls(session, call, count))
                floor.append(await with_session(sdk, environ, lambda session: calls(session, floor_call, count)))
                ours.append(figures | {"start ms, no daemon yet": cold["start ms"], "rss MB of the daemon": rss(pid)})
                floor[-1]["start ms, no daemon yet"] = floor[-1]["start ms"]
            finally:
                daemon_process = os.pidfd_open(pid)
                os.kill(pid, signal.SIGTERM)
                select.select([daemon_process], [], [], 10)
                os.close(daemon_process)
    print(f"{call.tool:28}{'ours':>10}{'SDK stdio':>12}{'ratio':>8}  budget")
    for name, budget in (
        ("start ms", "<= 0.15"),
        ("start ms, no daemon yet", "<= 1.3"),
        ("call p50 ms", "<= 1.0"),
        ("calls/s, 16 callers", ">= 2.5"),
        ("rss MB", ""),
    ):
        mine = statistics.median(row[name] for row in ours)
        theirs = statistics.median(row[name] for row in floor)
        print(f"{name:28}{mine:10.2f}{theirs:12.2f}{mine / theirs:8.2f}  {budget}")
    print(f"{'rss MB of the daemon':28}{statistics.median(row['rss MB of the daemon'] for row in ours):10.2f}")


def compile_own_modules() -> None:
    """As an installer does, and as the SDK is here: else each start would compile what was edited since the last."""
    root = Path(vespera_exec.__file__).parent.parent
    for package in ("vespera_exec", "roles"):
        compileall.compile_dir(root / package, quiet=2)


def serve_sdk() -> None:
    stand_in().run("stdio")


def serve_stand_in(data_dir: Path) -> None:
    import anyio

    from vespera_exec import paths
    from vespera_exec.server.connections import Connection, serve_mcp_socket
    from vespera_exec.server.conversation import serve_connection
    from vespera_exec.store.lock import OwnerLock

    server = stand_in()._lowlevel_server  # pyright: ignore[reportPrivateUsage]

    async def handle(connection: Connection) -> None:
        await serve_connection(server, connection)

    async def serve() -> None:
        path, _ = paths.socket_paths(data_dir, os.environ)
        async with serve_mcp_socket(path, handle):
            with anyio.open_signal_receiver(signal.SIGTERM) as signals:
                async for _ in signals:
                    return

    with OwnerLock.acquire(data_dir, purpose="daemon", wait_seconds=5):
        anyio.run(serve)


def stand_in() -> Any:
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("stand-in")

    @server.tool()
    async def status(task_id: str = "") -> Status:  # pyright: ignore[reportUnusedFunction]
        return Status(status="running", progress=40.0)

    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--daemon", choices=("stand-in", "real"), default="stand-in")
    parser.add_argument("--ask", choices=sorted(CALLS), default="running", help="with --daemon real")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--serve", choices=("sdk", "daemon"), help=argparse.SUPPRESS)
    parser.add_argument("--data-dir", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    match chosen.serve:
        case "sdk":
            serve_sdk()
        case "daemon":
            serve_stand_in(chosen.data_dir)
        case _:
            real = chosen.daemon == "real"
            call = CALLS[chosen.ask] if real else Call("status", {})
            asyncio.run(compare(real=real, call=call, repeats=chosen.repeats, count=chosen.count))


if __name__ == "__main__":
    main()
