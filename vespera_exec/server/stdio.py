"""Our own stdin and stdout as one byte stream, so that a conversation over them reads as one over a socket does."""

from __future__ import annotations

import fcntl
import os
import select
from contextlib import suppress

import anyio
import anyio.abc
import anyio.lowlevel

from vespera_exec.errors import InvalidInput

_CHUNK_BYTES = select.PIPE_BUF
"""A pipe that can be written takes so much at once without blocking us."""


class StdioStream(anyio.abc.ByteStream):
    """What a client gave us to talk over. Made once in a process, by `take`.

    The mode of both descriptors stays as it is: other processes may share them.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self._reader = reader
        self._writer = writer
        self._ended = False

    @classmethod
    def take(cls) -> StdioStream:
        """Both, for the protocol alone: from here on prints go to stderr, and stdin reads as empty.

        Raises:
            InvalidInput: one of them is closed.
        """
        try:
            reader, writer = (fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3) for number in (0, 1))
        except OSError as fault:
            raise InvalidInput("stdin or stdout is closed", hint="an MCP client gives both") from fault
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, 0)
        try:
            os.dup2(2, 1)
        except OSError:  # there is no stderr
            os.dup2(null, 1)
        os.close(null)
        return cls(reader, writer)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """What has come; a last line without its end is given one."""
        while not self._ended:
            if not _is_ready(self._reader, select.POLLIN):
                await anyio.wait_readable(self._reader)
            try:
                data = os.read(self._reader, max_bytes)
            except BlockingIOError:
                continue
            except OSError as fault:
                raise anyio.BrokenResourceError from fault
            await anyio.lowlevel.cancel_shielded_checkpoint()
            self._ended = not data
            return data or b"\n"
        raise anyio.EndOfStream

    async def send(self, item: bytes) -> None:
        view = memoryview(item)
        while view:
            if not _is_ready(self._writer, select.POLLOUT):
                await anyio.wait_writable(self._writer)
            try:
                view = view[os.write(self._writer, view[:_CHUNK_BYTES]) :]
            except BlockingIOError:
                continue
            except OSError as fault:
                raise anyio.BrokenResourceError from fault

    async def send_eof(self) -> None:
        """The client sees the end of our output."""
        await self.aclose()

    async def aclose(self) -> None:
        for descriptor in (self._reader, self._writer):
            with suppress(OSError):
                os.close(descriptor)


def _is_ready(descriptor: int, what: int) -> bool:
    """Reading or writing will not block. True for files, which the loop cannot wait for."""
    poll = select.poll()
    poll.register(descriptor, what)
    return bool(poll.poll(0))
