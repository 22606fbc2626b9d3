"""`vespera-exec demo`: a real MCP client against the real server, in a data directory of its own."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

import anyio
from mcp import Client, MCPError, StdioServerParameters, stdio_client

from vespera_exec.cli import config, output, owner
from vespera_exec.cli.output import colour
from vespera_exec.cli.state import Shown, ending
from vespera_exec.cli.text import duration, shown, size, table
from vespera_exec.errors import VesperaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.cli.render import Footer
    from vespera_exec.model.events import Json

_SHOWN_CHARACTERS = 420
_POLL_MS = 250
_STATUS_SECONDS = 0.5
_PROCESS_SECONDS = 10.0
_MOST_FILES = 20_000
_LONG_COMMAND = ["sh", "-c", "sleep 300 & sleep 300"]
_WORK_SECONDS = 3.0
_WORK = """
import hashlib, json, os, sys, time
report = open(int(os.environ["VESPERA_PROGRESS_FD"]), "w", buffering=1)
chunk, total, seconds, hashed = os.urandom(1 << 20), 30, float(sys.argv[1]), 0
for done in range(1, total + 1):
    until = time.monotonic() + seconds / total
    while time.monotonic() < until:
        hashlib.sha256(chunk).digest()
        hashed += 1
    report.write(json.dumps({"done": done, "total": total, "message": f"{hashed} MiB hashed"}) + "\\n")
