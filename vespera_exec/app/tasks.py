"""Finding what an id stands for: the live task in this process, else what the store knows of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from vespera_exec.app.plugins import progress_metrics
from vespera_exec.errors import TaskNotFound
from vespera_exec.model.enums import TaskStatus
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from vespera_exec.engine.jobs import Run
    from vespera_exec.model.clock import Clock
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.principal import Caller
    from vespera_exec.model.progress import Progress
    from vespera_exec.model.record import TaskRecord
    from vespera_exec.settings import Settings
    from vespera_exec.store.queries import Unfinished
    from vespera_exec.store.store import Store

_LONGEST_ID = 100
_HOT_EVENTS = 0
"""Kept in memory per session: none, since every door reads the feed, whose ring holds the last events of all."""


@dataclass(frozen=True, slots=True)
class Found:
    """A task, and the session that is meant: the one named, else the current, else the last one.

    `session` is set where it is live in this process; `life` and `progress` are its state either way.
    """

    record: TaskRecord
    life: Lifecycle | None
    progress: Progress | None
    session: ExecutionSession | None
    by_session: bool


def meant(found: Found, run: Run | None) -> ExecutionSession | None:
    """The live session that is to be acted on: the id of an earlier attempt means the active run."""
    if run is not None and found.life is not None and found.life.run_id == run.run_id:
        return run.session
    return found.session


class LiveTasks:
    """The tasks of this process: one object per task, however many ask, held while its run is active."""

    def __init__(self, store: Store, settings: Settings, clock: Clock) -> None:
        self._store = store
        self._options: dict[str, Any] = {
            "sink": store.journal,
            "clock": clock,
            "cancelled_status": TaskStatus(settings.cancelled_task_status),
            "max_events_in_memory": _HOT_EVENTS,
            "custom_metrics": progress_metrics(),
        }
        self._known: WeakValueDictionary[str, Task] = WeakValueDictionary()
        self._held: dict[str, Task] = {}

    def make(self, **fields: Any) -> Task:
        """A new task, recorded; `fields` as `Task` takes them."""
        task = Task(**fields, **self._options)
        self._known[task.id] = task
        return task

    def adopt(self, left: Unfinished) -> Task:
        """A stored task with a session that has not ended, live again."""
        task = Task.restored(left.task, **self._options)
        session = ExecutionSession.restored(
            left.lifecycle, left.progress, measured_at=left.measured_at, ledger=task.ledger, max_events=_HOT_EVENTS
        )
        task.execution.adopt(session)
        self._known[task.id] = task
        return task

    def known(self, task_id: str) -> Task | None:
        """The task, where it is live in this process."""
        return self._known.get(task_id)

    def hold(self, task: Task) -> None:
        """Keep it in memory until `release`."""
        self._held[task.id] = task

    def release(self, task: Task) -> None:
        self._held.pop(task.id, None)

    def held(self) -> list[Task]:
        """Those whose run is active."""
        return list(self._held.values())

    async def get(self, any_id: str, caller: Caller) -> Task:
        """The live task of an id.

        Raises:
            TaskNotFound: nothing has this id.
        """
        record = (await self.find(any_id, caller)).record
        if (task := self._known.get(record.task_id)) is None:
            task = Task.restored(record, **self._options)
            self._known[record.task_id] = task
        return task

    async def find(self, any_id: str, caller: Caller) -> Found:
        """What a task id, a session id or a unique prefix of either stands for, among what `caller` sees.

        Raises:
            TaskNotFound: nothing.
            InvalidInput: several things.
        """
        if (task := self._known.get(any_id)) and caller.sees(task.record.principal) and _is_whole(task):
            return _live(task, None)
        if not any_id.isascii() or len(any_id) > _LONGEST_ID:
            raise TaskNotFound(any_id[:_LONGEST_ID].encode("ascii", "backslashreplace").decode())
        for task in self._held.values():
            session = task.execution.current_session
            if session is not None and session.session_id == any_id and caller.sees(task.record.principal):
                return _live(task, any_id)
        known = await self._store.queries.get_known(any_id)
        if known is None or not caller.sees(known.task.principal):
            # Of what is not his he is told as of what does not exist, after the same work.
            any_id = await self._completed(any_id, caller)
            known = await self._store.queries.get_known(any_id)
        if known is None or not caller.sees(known.task.principal):
            raise TaskNotFound(any_id)
        task_id = known.task.task_id
        execution_id = any_id if any_id != task_id else None
        if (task := self._known.get(task_id)) is not None:
            session = task.execution.current_session
            is_meant = _is_whole(task) if execution_id is None else session and session.session_id == execution_id
            if is_meant:
                return _live(task, execution_id)
        record = task.record if task is not None else known.task
        life, progress = known.execution if known.execution is not None else (None, None)
        return Found(record, life, progress, None, execution_id is not None)

    async def _completed(self, beginning: str, caller: Caller) -> str:
        """The one id that begins so.

        Raises:
            TaskNotFound: there is none.
            InvalidInput: there are several.
        """
        located = await self._store.queries.locate(beginning, principal=caller.sees_only)
        if located is None:
            raise TaskNotFound(beginning)
        task_id, execution_id = located
        return execution_id or task_id

    async def record(self, task_id: str) -> TaskRecord:
        """
        Raises:
            TaskNotFound: it does not exist.
        """
        if task := self._known.get(task_id):
            return task.record
        record = await self._store.queries.get_task(task_id)
        if record is None:
            raise TaskNotFound(task_id)
        return record


def _is_whole(task: Task) -> bool:
    """Its last execution, if any, is in memory with it; not where the task was only read to be changed."""
    here = task.execution.current_session or task.execution.last_session
    return here is not None or task.record.last_execution_id is None


def _live(task: Task, execution_id: str | None) -> Found:
    session = task.execution.current_session or task.execution.last_session
    by_session = execution_id is not None
    if session is None:
        return Found(task.record, None, None, None, by_session)
    return Found(task.record, session.lifecycle, session.progress, session, by_session)
