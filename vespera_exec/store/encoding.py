"""How facts become bytes and integers in the database, and back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import orjson

from vespera_exec.model.jsonable import jsonable

if TYPE_CHECKING:
    from vespera_exec.model.events import ExecutionEvent, Json

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def encode_event(event: ExecutionEvent) -> bytes:
    """The event's JSON without its cursor, which only the commit knows.

    The same as of `to_stream_message`, but stamps and enums are left to the encoder: this is the hottest line.
    """
    message = {
        "event_id": event.event_id,
        "timestamp": event.timestamp,
        "type": event.event_type,
        "status": {"old": event.old_status, "new": event.new_status},
        "message": event.message,
        "phase": event.phase,
        "progress": event.progress_data,
        "details": event.details,
        "task_id": event.task_id,
        "execution_id": event.execution_id,
        "step_id": event.step_id,
        "level": event.level,
        "sequence": event.sequence,
    }
    try:
        return orjson.dumps(message)
    except TypeError:
        return orjson.dumps(jsonable(message))


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