print(f"{hashed} MiB hashed")
"""
"""Real work that reports how far it is, long enough for an ETA and for measures of its use."""
_PROMISED = (
    "get_task_execution_status",
    "stream_task_execution_events",
    "cancel_task_execution",
    "get_task_performance_metrics",
)
# What of our environment the server is started with, beside what every MCP client passes on.
_ENV_PREFIXES = ("VESPERA_", "COVERAGE_")


class DemoFailed(Exception):
    """The argument says what did not happen."""


def show(folder: Path) -> int:
    """Runs the demo over `folder`; 0 when everything held, 1 when something failed, which it says."""
    place = Path(tempfile.mkdtemp(prefix="vespera-demo-"))
    screen = _Screen()
    demo = _Demo(folder, place / "data", screen)
    problem = ""
    try:
        anyio.run(demo.run)
    except (DemoFailed, MCPError, OSError, VesperaError, ExceptionGroup) as fault:
        problem = _reason(cast("Exception", fault))
    finally:
        screen.close()
        try:
            owner.stop(place / "data", now=True)
            shutil.rmtree(place, ignore_errors=True)
        except VesperaError as fault:
            problem = problem or fault.message
    return _summary(screen, demo.done, problem)


@dataclass(slots=True)
class _Screen:
    """Text to stdout, with a moving line below it where that is a terminal."""

    footer: Footer | None = None
    _last: float = -1

    def __post_init__(self) -> None:
        if output.is_display(sys.stdout):
            from vespera_exec.cli.render import Footer

            self.footer = Footer(sys.stdout)

    def say(self, text: str = "") -> None:
        if self.footer is not None:
            self.footer.output(sys.stdout, text + "\n")
        else:
            output.line(text)
            sys.stdout.flush()

    def heading(self, text: str) -> None:
        self.say()
        self.say(colour(text, "bold"))

    def progress(self, state: Shown) -> None:
        """The bar; without a terminal a line per 10 % of the work."""
        if self.footer is not None:
            self.footer.update(state)
            return
        # The executor shows the work's own progress as 30 to 90 %.
        if state.phase != "execution" or state.percentage is None or state.percentage < 30:
            return
        if (step := state.percentage // 10) != self._last:
            self._last = step
            self.say(f"    {_measures(state)}")

    def ended(self, state: Shown) -> None:
        """The bar as it stands, to stay."""
        if self.footer is not None:
            self.say(self.footer.render(state))

    def close(self) -> None:
        if self.footer is not None:
            self.footer.close()


@dataclass(slots=True)
class _Demo:
    folder: Path
    data_dir: Path
    screen: _Screen
    done: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    _began: float = field(default_factory=time.monotonic)

    async def run(self) -> None:
        command, *before = config.executable()
        entry: Mapping[str, Json] = config.EXAMPLE["mcpServers"][config.NAME]
        if shutil.which(str(entry["command"])):
            command, before = str(entry["command"]), []
        server = StdioServerParameters(command=command, args=[*before, *entry["args"]], env=self._environment())
        self.screen.say(colour("vespera-exec demo", "bold"))
        self.screen.say(f"Starting the server as an MCP client does: {command} (stdio)")
        # Failures are kept until the connection is closed: a task group would wrap them.
        failed: DemoFailed | None = None
        async with Client(stdio_client(server)) as client:
            try:
                await self._with(client)
            except DemoFailed as fault:
                failed = fault
        if failed is not None:
            raise failed

    async def _with(self, client: Client) -> None:
        tools = [tool.name for tool in (await client.list_tools()).tools]
        named = f"{client.server_info.name} {client.server_info.version}" if client.server_info else "the server"
        self.screen.say(f"Connected to {shown(named, 80)}, protocol {client.protocol_version}, {len(tools)} tools:")
        for line in _wrapped(tools, 100):
            self.screen.say(f"  {line}")
        if missing := [name for name in _PROMISED if name not in tools]:
            raise DemoFailed(f"the server lacks the tools {', '.join(missing)}")
        self._held("server started, tools listed")
        surveyed = await self._survey(client)
        await self._watch(client)
        await self._read(client, surveyed)
        await self._cancel(client)

    async def _survey(self, client: Client) -> dict[str, Json]:
        self.screen.heading(f"1. Survey {shown(self.folder, 100)}")
        asked: dict[str, Json] = {
            "title": f"Survey {self.folder.name or self.folder}"[:200],
            "role": "survey",
            "inputs": {"path": str(self.folder), "max_files": _MOST_FILES},
        }
        handle = await self._executed(client, asked)
        self._held("survey executed, watched live")
        return handle

    async def _watch(self, client: Client) -> None:
        self.screen.heading("2. Watch work that takes a moment: progress, ETA, use of the machine")
        asked: dict[str, Json] = {
            "title": "Hash for three seconds",
            "role": "command",
            "inputs": {"argv": [sys.executable, "-c", _WORK, str(_WORK_SECONDS)]},
        }
        await self._executed(client, asked)
        self._held("command executed, with its ETA and its use of the machine")

    async def _executed(self, client: Client, asked: dict[str, Json]) -> dict[str, Json]:
        """The handle, once the task has been executed before our eyes."""
        handle = await self._call(client, "execute_task", asked, show=True)
        state = await self._follow(client, handle)
        self.screen.ended(state)
        self.screen.say(f"  {ending(state)}; peak use: {_peaks(state)}")
        if state.status != "completed":
            raise DemoFailed(f"{asked['title']}: {ending(state)}")
        return handle

    async def _read(self, client: Client, handle: Mapping[str, Json]) -> None:
        self.screen.heading("3. What an agent sees")
        task = {"task_id": handle["task_id"]}
        page: dict[str, Json] = {**task, "cursor": handle["cursor"], "max_events": 2}
        await self._call(client, "stream_task_execution_events", page, show=True)
        await self._call(client, "get_task_execution_status", task, show=True)
        await self._call(client, "get_task_performance_metrics", task, show=True)
        found = await self._call(client, "get_task_result", {**task, "output_limit": 0}, show=True)
        self._held("status, events, metrics and result read")
        self.screen.say()
        for line in _survey_lines(found.get("result")):
            self.screen.say(f"  {line}")

    async def _cancel(self, client: Client) -> None:
        self.screen.heading("4. Cancel means gone")
        asked: dict[str, Json] = {
            "title": "A command that would take five minutes",
            "role": "command",
            "inputs": {"argv": _LONG_COMMAND},
        }
        handle = await self._call(client, "execute_task", asked, show=True)
        alive = await self._processes(str(handle["session_id"]))
        for process in alive:
            self.screen.say(f"  alive: {process.pid:>7}  {shown(process.command, 60)}")
        body: dict[str, Json] = {"task_id": handle["task_id"], "reason": "the demo ends it", "wait_ms": 10_000}
        began = time.monotonic()
        answer = await self._call(client, "cancel_task_execution", body, show=True)
        took = time.monotonic() - began
        if answer.get("status") != "cancelled":
            raise DemoFailed(f"the command is {answer.get('status')} after {duration(took)}, not cancelled")
        left = [process for process in alive if process.is_alive] + _marked(str(handle["session_id"]))
        for process in alive:
            self.screen.say(f"  {'ALIVE' if process.is_alive else 'gone: '} {process.pid:>7}")
        if left:
            raise DemoFailed(f"processes survived the cancel: {', '.join(str(each.pid) for each in left)}")
        self._held(f"command cancelled, {len(alive)} processes gone after {duration(took)}")

    async def _follow(self, client: Client, handle: Mapping[str, Json]) -> Shown:
        task_id, cursor = str(handle["task_id"]), handle["cursor"]
        state = Shown(self.folder.name, sessions=[str(handle["session_id"])])
        next_status, first = 0.0, ""
        while True:
            wanted: dict[str, Json] = {"task_id": task_id, "cursor": cursor, "wait_ms": _POLL_MS, "max_events": 100}
            page = await self._call(client, "stream_task_execution_events", wanted)
            for event in page["events"]:
                before, first = state.phase, first or str(event["timestamp"])
                state.take_event(event)
                if state.phase and state.phase != before:
                    self.screen.say(
                        f"  {_since(first, str(event['timestamp'])):>8}  {state.phase:<16}{shown(event['message'], 60)}"
                    )
                self.screen.progress(state)
            cursor = page["next_cursor"]
            if page["done"]:
                return state
            if time.monotonic() >= next_status:
                next_status = time.monotonic() + _STATUS_SECONDS
                asked: dict[str, Json] = {"task_id": task_id, "detail": True}
                state.take_measures(await self._call(client, "get_task_execution_status", asked))
            self.screen.progress(state)

    async def _processes(self, session_id: str) -> list[_Process]:
        """The processes of the command, once all of them run."""
        if _ticks(os.getpid()) is None:
            self.screen.say("  (no /proc here: its processes cannot be shown)")
            return []
        with anyio.move_on_after(_PROCESS_SECONDS):
            while True:
                found = _marked(session_id)
                if sum(process.command.startswith("sleep") for process in found) >= 2:
                    return found
                await anyio.sleep(0.02)
        raise DemoFailed(f"the command has not started its processes within {duration(_PROCESS_SECONDS)}")

    async def _call(
        self, client: Client, tool: str, arguments: dict[str, Json], *, show: bool = False
    ) -> dict[str, Json]:
        answer = await client.call_tool(tool, arguments)
        if show:
            self.screen.say(f"{colour('→', 'cyan')} {tool} {_short(arguments)}")
        if answer.is_error:
            said = " ".join(getattr(part, "text", "") for part in answer.content)
            raise DemoFailed(f"{tool}: {said}")
        content = answer.structured_content
        if not isinstance(content, dict):
            raise DemoFailed(f"{tool} gave no structured content")
        if show:
            self.screen.say(f"{colour('←', 'green')} {_short(content)}")
        return cast("dict[str, Json]", content)

    def _held(self, what: str) -> None:
        now = time.monotonic()
        self.done.append((what, now - self._began))
        self._began = now

    def _environment(self) -> dict[str, str]:
        passed = {name: value for name, value in os.environ.items() if name.startswith(_ENV_PREFIXES)}
        return passed | {"VESPERA_DATA_DIR": str(self.data_dir)}


@dataclass(frozen=True, slots=True)
class _Process:
    """A process that was seen; `ticks` is its start, so that a later one with its pid is not taken for it."""

    pid: int
    ticks: str
    command: str

    @property
    def is_alive(self) -> bool:
        return _ticks(self.pid) == self.ticks


def _marked(session_id: str) -> list[_Process]:
    """Every living process that carries the session's marker in its environment."""
    marker = f"VESPERA_EXECUTION_ID={session_id}".encode()
    found: list[_Process] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if marker not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        except OSError:
            continue  # another user's, or gone meanwhile
        ticks = _ticks(int(entry.name))
        if ticks is not None:
            found.append(_Process(int(entry.name), ticks, command))
    return sorted(found, key=lambda process: process.pid)


