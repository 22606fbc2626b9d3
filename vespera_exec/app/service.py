"""The use cases, each once: what every door shows a skin of."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import anyio
from anyio.from_thread import check_cancelled

from vespera_exec import __version__
from vespera_exec.app import checks, doctor, handles, present, views
from vespera_exec.app.answers import Answers
from vespera_exec.app.callers import require, require_local
from vespera_exec.app.checkpoints.checkpoints import Checkpoints
from vespera_exec.app.dead_letters.dead_letters import DeadLetters
from vespera_exec.app.inputs import Inputs
from vespera_exec.app.pausing import Pausing
from vespera_exec.app.plans.plans import Plans
from vespera_exec.app.plans.step_cache import StepCache
from vespera_exec.app.tasks import meant
from vespera_exec.app.token_views import Visitor
from vespera_exec.app.workers.workers import Workers
from vespera_exec.errors import (
    InvalidInput,
    RoleNotFound,
    StoreDamaged,
    StoreUnavailable,
)
from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.plans.plan import PLAN_ROLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from roles.definition import Role
    from roles.registry import RoleRegistry
    from vespera_exec.app.access import Access
    from vespera_exec.app.opening import Purpose
    from vespera_exec.app.starting import Starter
    from vespera_exec.app.tasks import LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.errors import StoreError
    from vespera_exec.model.principal import Caller
    from vespera_exec.settings import Settings
    from vespera_exec.store.owners import Tenure
    from vespera_exec.store.store import Store


class Vespera(Answers):
    """Tasks, executions, events and results of one data directory.

    Made by `Vespera.open`. Every use case takes the caller first; an id is a task id, a session id or a
    unique prefix (six characters at least) of either.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        engine: Engine,
        roles: RoleRegistry,
        tasks: LiveTasks,
        starter: Starter,
        access: Access,
        owners: Sequence[Tenure] = (),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(
            settings=settings, store=store, engine=engine, roles=roles, tasks=tasks, starter=starter, clock=clock
        )
        self.version = __version__
        self.access = access
        self.workers = Workers(store=store, engine=engine, roles=roles, shifts=starter.shifts, settings=settings)
        self._owners = owners
        self._pausing = Pausing(store, engine, tasks)
        self.strategies = engine.strategies
        self.plans = Plans(
            store=store,
            engine=engine,
            tasks=tasks,
            starter=starter,
            settings=settings,
            pausing=self._pausing,
            cache=StepCache(store, roles),
        )
        self.checkpoints = Checkpoints(store, engine, tasks, starter, self.plans)
        self.dead_letters = DeadLetters(
            store=store,
            engine=engine,
            tasks=tasks,
            starter=starter,
            settings=settings,
            restore_plan=self.checkpoints.restore_ended,
        )
        self._inputs = Inputs(store, engine, tasks, self._reading)

    @classmethod
    def open(
        cls,
        path: str | Path | None = None,
        *,
        settings: Settings | None = None,
        purpose: Purpose = "library",
        roles: Sequence[Role] = (),
    ) -> AbstractAsyncContextManager[Vespera]:
        """Own a data directory for as long as the context lasts.

        `roles` are the program's own. Given here, and not added later, they are there when what an earlier owner left
        goes on.

        Raises:
            InvalidInput: a role has the name of another.
            DataDirectoryInUse: a daemon or another program owns it.
            StoreUnavailable, StoreTooNew, StoreDamaged: it cannot be opened; the hint says what to do.
        """
        from vespera_exec.app.opening import opened

        return opened(path, settings=settings, purpose=purpose, roles=roles)

    # making and starting

    async def create_task(self, caller: Caller, new: views.NewTask) -> views.TaskView:
        """A task that waits to be executed; on disk when this returns.

        Raises:
            InvalidInput: title, description or inputs are refused.
            RoleNotFound, PermissionDenied: the role named is unknown, or not this caller's.
            Conflict: the idempotency key stands for another request.
            StoreUnavailable: nothing new can be written now.
        """
        require(caller, "operate")
        self._store.journal.check_writable()
        async with self._starter.once(caller, "create", new) as known:
            if known is not None:
                return present.task(await self._tasks.record(known.task_id), repeated=True)
            task = self._starter.new_task(caller, new)
            if new.idempotency_key is not None:
                with task.ledger:
                    task.remember_key(
                        caller.principal, "create", new.idempotency_key, digest=checks.request_digest(new)
                    )
            await self._store.journal.sync()
        return present.task(task.record)

    async def execute_task(self, caller: Caller, request: views.Execute) -> views.Handle:
        """Queue a run; its acceptance is on disk when this returns, or its end, within `wait_ms`.

        Raises:
            InvalidInput: neither or both of `task_id` and `title`, or values that the role refuses.
            TaskNotFound, RoleNotFound, PermissionDenied.
            AlreadyExecuting: the task runs.
            Conflict: the queue is full, or the idempotency key stands for another request.
            StoreUnavailable: nothing new can be written now.
        """
        require(caller, "operate")
        self._store.journal.check_writable()
        async with self._starter.once(caller, "execute", request) as known:
            if known is not None:
                return await handles.repeated(known, self._engine, self._store)
            checks.room(self._engine.queued, self.settings)
            cursor = self._store.journal.head
            job = await self.plans.again(caller, request) or await self._starter.start(caller, request)
            run = await handles.accepted(job, tasks=self._tasks, engine=self._engine, store=self._store)
        return await handles.within(run, cursor, wait_ms=request.wait_ms)

    async def cancel(
        self, caller: Caller, any_id: str, *, reason: str = "User requested", wait_ms: int = 0
    ) -> views.Cancelled:
        """Ask the running execution to stop; on disk when this returns, and over, within `wait_ms`.

        Refused (`success` False, with the reason) where nothing runs or it is already completing.

        Raises:
            TaskNotFound: the id is unknown.
        """
        require(caller, "operate")
        found = await self._tasks.find(any_id, caller)
        run = self._engine.run_of(found.record.task_id)
        session = meant(found, run)
        if session is None or session.lifecycle.status.is_terminal:
            life = found.life
            why = f"it has ended ({life.status.value})" if life else "it was never executed"
            return views.Cancelled(
                success=False,
                message="Cancellation not possible",
                reason=why,
                status=life.status.value if life else ExecutionStatus.IDLE.value,
                session_id=life.execution_id if life else None,
            )
        before = session.lifecycle.status
        accepted = session.request_cancellation(checks.reason(reason))
        if not accepted:
            return views.Cancelled(
                success=False,
                message="Cancellation not possible",
                reason=f"it is {session.lifecycle.status.value} already",
                status=session.lifecycle.status.value,
                session_id=session.session_id,
            )
        if wait_ms and run is not None:
            with anyio.move_on_after(wait_ms / 1000):
                await run.done.wait()
        await self._cancel_kept(session.session_id)
        found = self._written(await self._tasks.find(session.session_id, caller))
        life = found.life or session.lifecycle
        return views.Cancelled(
            success=True,
            message="Cancellation requested",
            status=life.status.value,
            session_id=life.execution_id,
            already_requested=before is ExecutionStatus.CANCELLING,
            rung=life.outcome.get("rung"),
        )

    async def pause(
        self, caller: Caller, any_id: str, *, reason: str = "User requested", wait_ms: int = 5000
    ) -> views.Paused:
        """Stop the running execution where it stands, until `resume`; its clock and its timeout stop with it.

        Processes are stopped at once, work in the loop at its next pause point: where that was not reached within
        `wait_ms`, the answer is `pending`. Refused (`success` False, with the reason) where nothing runs.

        Raises:
            TaskNotFound: the id is unknown.
            PauseUnsupported: it has processes, which this system cannot stop.
            StoreUnavailable: a pause could not be written now.
        """
        require(caller, "operate")
        return await self._pausing.pause(any_id, caller, reason=reason, wait_ms=wait_ms)

    async def resume(self, caller: Caller, any_id: str, *, reason: str = "User requested") -> views.Resumed:
        """Let a paused execution go on, or take back a pause that is pending; on disk when this returns.

        Raises:
            TaskNotFound: the id is unknown.
            StoreUnavailable: a resume could not be written now; it stays paused.
        """
        require(caller, "operate")
        return await self._pausing.resume(any_id, caller, reason=reason)

    async def answer_input(
        self, caller: Caller, any_id: str, answers: Mapping[str, views.InputAnswer]
    ) -> views.Answered:
        """Answer questions that a run has asked, by their keys; on disk when this returns.

        Keys that are unknown, or answered already, are ignored. Once the last question is answered it goes on; an
        approval that is not given ends it, FAILED with code APPROVAL_REJECTED.

        Raises:
            TaskNotFound: the id is unknown.
            InvalidInput: the content of one does not fit its form; nothing is recorded.
            StoreUnavailable: an answer could not be written now.
        """
        require(caller, "operate")
        return await self._inputs.answer(any_id, caller, answers)

    async def list_inputs(self, caller: Caller, *, limit: int = 20) -> views.OpenInputs:
        """The questions that wait for somebody, over all tasks that the caller sees, oldest first.

        Raises:
            InvalidInput: a limit outside 1 to 200.
        """
        require(caller, "read")
        return await self._inputs.open(caller, limit=limit)

    # of the process

    @property
    def is_idle(self) -> bool:
        """Nothing runs, waits or backs off."""
        return self._engine.idle

    @property
    def replaced(self) -> StoreError | None:
        """Why the log, though it is sound, takes nothing from this process ever again: another owner has it, say."""
        fault = self._store.journal.broken
        return None if isinstance(fault, StoreDamaged) else fault

    def describe(
        self, *, url: str | None = None, tcp_problem: str | None = None, connections: int = 0
    ) -> views.DaemonView:
        fault = self._store.journal.refusal
        return views.DaemonView(
            version=self.version,
            pid=os.getpid(),
            started_at=self.started_at,
            data_dir=str(self.settings.data_dir),
            url=url,
            tcp_problem=tcp_problem,
            running=self._engine.active,
            queued=self._engine.queued,
            head=self._store.journal.head,
            connections=connections,
            store_fault=str(fault) if fault else None,
            damage=next((each.what for each in self._store.upkeep.findings or () if each.severity == "error"), None),
            work=present.work(self._tasks.held(), resumes=self._resumes, limit=20),
            owners=present.owners(self._owners),
        )

    def visit(self, caller: Caller, *, url: str | None) -> Visitor:
        """What `describe` is for somebody who does not see everything."""
        return Visitor(version=self.version, url=url, principal=caller.principal, scopes=sorted(caller.scopes))

    async def doctor(self, caller: Caller) -> views.Checked:
        """What is wrong with the database, the roles and the rest that only the owner may look at.

        Raises:
            PermissionDenied: the caller is not the user who started it.
        """
        require_local(caller)
        found = await anyio.to_thread.run_sync(
            lambda: doctor.contents(self._store.database, self.settings.roles_dir, ask=check_cancelled)
        )
        return views.Checked(checks=[views.CheckView(**asdict(each)) for each in found])

    async def backup(self, caller: Caller, request: views.Backup) -> views.BackedUp:
        """Copy the database to a file, while it is written.

        Raises:
            PermissionDenied: the caller is not the user who started it.
            InvalidInput, Conflict, StoreError: as `Store.backup`.
        """
        require_local(caller)
        target = checks.absolute_path(request.path)
        report = await self._store.backup(target, overwrite=request.overwrite)
        return views.BackedUp(path=str(report.path), size_bytes=report.size_bytes)

    async def _cancel_kept(self, session_id: str) -> None:
        """A cancel that has been accepted is in the log, or noted beside it where the disk takes no more."""
        try:
            self._store.journal.check_writable()
            await self._store.journal.sync()
        except StoreUnavailable:
            await anyio.to_thread.run_sync(self._store.cancels.note, session_id)

    def _resumes(self, role_name: str) -> bool:
        if role_name == PLAN_ROLE:
            return True
        try:
            role = self.roles.get(role_name)
        except (RoleNotFound, InvalidInput):
            return False
        return role.runner == "external" or role.on_interrupt == "resume"
