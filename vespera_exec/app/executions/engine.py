"""The execution engine of document 003, for Python programs: plans in, results out, everything in between."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

import anyio

from vespera_exec.app import views
from vespera_exec.app.plans.source import read_plan_file
from vespera_exec.app.plans.views import ExecutePlan
from vespera_exec.app.service import Vespera
from vespera_exec.errors import Conflict, ExecutionNotFound, InvalidInput, InvalidTransitionError, TaskNotFound
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.events import mapping
from vespera_exec.model.plans.plan import ExecutionPlan
from vespera_exec.model.principal import Caller, allowed_env
from vespera_exec.model.task import Task
from vespera_exec.model.transitions import allowed_from

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from roles.definition import Role
    from vespera_exec.app.executions.result import ExecutionResult, ExecutionUpdate
    from vespera_exec.app.executions.subscriptions import UpdateCallback
    from vespera_exec.engine.plans.strategies import RecoveryStrategy
    from vespera_exec.model.capacity import Allocation, CapacityRequirement
    from vespera_exec.model.events import Json
    from vespera_exec.model.plans.restoring import ExecutionCheckpoint
    from vespera_exec.settings import Settings

S = ExecutionStatus

Plan: TypeAlias = ExecutionPlan | Mapping[str, Any] | str | Path | Task | views.NewTask
"""A plan, the content of a plan file, the path of one, or a task, which is a plan of one step."""

_PAUSE_WAIT_MS = 25_000
_CANCEL_SECONDS = 10.0
"""The ladder ends the work in 5; the rest is for a slow disk."""


class ExecutionEngine(Protocol):
    """What document 003 promises of an engine: `DefaultExecutionEngine` is one, and a test double may be another."""

    async def execute(self, plan: Plan, *, variables: Mapping[str, Json] | None = None) -> ExecutionResult: ...
    async def submit(self, plan: Plan, *, variables: Mapping[str, Json] | None = None) -> str: ...
    async def pause(self, execution_id: str, *, reason: str = ...) -> None: ...
    async def resume(self, execution_id: str, *, reason: str = ...) -> None: ...
    async def cancel(self, execution_id: str, *, reason: str = ...) -> None: ...
    async def get_status(self, execution_id: str) -> ExecutionStatus: ...
    async def get_result(self, execution_id: str) -> ExecutionResult | None: ...
    def monitor(self, execution_id: str) -> AsyncIterator[ExecutionUpdate]: ...
    async def create_checkpoint(
        self, execution_id: str, *, metadata: Mapping[str, Json] | None = None
    ) -> ExecutionCheckpoint: ...
    async def restore_from_checkpoint(self, checkpoint_id: str) -> str: ...
    def add_recovery_strategy(self, strategy: RecoveryStrategy) -> None: ...
    def remove_recovery_strategy(self, strategy_id: str) -> None: ...
    async def allocate_resources(
        self, requirements: Sequence[CapacityRequirement], *, wait_ms: int = 0
    ) -> list[Allocation]: ...
    async def release_resources(self, resource_ids: Sequence[str]) -> None: ...
    def subscribe(self, execution_id: str, callback: UpdateCallback) -> None: ...
    def unsubscribe(self, execution_id: str, callback: UpdateCallback) -> None: ...


class DefaultExecutionEngine:
    """Executes plans over an open `Vespera`; several may stand over the same one.

    An id is that of an execution, as `submit` gives it, of one of its attempts, or of its task. Every method that takes
    one raises ExecutionNotFound where it is unknown, unless it says otherwise. Cancelling a call that waits leaves the
    execution as it is.
    """

    def __init__(self, vespera: Vespera, *, caller: Caller | None = None) -> None:
        self.vespera = vespera
        self.caller = caller or Caller(cwd=os.getcwd(), env=allowed_env(os.environ))

    @classmethod
    @asynccontextmanager
    async def open(
        cls, path: str | Path | None = None, *, settings: Settings | None = None, roles: Sequence[Role] = ()
    ) -> AsyncGenerator[Self]:
        """Own a data directory for as long as the context lasts. `roles` are the program's own.

        Raises:
            DataDirectoryInUse: a daemon or another program owns it.
            StoreUnavailable, StoreTooNew, StoreDamaged: it cannot be opened; the hint says what to do.
        """
        async with Vespera.open(path, settings=settings, roles=roles) as vespera:
            yield cls(vespera)

    # lifecycle

    async def execute(self, plan: Plan, *, variables: Mapping[str, Json] | None = None) -> ExecutionResult:
        """Its result, however it ended; see `submit`."""
        execution_id = await self.submit(plan, variables=variables)
        await self.vespera.executions.ended(execution_id, self.caller)
        result = await self.vespera.executions.result(execution_id, self.caller)
        if result is None:
            raise ExecutionNotFound(execution_id)
        return result

    async def submit(self, plan: Plan, *, variables: Mapping[str, Json] | None = None) -> str:
        """Start it; its id, as soon as that is on disk. `variables` take the place of the plan's own of these names.

        Raises:
            InvalidPlan: names all that is wrong with the plan.
            InvalidInput: inputs are refused, or a task is given variables.
            RoleNotFound, PermissionDenied: a role is unknown, or not open to the caller.
            Conflict: the queue is full.
            StoreUnavailable: nothing new can be written now.
        """
        if isinstance(plan, Task | views.NewTask):
            if variables:
                raise InvalidInput("a task has inputs and no variables")
            return await self._submit_task(plan)
        if isinstance(plan, ExecutionPlan):
            plan = replace(plan, variables={**plan.variables, **(variables or {})})
            return (await self.vespera.plans.start(self.caller, plan)).run_id
        if isinstance(plan, Mapping):
            content = dict(plan)
        else:
            content = mapping(await anyio.to_thread.run_sync(read_plan_file, Path(plan)))
        request = ExecutePlan(plan=content, variables=dict(variables or {}))
        return (await self.vespera.plans.execute(self.caller, request)).run_id

    async def pause(self, execution_id: str, *, reason: str = "User requested") -> None:
        """Returns when it stands still.

        Work in the loop stops at its next pause point; whoever gives up waiting for it leaves the pause asked for.

        Raises:
            InvalidTransitionError: it has ended, does so meanwhile, or has not begun.
            PauseUnsupported: it has processes, which this system cannot stop.
            StoreUnavailable: a pause could not be written now.
        """
        while True:
            with _known(execution_id):
                answer = await self.vespera.pause(self.caller, execution_id, reason=reason, wait_ms=_PAUSE_WAIT_MS)
            if not answer.success:
                raise _refused(answer.status, "paused", answer.reason)
            if not answer.pending:
                return

    async def resume(self, execution_id: str, *, reason: str = "User requested") -> None:
        """Let it go on; no effect where it does.

        Raises:
            InvalidTransitionError: it has ended, has not begun, or waits for an answer.
            StoreUnavailable: a resume could not be written now; it stays paused.
        """
        with _known(execution_id):
            answer = await self.vespera.resume(self.caller, execution_id, reason=reason)
        if not answer.success:
            raise _refused(answer.status, "resumed", answer.reason)

    async def cancel(self, execution_id: str, *, reason: str = "User requested") -> None:
        """Returns when it is CANCELLED and nothing of it is left, which takes 5 s at most; no effect where it is.

        Raises:
            InvalidTransitionError: it has ended otherwise, or does so already.
            Conflict: its end is not on disk in time; it is still CANCELLING.
        """
        with _known(execution_id):
            answer = await self.vespera.cancel(self.caller, execution_id, reason=reason)
        if not answer.success:
            if answer.status == S.CANCELLED:
                return
            raise _refused(answer.status or S.IDLE, "cancelled", answer.reason)
        with anyio.move_on_after(_CANCEL_SECONDS) as scope:
            await self.vespera.executions.ended(execution_id, self.caller)
        if scope.cancelled_caught:
            raise Conflict(f"{execution_id} is still being cancelled", hint="look at its status again")

    # where it stands

    async def get_status(self, execution_id: str) -> ExecutionStatus:
        """IDLE for a task that was never executed. An end is told once it is on disk."""
        return await self.vespera.executions.status(execution_id, self.caller)

    async def get_execution_status(self, execution_id: str) -> views.Status:
        """Where it stands, with its progress: what every door shows of it."""
        with _known(execution_id):
            return await self.vespera.get_status(self.caller, execution_id)

    async def get_result(self, execution_id: str) -> ExecutionResult | None:
        """How it ended; None where it has not, or where nothing has this id."""
        try:
            return await self.vespera.executions.result(execution_id, self.caller)
        except ExecutionNotFound:
            return None

    def monitor(self, execution_id: str) -> AsyncGenerator[ExecutionUpdate]:
        """Where it stands now, then each change, at most one update in 0.1 s, up to one that is terminal.

        What has ended gives this one alone. `contextlib.aclosing` closes it where the loop is left early.
        """
        return self.vespera.executions.updates(execution_id, self.caller)

    def subscribe(self, execution_id: str, callback: UpdateCallback) -> None:
        """Call `callback(update)` in the loop with what `monitor` gives; it may be async.

        In order, one call after the other; a fault of the callback is logged. It ends by itself after the terminal
        update. An id that is unknown is logged, and nothing is called.
        """
        self.vespera.executions.subscriptions.add(execution_id, self.caller, callback)

    def unsubscribe(self, execution_id: str, callback: UpdateCallback) -> None:
        """Call it no more; no effect where it was not subscribed."""
        self.vespera.executions.subscriptions.remove(execution_id, callback)

    # checkpoints and recovery

    async def create_checkpoint(
        self, execution_id: str, *, metadata: Mapping[str, Json] | None = None
    ) -> ExecutionCheckpoint:
        """A place in its log to which it can go back, with the state that it has there.

        Raises:
            Conflict: it has not begun, or has ended, or is ending.
            InvalidInput: the metadata are not JSON, or take more than 16 KiB.
            StoreUnavailable: nothing can be written now.
        """
        with _known(execution_id):
            made = await self.vespera.checkpoints.create(self.caller, execution_id, metadata=metadata)
        return await self.vespera.checkpoints.materialised(self.caller, made.checkpoint_id)

    async def restore_from_checkpoint(self, checkpoint_id: str) -> str:
        """Put its execution back to it; the id of the execution that goes on from there.

        That is the same one, as long as it has not ended, else a new one.

        Raises:
            CheckpointNotFound: nothing has this id.
            Conflict: it is ending, has not begun, or has been recovered as often as it may.
            StoreUnavailable: nothing can be written now.
        """
        return (await self.vespera.checkpoints.restore(self.caller, checkpoint_id)).run_id

    def add_recovery_strategy(self, strategy: RecoveryStrategy) -> None:
        """Ask it about steps that fail from now on, after those that are there.

        Raises:
            Conflict: there is one of this id.
            InvalidInput: it has no id, or is for no error.
        """
        self.vespera.strategies.add(strategy)

    def remove_recovery_strategy(self, strategy_id: str) -> None:
        """Ask it no more; no effect where there is none of this id."""
        self.vespera.strategies.remove(strategy_id)

    # capacity

    async def allocate_resources(
        self, requirements: Sequence[CapacityRequirement], *, wait_ms: int = 0
    ) -> list[Allocation]:
        """Take all of it at once, or nothing; it is held until `release_resources`, or until the directory is closed.

        Raises:
            InvalidInput: no pool can ever give it.
            Conflict: it was not free within `wait_ms`.
        """
        return await self.vespera.capacity.allocate(self.caller, requirements, wait_ms=wait_ms)

    async def release_resources(self, resource_ids: Sequence[str]) -> None:
        """Give it back; ids that are not held are passed over."""
        await self.vespera.capacity.release(self.caller, resource_ids)

    async def _submit_task(self, given: Task | views.NewTask) -> str:
        new = given if isinstance(given, views.NewTask) else _described(given)
        task = await self.vespera.create_task(self.caller, new)
        request = views.Execute(task_id=task.task_id, idempotency_key=new.idempotency_key)
        return (await self.vespera.execute_task(self.caller, request)).run_id


@contextmanager
def _known(execution_id: str) -> Generator[None]:
    """Where the use cases know no such task, the engine knows no such execution."""
    try:
        yield
    except TaskNotFound:
        raise ExecutionNotFound(execution_id) from None


def _described(task: Task) -> views.NewTask:
    """A task that was made in memory, as a request for one like it."""
    record = task.record
    return views.NewTask(
        title=record.title,
        description=record.description,
        role=record.assigned_role,
        inputs=dict(record.inputs),
        priority=record.priority,
        max_retries=record.max_retries,
        sla_seconds=record.sla_seconds,
    )


def _refused(status: str, wanted: str, reason: str | None) -> InvalidTransitionError:
    allowed = tuple(each.value for each in allowed_from(S(status)))
    refusal = InvalidTransitionError(status, wanted, allowed)
    refusal.hint = reason or ""
    return refusal