def _ticks(pid: int) -> str | None:
    """When the process started, in clock ticks; None when there is none, or only its exit status is left."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _short(value: Json) -> str:
    """Compact JSON as it goes over the wire; a longer one says how long it is."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if len(text) <= _SHOWN_CHARACTERS:
        return shown(text, 4 * _SHOWN_CHARACTERS)
    return f"{shown(text[:_SHOWN_CHARACTERS], 4 * _SHOWN_CHARACTERS)}… ({len(text)} characters in all)"


def _survey_lines(result: Json) -> list[str]:
    if not isinstance(result, dict):
        raise DemoFailed("the survey returned nothing")
    found = cast("dict[str, Json]", result)
    counted = f"{found['files']} files in {found['folders']} folders, {found['lines']} lines, {size(found['bytes'])}"
    lines = [counted + (f" (stopped counting after {_MOST_FILES} files)" if found["truncated"] else "")]
    languages: Sequence[Mapping[str, Json]] = found["languages"][:6]
    rows = [
        (shown(each["language"], 30), str(each["files"]), str(each["lines"]), size(each["bytes"])) for each in languages
    ]
    if rows:
        lines += table(("LANGUAGE", "FILES", "LINES", "SIZE"), rows)
    wasted = found["duplicates"]
    lines.append(f"duplicates: {wasted['groups']} groups, {size(wasted['wasted_bytes'])} could be saved")
    return lines


