"""A decision as the writer takes it: its events encoded, and its rows."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from vespera_exec.model.enums import EventType
from vespera_exec.model.ledger import Row
from vespera_exec.store.encoding import encode_event, micros

if TYPE_CHECKING:
    from vespera_exec.model.ledger import Batch

# Plain tuples: one of each is made for every event and append.
Fact = tuple[str, str, str, str | None, int, bytes, int | None, int, int]
"""Stream, type, task, execution, sequence, body, stamp, 1 where it ends the execution, checksum.

Up to the body it is laid out as a `StoredEvent`, which has the cursor where a fact has its stream.
"""

Decision = tuple[list[Fact], tuple[Row, ...]]
"""A batch: its events encoded, and its rows."""


def prepared(batch: Batch) -> Decision:
    """Encode a batch, where it is decided: the writer's thread, which shares the interpreter, has less to do."""
    facts: list[Fact] = []
    stamp, at = None, None
    for event in batch.events:
        body = b"%b" % encode_event(event)  # a copy: orjson's own keeps the kilobyte that it was written in
        if event.timestamp is not stamp:  # the facts of one decision share theirs
            stamp = event.timestamp
            at = micros(stamp)
        status = event.new_status
        facts.append(
            (
                event.execution_id or event.task_id,
                event.event_type._value_,
                event.task_id,
                event.execution_id,
                event.sequence,
                body,
                at,
                1 if status is not None and status.is_terminal and event.event_type is EventType.STATUS_CHANGE else 0,
                zlib.crc32(body),
            )
        )
    return facts, batch.rows
