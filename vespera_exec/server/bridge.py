"""Copies an MCP client's lines between stdin, stdout and the daemon's socket, and outlives the daemon.

One thread, one `poll` loop, the standard library only. Whole lines are forwarded, so that a daemon that
dies in mid-line never leaves half a message with the client.

When the daemon dies, each request in flight is answered with JSON-RPC error -32603 and data
`{"error_code": "DAEMON_RESTARTED", "retriable": true}`, the connection is restored, and the handshake of a
handshake session is replayed; nothing else is sent a second time. A crash (the socket file is still there)
is repaired at once, so that the work goes on; after an orderly stop (it is gone) the next line of the client
starts a new daemon. When none can be started, every request is answered with the reason, under the daemon's own
code (`STORE_DAMAGED`, say), and `retriable` says whether waiting may help.

A daemon of an older version that nobody uses yields: it says so in its answer to our preamble, and ends.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vespera_exec import __version__, paths
from vespera_exec.server.greeting import UNAVAILABLE, Failure, check_answer, failure_of, preamble, read_line, say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

_INTERNAL_ERROR = -32603
_INVALID_REQUEST = -32600

_READ_BYTES = 256 * 1024
_HIGH_WATER_BYTES = 1024 * 1024  # a side that does not read stops the other side's input here
_LINE_LIMIT_BYTES = 64 * 1024 * 1024  # the daemon's own limit is far below; this one bounds our memory
_CHUNK_BYTES = 512  # POSIX: what a pipe that polls writable takes without blocking

_GREETING_SECONDS = 10.0
_REPLAY_SECONDS = 30.0  # a daemon that has just started imports the MCP SDK before it answers
_ANSWER_SECONDS = 1.0  # after the end of input, for answers on their way: `printf ... | vespera-exec` works
_DRAIN_SECONDS = 1.5  # in all; clients kill after 2
_FIRST_ANSWER_SECONDS = 20.0  # both, for a daemon that has answered nothing yet: it may still import the MCP SDK
_RETRY_SECONDS = (0.5, 5.0)  # after a daemon that could not be had: at first, and at most
_ATTEMPTS = 4  # to connect: a daemon may be in its last moments, or yield to us


# How our daemon writes answers. Whatever looks different is parsed.
_ANSWER = re.compile(rb'\{"jsonrpc":"2\.0","id":(-?\d+|"[^"\\]*"),"(result|error|method)"')
_NOTIFICATION = b'{"jsonrpc":"2.0","method":'


def main(command: Sequence[str] | None = None) -> int:
    """Serves the client on stdin and stdout until the end of its input; returns the exit code.

    `command` replaces the daemon's argv. 0: served to the end. 1: no daemon could be started, or a bad
    data directory; the reason is on stderr and in the answer to every request. SIGTERM ends it at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to save, and no traceback for the client's Ctrl-C
    environ = dict(os.environ)
    try:
        cwd = Path.cwd()
    except OSError:
        cwd = Path("/")  # the client stands in a folder that is gone
    return _Bridge(cwd, environ, command).run()


class _Gone(Exception):
    """The client closed its side."""