def _peaks(state: Shown) -> str:
    peaks: Mapping[str, float] = state.outcome.get("peaks") or {}
    parts: list[str] = []
    if "cpu_usage" in peaks:
        parts.append(f"cpu {peaks['cpu_usage']:.0f} %")
    if "memory_rss" in peaks:
        parts.append(f"{peaks['memory_rss']:.0f} MB")
    return ", ".join(parts) or "not measured, it was too short"


def _measures(state: Shown) -> str:
    eta = f"ETA {state.eta}" if state.eta else ""
    return " · ".join(
        each for each in (f"{state.percentage:.0f} %", shown(state.message, 60), eta, state.usage) if each
    )


def _since(first: str, stamp: str) -> str:
    return f"+{(datetime.fromisoformat(stamp) - datetime.fromisoformat(first)).total_seconds():.2f} s"


def _wrapped(words: Sequence[str], width: int) -> list[str]:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += f"{', ' if lines[-1] else ''}{word}"
    return lines


def _reason(fault: Exception) -> str:
    """What went wrong first, inside whatever groups it."""
    while isinstance(fault, ExceptionGroup):
        fault = cast("ExceptionGroup[Exception]", fault).exceptions[0]
    return f"{fault}" if isinstance(fault, (DemoFailed, VesperaError)) else f"{type(fault).__name__}: {fault}"


def _summary(screen: _Screen, done: Sequence[tuple[str, float]], problem: str) -> int:
    screen.heading("Summary")
    for what, seconds in done:
        screen.say(f"  {colour('ok', 'green')}      {what} ({duration(seconds)})")
    if problem:
        screen.say(f"  {colour('FAILED', 'red')}  {shown(problem, 500)}")
        return 1
    screen.say("  Your own data was not touched. Next: vespera-exec mcp-config, or vespera-exec run -- COMMAND")
    return 0
