"""What executions write to stdout and stderr: kept in files, capped, masked, readable while it grows.

`outputs/<execution_id>/` holds segments `0`, `1`, … of one combined record. A segment begins with a header
(`VXO1`, then the bytes of stdout and of stderr that came before it, 8 bytes each, big-endian); then follow
frames: `o` or `e`, the length (4 bytes), the bytes as they came. Once the limit is reached, segments are
deleted from the middle: the first half of the limit stays, and of the rest what is newest. A frame `.` of
length 0 says that the writer closed it; without it the writer died, and what is there still reads.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import struct
import threading
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Self

import anyio

from vespera_exec import paths
from vespera_exec.errors import InvalidInput
from vespera_exec.model.tokens import BEGINNING, FORM, FORM_BYTES, FORM_PREFIX

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
    from pathlib import Path

MASK = b"***"
_MAGIC = b"VXO1"
_HEADER = struct.Struct(">4sQQ")
_FRAME = struct.Struct(">cI")
_STREAMS = {"stdout": b"o", "stderr": b"e"}
_END = b"."
_LINGER_SECONDS = 0.05
_OWED_SECONDS = 1.0
"""How often it is tried to state a loss for which there was no room."""
_BUFFER = 1024 * 1024
_SEGMENTS = 16
_SMALLEST_SEGMENT = 64
_MAX_FRAME = 64 * 1024
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_log = logging.getLogger(__name__)


class OutputFiles:
    """The outputs of a data directory. One thread writes them all, at most 50 ms after they came."""

    def __init__(self, data_dir: Path, *, limit_bytes: int, mask: Sequence[bytes] = ()) -> None:
        self._folder = data_dir / paths.OUTPUTS
        self._limit = limit_bytes
        self._mask = tuple(mask)
        self._open: set[Output] = set()
        self._dirty: set[Output] = set()
        self._owing: set[Output] = set()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="vespera-output")

    @classmethod
    @asynccontextmanager
    async def open(cls, data_dir: Path, *, limit_bytes: int, mask: Sequence[bytes] = ()) -> AsyncGenerator[Self]:
        """`mask` are secrets that are replaced by `***`. Leaving the context closes what is open."""
        files = cls(data_dir, limit_bytes=limit_bytes, mask=mask)
        files._thread.start()
        try:
            yield files
        finally:
            files._closing.set()
            files._wake.set()
            with anyio.CancelScope(shield=True):  # the thread ends within one write
                await anyio.to_thread.run_sync(files._thread.join)
            for output in tuple(files._open):
                output.close()

    def create(self, execution_id: str) -> Output:
        """The output of an execution that begins, or goes on after its owner died. Touches no file yet."""
        output = Output(self._folder / _safe(execution_id), self._limit, self._mask, self._changed)
        with self._lock:
            self._open.add(output)
        return output

    def remove(self, execution_ids: Iterable[str]) -> None:
        """Delete what ended executions have written; nothing where there is nothing."""
        for execution_id in execution_ids:
            try:
                shutil.rmtree(self._folder / _safe(execution_id))
            except FileNotFoundError:
                pass
            except OSError as fault:
                _log.warning("The output of %s could not be deleted: %s", execution_id, fault)

    def _changed(self, output: Output) -> None:
        with self._lock:
            if output.closed:
                self._open.discard(output)
                self._dirty.discard(output)
                if not output.state_loss():
                    self._owing.add(output)
                return
            self._dirty.add(output)
        self._wake.set()

    def _write_on(self) -> None:
        while True:
            self._wake.wait(_OWED_SECONDS if self._owing else None)
            self._closing.wait(_LINGER_SECONDS)
            self._wake.clear()
            if self._closing.is_set():  # looked at after the clear, since it is set before the wake
                return
            with self._lock:
                dirty, self._dirty = self._dirty, set()
                self._owing = {output for output in self._owing if not output.state_loss()}
            for output in dirty:
                output.flush()


class Output:
    """One execution's output. `write` takes a few microseconds, from any thread, and never fails.

    What the disk will not take is dropped and counted, like what exceeds the limit. `lost_bytes` are those that
    the disk did not take; the record itself states them as soon as there is room for a header of 20 bytes.
    """

    def __init__(
        self, folder: Path, limit_bytes: int, mask: Sequence[bytes], changed: Callable[[Output], None]
    ) -> None:
        self._folder = folder
        self._segment_size = max(_SMALLEST_SEGMENT, limit_bytes // _SEGMENTS)
        self._masks = {tag: SecretMask(mask) for tag in _STREAMS.values()}
        self._changed = changed
        self._pending: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._written = dict.fromkeys(_STREAMS.values(), 0)
        self._numbers: list[int] | None = None
        self._file: int | None = None
        self._room = 0
        self._disk_refused = False
        self.lost_bytes = 0
        self.closed = False

    def write(self, stream: str, data: bytes) -> None:
        """Keep `data` of "stdout" or "stderr". Ignored once closed."""
        with self._lock:
            if self.closed or not data:
                return
            self._pending.append((_STREAMS[stream], data))
            self._pending_bytes += len(data)
            first, full = len(self._pending) == 1, self._pending_bytes >= _BUFFER
        if full:
            self.flush()
        elif first:
            self._changed(self)

    def flush(self) -> None:
        """Write what has been kept back; all but the beginning of what may become a secret."""
        with self._writing:
            self._flush(last=False)

    def close(self) -> None:
        """Write all, and that it is all. May be called twice."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        with self._writing:
            self._flush(last=True)
            self._finish()
        if self.lost_bytes:
            _log.warning("The disk did not take %d bytes of the output in %s", self.lost_bytes, self._folder.name)
        self._changed(self)

    def state_loss(self) -> bool:
        """Whether the record of a closed output says what is missing; tries to write it where it does not yet."""
        with self._writing:
            if self._disk_refused:
                self._finish()
            return not self._disk_refused

    def _finish(self) -> None:
        """Write that it is all. Where the disk refused the last part, a segment that begins after it says how much."""
        if self._disk_refused:
            self._begin_segment()
        if self._file is not None:
            self._append(_FRAME.pack(_END, 0))
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _flush(self, *, last: bool) -> None:
        with self._lock:
            pending, self._pending, self._pending_bytes = self._pending, [], 0
        chunks = [(tag, self._masks[tag].feed(data)) for tag, data in _joined(pending)]
        if last:
            chunks += [(tag, mask.rest()) for tag, mask in self._masks.items()]
        for tag, data in chunks:
            begin = 0
            while begin < len(data):
                begin += self._put(tag, data[begin : begin + _MAX_FRAME])

    def _put(self, tag: bytes, data: bytes) -> int:
        """Write as much of `data` as the segment has room for; returns how much that was."""
        if self._room <= _FRAME.size:
            self._begin_segment()
        data = data[: max(1, self._room - _FRAME.size)]
        kept = self._append(_FRAME.pack(tag, len(data)) + data) - _FRAME.size
        self.lost_bytes += len(data) - max(0, kept)
        self._written[tag] += len(data)
        return len(data)

    def _append(self, data: bytes) -> int:
        """How many bytes the disk took."""
        self._room -= len(data)
        written = 0
        try:
            while self._file is not None and written < len(data):
                written += os.write(self._file, data[written:])
        except OSError as fault:
            self._refused(fault)
        return written

    def _begin_segment(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._room = self._segment_size
        try:
            for folder in (self._folder.parent, self._folder):
                folder.mkdir(mode=0o700, exist_ok=True)
            numbers = self._go_on() if self._numbers is None else self._numbers
            # A number left out says that something is missing there.
            number = numbers[-1] + (2 if self._disk_refused else 1) if numbers else 0
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(self._folder / str(number), flags, 0o600)
            self._disk_refused = False
            header = _HEADER.pack(_MAGIC, self._written[b"o"], self._written[b"e"])
            if self._append(header) < len(header):
                # Left there, it would in the end crowd out what has been kept.
                (self._folder / str(number)).unlink(missing_ok=True)
                return
            numbers.append(number)
            while len(numbers) > _SEGMENTS:
                (self._folder / str(numbers.pop(_SEGMENTS // 2))).unlink(missing_ok=True)
        except OSError as fault:
            self._refused(fault)

    def _go_on(self) -> list[int]:
        """Where an earlier owner of this execution stopped."""
        segments = _segments(self._folder)
        if segments:
            last = segments[-1]
            self._written = {tag: start + len(last.of(tag)) for tag, start in last.starts.items()}
        self._numbers = [segment.number for segment in segments]
        return self._numbers

    def _refused(self, fault: OSError) -> None:
        if not self._disk_refused:
            _log.warning("Output is being dropped, the disk does not take it: %s", fault)
        self._disk_refused = True
        if self._file is not None:
            os.close(self._file)
            self._file = None


class SecretMask:
    """Replaces secrets in a stream, also where one arrives in pieces: those given, and all that looks like a token."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        self._secrets = sorted({secret for secret in secrets if secret}, key=len, reverse=True)
        self._signs: list[bytes] = [*self._secrets, FORM_PREFIX]
        self._longest = max([FORM_BYTES, *map(len, self._secrets)])
        self._pattern = re.compile(b"|".join([*map(re.escape, self._secrets), FORM.pattern]))
        self._kept: bytes = b""

    def feed(self, data: bytes) -> bytes:
        """What can be shown; the end is kept back while it may be the beginning of a secret."""
        data = self._kept + data
        shown: list[bytes] = []
        position, safe = 0, self._safe_end(data, 0)
        if not any(each in data for each in self._signs):  # much faster than the pattern, and nearly always so
            self._kept = data[safe:]
            return data[:safe]
        for match in self._pattern.finditer(data):
            if match.start() >= safe:
                break
            shown += (data[position : match.start()], MASK)
            position = match.end()
        safe = self._safe_end(data, position)
        shown.append(data[position:safe])
        self._kept = data[safe:]
        return b"".join(shown)

    def rest(self) -> bytes:
        """What was kept back, at the end of the stream."""
        kept, self._kept = self._kept, b""
        return self.whole(kept)

    def whole(self, data: bytes) -> bytes:
        """What can be shown of something that has come in one piece."""
        return self._pattern.sub(MASK, data)

    def _safe_end(self, data: bytes, begin: int) -> int:
        """The first place from which all that follows is the beginning of a secret."""
        token = BEGINNING.search(data, max(begin, len(data) - FORM_BYTES + 1))
        until = token.start() if token is not None else len(data)
        for place in range(max(begin, len(data) - self._longest + 1), until):
            end = data[place:]
            if any(len(secret) > len(end) and secret.startswith(end) for secret in self._secrets):
                return place
        return until


@dataclass(frozen=True, slots=True)
class OutputText:
    """A piece of an output. Offsets count all bytes that the stream ever had, dropped ones too.

    `text` begins at `offset`, later than asked where that has been dropped; read on at `next_offset`. A piece
    ends where a dropped part begins. `end` is as far as can be read now: `total`, or a little less while
    the last character has not come whole. `dropped` bytes are missing in the middle.
    """

    text: str
    offset: int
    next_offset: int
    total: int
    end: int
    dropped: int


def read_output(
    data_dir: Path,
    execution_id: str,
    *,
    stream: str = "combined",
    offset: int = 0,
    limit: int = 65_536,
    tail: bool = False,
) -> OutputText:
    """Up to `limit` bytes of "combined", "stdout" or "stderr" from `offset` on, or with `tail` the last ones.

    Bytes that are no UTF-8 become U+FFFD. Empty where nothing was written. May be called while it grows.

    Raises:
        InvalidInput: an unknown stream, a negative offset or limit.
    """
    if stream not in ("combined", *_STREAMS):
        raise InvalidInput("stream is combined, stdout or stderr")
    if offset < 0 or limit < 0:
        raise InvalidInput("offset and limit are not negative")
    tags = (_STREAMS[stream],) if stream in _STREAMS else tuple(_STREAMS.values())
    record = _Record(_segments(data_dir / paths.OUTPUTS / _safe(execution_id)), tags)
    if tail:
        offset = max(0, record.total - limit)
    begin, data = record.piece(offset, max(limit, 4))
    if tail or begin != offset:
        skipped = _continued(data)
        begin, data = begin + skipped, data[skipped:]
    whole = len(data) - _incomplete(data)
    at_end = begin + len(data) >= record.total
    # Kept back where the rest of the character is still to come, or stands in the next piece.
    if (at_end and not record.closed) or (whole and not record.missing_at(begin + len(data)) and not at_end):
        data = data[:whole]
    end = begin + len(data) if at_end else record.total
    return OutputText(data.decode(errors="replace"), begin, begin + len(data), record.total, end, record.dropped)


class _Segment:
    """One file of a record; its content is read when asked for."""

    __slots__ = ("_content", "_path", "number", "starts")

    def __init__(self, path: Path, starts: dict[bytes, int]) -> None:
        self.number = int(path.name)
        self.starts = starts
        self._path = path
        self._content: bytes | None = None

    def frames(self) -> Iterator[tuple[bytes, bytes]]:
        if self._content is None:
            self._content = b""
            with suppress(FileNotFoundError):  # deleted from the middle since it was listed
                self._content = self._path.read_bytes()
        place = _HEADER.size
        while place + _FRAME.size <= len(self._content):
            tag, length = _FRAME.unpack_from(self._content, place)
            place += _FRAME.size
            yield tag, self._content[place : place + length]
            place += length

    def of(self, *tags: bytes) -> bytes:
        return b"".join(data for tag, data in self.frames() if tag in tags)

    def start(self, tags: Sequence[bytes]) -> int:
        return sum(self.starts[tag] for tag in tags)

    @property
    def closed(self) -> bool:
        return any(tag == _END for tag, _ in self.frames())


class _Record:
    """All segments of an output, seen as one stream."""

    def __init__(self, segments: list[_Segment], tags: Sequence[bytes]) -> None:
        self._segments = segments
        self._tags = tags
        self._gaps: dict[int, int] = {0: segments[0].start(tags)} if segments else {}
        for before, after in pairwise(segments):
            if after.number != before.number + 1:
                end = before.start(tags) + len(before.of(*tags))
                self._gaps[end] = after.start(tags)
        self.total = segments[-1].start(tags) + len(segments[-1].of(*tags)) if segments else 0
        self.dropped = sum(after - before for before, after in self._gaps.items())
        self.closed = bool(segments) and segments[-1].closed

    def missing_at(self, place: int) -> bool:
        return self._gaps.get(place, place) > place

    def piece(self, offset: int, limit: int) -> tuple[int, bytes]:
        """Where the first byte at or after `offset` is, and up to `limit` bytes without a gap."""
        for before, after in self._gaps.items():
            if before <= offset < after:
                offset = after
        found: list[bytes] = []
        size = 0
        for place, segment in enumerate(self._segments):
            following = self._segments[place + 1] if place + 1 < len(self._segments) else None
            if following is not None and following.start(self._tags) <= offset:
                continue
            if size >= limit or (size and self.missing_at(offset + size)):
                break
            start = segment.start(self._tags)
            if start > offset + size:  # the one before was deleted after it had been listed
                if size:
                    break
                offset = start
            data = segment.of(*self._tags)[offset + size - start :]
            found.append(data[: limit - size])
            size += len(found[-1])
        return offset, b"".join(found)


def _segments(folder: Path) -> list[_Segment]:
    """What there is of a record, oldest first."""
    try:
        names = [name for name in os.listdir(folder) if name.isdecimal()]
    except FileNotFoundError:
        return []
    segments: list[_Segment] = []
    for name in sorted(names, key=int):
        path = folder / name
        with suppress(FileNotFoundError), path.open("rb") as file:
            header = file.read(_HEADER.size)
            # Shorter: it is being begun at this moment, or its writer died there.
            if len(header) == _HEADER.size:
                _, stdout, stderr = _HEADER.unpack(header)
                segments.append(_Segment(path, {b"o": stdout, b"e": stderr}))
    return segments


def _safe(execution_id: str) -> str:
    """The id as the name of a folder.

    Raises:
        InvalidInput: it could lead out of the outputs.
    """
    if not _SAFE_ID.fullmatch(execution_id) or execution_id.strip(".") == "":
        raise InvalidInput(f"{execution_id!r:.80} is no execution id")
    return execution_id


def _joined(chunks: Sequence[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Neighbours of the same stream as one."""
    for tag, group in groupby(chunks, key=itemgetter(0)):
        yield tag, b"".join(data for _, data in group)


def _continued(data: bytes) -> int:
    """How many bytes at the beginning belong to a character that began before."""
    count = 0
    while count < min(3, len(data)) and data[count] & 0xC0 == 0x80:
        count += 1
    return count


def _incomplete(data: bytes) -> int:
    """How many bytes at the end are the beginning of a character."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return back if needed > back else 0
    return 0
