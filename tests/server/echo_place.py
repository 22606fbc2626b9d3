"""A data directory whose daemon is `echo_daemon.py`, and a client that speaks to it through the bridge."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deadlines import WITHIN

from vespera_exec import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BRIDGE = "import sys; from vespera_exec.server import bridge; sys.exit(bridge.main(sys.argv[1:] or None))"

HELLO = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}},
}


def eventually(holds: Callable[[], bool], *, within: float = WITHIN) -> bool:
    """Whether it holds before the deadline."""
    deadline = time.monotonic() + within
    never = select.poll()
    while not holds():
        if time.monotonic() > deadline:
            return False
        never.poll(5)
    return True


@dataclass
class Place:
    """Ends every daemon that was started here when it is left."""

    data_dir: Path
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def __post_init__(self) -> None:
        self.environ["VESPERA_DATA_DIR"] = str(self.data_dir)

    @property
    def command(self) -> list[str]:
        script = str(Path(__file__).with_name("echo_daemon.py"))
        return [sys.executable, "-P", script, "--data-dir", str(self.data_dir)]

    @property
    def socket_path(self) -> Path:
        return paths.socket_paths(self.data_dir, self.environ)[0]

    def starts(self) -> list[int]:
        return self._pids("starts")

    def spawned(self) -> list[int]:
        return self._pids("spawned")

    def _pids(self, name: str) -> list[int]:
        try:
            return [int(line) for line in (self.data_dir / name).read_text().split()]
        except FileNotFoundError:
            return []

    def bridge(self, command: Sequence[str] | None = None, **options: Any) -> Client:
        argv = [sys.executable, "-P", "-c", BRIDGE, *(command or self.command)]
        return Client(argv, self.environ, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in {*self.spawned(), *self.starts()}:  # one that waits for its turn would take over
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self.socket_path.unlink(missing_ok=True)


class Client:
    """An MCP client on the stdio of one process. `over`: what its stdin and stdout are, "pipe" or "socketpair"."""

    def __init__(
        self, argv: Sequence[str], environ: dict[str, str], *, over: str = "pipe", cwd: Path | None = None
    ) -> None:
        if over == "socketpair":  # what Node gives its children
            ours, theirs = socket.socketpair()
            self._read_fd, self._write_fd = os.dup(ours.fileno()), os.dup(ours.fileno())
            child_in = child_out = theirs.fileno()
            opened: list[socket.socket] = [ours, theirs]
            pipes: list[int] = []
        else:
            child_in, self._write_fd = os.pipe()
            self._read_fd, child_out = os.pipe()
            opened, pipes = [], [child_in, child_out]
        self.process = subprocess.Popen(
            argv, stdin=child_in, stdout=child_out, stderr=subprocess.PIPE, env=environ, cwd=cwd
        )
        for one in opened:
            one.close()
        for descriptor in pipes:
            os.close(descriptor)
        self._over = over
        self._buffer = bytearray()
        self._write_open = self._read_open = True
        self._next = 0

    def send(self, message: dict[str, Any]) -> None:
        self.write(json.dumps(message).encode() + b"\n")

    def write(self, line: bytes) -> None:
        data = memoryview(line)
        while data:
            data = data[os.write(self._write_fd, data) :]

    def request(self, method: str, **params: Any) -> int:
        self._next += 1
        self.send({"jsonrpc": "2.0", "id": self._next, "method": method, "params": params})
        return self._next

    def read(self) -> dict[str, Any]:
        """The next line; fails at the deadline and at the end of output."""
        deadline = time.monotonic() + WITHIN
        poll = select.poll()
        poll.register(self._read_fd, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poll.poll(max(0, (deadline - time.monotonic()) * 1000)):
                raise TimeoutError("no line from the bridge")
            chunk = os.read(self._read_fd, 2**20)
            if not chunk:
                raise EOFError(bytes(self._buffer))
            self._buffer += chunk
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return json.loads(line)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a request that is answered next."""
        number = self.request(method, **params)
        answer = self.read()
        assert answer["id"] == number, answer
        return answer["result"]

    def end_input(self) -> None:
        if self._write_open:
            self._write_open = False
            if self._over == "socketpair":
                with socket.socket(fileno=os.dup(self._write_fd)) as side, suppress(OSError):
                    side.shutdown(socket.SHUT_WR)
            os.close(self._write_fd)

    def stop_reading(self) -> None:
        if self._read_open:
            self._read_open = False
            os.close(self._read_fd)

    def close(self) -> tuple[int, str]:
        """Ends the input; the exit code and what was said on stderr."""
        self.end_input()
        _, said = self.process.communicate(timeout=WITHIN)
        self.stop_reading()
        return self.process.returncode, said.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_input()
        if self.process.stderr is not None and not self.process.stderr.closed:
            self.process.kill()
            self.process.communicate()
        self.stop_reading()
