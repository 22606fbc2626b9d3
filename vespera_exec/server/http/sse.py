"""Server-sent events: the log of one run as a stream that a client may leave and resume at any event."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import anyio
import orjson

from vespera_exec.errors import InvalidInput, VesperaError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.types import Receive, Scope, Send

    from vespera_exec.app.views import Json

EVENT_STREAM = "text/event-stream"
HEARTBEAT_SECONDS = 15.0
log = logging.getLogger(__name__)


def wants_event_stream(accept: str) -> bool:
    """An Accept header names `text/event-stream`; wildcards do not ask for it."""
    return any(part.partition(";")[0].strip().lower() == EVENT_STREAM for part in accept.split(","))


def resume_cursor(last_event_id: str | None, cursor: int) -> int:
    """Where to go on: a reconnecting client's `Last-Event-ID` wins over the cursor in its URL.

    Raises:
        InvalidInput: the id is none of ours.
    """
    if last_event_id is None:
        return cursor
    if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) <= 18):
        raise InvalidInput("Last-Event-ID is not a cursor of this server")
    return int(last_event_id)


class LogEvent(Protocol):
    """What the app hands over for one line of the log."""

    @property
    def cursor(self) -> int: ...

    @property
    def event_type(self) -> str: ...

    def message(self) -> dict[str, Json]: ...


class EventStream:
    """An ASGI response: each event with its cursor as `id`, then `event: done` with what `summary` says.

    A comment goes out after `heartbeat_seconds` without an event. Ends early, without `done`, when the
    client goes or the server closes; an error in mid-stream is an `event: error` before the end.
    """

    def __init__(
        self,
        events: AsyncIterator[LogEvent],
        summary: Callable[[], Awaitable[dict[str, Json]]],
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self._events = events
        self._summary = summary
        self._heartbeat_seconds = heartbeat_seconds
        self._spoke = anyio.Event()
        self._writing = anyio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with anyio.create_task_group() as group:
            group.start_soon(self._until_gone, receive, group.cancel_scope)
            group.start_soon(self._heartbeats, send)
            await self._pump(send)
            group.cancel_scope.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        # The first bytes tell a client at once that it is connected.
        await self._write(send, b": connected\n\n")
        try:
            async for event in self._events:
                await self._write(send, _record(event.event_type, orjson.dumps(event.message()), event.cursor))
            await self._write(send, _record("done", orjson.dumps(await self._summary())))
        except VesperaError as error:
            log.warning("An event stream ended early: %s", error)
            await self._write(send, _record("error", orjson.dumps(error.to_dict())))

    async def _heartbeats(self, send: Send) -> None:
        while True:
            self._spoke = anyio.Event()
            with anyio.move_on_after(self._heartbeat_seconds):
                await self._spoke.wait()
                continue
            await self._write(send, b": still here\n\n")

    async def _until_gone(self, receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _write(self, send: Send, body: bytes) -> None:
        async with self._writing:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        self._spoke.set()


def _record(event_type: str, data: bytes, cursor: int | None = None) -> bytes:
    head = b"" if cursor is None else b"id: %d\n" % cursor
    return b"%sevent: %s\ndata: %s\n\n" % (head, event_type.encode(), data)
