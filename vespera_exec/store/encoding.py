"""How facts become bytes and integers in the database, and back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import orjson

from vespera_exec.model.events import ExecutionEvent, Json
from vespera_exec.model.jsonable import jsonable

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def encode_event(event: ExecutionEvent) -> bytes:
    """The event's JSON without its cursor, which only the commit knows."""
    message = event.to_stream_message()
    del message["cursor"]
    return encode(message)


def encode(value: Json) -> bytes:
    """JSON. What JSON cannot hold is replaced, never refused: the fact has been decided already."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return orjson.dumps(jsonable(value))


def with_cursor(body: bytes, cursor: int) -> bytes:
    """A stored body as it goes out: with its place in the log."""
    return b'%b,"cursor":%d}' % (body[:-1], cursor)


def micros(moment: datetime | None) -> int | None:
    """Microseconds since 1970; a naive moment is taken for UTC."""
    if moment is None:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // _MICROSECOND


def moment_of(stamp: int) -> datetime:
    return _EPOCH + timedelta(microseconds=stamp)
