"""The MCP door against the bare SDK: one status call in memory, what the door costs to import, the idle daemon.

    python benchmarks/mcp_calls.py [--calls 2000]

Budgets: status tool <= 1.2x a bare SDK tool with an answer of the same size; RSS of the idle daemon <= 90 MB.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio
import psutil
from mcp import Client
from mcp.server.mcpserver import MCPServer
from pydantic import BaseModel

from roles.definition import Role
from vespera_exec import paths
from vespera_exec.app.callers import current_caller
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute, Status
from vespera_exec.model.principal import Caller
from vespera_exec.server.mcp.server import build_mcp_server
from vespera_exec.settings import Settings

ME = Caller(cwd="/")
MODES = {"2026-07-28": "auto", "2025-11-25": "legacy"}


class Tiny(BaseModel):
    status: str
    progress: float


def bare_server(answer: Status) -> MCPServer[Any]:
    """Tools made as the SDK's own examples make them: one returns our whole answer, one two fields."""
    server: MCPServer[Any] = MCPServer("bare", log_level="WARNING")

    async def status(task_id: str, detail: bool = False) -> Status:
        return answer

    async def tiny(task_id: str) -> Tiny:
        return Tiny(status="running", progress=40)

    server.add_tool(status, name="status")
    server.add_tool(tiny, name="tiny")
    return server


async def calls(count: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="vespera-bench-"))
    settings = Settings.load({"HOME": str(folder)}, data_dir=folder / "data", roles_dir=folder / "roles")
    current_caller.set(ME)
    async with Vespera.open(settings=settings) as vespera:
        gate = anyio.Event()

        async def hold(context: Any) -> None:
            context.progress(40, "half way")
            await gate.wait()

        async def brief(context: Any) -> None:
            context.progress(40, "half way")

        for name, work in (("hold", hold), ("brief", brief)):
            vespera.roles.add(Role.from_callable(work, name=name, in_loop=True, inputs=None, grace_seconds=0.1))
        ended = await vespera.execute_task(ME, Execute(title="Ended", role="brief", wait_ms=10_000))
        running = await vespera.execute_task(ME, Execute(title="Running", role="hold", wait_ms=300))
        ours = build_mcp_server(vespera)
        bare = bare_server(await vespera.get_status(ME, running.task_id))
        for version, mode in MODES.items():
            async with Client(bare, mode=mode) as bare_client, Client(ours, mode=mode) as our_client:
                cases = {
                    "bare": (bare_client, "status", running.task_id),
                    "tiny": (bare_client, "tiny", running.task_id),
                    "running": (our_client, "get_task_execution_status", running.task_id),
                    "ended": (our_client, "get_task_execution_status", ended.task_id),
                }
                taken = await interleaved(cases, count)
            floor = taken["bare"]
            for name in ("running", "ended"):
                print(
                    f"{version} status of a task that is {name}: {taken[name] * 1e6:.0f} us, "
                    f"bare SDK tool {floor * 1e6:.0f} us, ratio {taken[name] / floor:.2f} (budget 1.2); "
                    f"with two fields {taken['tiny'] * 1e6:.0f} us"
                )
        gate.set()


async def interleaved(cases: dict[str, tuple[Client, str, str]], count: int) -> dict[str, float]:
    """Medians in seconds; in turns, so that the machine's moods meet all."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(count + 100):
        for name, (client, tool, task_id) in cases.items():
            began = time.perf_counter()
            result = await client.call_tool(tool, {"task_id": task_id})
            taken = time.perf_counter() - began
            assert not result.is_error
            if number >= 100:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def imports() -> None:
    taken: dict[str, float] = {}
    for name, statement in {
        "pass": "pass",
        "mcp": "import mcp.server.mcpserver",
        "daemon": "import vespera_exec.server.daemon",
    }.items():
        runs: list[float] = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            runs.append(time.perf_counter() - began)
        taken[name] = statistics.median(runs)
    print(
        f"import of the daemon {taken['daemon'] * 1e3:.0f} ms, of the SDK's server alone {taken['mcp'] * 1e3:.0f} ms, "
        f"python {taken['pass'] * 1e3:.0f} ms; ratio {taken['daemon'] / taken['mcp']:.2f}"
    )


def idle_daemon() -> None:
    with tempfile.TemporaryDirectory(prefix="vx-") as folder:
        data_dir = Path(folder) / "data"
        environ = {**os.environ, "VESPERA_RUNTIME_DIR": folder, "HOME": folder, "VESPERA_LOG_LEVEL": "error"}
        _, http_path = paths.socket_paths(data_dir, environ)
        began = time.perf_counter()
        daemon = subprocess.Popen(
            [sys.executable, "-P", "-m", "vespera_exec.server.daemon", "--data-dir", str(data_dir)], env=environ
        )
        try:
            while not http_path.exists():
                if daemon.poll() is not None or time.perf_counter() - began > 30:
                    raise SystemExit("the daemon did not start")
                time.sleep(0.005)
            ready = time.perf_counter() - began
            time.sleep(1)
            rss = psutil.Process(daemon.pid).memory_info().rss / 2**20
            print(f"idle daemon: ready after {ready * 1e3:.0f} ms, RSS {rss:.0f} MB (budget 90)")
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    arguments = parser.parse_args()
    anyio.run(calls, arguments.calls)
    imports()
    idle_daemon()


if __name__ == "__main__":
    main()
