"""Connections that read the database, and what every question to it needs."""

from __future__ import annotations

import base64
import binascii
import logging
import zlib
from collections import deque
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import aiosqlite
import anyio
import orjson

from vespera_exec.errors import InvalidInput, StoreDamaged
from vespera_exec.model.events import ExecutionEvent
from vespera_exec.model.jsonable import clean_text
from vespera_exec.model.progress import Progress
from vespera_exec.store import database
from vespera_exec.store.encoding import UNREADABLE, with_cursor
from vespera_exec.store.feed import StoredEvent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)

_CONNECTIONS = 2
_INT_LIMIT = 2**63
_T = TypeVar("_T")

EVENTS = (
    "SELECT e.cursor, e.sequence, e.type, e.checksum, e.body, s.name, t.name "
    "FROM log e JOIN streams s ON s.id = e.stream JOIN streams t ON t.id = s.task"
)
AND_THOSE_SINCE = (
    "since >= (SELECT max(since) FROM segments WHERE stream = {0} AND since <= {1} + 1) AND sequence > {1}"
)
"""Of the `log` of a stream: the events after a sequence, from the segment on in which they begin."""
PROGRESS = (
    "p.doc, (SELECT CAST(group_concat(checksum || ' ' || CAST(body AS TEXT), char(10)) AS BLOB) FROM "
    "(SELECT checksum, body FROM log "
    f"WHERE stream = p.id AND {AND_THOSE_SINCE.format('p.id', 'p.sequence')} ORDER BY since, sequence))"
)
"""Of a row `p` of `progress_docs`: two columns for `progress_of`, out of one snapshot."""


@dataclass(frozen=True, slots=True)
class Page(Generic[_T]):
    """Part of a list. `next_token` leads to the next part, None from the last; `total` counts the whole."""

    items: list[_T]
    next_token: str | None
    total: int


@dataclass(slots=True)
class Where:
    """Conditions that hold together, with their values."""

    conditions: list[str] = field(default_factory=list[str])
    values: list[Any] = field(default_factory=list[Any])

    def add(self, condition: str, *values: Any) -> None:
        self.conditions.append(condition)
        self.values.extend(values)

    def __str__(self) -> str:
        return f"WHERE {' AND '.join(self.conditions)}" if self.conditions else ""


def progress_of(execution_id: str, document: str | None, since: bytes | None, *, spare: bool = False) -> Progress:
    """How far an execution is: the whole that was last written, and the events since then folded into it.

    `spare`: an event that cannot be read is logged and counts for its place alone, so that whoever takes the execution
    over can go on.

    Raises:
        ValueError and others of `UNREADABLE`: they are not what anybody wrote, or do not follow each other.
    """
    if document is None:
        return Progress(execution_id=execution_id)
    progress = Progress.from_dict(orjson.loads(document))
    for line in since.split(b"\n") if since else ():
        try:
            event = _checked(line)
            if event.sequence != progress.sequence + 1 and not spare:
                raise ValueError(f"event {event.sequence} of {execution_id} does not follow {progress.sequence}")
            progress = progress.evolve(event)
        except UNREADABLE as fault:
            if not spare:
                raise
            place = progress.sequence + 1
            _log.warning(
                "Event %d of execution %s is damaged, and its progress lacks it: %s", place, execution_id, fault
            )
            progress = replace(progress, sequence=place)
    return progress


def _checked(line: bytes) -> ExecutionEvent:
    checksum, _, body = line.partition(b" ")
    if zlib.crc32(body) != int(checksum):
        raise ValueError("an event does not match its checksum")
    return ExecutionEvent.from_stream_message(orjson.loads(body))


class Reader:
    """Reads what is committed. A cancelled question harms nobody: its connection ends it by itself."""

    def __init__(self, path: Path, connections: Sequence[aiosqlite.Connection]) -> None:
        # A client may see it in a message, and needs not know where it lies.
        self._name = path.name
        self._free = deque(connections)
        self._turn = anyio.Semaphore(len(connections))

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path, *, connections: int = _CONNECTIONS) -> AsyncGenerator[Self]:
        """Connections of its own to a database that a journal has opened.

        Raises:
            StoreUnavailable, StoreDamaged: it cannot be read.
        """
        opened: list[aiosqlite.Connection] = []
        try:
            for _ in range(connections):
                connection = aiosqlite.Connection(lambda: database.open_for_reading(path), iter_chunk_size=64)
                try:
                    opened.append(await connection)
                except database.FAULTS as fault:
                    raise database.named(fault, path) from fault
            yield cls(path, opened)
        finally:
            with anyio.CancelScope(shield=True):  # an open connection would keep the interpreter from ending
                for connection in opened:
                    await connection.close()

    def _stored(self, rows: Iterable[tuple[Any, ...]]) -> list[StoredEvent]:
        events: list[StoredEvent] = []
        for cursor, sequence, kind, checksum, body, name, task in rows:
            if not isinstance(body, bytes) or zlib.crc32(body) != checksum:
                raise StoreDamaged(f"event {cursor} in {self._name} does not match its checksum")
            execution_id = name if name != task else None
            events.append(StoredEvent(cursor, kind, task, execution_id, sequence, with_cursor(body, cursor)))
        return events

    @contextmanager
    def _decoding(self) -> Generator[None]:
        """
        Raises:
            StoreDamaged: what was read is not what anybody wrote.
        """
        try:
            yield
        except UNREADABLE as fault:
            raise StoreDamaged(f"a row in {self._name} cannot be read: {fault!r:.80}") from fault

    async def _count(self, table: str, where: Where) -> int:
        rows = await self._rows(f"SELECT count(*) FROM {table} {where}", *where.values)
        return rows[0][0]

    async def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """One statement on a connection that nobody else uses meanwhile.

        Raises:
            StoreUnavailable, StoreDamaged: it cannot be read.
        """
        values = tuple(clean_text(value) if isinstance(value, str) else value for value in values)
        async with self._turn:
            connection = self._free.popleft()
            try:
                return list(await connection.execute_fetchall(sql, values))  # pyright: ignore[reportArgumentType, reportReturnType]
            except database.FAULTS as fault:
                raise database.named(fault, self._name) from fault
            finally:
                self._free.append(connection)


def one_of(name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise InvalidInput(f"cannot sort by {name!r}", hint=f"one of {', '.join(known)}")
    return name


def go_on(where: Where, key: str, row_id: str, order: str, token: str | None) -> None:
    """Only what comes after the page that ended with `token`."""
    if token is None:
        return
    try:
        given, value, last = orjson.loads(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, TypeError, binascii.Error):
        raise InvalidInput("the page token is none of ours", hint="start again without it") from None
    if given != order or not isinstance(value, int) or not isinstance(last, int):
        raise InvalidInput("the page token belongs to another list", hint="start again without it")
    if not (abs(value) < _INT_LIMIT and abs(last) < _INT_LIMIT):
        raise InvalidInput("the page token is none of ours", hint="start again without it")
    where.add(f"({key}, {row_id}) < (?, ?)", value, last)


def token_of(rows: Sequence[Sequence[Any]], limit: int, order: str) -> str | None:
    if len(rows) <= limit:
        return None
    value, row_id = rows[limit - 1][:2]
    return base64.urlsafe_b64encode(orjson.dumps([order, value, row_id])).decode()