class _Bridge:
    def __init__(self, cwd: Path, environ: Mapping[str, str], command: Sequence[str] | None) -> None:
        self._cwd = cwd
        self._data_dir = paths.find_data_dir(cwd, environ)
        self._environ = environ
        self._command = command
        self._daemon: socket.socket | None = None
        self._socket_path: Path | None = None
        self._connected_at = 0.0
        self._lost = False  # a write found the daemon gone
        self._failure: Failure | None = None  # why there is no daemon
        self._retry_at = 0.0
        self._pause = 0.0  # what `_retry_at` was last put off by
        self._unserved = False  # nobody accepted connections when we last tried
        # partial lines, and lines on their way out
        self._from_client = bytearray()
        self._from_daemon = bytearray()
        self._to_client = bytearray()
        self._to_daemon = bytearray()
        self._skipping = False
        # requests of the client without an answer, and what a reconnection replays
        self._waiting: dict[int | str, None] = {}
        self._initialize: tuple[int | str, bytes] | None = None
        self._initialized: bytes | None = None
        self._unanswered_handshake = False  # a daemon died over `initialize`
        self._heard = False  # something from this daemon
        self._ended_at: float | None = None  # of the client's input, or the first answer after that
        self._half_closed = False
        self._write, self._out = _open_output(1)
        self._poll = select.poll()
        self._masks: dict[int, int] = {}

    def run(self) -> int:
        try:
            self._connect()
            while not self._finished():
                self._turn()
            self._flush_client(until=time.monotonic() + _DRAIN_SECONDS)
        except _Gone:
            pass
        if self._daemon is not None:
            self._daemon.close()
        return 0 if self._failure is None else 1

    # one turn of the loop

    def _turn(self) -> None:
        daemon = self._daemon
        taking = len(self._to_client) < _HIGH_WATER_BYTES
        self._watch(0, select.POLLIN, self._ended_at is None and taking and len(self._to_daemon) < _HIGH_WATER_BYTES)
        self._watch(self._out, select.POLLOUT, bool(self._to_client))
        descriptor = -1
        if daemon is not None:
            descriptor = daemon.fileno()
            mask = (select.POLLIN if taking else 0) | (select.POLLOUT if self._to_daemon else 0)
            self._watch(descriptor, mask, bool(mask))
        ready = dict(self._poll.poll(None if self._ended_at is None else 20))
        if 0 in ready:
            self._read_client()
        if self._out in ready:
            self._write_client()
        if daemon is not None and daemon is self._daemon:
            seen = ready.get(descriptor, 0)
            if self._to_daemon and seen & (select.POLLOUT | select.POLLERR | select.POLLHUP):
                self._write_daemon()
            if daemon is self._daemon and seen & ~select.POLLOUT:
                self._read_daemon()
        if self._ended_at is not None:
            self._half_close()

    def _finished(self) -> bool:
        if self._ended_at is None:
            return False
        return self._daemon is None or time.monotonic() >= self._ended_at + self._patience(_DRAIN_SECONDS)

    def _half_close(self) -> None:
        assert self._ended_at is not None
        if self._half_closed or self._daemon is None or self._to_daemon:
            return
        if not self._waiting or time.monotonic() >= self._ended_at + self._patience(_ANSWER_SECONDS):
            self._half_closed = True
            try:
                self._daemon.shutdown(socket.SHUT_WR)
            except OSError:
                self._lose()

    def _patience(self, seconds: float) -> float:
        return _FIRST_ANSWER_SECONDS if self._waiting and not self._heard else seconds

    def _watch(self, descriptor: int, mask: int, wanted: bool) -> None:
        # Unregistered rather than masked to 0: a hang-up is reported for any mask and would spin the loop.
        before = self._masks.get(descriptor, 0)
        after = mask if wanted else 0
        if before == after:
            return
        if not after:
            self._poll.unregister(descriptor)
        else:
            self._poll.register(descriptor, after)
        self._masks[descriptor] = after

    # client to daemon

    def _read_client(self) -> None:
        try:
            chunk = os.read(0, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._ended_at = time.monotonic()
            if not self._from_client:
                return
            chunk = b"\n"  # a last line without its end
        lines = self._whole_lines(chunk)
        if not lines:
            return
        if self._daemon is None and self._may_connect():
            self._connect()
        if self._daemon is None:
            for line in lines.split(b"\n"):
                self._refuse(line)
            self._write_client()
            return
        self._to_daemon += lines
        self._send()  # before the lines are parsed: the daemon works meanwhile
        for line in lines.split(b"\n"):
            self._note_request(line)
        if self._lost:
            self._lose()

    def _whole_lines(self, chunk: bytes) -> bytes:
        """What can be forwarded now; the rest is kept. A line beyond the limit is refused and skipped."""
        end = chunk.rfind(b"\n")
        if self._skipping:
            start = chunk.find(b"\n")
            if start < 0:
                return b""
            self._skipping = False
            return self._whole_lines(chunk[start + 1 :])
        if end < 0:
            self._from_client += chunk
            if len(self._from_client) > _LINE_LIMIT_BYTES:
                self._from_client.clear()
                self._skipping = True
                self._to_client += _error(None, _INVALID_REQUEST, f"a line is longer than {_LINE_LIMIT_BYTES} bytes")
                self._write_client()
            return b""
        lines = bytes(self._from_client) + chunk[: end + 1]
        self._from_client = bytearray(chunk[end + 1 :])
        return lines

    def _note_request(self, line: bytes) -> None:
        message = _parse(line)
        method = message.get("method")
        number = message.get("id")
        if isinstance(number, (int, str)) and method is not None:
            self._waiting[number] = None
            if method == "initialize":
                self._initialize = (number, line + b"\n")
                self._initialized = None
        elif method == "notifications/initialized":
            self._initialized = line + b"\n"
        elif method == "notifications/cancelled":
            # A cancelled request gets no answer. The SDK takes "7" and 7 for one id here, so do we.
            params = message.get("params")
            cancelled = str(cast("dict[str, Any]", params).get("requestId")) if isinstance(params, dict) else ""
            for known in [known for known in self._waiting if str(known) == cancelled]:
                del self._waiting[known]

    def _refuse(self, line: bytes) -> None:
        message = _parse(line)
        number = message.get("id")
        if isinstance(number, (int, str)) and "method" in message:
            self._to_client += _error(
                number,
                _INTERNAL_ERROR,
                f"vespera-exec cannot reach its daemon: {self._failure}",
                {
                    "error_code": self._failure.error_code if self._failure else UNAVAILABLE,
                    "retriable": self._failure is None or self._failure.retriable,
                },
            )

    def _write_daemon(self) -> None:
        self._send()
        if self._lost:
            self._lose()

    def _send(self) -> None:
        """Writes what the socket takes. A dead daemon is only noted: its requests may not be noted yet."""
        assert self._daemon is not None
        self._lost = False
        try:
            while self._to_daemon:
                del self._to_daemon[: self._daemon.send(self._to_daemon)]
        except BlockingIOError:
            pass
        except OSError:
            self._lost = True

    # daemon to client

    def _read_daemon(self) -> None:
        assert self._daemon is not None
        try:
            chunk = self._daemon.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._lose()
            return
        if not self._heard:
            self._heard = True
            if self._ended_at is not None:
                self._ended_at = time.monotonic()  # the other answers come only now
        self._take_answers(chunk)
        self._write_client()

    def _take_answers(self, chunk: bytes) -> None:
        end = chunk.rfind(b"\n")
        if end < 0:
            self._from_daemon += chunk
            return
        lines = bytes(self._from_daemon) + chunk[: end + 1] if self._from_daemon else chunk[: end + 1]
        self._from_daemon = bytearray(chunk[end + 1 :])
        self._to_client += lines
        if self._waiting:
            for line in lines.split(b"\n"):
                answered = _answered(line)
                if answered is not None:
                    self._waiting.pop(answered, None)

    def _write_client(self) -> None:
        while self._to_client:
            try:
                written = self._write(self._to_client)
            except BlockingIOError:
                return
            except OSError:
                raise _Gone from None
            if not written:
                return
            del self._to_client[:written]

    def _flush_client(self, *, until: float) -> None:
        self._write_client()
        while self._to_client and time.monotonic() < until:
            self._watch(self._out, select.POLLOUT, wanted=True)
            self._watch(0, select.POLLIN, wanted=False)
            self._poll.poll(20)
            self._write_client()

    # connecting

    def _may_connect(self) -> bool:
        """It failed long enough ago, or somebody else has started a daemon meanwhile."""
        if self._failure is None or time.monotonic() >= self._retry_at:
            return True
        return self._unserved and self._socket_path is not None and _accepts(self._socket_path)

    def _connect(self) -> None:
        """Connects, starting the daemon if need be. Without success `_failure` says why."""
        before, self._failure = self._failure, None
        self._unserved = False
        try:
            self._socket_path, _ = paths.socket_paths(self._data_dir, self._environ)
            for attempt in range(_ATTEMPTS):
                try:
                    self._daemon = self._open()
                except (ConnectionError, FileNotFoundError):
                    # An accepted connection that ends before its first line met a daemon in its last moments.
                    self._unserved = True
                    if attempt == _ATTEMPTS - 1:
                        raise
                    self._start_daemon()
                else:
                    self._connected_at, self._pause = time.monotonic(), 0.0
                    return
        except (Failure, OSError) as fault:
            self._failure = fault if isinstance(fault, Failure) else failure_of(fault)
            self._pause = min(max(2 * self._pause, _RETRY_SECONDS[0]), _RETRY_SECONDS[1])
            self._retry_at = time.monotonic() + self._pause
            if str(self._failure) != str(before):  # once, however often it is tried
                say(f"cannot reach the daemon of {self._data_dir}: {self._failure}")
            if self._initialize is not None and self._unanswered_handshake:
                self._unanswered_handshake = False
                self._refuse(self._initialize[1])

    def _start_daemon(self) -> None:
        # only who starts a daemon pays for these imports
        from vespera_exec.errors import VesperaError
        from vespera_exec.server import launch

        try:
            command = self._command or launch.daemon_command(self._data_dir, expect_mcp=True)
            launch.ensure_daemon(self._data_dir, self._environ, command=command)
        except VesperaError as fault:
            passing = fault.error_code == UNAVAILABLE or getattr(fault, "retriable", False)
            raise Failure(fault.error_code, fault.message, fault.hint, retriable=passing) from fault
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # when it dies it leaves no zombie with us

    def _open(self) -> socket.socket:
        """A connection that has been greeted, and shaken hands with if this session ever did."""
        daemon = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            daemon.settimeout(_GREETING_SECONDS)
            daemon.connect(os.fspath(self._socket_path or ""))
            daemon.sendall(preamble(str(self._cwd), self._environ, client="bridge"))
            rest = bytearray()
            answer = _parse(read_line(daemon, rest))
            if answer.get("yields"):
                say(f"the daemon was version {answer.get('daemon')}; it yields to this one, {__version__}")
                read_line(daemon, rest)  # raises at the end of the connection, when its sockets are withdrawn
            check_answer(answer)
            self._heard = self._initialize is not None
            if self._heard:
                self._replay_handshake(daemon, rest)
            self._from_daemon = bytearray()
            self._take_answers(bytes(rest))
            daemon.setblocking(False)
        except BaseException:
            daemon.close()
            raise
        return daemon

    def _replay_handshake(self, daemon: socket.socket, rest: bytearray) -> None:
        assert self._initialize is not None
        number, request = self._initialize
        daemon.settimeout(_REPLAY_SECONDS)
        daemon.sendall(request)
        while True:
            line = read_line(daemon, rest)
            if _answered(line) == number:
                break
            self._to_client += line + b"\n"
        if self._unanswered_handshake:
            self._to_client += line + b"\n"  # the first daemon died over it; this is the client's answer
            self._unanswered_handshake = False
        if self._initialized is not None:
            daemon.sendall(self._initialized)

    def _lose(self) -> None:
        """The daemon is gone: settle what was in flight, then restore the connection."""
        assert self._daemon is not None
        self._watch(self._daemon.fileno(), 0, wanted=False)
        self._daemon.close()
        self._daemon = None
        self._from_daemon.clear()
        self._to_daemon.clear()
        if self._initialize is not None and self._initialize[0] in self._waiting:
            del self._waiting[self._initialize[0]]
            self._unanswered_handshake = True
        for number in self._waiting:
            self._to_client += _error(
                number,
                _INTERNAL_ERROR,
                "the vespera-exec daemon restarted before it answered. The call may have taken effect: look before you "
                "repeat it, or repeat it with its idempotency_key",
                {"error_code": "DAEMON_RESTARTED", "retriable": True},
            )
        self._waiting.clear()
        if self._ended_at is not None:
            return
        now = time.monotonic()
        self._flush_client(until=now + _DRAIN_SECONDS)
        crashed = self._socket_path is not None and os.path.lexists(self._socket_path)
        # One that dies as soon as it serves is not started over and over, but with the client's next line.
        if self._unanswered_handshake or (crashed and now - self._connected_at > 1.0):
            self._connect()
            self._write_client()


def _accepts(socket_path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(os.fspath(socket_path)) == 0


def _open_output(descriptor: int) -> tuple[Callable[[bytearray], int], int]:
    """A write that never blocks, and the descriptor to poll for it.

    The mode of the inherited description stays as it is: other processes share it.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        output = socket.socket(fileno=os.dup(descriptor))
        return lambda data: output.send(data, socket.MSG_DONTWAIT), output.fileno()
    if not stat.S_ISFIFO(mode):
        return lambda data: os.write(descriptor, data), descriptor
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return lambda data: _write_chunk(descriptor, data), descriptor
    return lambda data: os.write(own, data), own


def _write_chunk(descriptor: int, data: bytearray) -> int:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return os.write(descriptor, data[:_CHUNK_BYTES]) if poll.poll(0) else 0


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line) if line else None
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", message) if isinstance(message, dict) else {}


def _answered(line: bytes) -> int | str | None:
    """The id that this line of the daemon answers."""
    if not line or line.startswith(_NOTIFICATION):
        return None
    found = _ANSWER.match(line)
    if found is None:
        message = _parse(line)
        number = message.get("id")
        return number if isinstance(number, (int, str)) and "method" not in message else None
    if found[2] == b"method":
        return None
    return json.loads(found[1])


def _error(number: int | str | None, code: int, message: str, data: dict[str, object] | None = None) -> bytes:
    error: dict[str, object] = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    return json.dumps({"jsonrpc": "2.0", "id": number, "error": error}).encode() + b"\n"
