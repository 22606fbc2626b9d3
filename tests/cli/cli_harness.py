"""The installed program as a user runs it: in a pipe, and in a terminal whose screen can be read."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deadlines import WITHIN

from vespera_exec import paths
from vespera_exec.app.owning import listener
from vespera_exec.cli.client import Daemon
from vespera_exec.errors import StoreUnavailable
from vespera_exec.store.lock import read_owner

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAM = str(Path(sys.executable).parent / "vespera-exec")
_SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")
_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


@dataclass
class Cli:
    """Runs the program in `cwd` with its own data directory."""

    environ: dict[str, str]
    cwd: Path

    @classmethod
    def over(cls, folder: Path) -> Cli:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("VESPERA_")}
        environ.pop("NO_COLOR", None)
        (folder / "here").mkdir()
        given = {"VESPERA_DATA_DIR": str(folder / "data"), "VESPERA_RUNTIME_DIR": str(folder), "TERM": "xterm"}
        return cls(environ | given | {"VESPERA_ROLES_DIR": str(folder / "roles")}, folder / "here")

    @property
    def data_dir(self) -> Path:
        return Path(self.environ["VESPERA_DATA_DIR"])

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, *arguments],
            env=self.environ | environ,
            cwd=self.cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WITHIN,
        )

    def json(self, *arguments: str) -> Any:
        """The one document that `--json` prints, of a command that succeeds."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [PROGRAM, *arguments],
            env=self.environ,
            cwd=self.cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def terminal(self, *arguments: str, columns: int = 100, **environ: str) -> Terminal:
        return Terminal.start([PROGRAM, *arguments], self.environ | environ, self.cwd, columns)

    def task(self, *arguments: str) -> str:
        """The id of a run that was started and left to itself."""
        done = self.run("run", "--detach", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["task_id"])

    def ask(self, path: str) -> Any:
        """What the daemon answers to a GET; asked as the program asks it, without the price of a process."""
        with Daemon(self.data_dir, environ=self.environ, cwd=str(self.cwd)) as daemon:
            return daemon.get(path)

    def status(self, task_id: str) -> str:
        return str(self.ask(f"/tasks/{task_id}")["status"])

    def steps(self, task_id: str) -> dict[str, str]:
        """The status of each step of a plan."""
        return {each["id"]: each["status"] for each in self.ask(f"/tasks/{task_id}/steps?limit=1000")["steps"]}

    def stop(self) -> None:
        """The daemon, if one runs, goes with what it runs."""
        if (pid := self._daemon()) is None:
            return
        with suppress(ProcessLookupError):
            process = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(process, signal.SIGTERM)
                assert select.select([process], [], [], WITHIN)[0], "the daemon did not stop"
            finally:
                os.close(process)

    def _daemon(self) -> int | None:
        """By its lock, else by its socket."""
        with suppress(StoreUnavailable):
            if (owner := read_owner(self.data_dir)) is not None and owner.purpose == "daemon":
                return owner.pid
        return listener(paths.socket_paths(self.data_dir, self.environ)[0])


class Screen:
    """Just enough of a terminal: what stands where after the sequences that we write."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines: list[list[str]] = [[]]
        self.row = 0
        self.column = 0
        self._pending = ""

    def feed(self, text: str) -> None:
        text, self._pending = self._pending + text, ""
        at = 0
        while at < len(text):
            if found := _SEQUENCE.match(text, at):
                self._obey(found[2], int(found[1]) if found[1].isdigit() else 1, found[1])
                at = found.end()
            elif text[at] == "\x1b" and len(text) - at < 16:
                self._pending = text[at:]  # the rest of it is still to come
                return
            else:
                self._put(text[at])
                at += 1

    def text(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]

    def _obey(self, letter: str, count: int, raw: str) -> None:
        match letter:
            case "K" if raw == "2":
                self.lines[self.row] = []
            case "A":
                self.row -= count
            case "C":
                self.column += count
            case "m":
                pass
            case other:
                raise AssertionError(f"unexpected sequence {raw}{other}")

    def _put(self, character: str) -> None:
        match character:
            case "\r":
                self.column = 0
            case "\n":
                self.row += 1
                if self.row == len(self.lines):
                    self.lines.append([])
            case _:
                if self.column == self.columns:
                    self._put("\r")
                    self._put("\n")
                line = self.lines[self.row]
                line.extend(" " * (self.column + 1 - len(line)))
                line[self.column] = character
                self.column += 1


@dataclass
class Terminal:
    """The program in a terminal of its own; Ctrl-C is typed, not sent."""

    process: subprocess.Popen[bytes]
    master: int
    screen: Screen
    raw: str = ""
    _decoder: codecs.IncrementalDecoder = field(default_factory=codecs.getincrementaldecoder("utf-8"))

    @classmethod
    def start(cls, argv: list[str], environ: dict[str, str], cwd: Path, columns: int) -> Terminal:
        master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        command = [sys.executable, "-c", _TAKE_TERMINAL, *argv]
        process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environ, cwd=cwd, start_new_session=True
        )
        os.close(slave)
        return cls(process, master, Screen(columns))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.master >= 0:
            os.close(self.master)

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def hang_up(self) -> None:
        """The terminal is gone, as when its window is closed."""
        os.close(self.master)
        self.master = -1

    def until(self, wanted: str | Callable[[Terminal], bool]) -> None:
        """Reads until the screen shows `wanted`, or it holds."""
        deadline = time.monotonic() + WITHIN
        while not (any(wanted in line for line in self.screen.text()) if isinstance(wanted, str) else wanted(self)):
            if not self._read(deadline):
                raise AssertionError(f"{wanted!r} was not shown; the screen:\n" + "\n".join(self.screen.text()))

    def finish(self) -> int:
        """Reads to the end; the exit code."""
        deadline = time.monotonic() + WITHIN
        while self._read(deadline):
            pass
        return self.process.wait(timeout=WITHIN)

    def _read(self, deadline: float) -> bool:
        readable, _, _ = select.select([self.master], [], [], max(deadline - time.monotonic(), 0))
        if not readable:
            raise AssertionError("nothing more was shown in time:\n" + "\n".join(self.screen.text()))
        try:
            data = os.read(self.master, 65536)
        except OSError:  # the other side is closed
            return False
        text = self._decoder.decode(data)
        self.raw += text
        self.screen.feed(text)
        return True


def until(holds: Callable[[], bool], what: str) -> None:
    """Asks again until it holds, under a deadline."""
    deadline = time.monotonic() + WITHIN
    while not holds():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.02)


def marked(marker: str) -> list[int]:
    """The processes whose environment or arguments carry `marker`."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            seen = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            zombie = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if marker.encode() in seen and not zombie and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found
