"""The stdio bridge in front of a daemon, against the SDK's own stdio server with the same tools, in one run.

    python benchmarks/bridge.py                 a stand-in daemon with one no-op tool
    python benchmarks/bridge.py --daemon real   the daemon itself, tool `list_roles`

Budgets (ratio to the SDK's stdio server): start to first `tools/list` <= 0.15 with a running daemon and <= 1.3
without one, call p50 <= 1.0, calls/s with 16 callers >= 2.5. The client is the same small raw one for both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

BRIDGE = "import sys; from vespera_exec.server import bridge; sys.exit(bridge.main(sys.argv[1:] or None))"


class Status(BaseModel):
    status: str
    progress: float


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


async def calls(session: Session, tool: str, count: int) -> dict[str, float]:
    for _ in range(50):
        await session.ask("tools/call", {"name": tool, "arguments": {}})
    times: list[float] = []
    for _ in range(count):
        before = time.perf_counter()
        await session.ask("tools/call", {"name": tool, "arguments": {}})
        times.append(time.perf_counter() - before)

    async def caller() -> None:
        for _ in range(count // 4):
            await session.ask("tools/call", {"name": tool, "arguments": {}})

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


async def compare(*, real: bool, repeats: int, count: int) -> None:
    own = [sys.executable, "-P", __file__]
    sdk = [*own, "--serve", "sdk"]
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        environ = dict(os.environ) | {"VESPERA_DATA_DIR": str(data_dir)}
        daemon = [] if real else [*own, "--serve", "daemon", "--data-dir", str(data_dir)]
        bridge = [sys.executable, "-P", "-c", BRIDGE, *daemon]
        tool = "list_roles" if real else "status"
        cold = await with_session(bridge, environ, nothing)
        pid = json.loads((data_dir / "owner.lock").read_text())["pid"]
        try:
            ours: list[dict[str, float]] = []
            floor: list[dict[str, float]] = []
            for _ in range(repeats):
                ours.append(await with_session(bridge, environ, lambda session: calls(session, tool, count)))
                floor.append(await with_session(sdk, environ, lambda session: calls(session, "status", count)))
            print(f"{'':28}{'ours':>10}{'SDK stdio':>12}{'ratio':>8}  budget")
            for name, budget in (
                ("start ms", "<= 0.15"),
                ("call p50 ms", "<= 1.0"),
                ("calls/s, 16 callers", ">= 2.5"),
                ("rss MB", ""),
            ):
                mine = statistics.median(row[name] for row in ours)
                theirs = statistics.median(row[name] for row in floor)
                print(f"{name:28}{mine:10.2f}{theirs:12.2f}{mine / theirs:8.2f}  {budget}")
            theirs = statistics.median(row["start ms"] for row in floor)
            mine = cold["start ms"]
            print(f"{'start ms, no daemon yet':28}{mine:10.2f}{theirs:12.2f}{mine / theirs:8.2f}  <= 1.3")
            print(f"{'rss MB of the daemon':28}{rss(pid):10.2f}")
        finally:
            os.kill(pid, signal.SIGTERM)


def serve_sdk() -> None:
    stand_in().run("stdio")


def serve_stand_in(data_dir: Path) -> None:
    import anyio

    from vespera_exec import paths
    from vespera_exec.server.connections import Connection, serve_connection, serve_mcp_socket
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
    async def status() -> Status:  # pyright: ignore[reportUnusedFunction]
        return Status(status="running", progress=40.0)

    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--daemon", choices=("stand-in", "real"), default="stand-in")
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
            asyncio.run(compare(real=chosen.daemon == "real", repeats=chosen.repeats, count=chosen.count))


if __name__ == "__main__":
    main()
