"""A worker: an MCP client that takes tasks of a role with `runner: external`, does them, and hands them back.

    python examples/worker.py --role review

The server it starts needs `VESPERA_TOOLSETS=core,worker`. In place of `work`, put what your agent does.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import anyio
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

SERVER = [sys.executable, "-P", "-c", "from vespera_exec.cli.entry import main; raise SystemExit(main())"]


class Stopped(Exception):
    """The task is to be cancelled, or is not ours any more."""


class Worker:
    def __init__(self, client: Client) -> None:
        self._client = client

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        answer = await self._client.call_tool(tool, arguments)
        told: dict[str, Any] = answer.structured_content or {}
        if answer.is_error and told.get("error_code") == "LEASE_LOST":
            raise Stopped(told["error"])
        if answer.is_error:
            raise RuntimeError(told)
        return told

    async def do(self, task: dict[str, Any]) -> None:
        """One task, from the claim to its end."""
        held = {"session_id": task["session_id"], "lease": task["lease"]}
        try:
            result = await self.work(task, held)
        except Stopped as stopped:
            print(f"{task['title']}: {stopped}", file=sys.stderr)
        else:
            await self.call("complete_task_execution", **held, result=result)

    async def work(self, task: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
        """Ten pieces, from where the last worker left off."""
        first = (task.get("checkpoint") or {"done": 0})["done"]
        for done in range(first + 1, 11):
            await anyio.sleep(0.05)
            said = {"done": done, "total": 10, "unit": "pieces", "checkpoint": {"done": done}}
            await self.report(held, **said)
        return {**task["inputs"], "pieces": 10}

    async def report(self, held: dict[str, Any], **said: Any) -> None:
        """Say how far it is; stands still while it is paused."""
        answer = await self.call("report_task_progress", **held, **said)
        while answer.get("pause"):
            await anyio.sleep(1)
            answer = await self.call("report_task_progress", **held, state="paused")
        if answer.get("cancel"):
            await self.call("complete_task_execution", **held, success=False, error="stopped")
            raise Stopped("cancelled")


async def main(role: str, tasks: int) -> None:
    server = StdioServerParameters(command=SERVER[0], args=SERVER[1:], env=dict(os.environ))
    async with Client(stdio_client(server)) as client:
        worker = Worker(client)
        while tasks:
            task = await worker.call("claim_task", roles=[role], worker="example", wait_ms=20_000)
            if task["claimed"]:
                await worker.do(task)
                tasks -= 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--role", default="review")
    parser.add_argument("--tasks", type=int, default=-1, help="how many to do; all that come, when left out")
    given = parser.parse_args()
    anyio.run(main, given.role, given.tasks)
