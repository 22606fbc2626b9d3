"""A call that stays open: what happens meanwhile, page by page, with progress notifications as its live overlay."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import anyio

from vespera_exec.model.enums import EventType
from vespera_exec.model.events import mapping

if TYPE_CHECKING:
    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import EventPage, Json
    from vespera_exec.model.principal import Caller

Report = Callable[[float, str], Awaitable[None]]
"""Tells the client that the call has come to (progress, message); does nothing where it did not ask."""

# Twice this is still less than the 15 s after which somebody should have heard something.
HEARTBEAT_SECONDS = 7.0
_MESSAGE_CHARACTERS = 200


@dataclass(slots=True)
class Overlay:
    """The notifications of one call. The protocol wants their progress to rise each time.

    It is the event's cursor; a heartbeat lies between the last cursor and the next.
    """

    report: Report
    cursor: int
    said: str = "waiting"
    beats: int = 0

    async def show(self, page: EventPage) -> None:
        """Each event of the executions; of progress reports in a row, only the last."""
        news = [event for event in page.events if event["execution_id"]]
        for event, following in pairwise([*news, None]):
            assert event is not None
            if following is not None and _is_progress(event) and _is_progress(following):
                continue
            self.cursor, self.beats, self.said = event["cursor"], 0, line(event)
            await self.report(self.cursor, self.said)

    async def beat(self) -> None:
        self.beats += 1
        await self.report(self.cursor + self.beats / (self.beats + 1), self.said)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """How long to look at whose events, and with whom to share them meanwhile."""

    vespera: Vespera
    caller: Caller
    report: Report
    heartbeat_seconds: float = HEARTBEAT_SECONDS

    async def pages(self, any_id: str, *, cursor: int, wait_ms: int, max_events: int) -> AsyncGenerator[EventPage]:
        """Pages of at most `max_events` after `cursor`, in order, until the run is over or `wait_ms` have passed.

        The first comes in any case, and may be empty.

        Raises:
            TaskNotFound: the id is unknown.
        """
        overlay = Overlay(self.report, cursor)
        deadline = anyio.current_time() + wait_ms / 1000
        while True:
            left = max(0.0, deadline - anyio.current_time())
            beats = left > self.heartbeat_seconds
            page = await self.vespera.read_events(
                self.caller,
                any_id,
                cursor=cursor,
                wait_ms=math.ceil(min(left, self.heartbeat_seconds) * 1000),
                max_events=max_events,
            )
            over = page.done or anyio.current_time() >= deadline
            yield page
            if over:
                return
            # Only what does not end the call: some clients take a notification for late that comes with the answer.
            if page.events:
                await overlay.show(page)
            elif beats:
                await overlay.beat()
            cursor = page.next_cursor


def line(event: dict[str, Json]) -> str:
    """An event as one readable line."""
    progress = mapping(event.get("progress"))
    parts: list[str] = []
    if _is_progress(event) and isinstance(percentage := progress.get("percentage"), int | float):
        parts.append(f"{percentage:.0f} %")
    if new := mapping(event.get("status")).get("new"):
        parts.append(str(new))
    if message := event.get("message") or progress.get("message"):
        parts.append(str(message))
    text = " · ".join(parts) or str(event["type"]).replace("_", " ")
    return " ".join(text.split())[:_MESSAGE_CHARACTERS]


def _is_progress(event: dict[str, Json]) -> bool:
    return event["type"] == EventType.PROGRESS_UPDATE
