"""Cancels that the log could not take: kept in a file whose room was made while there was some."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from vespera_exec import paths

if TYPE_CHECKING:
    from pathlib import Path

_ROOM = 64 * 1024
_LINE = 128
"""Bytes of one note: an id, padded with spaces, and a newline."""
_log = logging.getLogger(__name__)


class UnwrittenCancels:
    """Notes which executions were asked to end while the disk was full, for an owner that comes after a kill.

    The bytes are written over zeros that are on disk already, so this needs no room. For at most 512 executions;
    blocking, a write and an fsync each.
    """

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / paths.CANCELS
        self._used = len(self._lines())
        try:
            file = self._open()
            try:
                os.posix_fallocate(file, 0, _ROOM)
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as fault:
            _log.warning("A cancel while the disk is full would be forgotten by a kill: %s", fault)

    def note(self, execution_id: str) -> bool:
        """False where there is no room for it, or the disk refuses that, too."""
        line = execution_id.encode().ljust(_LINE - 1) + b"\n"
        if len(line) != _LINE or (self._used + 1) * _LINE > _ROOM:
            return False
        try:
            file = self._open()
            try:
                os.pwrite(file, line, self._used * _LINE)
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as fault:
            _log.warning("The cancel of %s is neither in the log nor noted: %s", execution_id, fault)
            return False
        self._used += 1
        return True

    def noted(self) -> frozenset[str]:
        """The ids of the executions that an earlier owner, or this one, has noted."""
        return frozenset(line.strip().decode("ascii", "replace") for line in self._lines() if line.strip(b"\0"))

    def _lines(self) -> list[bytes]:
        """As they stand in the file, without the zeros that follow the last."""
        with suppress(OSError):
            file = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                kept = os.read(file, _ROOM).rstrip(b"\0")
            finally:
                os.close(file)
            return [kept[begin : begin + _LINE] for begin in range(0, len(kept), _LINE)]
        return []

    def clear(self) -> None:
        """Forget them: the log knows all."""
        if not self._used:
            return
        with suppress(OSError):
            file = self._open()
            try:
                os.pwrite(file, bytes(self._used * _LINE), 0)
                os.fsync(file)
            finally:
                os.close(file)
            self._used = 0

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(self._path, flags, 0o600)
