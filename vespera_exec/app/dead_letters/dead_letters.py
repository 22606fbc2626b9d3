"""Tasks that have failed and that nobody tries again by itself: listed, put back, or taken off the list.

The list is no place of its own: it is the tasks that are open or FAILED, are not executed, and whose last run ended
FAILED or TIMED_OUT. The tasks of a plan's steps are not in it, since what becomes of them is their plan's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from vespera_exec.app import views
from vespera_exec.app.callers import require
from vespera_exec.app.dead_letters import views as shown
from vespera_exec.app.dead_letters.views import MAX_AT_ONCE
from vespera_exec.app.kept import request_kept
from vespera_exec.errors import Conflict, InvalidInput, StoreUnavailable, VesperaError
from vespera_exec.model.enums import ExecutionStatus, TaskStatus
from vespera_exec.model.plans.plan import PLAN_ROLE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from vespera_exec.app.starting import Starter
    from vespera_exec.app.tasks import LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.engine.jobs import Job
    from vespera_exec.model.events import Json
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.principal import Caller
    from vespera_exec.model.task import Task
    from vespera_exec.settings import Settings
    from vespera_exec.store.plan_queries import DeadLetter
    from vespera_exec.store.store import Store

_FAILED = (ExecutionStatus.FAILED, ExecutionStatus.TIMED_OUT)


class DeadLetters:
    """Of each caller those that it sees. `restore_plan` starts a plan again with what it has done already."""

    def __init__(
        self,
        *,
        store: Store,
        engine: Engine,
        tasks: LiveTasks,
        starter: Starter,
        settings: Settings,
        restore_plan: Callable[[Caller, str], Awaitable[views.Handle]],
    ) -> None:
        self._store = store
        self._engine = engine
        self._tasks = tasks
        self._starter = starter
        self._settings = settings
        self._restore_plan = restore_plan
        self._deciding = anyio.Lock()

    async def list(
        self, caller: Caller, *, role: str | None = None, limit: int = 50, page: str | None = None
    ) -> shown.DeadLetterPage:
        """What has failed and is not tried again by itself, the last first; `page` comes from the last page.

        Raises:
            InvalidInput: a limit outside 1 to 200, a page token that is not ours.
        """
        require(caller, "read")
        if not 1 <= limit <= 200:
            raise InvalidInput("limit is between 1 and 200")
        await self._settled()
        found = await self._store.queries.dead_letters(
            principal=caller.sees_only, role=role, limit=limit, page_token=page
        )
        return shown.DeadLetterPage(
            dead_letters=[_view(each) for each in found.items], next_page=found.next_token, total=found.total
        )

    async def requeue(
        self,
        caller: Caller,
        task_ids: Sequence[str] = (),
        *,
        all: bool = False,
        role: str | None = None,
        limit: int = MAX_AT_ONCE,
    ) -> shown.Requeued:
        """Execute them again, with their retries reset; on disk when this returns.

        Each runs with the role, the priority and the timeout of its last run, and where our own user asks, also for
        who had asked for that; a plan keeps what it has done. One that cannot be put back stays in the list, and the
        answer says why.

        Raises:
            InvalidInput: neither or both of `task_ids` and `all`, or too many.
            StoreUnavailable: nothing new can be written now.
        """
        require(caller, "operate")
        self._store.journal.check_writable()
        requeued: list[shown.RequeuedTask] = []
        refused: list[shown.Refused] = []
        jobs: list[Job] = []
        async with self._deciding:
            for task_id in await self._meant(caller, task_ids, every=all, role=role, limit=limit):
                try:
                    started, job = await self._put_back(task_id, caller)
                except VesperaError as why:
                    refused.append(_refused(task_id, why))
                    continue
                requeued.append(started)
                jobs += [job] if job is not None else []
            try:
                await self._store.journal.sync()
            except StoreUnavailable:
                for job in jobs:
                    job.session.request_cancellation("Its acceptance could not be written")
                raise
        return shown.Requeued(requeued=requeued, refused=refused, left=await self._left(caller, role) if all else None)

    async def discard(
        self,
        caller: Caller,
        task_ids: Sequence[str] = (),
        *,
        all: bool = False,
        role: str | None = None,
        limit: int = MAX_AT_ONCE,
    ) -> shown.Discarded:
        """Take them off the list: they become CANCELLED, and can be executed again as any task; on disk then.

        Raises:
            InvalidInput: neither or both of `task_ids` and `all`, or too many.
            StoreUnavailable: nothing can be written now.
        """
        require(caller, "operate")
        self._store.journal.check_writable()
        discarded: list[str] = []
        refused: list[shown.Refused] = []
        async with self._deciding:
            for task_id in await self._meant(caller, task_ids, every=all, role=role, limit=limit):
                try:
                    task, life = await self._dead(task_id, caller)
                    with task.ledger:
                        _check_still(task, life)
                        task.reopen()
                        task.update_status(TaskStatus.CANCELLED, "Discarded")
                except VesperaError as why:
                    refused.append(_refused(task_id, why))
                    continue
                discarded.append(task.id)
            await self._store.journal.sync()
        return shown.Discarded(
            discarded=discarded, refused=refused, left=await self._left(caller, role) if all else None
        )

    async def _meant(
        self, caller: Caller, task_ids: Sequence[str], *, every: bool, role: str | None, limit: int
    ) -> Sequence[str]:
        """
        Raises:
            InvalidInput: neither or both of `task_ids` and `every`, or too many.
        """
        if every == bool(task_ids):
            raise InvalidInput("give either task_ids, or all")
        if role is not None and not every:
            raise InvalidInput("role narrows down all; task_ids say which ones by themselves")
        if len(task_ids) > MAX_AT_ONCE or not 1 <= limit <= MAX_AT_ONCE:
            raise InvalidInput(f"one call decides about 1 to {MAX_AT_ONCE:,} tasks")
        await self._settled()
        if not every:
            return task_ids
        found = await self._store.queries.dead_letters(principal=caller.sees_only, role=role, limit=limit)
        return [each.task.task_id for each in found.items]

    async def _dead(self, any_id: str, caller: Caller) -> tuple[Task, Lifecycle]:
        """A task that may be in the list (see `_check_still`), and its last execution.

        Raises:
            TaskNotFound: there is none that this caller sees.
            Conflict: it is not in the list.
        """
        task = await self._tasks.get(any_id, caller)
        if task.record.parent_execution_id is not None:
            raise Conflict(
                f"task {task.id} is step {task.record.step_id} of a plan", hint="decide about the plan, not its step"
            )
        last = await self._store.queries.get_execution(task.record.last_execution_id or "")
        if last is None or last[0].status not in _FAILED:
            raise Conflict(f"task {task.id} is {task.status.value}, and its last run has not failed")
        return task, last[0]

    async def _put_back(self, any_id: str, caller: Caller) -> tuple[shown.RequeuedTask, Job | None]:
        """What was started, and the job where the engine was given one here.

        Raises:
            VesperaError: why it stays where it is.
        """
        task, life = await self._dead(any_id, caller)
        role = life.role_name or task.record.assigned_role
        if self._engine.queued >= self._settings.max_queued:
            raise Conflict(f"the queue is full ({self._engine.queued} wait)", hint="try again later")
        asked = request_kept(await self._store.queries.last_request(task.id))
        # Our own user may do what any other may, and stands elsewhere; the others do what they may themselves.
        asker = self._starter.caller(asked) if asked and caller.is_local else caller
        _check_still(task, life)
        if role == PLAN_ROLE:
            handle = await self._restore_plan(asker, task.id)
            return shown.RequeuedTask(task_id=task.id, run_id=handle.run_id, session_id=handle.session_id), None
        job = await self._starter.start(
            asker,
            views.Execute(
                task_id=task.id,
                role=role,
                priority=life.priority,
                timeout_seconds=asked.get("timeout_seconds"),
                capacity=asked.get("capacity"),
            ),
        )
        with task.ledger:
            task.execution.reset_retries()  # also of one that was open already
        self._tasks.hold(job.task)
        self._engine.submit(job)
        session = job.session
        return shown.RequeuedTask(task_id=task.id, run_id=session.run_id, session_id=session.session_id), job

    async def _left(self, caller: Caller, role: str | None) -> int:
        return (await self._store.queries.dead_letters(principal=caller.sees_only, role=role, limit=1)).total

    async def _settled(self) -> None:
        """What was decided before is on disk, where the list is read."""
        if self._store.journal.fault is None:
            await self._store.journal.sync()


def _view(letter: DeadLetter) -> shown.DeadLetter:
    task, life = letter.task, letter.lifecycle
    error: Mapping[str, Json] = life.error
    ended_at = life.completed_at or task.updated_at or task.created_at
    assert ended_at is not None
    role = life.role_name or task.assigned_role
    return shown.DeadLetter(
        task_id=task.task_id,
        title=task.title,
        role=role,
        is_plan=role == PLAN_ROLE,
        run_id=life.run_id,
        session_id=life.execution_id,
        attempts=life.attempt,
        retry_count=task.retry_count,
        error={
            "code": error.get("code") or life.status.value.upper(),
            "message": error.get("message") or task.last_error or "",
        },
        ended_at=ended_at,
    )


def _check_still(task: Task, last: Lifecycle) -> None:
    """
    Raises:
        Conflict: it is executed, or somebody has decided about it since that run ended.
    """
    record = task.record
    if record.current_execution_id is not None or record.last_execution_id != last.execution_id:
        raise Conflict(f"task {task.id} is executed again already")
    if task.status not in (TaskStatus.TODO, TaskStatus.FAILED):
        raise Conflict(f"task {task.id} is {task.status.value}; only what has failed, and is open or failed, is listed")


def _refused(task_id: str, why: VesperaError) -> shown.Refused:
    return shown.Refused(task_id=task_id, error_code=why.error_code, reason=why.message)
