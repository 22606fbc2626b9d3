"""A call that stays open: what happens meanwhile, page by page, with progress notifications as its live overlay.

Where the work asks its user something, the client's host is given the question; where it cannot ask, the call ends.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import anyio

from vespera_exec.app.views import EventPage, InputView
from vespera_exec.errors import VesperaError
from vespera_exec.model.enums import EventType, ExecutionStatus
from vespera_exec.model.events import mapping
from vespera_exec.server.mcp.asking import DIALOG_SECONDS, SILENT_SECONDS

if TYPE_CHECKING:
    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import Json, Status
    from vespera_exec.model.principal import Caller
    from vespera_exec.server.mcp.asking import Host

Report = Callable[[float, str], Awaitable[None]]
"""Tells the client that the call has come to (progress, message); does nothing where it did not ask."""

# Twice this is still less than the 15 s after which somebody should have heard something.
HEARTBEAT_SECONDS = 7.0
_MESSAGE_CHARACTERS = 200


class SeenPage(EventPage):
    """A page, and the questions that the run waits for."""

    inputs: list[InputView] | None = None
    more_inputs: int | None = None
    """How many more questions there are than the answer has room for."""
    input_error: str | None = None
    """Why the user's answer to one was not taken."""


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
        """Each event of the executions that is new; of progress reports in a row, only the last."""
        news = [event for event in page.events if event["execution_id"] and event["cursor"] > self.cursor]
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
    host: Host
    heartbeat_seconds: float = HEARTBEAT_SECONDS

    async def pages(self, any_id: str, *, cursor: int, wait_ms: int, max_events: int) -> AsyncGenerator[SeenPage]:
        """Pages of at most `max_events` after `cursor`, in order, until the run is over or `wait_ms` have passed.

        The first comes in any case, and may be empty. A question that nobody answers ends them, too, unless it was
        asked before `cursor` and is not put to the user now; the time that he takes for it is not counted.

        Raises:
            TaskNotFound: the id is unknown.
            NextRound: the client is to ask its user, and to call again.
        """
        overlay = Overlay(self.report, cursor)
        began = anyio.current_time()
        first, deadline, wait = cursor, began + wait_ms / 1000, 0.0
        end = began + max(DIALOG_SECONDS if self.host.sees_progress else SILENT_SECONDS, wait_ms / 1000)
        news, looks = False, True
        while True:
            page = await self.vespera.read_events(
                self.caller, any_id, cursor=cursor, wait_ms=math.ceil(wait * 1000), max_events=max_events
            )
            status = await self._parked(any_id, page, looks=looks)
            # A plan runs while a step waits for an answer, and has news all the time.
            looks = status is not None and status.plan is not None
            inputs = status.inputs if status is not None else None
            if wait_ms and status is not None and inputs and (askable := self.host.askable(inputs)):
                await overlay.show(page)
                asked_at = anyio.current_time()
                left = max(0.0, deadline - asked_at)
                if self.host.way == "rounds":
                    self.host.ask_between_rounds(status, askable, cursor=first, left_ms=left * 1000)
                else:
                    news = await self._ask(status, askable, overlay, until=end)
                deadline, wait = min(anyio.current_time() + left, end), 0.0
                continue
            news = news or (any(map(_asks, page.events)) if looks else bool(page.events))
            over = page.done or anyio.current_time() >= deadline or bool(inputs and news)
            yield SeenPage.model_construct(**dict(page), inputs=inputs or None, input_error=self.host.refused)
            if over:
                return
            # Only what does not end the call: some clients take a notification for late that comes with the answer.
            if page.events:
                await overlay.show(page)
            elif wait >= self.heartbeat_seconds:
                await overlay.beat()
            cursor = page.next_cursor
            wait = min(max(0.0, deadline - anyio.current_time()), self.heartbeat_seconds)

    async def _parked(self, any_id: str, page: EventPage, *, looks: bool) -> Status | None:
        """The status of a run that may be waiting for an answer; with `looks` also of one that does not stand still."""
        # The page's status may be older than its events.
        if page.done or not (looks or page.status == ExecutionStatus.PAUSED or any(map(_asks, page.events))):
            return None
        return await self.vespera.get_status(self.caller, any_id)

    async def _ask(self, status: Status, inputs: list[InputView], overlay: Overlay, *, until: float) -> bool:
        """Put each question to the user in a dialog, one after the other. False where other clients do."""
        assert status.session is not None
        run_id = status.session.run_id
        put = False
        for question in inputs:

            async def answered(key: str = question.key) -> None:
                with suppress(VesperaError):  # the call goes on, and says what is wrong
                    while True:
                        run = await self.vespera.get_run(self.caller, run_id)
                        if all(each.key != key for each in run.inputs):
                            return
                        await self.vespera.run_changed(run, within=self.heartbeat_seconds)
                        await overlay.beat()

            seconds = until - anyio.current_time()
            if seconds > 0:
                overlay.said = _short(f"waiting for an answer: {question.message}")
                put |= await self.host.ask_in_dialog(
                    self.vespera, self.caller, run_id, question, seconds=seconds, answered=answered
                )
        return put


def line(event: dict[str, Json]) -> str:
    """An event as one readable line."""
    progress = mapping(event.get("progress"))
    parts: list[str] = [event["step_id"]] if event.get("step_id") else []
    if _is_progress(event) and isinstance(percentage := progress.get("percentage"), int | float):
        parts.append(f"{percentage:.0f} %")
    if new := mapping(event.get("status")).get("new"):
        parts.append(str(new))
    if event["type"] == EventType.APPROVAL_REQUESTED:
        parts.append(f"asks: {mapping(event.get('details')).get('message')}")
    elif message := event.get("message") or progress.get("message"):
        parts.append(str(message))
    text = " · ".join(parts) or str(event["type"]).replace("_", " ")
    return _short(text)


def _short(text: str) -> str:
    return " ".join(text.split())[:_MESSAGE_CHARACTERS]


def _asks(event: dict[str, Json]) -> bool:
    if event["type"] == EventType.STEP_WAITING:
        return mapping(event.get("details")).get("for") == "answer"
    return event["type"] == EventType.APPROVAL_REQUESTED


def _is_progress(event: dict[str, Json]) -> bool:
    return event["type"] == EventType.PROGRESS_UPDATE
