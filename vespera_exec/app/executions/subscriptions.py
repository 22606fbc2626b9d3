"""Callbacks that are told of an execution until it ends."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from vespera_exec.app.executions.result import ExecutionUpdate
from vespera_exec.errors import Conflict, VesperaError
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

UpdateCallback = Callable[[ExecutionUpdate], Awaitable[None] | None]
Updates = Callable[[str, Caller], AsyncGenerator[ExecutionUpdate]]

_log = logging.getLogger(__name__)


class UpdateSubscriptions:
    """Each subscription is a task of its own, that calls its callback in the loop, one update after the other."""

    def __init__(self, updates: Updates) -> None:
        self._updates = updates
        self._group: TaskGroup | None = None
        self._known: dict[tuple[str, UpdateCallback], anyio.CancelScope] = {}

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        async with anyio.create_task_group() as group:
            self._group = group
            try:
                yield
            finally:
                self._group = None
                group.cancel_scope.cancel()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, any_id: str, caller: Caller, callback: UpdateCallback) -> None:
        """Tell `callback` of the execution from now on; no effect where it is told already.

        Raises:
            Conflict: the data directory is closed.
        """
        if self._group is None:
            raise Conflict("the data directory is closed")
        if (any_id, callback) not in self._known:
            scope = self._known[any_id, callback] = anyio.CancelScope()
            self._group.start_soon(self._tell, any_id, caller, callback, scope)

    def remove(self, any_id: str, callback: UpdateCallback) -> bool:
        """Tell it nothing more; False where it was not told. The callback may do so itself: that call ends in order."""
        scope = self._known.pop((any_id, callback), None)
        if scope is None:
            return False
        scope.cancel()
        return True

    async def _tell(self, any_id: str, caller: Caller, callback: UpdateCallback, waiting: anyio.CancelScope) -> None:
        key = (any_id, callback)
        try:
            async with aclosing(self._updates(any_id, caller)) as updates:
                while self._known.get(key) is waiting:
                    update = None
                    with waiting:
                        update = await anext(updates, None)
                    if update is None or self._known.get(key) is not waiting:
                        return
                    await _call(callback, update)
                    if self._known.get(key) is waiting:
                        waiting = self._known[key] = anyio.CancelScope()
        except VesperaError as fault:
            _log.warning("Nobody is told of %s any more: %s", any_id, fault)
        finally:
            if self._known.get(key) is waiting:
                del self._known[key]


async def _call(callback: UpdateCallback, update: ExecutionUpdate) -> None:
    try:
        answer = callback(update)
        if answer is not None and inspect.isawaitable(answer):
            await answer
    except Exception:  # noqa: BLE001 - the boundary to a stranger's callback: its fault is not the execution's
        _log.exception("A callback failed on an update of %s", update.execution_id)
