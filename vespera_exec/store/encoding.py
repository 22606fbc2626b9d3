"""How facts become bytes and integers in the database, and back."""

from __future__ import annotations

from dataclasses import MISSING, fields
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import orjson

from vespera_exec.model.enums import ProgressType
from vespera_exec.model.jsonable import jsonable
from vespera_exec.model.lifecycle import Lifecycle

if TYPE_CHECKING:
    from vespera_exec.model.events import ExecutionEvent, Json
    from vespera_exec.model.progress import Progress, ProgressState

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LIFECYCLE = tuple(
    (each.name, each.default_factory() if each.default_factory is not MISSING else each.default)
    for each in fields(Lifecycle)
)
"""Its fields, and what each of them is where nothing is said; `execution_id` always is."""
UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What decoding bytes that a disk has changed can come to."""


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
    return encode(message)


def encode_progress(progress: Progress) -> bytes:
    """What `Progress.from_dict` reads, without what it puts there by itself: most of it, mostly."""
    document: dict[str, Json] = {
        "execution_id": progress.execution_id,
        "overall": _measured(progress.overall),
        "reached": progress.reached,
        "sequence": progress.sequence,
    }
    if progress.phases:
        document["phases"] = {phase._value_: _measured(state) for phase, state in progress.phases.items()}
    if progress.custom:
        document["custom"] = {name: _measured(state) for name, state in progress.custom.items()}
    if progress.completed:
        document["completed"] = True
    if progress.updated_at != progress.overall.updated_at:
        document["updated_at"] = progress.updated_at
    return encode(document)


def encode_lifecycle(life: Lifecycle) -> bytes:
    """What `Lifecycle.from_dict` reads, without what it puts there by itself: a third of it, mostly."""
    document: dict[str, Json] = {
        name: value
        for name, default in _LIFECYCLE
        if (value := getattr(life, name)) is not default and value != default
    }
    if life.phases:
        document["phases"] = [each._asdict() for each in life.phases]
    if life.lease is not None:
        document["lease"] = life.lease.to_dict()
    for name in ("inputs", "capacity"):
        if name in document:
            document[name] = [each.to_dict() for each in document[name]]
    return encode(document)


def encode(value: Json) -> bytes:
    """JSON. What JSON cannot hold is replaced, never refused: the fact has been decided already."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return orjson.dumps(jsonable(value))


def _measured(state: ProgressState) -> dict[str, Json]:
    document: dict[str, Json] = {"current": state.current, "message": state.message, "updated_at": state.updated_at}
    if state.progress_type is not ProgressType.PERCENTAGE:
        document["type"] = state.progress_type
    if state.total is not None:
        document["total"] = state.total
    if state.unit:
        document["unit"] = state.unit
    if state.details:
        document["details"] = dict(state.details)
    return document


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
