"""A data directory with the real daemon, the ways to reach it, and work whose processes can be told."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
from deadlines import WITHIN
from echo_place import HELLO, Client, eventually

from vespera_exec import paths
from vespera_exec.server.launch import accepts

if TYPE_CHECKING:
    from collections.abc import Sequence

# What is promised is less, of a machine that has time for it; without what keeps the promise it takes for ever.
STOPS_WITHIN = 15.0
"""Seconds in which a daemon that is told to go is gone, with its work; promised are 5."""
GONE_WITHIN = 10.0
"""Seconds in which the processes of a dead owner are gone; promised is 1."""

BRIDGE = [sys.executable, "-P", "-c", "import sys; from vespera_exec.cli.entry import main; sys.exit(main())"]

# One child in our group and one in a session of its own; the pids of all three are told, then it waits for a file.
_WORK = """
sleep 300 & one=$!
setsid sleep 300 & two=$!
echo $$ $one $two > "$0.draft"; mv "$0.draft" "$0.pids"
until [ -e "$0.go" ]; do sleep 0.02; done
kill $one $two
"""


@dataclass
class Work:
    """A command that runs until `let_go`, with children that would outlive it."""

    stem: Path

    @property
    def argv(self) -> list[str]:
        return ["/bin/sh", "-c", _WORK, str(self.stem)]

    def pids(self) -> list[int]:
        """Of the work and its children, as soon as all are there."""
        told = self.stem.with_name(f"{self.stem.name}.pids")
        assert eventually(told.exists)
        pids = [int(pid) for pid in told.read_text().split()]
        assert all(is_alive(pid) for pid in pids)
        return pids

    def let_go(self) -> None:
        self.stem.with_name(f"{self.stem.name}.go").touch()


@dataclass
class Place:
    """Ends every daemon that served here when it is left."""

    folder: Path
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    started: list[subprocess.Popen[str]] = field(default_factory=list[subprocess.Popen[str]])

    def __post_init__(self) -> None:
        self.data_dir = self.folder / "data"
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="vx-", dir="/tmp"))
        self.environ |= {
            "VESPERA_DATA_DIR": str(self.data_dir),
            "VESPERA_RUNTIME_DIR": str(self.runtime_dir),
            "VESPERA_ROLES_DIR": str(self.folder / "roles-dir"),
            "HOME": str(self.folder),
        }

    def set(self, **settings: object) -> None:
        self.environ |= {f"VESPERA_{name.upper()}": str(value) for name, value in settings.items()}

    def client(self, argv: Sequence[str] = BRIDGE, *, cwd: Path | None = None, greet: bool = True) -> Client:
        """A client of the bridge (or of `argv`) that has shaken hands."""
        client = Client(argv, self.environ, cwd=cwd or self.folder)
        if greet:
            client.send(HELLO)
            assert client.read()["id"] == 0
            client.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return client

    def http(self) -> httpx.Client:
        """A client of http.sock."""
        _, path = paths.socket_paths(self.data_dir, self.environ)
        transport = httpx.HTTPTransport(uds=str(path))
        return httpx.Client(transport=transport, base_url="http://vespera", timeout=WITHIN)

    def ask(self, path: str, **query: str | int) -> Any:
        with self.http() as http:
            answer = http.get(path, params=query)
            assert answer.status_code == 200, answer.text
            return answer.json()

    def start(self) -> subprocess.Popen[str]:
        """A daemon as our own child, ready."""
        daemon = self.spawn()
        mcp_sock, _ = paths.socket_paths(self.data_dir, self.environ)
        assert eventually(lambda: accepts(mcp_sock) or daemon.poll() is not None)
        assert daemon.poll() is None, daemon.communicate()
        return daemon

    def spawn(self, argv: Sequence[str] = ()) -> subprocess.Popen[str]:
        """A daemon as our own child, or what is named."""
        argv = argv or [sys.executable, "-P", "-m", "vespera_exec.server.daemon", "--data-dir", str(self.data_dir)]
        daemon = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=self.environ, cwd=self.folder)
        self.started.append(daemon)
        return daemon

    def log(self) -> list[dict[str, Any]]:
        """The log of the daemons that bridges started."""
        try:
            lines = (self.data_dir / paths.DAEMON_LOG).read_text().splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [json.loads(line) for line in lines if line.startswith("{")]

    def served_by(self) -> list[int]:
        """The pids of the daemons that bridges started and that got ready, in order."""
        return [line["pid"] for line in self.log() if line["event"] == "ready"]

    def work(self, name: str = "work") -> Work:
        return Work(self.folder / name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self.started:
            daemon.kill()
            daemon.communicate()
        for pid in {*self.served_by(), *self._owner()}:
            end(pid)
        shutil.rmtree(self.runtime_dir, ignore_errors=True)

    def _owner(self) -> list[int]:
        with suppress(OSError, ValueError, KeyError):
            owner = json.loads((self.data_dir / paths.LOCK).read_text())
            return [owner["pid"]] if owner["purpose"] == "daemon" else []
        return []


def call(client: Client, tool: str, /, **arguments: Any) -> dict[str, Any]:
    """What the tool answered; fails on an error."""
    result = client.call("tools/call", name=tool, arguments=arguments)
    assert not result.get("isError"), result
    return result["structuredContent"]


def run(client: Client, work: Work, *, title: str = "work") -> dict[str, Any]:
    """The handle of an execution of `work` by the role `command`."""
    return call(client, "execute_task", title=title, role="command", inputs={"argv": work.argv})


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def ends(pid: int, *, within: float) -> bool:
    """Whether the process is over before the deadline."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], within)[0])
    finally:
        os.close(process)


def end(pid: int) -> None:
    """SIGKILL, if it still is a daemon of ours."""
    with suppress(OSError):
        process = os.pidfd_open(pid)
        try:
            if b"vespera_exec.server.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes():
                signal.pidfd_send_signal(process, signal.SIGKILL)
                select.select([process], [], [], WITHIN)
        finally:
            os.close(process)
