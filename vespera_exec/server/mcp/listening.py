"""What a `subscriptions/listen` stream carries of tasks: `notifications/tasks`, and news of resources that show one."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import anyio
from mcp.server.mcpserver import require_client_extension
from mcp.shared.exceptions import MCPError
from mcp.shared.subscriptions import SUBSCRIPTION_ID_META_KEY
from mcp_types import INVALID_PARAMS
from pydantic import ValidationError

from vespera_exec.app.callers import current_caller
from vespera_exec.errors import InvalidInput, NotFound, PermissionDenied, StoreError
from vespera_exec.model.events import mapping
from vespera_exec.server.mcp.adapter import ListenSession, notify
from vespera_exec.server.mcp.tasks import IDENTIFIER, VERSION, served, status_of

if TYPE_CHECKING:
    from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
    from mcp.server.mcpserver import MCPServer

    from vespera_exec.app import views
    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import Json
    from vespera_exec.model.principal import Caller
    from vespera_exec.server.mcp.tasks import TasksExtension

MOST_TASKS: Final = 256
"""Tasks, and resources, of one stream."""
_EVERY_SECONDS = 0.2
_LOOK_SECONDS = 60.0
_RETRY_SECONDS = 1.0
_GOODBYE_SECONDS = 0.5
_WRITING_SECONDS = 0.02  # from the end of a handler to its result on the wire

_Watch = Callable[[], Coroutine[Any, Any, None]]


async def close_streams(server: MCPServer[Any]) -> None:
    """The listen streams of `server` end in order."""
    for each in server.middleware:
        if isinstance(each, Listening):
            await each.close()


class Listening:
    """Server middleware: pumps what changes onto the streams that the SDK's own handler opens and closes.

    Each stream wakes up by the log and tells the state as it is then, so a client that does not read holds
    up nobody, and gets the last state only. While a task is working it is told at most once in `every_seconds`;
    questions and the end at once. `shown_in` says which task (by any id of it) a resource shows, if any.
    """

    def __init__(
        self,
        vespera: Vespera,
        tasks: TasksExtension,
        *,
        shown_in: Callable[[str], str | None] | None = None,
        every_seconds: float = _EVERY_SECONDS,
    ) -> None:
        self._vespera = vespera
        self._tasks = tasks
        self._shown_in = shown_in
        self._every_seconds = every_seconds
        self._closing = anyio.Event()
        self._closed = anyio.Event()
        self._open = 0

    async def close(self) -> None:
        """Ends each stream with its last word, the result; to be called before the doors cut what is open."""
        self._closing.set()
        with anyio.move_on_after(_GOODBYE_SECONDS, shield=True):
            if self._open:
                await self._closed.wait()
                await anyio.sleep(_WRITING_SECONDS)

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        if ctx.method != "subscriptions/listen" or ctx.protocol_version != VERSION:
            return await call_next(ctx)
        wanted = mapping(mapping(ctx.params).get("notifications"))
        caller = current_caller.get()
        agreed: dict[str, Json] = {}
        watches: list[_Watch] = []
        if wanted.get("taskIds") not in (None, []):
            require_client_extension(ctx, IDENTIFIER)
            agreed["taskIds"] = await self._seen(caller, _names(wanted["taskIds"], "taskIds"))
            watches += [partial(self._tell_task, ctx, caller, run_id) for run_id in agreed["taskIds"]]
        if self._shown_in is not None and wanted.get("resourceSubscriptions"):
            for uri in _names(wanted["resourceSubscriptions"], "resourceSubscriptions"):
                if (shown := self._shown_in(uri)) is not None:
                    watches.append(partial(self._tell_resource, ctx, caller, uri, shown))
        self._open += 1
        try:
            return await self._beside(ctx, call_next, agreed, watches)
        finally:
            self._open -= 1
            if self._closing.is_set() and not self._open:
                self._closed.set()

    async def _seen(self, caller: Caller, run_ids: Iterable[str]) -> list[str]:
        """Those that are there for the caller."""
        seen: list[str] = []
        for run_id in run_ids:
            try:
                await self._vespera.get_run(caller, run_id)
            except (NotFound, PermissionDenied):
                continue
            seen.append(run_id)
        return seen

    async def _tell_task(self, ctx: ServerRequestContext[Any, Any], caller: Caller, run_id: str) -> None:
        """The state now, then each change, to the end of the run."""
        told: tuple[Json, ...] | None = None
        told_at = -math.inf
        while True:
            try:
                run = served(await self._vespera.get_run(caller, run_id), ctx)
            except NotFound:
                return  # it has expired
            except StoreError:
                await anyio.sleep(_RETRY_SECONDS)
                continue
            state = _state(run)
            left = told_at + self._every_seconds - anyio.current_time()
            if state != told and (left <= 0 or status_of(run) != "working"):
                await _send(ctx, "notifications/tasks", self._tasks.detailed(run))
                told, told_at = state, anyio.current_time()
            if run.done:
                return
            await self._vespera.run_changed(run, within=_LOOK_SECONDS if state == told else left)

    async def _tell_resource(self, ctx: ServerRequestContext[Any, Any], caller: Caller, uri: str, any_id: str) -> None:
        """That it is another than before, whenever its task has an event."""
        cursor: int | None = None
        while True:
            try:
                if cursor is None:
                    cursor = (await self._vespera.get_status(caller, any_id)).cursor
                heard = await self._vespera.event_after(caller, any_id, cursor=cursor, within=_LOOK_SECONDS)
            except (NotFound, InvalidInput, PermissionDenied):
                return  # what is not there does not change
            except StoreError:
                await anyio.sleep(_RETRY_SECONDS)
                continue
            if heard is not None:
                cursor = heard
                await _send(ctx, "notifications/resources/updated", {"uri": uri})
                await anyio.sleep(self._every_seconds)

    async def _beside(
        self, ctx: ServerRequestContext[Any, Any], call_next: CallNext, agreed: dict[str, Json], watches: list[_Watch]
    ) -> HandlerResult:
        """The SDK's handler, and beside it the watches, from its acknowledgement to the end of either."""
        result: HandlerResult = {"resultType": "complete", "_meta": {SUBSCRIPTION_ID_META_KEY: ctx.request_id}}
        fault: MCPError | ValidationError | None = None
        async with anyio.create_task_group() as group:

            async def close() -> None:
                await self._closing.wait()
                group.cancel_scope.cancel()

            def told() -> None:
                for watch in (*watches, close):
                    group.start_soon(watch)

            session = cast("Any", ListenSession(ctx.session, agreed, told))
            try:
                result = await call_next(replace(ctx, session=session))
            except (MCPError, ValidationError) as raised:
                fault = raised  # raised in here, it would leave as a group
            group.cancel_scope.cancel()
        if fault is not None:
            raise fault
        return result


async def _send(ctx: ServerRequestContext[Any, Any], method: str, params: dict[str, Json]) -> None:
    meta = {**mapping(params.get("_meta")), SUBSCRIPTION_ID_META_KEY: ctx.request_id}
    await notify(ctx, method, {**params, "_meta": meta})


def _state(run: views.Run) -> tuple[Json, ...]:
    """What a listener is told of; that an event has been written is none of it."""
    asked = tuple(each.key for each in run.inputs)
    return run.done, run.status, run.session_id, run.phase, run.percentage, run.message, asked


def _names(given: Json, what: str) -> Iterable[str]:
    """
    Raises:
        MCPError: -32602, it is no list of strings, or too long.
    """
    if not isinstance(given, list) or not all(isinstance(each, str) for each in cast("list[Json]", given)):
        raise MCPError(INVALID_PARAMS, f"notifications.{what} must be a list of strings")
    names = dict.fromkeys(cast("list[str]", given))
    if len(names) > MOST_TASKS:
        raise MCPError(INVALID_PARAMS, f"notifications.{what} has {len(names)} entries; at most {MOST_TASKS}")
    return names
