"""The pipes between the daemon and one process: made for the shim, read without threads, cut into lines."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import termios
from collections import deque
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from vespera_exec.engine.work import MAX_REPORT_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from vespera_exec.engine.work import ProcessSpec

PROGRESS_FD = 3
"""What the work knows its progress descriptor by."""
_CHUNK = 256 * 1024
_PROGRESS_BYTES = 256 * 1024  # that the progress pipe holds between two reads
_LINES_AT_ONCE = 128  # then others have their turn on the loop


class Plumbing:
    """The descriptors between this process and a shim: a control socket and the work's streams."""

    def __init__(self) -> None:
        self.control, self._far_control = socket.socketpair()
        self.control.setblocking(False)
        self.far = [-1, -1, -1]
        """What the work gets as 0, 1, ...; -1: /dev/null."""
        self.near: dict[str, int] = {}

    @property
    def far_control(self) -> int:
        return self._far_control.fileno()

    def open(self, spec: ProcessSpec) -> None:
        if spec.stdin:
            self.far[0], self.near["stdin"] = os.pipe()
        if spec.on_output is not None:
            self.near["stdout"], self.far[1] = os.pipe()
            self.near["stderr"], self.far[2] = os.pipe()
        if spec.on_report is not None:
            self.near["progress"], far = os.pipe()
            self.far.append(far)
            with contextlib.suppress(OSError, AttributeError):  # not on macOS, or the user's share is used up
                fcntl.fcntl(far, fcntl.F_SETPIPE_SZ, _PROGRESS_BYTES)
        for fd in self.near.values():
            os.set_blocking(fd, False)

    def take(self, name: str) -> int:
        """A near end, which the caller closes from now on."""
        return self.near.pop(name)

    def close_far_ends(self) -> None:
        self._far_control.close()
        for fd in self.far:
            if fd >= 0:
                os.close(fd)
        self.far = []

    def close(self) -> None:
        self.close_far_ends()
        self.control.close()
        for fd in self.near.values():
            os.close(fd)
        self.near = {}


class Pump:
    """Reads one descriptor to its end, or to what is in it when `stop` is called, and closes it."""

    def __init__(self, fd: int, deliver: Callable[[bytes], None]) -> None:
        self._fd = fd
        self._deliver = deliver
        self._scope = anyio.CancelScope()

    def stop(self) -> None:
        self._scope.cancel()

    async def run(self) -> None:
        try:
            with self._scope:
                while True:
                    try:
                        chunk = os.read(self._fd, _CHUNK)
                    except BlockingIOError:
                        await anyio.wait_readable(self._fd)
                        continue
                    if not chunk:
                        break
                    await self._take(chunk)
            if self._scope.cancelled_caught:
                self._drain()
            self._end()
        finally:
            os.close(self._fd)

    async def _take(self, chunk: bytes) -> None:
        self._deliver(chunk)
        await anyio.lowlevel.checkpoint()

    def _drain(self) -> None:
        """Deliver what has been written until now, and no more: a holder elsewhere may never stop writing."""
        left = int.from_bytes(fcntl.ioctl(self._fd, termios.FIONREAD, bytes(4)), sys.byteorder)
        while left > 0:
            try:
                chunk = os.read(self._fd, min(left, _CHUNK))
            except BlockingIOError:
                return
            if not chunk:
                return
            left -= len(chunk)
            self._deliver(chunk)

    def _end(self) -> None:
        """What is to be done after the last byte."""


class LinePump(Pump):
    """A pump that delivers lines, and reads at most every `interval` seconds."""

    def __init__(self, fd: int, lines: Lines, *, interval: float) -> None:
        super().__init__(fd, lines.feed)
        self._lines = lines
        self._interval = interval

    async def _take(self, chunk: bytes) -> None:
        self._lines.add(chunk)
        while self._lines.deliver(_LINES_AT_ONCE):
            await anyio.lowlevel.checkpoint()
        await anyio.sleep(self._interval)

    def _end(self) -> None:
        self._lines.finish()


class Lines:
    """Cuts a stream into lines; the last one counts also without its newline.

    `dropped` is called in the place of each line of more than `MAX_REPORT_BYTES`.
    """

    def __init__(self, deliver: Callable[[bytes], None], dropped: Callable[[], None] | None = None) -> None:
        self._deliver = deliver
        self._dropped = dropped
        self._ready: deque[bytes | None] = deque()
        """None stands for a line that was dropped."""
        self._rest = b""
        self._skipping = False

    def feed(self, chunk: bytes) -> None:
        self.add(chunk)
        self.deliver(len(self._ready))

    def add(self, chunk: bytes) -> None:
        """Cut it, without delivering."""
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            self._extend(part)
            if not self._skipping:
                self._ready.append(self._rest)
            self._rest = b""
            self._skipping = False
        self._extend(rest)

    def deliver(self, most: int) -> bool:
        """Deliver at most so many lines. Whether there are more."""
        for _ in range(min(most, len(self._ready))):
            line = self._ready.popleft()
            if line is not None:
                self._deliver(line)
            elif self._dropped is not None:
                self._dropped()
        return bool(self._ready)

    def finish(self) -> None:
        if self._rest:
            self._ready.append(self._rest)
            self._rest = b""
        self.deliver(len(self._ready))

    def _extend(self, part: bytes) -> None:
        if self._skipping:
            return
        self._rest += part
        if len(self._rest) > MAX_REPORT_BYTES:
            self._rest = b""
            self._skipping = True
            self._ready.append(None)


async def feed(plumbing: Plumbing, data: bytes, scope: anyio.CancelScope) -> None:
    """Feed the work's stdin and close it; a work that does not read it is no fault."""
    if not data:
        return
    fd = plumbing.take("stdin")
    rest = memoryview(data)
    try:
        with scope:
            while rest:
                try:
                    rest = rest[os.write(fd, rest[:_CHUNK]) :]
                except BlockingIOError:
                    await anyio.wait_writable(fd)
    except BrokenPipeError:
        return
    finally:
        os.close(fd)
