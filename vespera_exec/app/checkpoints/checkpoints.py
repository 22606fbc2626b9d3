"""Checkpoints: made of what runs, listed, looked into, and gone back to, in place or by a new execution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
import orjson

from vespera_exec.app import handles, views
from vespera_exec.app.callers import require
from vespera_exec.app.checkpoints.views import CheckpointList, CheckpointState, CheckpointView, Restored
from vespera_exec.app.kept import request_kept
from vespera_exec.app.tasks import meant
from vespera_exec.engine import endings
from vespera_exec.engine.jobs import PutBack
from vespera_exec.engine.plans.checkpoints import CheckpointReader
from vespera_exec.errors import (
    AlreadyExecuting,
    CheckpointNotFound,
    Conflict,
    ExecutionNotFound,
    InvalidInput,
    TaskNotFound,
)
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.events import Json, mapping
from vespera_exec.model.jsonable import exact_json
from vespera_exec.model.plans.as_json import plan_from_dict
from vespera_exec.model.plans.plan import PLAN_ROLE
from vespera_exec.model.plans.restoring import (
    ExecutionCheckpoint,
    ExecutionState,
    put_back,
    state_of_plan,
    state_of_task,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.app.plans.plans import Plans
    from vespera_exec.app.starting import Starter
    from vespera_exec.app.tasks import Found, LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.engine.jobs import Job, Run
    from vespera_exec.model.ledger import CheckpointRecord
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.plans.plan import ExecutionPlan
    from vespera_exec.model.plans.steps import StepState
    from vespera_exec.model.principal import Caller
    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.store.store import Store

S = ExecutionStatus

MAX_METADATA_BYTES = 16 * 1024
_OURS = ("step", "completed_steps")
_MOST = 200
_ENDING_SECONDS = 6.0
_SETTLING_SECONDS = 1.0
_ENDING = (S.CANCELLING, S.COMPLETING)


@dataclass(frozen=True, slots=True)
class _Place:
    """A checkpoint that the caller sees, with its execution and, where that has one, its plan."""

    record: CheckpointRecord
    found: Found
    life: Lifecycle
    asked: dict[str, Json]
    plan: ExecutionPlan | None


class Checkpoints:
    """The use cases, whichever door asks."""

    def __init__(self, store: Store, engine: Engine, tasks: LiveTasks, starter: Starter, plans: Plans) -> None:
        self._store = store
        self._engine = engine
        self._tasks = tasks
        self._starter = starter
        self._plans = plans
        self._reader = CheckpointReader(store)

    async def create(
        self, caller: Caller, any_id: str, *, metadata: Mapping[str, Json] | None = None
    ) -> CheckpointView:
        """Mark where the execution stands now; on disk when this returns.

        Raises:
            TaskNotFound: the id is unknown.
            Conflict: nothing of it runs: it was never started, has not begun, has ended or is ending.
            InvalidInput: the metadata are not JSON, or take more than 16 KiB.
            StoreUnavailable: it could not be written now.
        """
        require(caller, "operate")
        self._store.journal.check_writable()
        kept = _checked(metadata)
        found = await self._tasks.find(any_id, caller)
        session = meant(found, self._engine.run_of(found.record.task_id))
        if (why := _why_not(found, session)) is not None or session is None:
            raise Conflict(f"No checkpoint can be made: {why}", hint="a checkpoint is of what runs")
        coordinator = self._engine.coordinator(session.session_id)
        if coordinator is not None:
            record = coordinator.checkpoint("call", kept)
        else:
            record = session.mark_checkpoint("call", metadata=kept)
        await self._store.journal.sync()
        return CheckpointView(**_shown(record, found.record.task_id))

    async def take(
        self, caller: Caller, any_id: str, *, metadata: Mapping[str, Json] | None = None
    ) -> ExecutionCheckpoint:
        """As `create`, with the state."""
        made = await self.create(caller, any_id, metadata=metadata)
        return await self.materialised(caller, made.checkpoint_id)

    async def list(self, caller: Caller, any_id: str, *, limit: int = 50, before: str | None = None) -> CheckpointList:
        """The checkpoints of an execution, the newest first; of a task, those of its running or last one.

        Raises:
            TaskNotFound: the id is unknown.
            InvalidInput: a limit outside 1 to 200.
        """
        require(caller, "read")
        if not 1 <= limit <= _MOST:
            raise InvalidInput(f"limit is between 1 and {_MOST}")
        found = await self._tasks.find(any_id, caller)
        task_id = found.record.task_id
        if found.life is None:
            return CheckpointList(task_id=task_id, execution_id=None, checkpoints=[])
        await self._settled()
        execution = found.life.execution_id
        records = await self._store.queries.checkpoints(execution, limit=limit + 1, before=before)
        return CheckpointList(
            task_id=task_id,
            execution_id=execution,
            checkpoints=[CheckpointView(**_shown(each, task_id)) for each in records[:limit]],
            next_before=records[limit - 1].checkpoint_id if len(records) > limit else None,
        )

    async def get(self, caller: Caller, checkpoint_id: str) -> CheckpointState:
        """A checkpoint with its state.

        Raises:
            CheckpointNotFound: the caller sees none of this id.
        """
        require(caller, "read")
        place = await self._place(checkpoint_id, caller)
        state = await self._state(place)
        told = await anyio.to_thread.run_sync(state.to_dict)  # of a large plan it takes long for everybody else
        return CheckpointState(**_shown(place.record, place.life.task_id), state=told)

    async def materialised(self, caller: Caller, checkpoint_id: str) -> ExecutionCheckpoint:
        """As `get`, for a program.

        Raises:
            CheckpointNotFound: the caller sees none of this id.
        """
        require(caller, "read")
        place = await self._place(checkpoint_id, caller)
        return ExecutionCheckpoint(
            id=place.record.checkpoint_id,
            execution_id=place.record.execution_id,
            timestamp=place.record.created_at,
            state=await self._state(place),
            metadata=place.record.metadata,
        )

    async def restore(
        self, caller: Caller, checkpoint_id: str | None = None, *, any_id: str | None = None, wait_ms: int = 0
    ) -> Restored:
        """Go back to a checkpoint, or to the last one of a task or execution; on disk when this returns.

        An execution that has not ended goes back in place, through RECOVERING. For one that has, a new execution of the
        task begins from there, with what was completed kept.

        Raises:
            CheckpointNotFound: there is none.
            TaskNotFound: the id is unknown.
            InvalidInput: neither or both of `checkpoint_id` and `any_id`.
            AlreadyExecuting: another execution of the task runs.
            Conflict: it is ending, has not begun, or has been recovered as often as it may.
            RoleNotFound, PermissionDenied: a new execution would need a role that is not there, or not the caller's.
            StoreUnavailable: it could not be written now.
        """
        require(caller, "operate")
        self._store.journal.check_writable()
        if (checkpoint_id is None) == (any_id is None):
            raise InvalidInput("give either a checkpoint, or the task whose last checkpoint is meant")
        place = await self._place(checkpoint_id or await self._last(any_id or "", caller), caller)
        session, run = place.found.session, await self._active(place.life.task_id)
        if run is not None and run.session.session_id != place.record.execution_id:
            raise AlreadyExecuting(place.life.task_id, run.session.session_id)
        if session is not None and not session.lifecycle.status.is_terminal:
            return await self._in_place(place, session)
        return await self._anew(place, caller, wait_ms=wait_ms)

    async def restore_ended(self, caller: Caller, any_id: str) -> views.Handle:
        """A new execution of a plan that has ended, from where it ended: what was completed is not done again.

        Raises:
            TaskNotFound: the id is unknown.
            Conflict: it has not ended, or was never executed, or has no plan.
            AlreadyExecuting: another execution of the task runs.
            RoleNotFound, PermissionDenied.
            StoreUnavailable: it could not be written now.
        """
        require(caller, "operate")
        self._store.journal.check_writable()
        found = await self._tasks.find(any_id, caller)
        run = await self._active(found.record.task_id)
        if run is not None:
            raise AlreadyExecuting(found.record.task_id, run.session.session_id)
        if found.life is None or not found.life.status.is_terminal:
            raise Conflict("It was never executed")
        asked, plan = await self._asked(found.life.run_id)
        board = await self._store.queries.plan_state(found.life.execution_id)
        if plan is None or board is None:
            raise Conflict("It has no plan", hint="execute the task again")
        head, steps = board
        then = {state.step_id: state for state in steps}
        life = found.life
        job = await self._plan_again(life, caller, asked, plan, then, variables=head.variables, origin=None)
        run, cursor = await self._submitted(job)
        return handles.handle(run.session.lifecycle, cursor, done=False)

    # inside

    async def _active(self, task_id: str) -> Run | None:
        """The run of a task; one whose end is decided is let go first."""
        run = self._engine.run_of(task_id)
        if run is not None and run.session.lifecycle.status.is_terminal:
            with anyio.move_on_after(_SETTLING_SECONDS):
                await run.done.wait()
            run = self._engine.run_of(task_id)
        return run

    async def _in_place(self, place: _Place, session: ExecutionSession) -> Restored:
        cursor = self._store.journal.head
        if (why := _why_not(place.found, session)) is not None:
            raise Conflict(f"It cannot go back: {why}", hint="wait for its end, then restore again")
        coordinator = await self._engine.opened(session.session_id)
        if place.plan is None:
            await self._put_back(place, session)
        elif coordinator is not None:
            replay = await self._reader.board_at(place.plan, place.record)
            arrived = await coordinator.restore(
                replay.states, replay.state.variables, checkpoint_id=place.record.checkpoint_id
            )
            if not arrived:
                raise Conflict(f"It did not go back: it is {session.lifecycle.status.value}, decided meanwhile")
        else:
            raise Conflict("It cannot go back: it is about to end, or has not begun", hint="try again")
        await self._store.journal.sync()
        return _restored(place, session.lifecycle, cursor, in_place=True)

    async def _put_back(self, place: _Place, session: ExecutionSession) -> None:
        """Of work without steps: it is ended, where it runs, and called again from its own last checkpoint there."""
        life = session.lifecycle
        if life.recovery_attempts >= session.max_recovery_attempts:
            often = f"it has had its {session.max_recovery_attempts} recoveries"
            raise Conflict(f"It cannot go back: {often}", hint="cancel it, and restore then")
        then, progress = await self._reader.task_at(place.record)
        back = PutBack(place.record.checkpoint_id, then.checkpoint, then.checkpoint_at, progress.percentage or 0.0)
        life, execution = session.lifecycle, self._engine.execution_of(session.session_id)
        if execution is None:
            standing = life.status_message if life.status is S.PAUSED and not life.is_parked else None
            endings.put_back(session, back, standing=standing)
            self._engine.unpark(session)
            return
        if not execution.put_back(back):
            raise Conflict("It cannot go back: its work is over, or is being ended", hint="try again")
        with anyio.move_on_after(_ENDING_SECONDS):
            await execution.concluded.wait()
        if session.lifecycle.recovery_attempts == life.recovery_attempts:
            raise Conflict(f"It cannot go back: it is {session.lifecycle.status.value}, which was asked for meanwhile")

    async def _anew(self, place: _Place, caller: Caller, *, wait_ms: int) -> Restored:
        record = place.record
        if place.plan is not None:
            replay = await self._reader.board_at(place.plan, record)
            job = await self._plan_again(
                place.life,
                caller,
                place.asked,
                place.plan,
                replay.states,
                variables=replay.state.variables,
                origin=record.checkpoint_id,
            )
        else:
            then, _ = await self._reader.task_at(record)
            task = await self._tasks.get(record.execution_id, caller)
            job = self._starter.restored(caller, task, place.asked, then, checkpoint_id=record.checkpoint_id)
        run, cursor = await self._submitted(job)
        if wait_ms:
            with anyio.move_on_after(wait_ms / 1000):
                await run.done.wait()
        return _restored(place, job.session.lifecycle, cursor, in_place=False, done=run.done.is_set())

    async def _plan_again(
        self,
        life: Lifecycle,
        caller: Caller,
        asked: Mapping[str, Json],
        plan: ExecutionPlan,
        then: Mapping[str, StepState],
        *,
        variables: Mapping[str, Json],
        origin: str | None,
    ) -> Job:
        task = await self._tasks.get(life.execution_id, caller)
        return await self._plans.started_again(
            task,
            caller,
            asked,
            plan,
            states=await anyio.to_thread.run_sync(put_back, then),
            variables=variables,
            restored_from=origin,
            parent_execution_id=life.execution_id,
        )

    async def _submitted(self, job: Job) -> tuple[Run, int]:
        """Its run, and the cursor to follow it from; its acceptance is on disk."""
        cursor = self._store.journal.head
        return await handles.accepted(job, tasks=self._tasks, engine=self._engine, store=self._store), cursor

    async def _state(self, place: _Place) -> ExecutionState:
        if place.plan is None:
            return state_of_task(*await self._reader.task_at(place.record))
        replay = await self._reader.board_at(place.plan, place.record)
        return await anyio.to_thread.run_sync(state_of_plan, replay.states, replay.state.variables, replay.allocations)

    async def _place(self, checkpoint_id: str, caller: Caller) -> _Place:
        await self._settled()
        record = await self._store.queries.checkpoint(checkpoint_id)
        if record is None:
            raise CheckpointNotFound(checkpoint_id[:100])
        try:
            found = await self._tasks.find(record.execution_id, caller)
        except (TaskNotFound, ExecutionNotFound):
            raise CheckpointNotFound(checkpoint_id[:100]) from None
        if found.life is None:
            raise CheckpointNotFound(checkpoint_id[:100])
        asked, plan = await self._asked(found.life.run_id)
        if plan is None and found.life.role_name == PLAN_ROLE:
            raise Conflict("The plan of this checkpoint is not known any more")
        return _Place(record, found, found.life, asked, plan)

    async def _asked(self, run_id: str) -> tuple[dict[str, Json], ExecutionPlan | None]:
        asked = request_kept(await self._store.queries.request(run_id))
        plan = mapping(asked.get("plan"))
        return asked, await anyio.to_thread.run_sync(plan_from_dict, plan) if plan else None

    async def _last(self, any_id: str, caller: Caller) -> str:
        """Of an execution that has made none, the one that it began from."""
        life = (await self._tasks.find(any_id, caller)).life
        record = await self._reader.last(life.execution_id) if life is not None else None
        checkpoint_id = record.checkpoint_id if record is not None else life and life.restored_from
        if checkpoint_id is None:
            raise CheckpointNotFound(f"the last of {any_id[:100]}, which has none")
        return checkpoint_id

    async def _settled(self) -> None:
        """What was decided before is on disk, as far as that can be written."""
        if self._store.journal.fault is None:
            await self._store.journal.sync()


def _checked(metadata: Mapping[str, Json] | None) -> dict[str, Json]:
    kept = exact_json(dict(metadata or {}), "metadata")
    if (size := len(orjson.dumps(kept))) > MAX_METADATA_BYTES:
        raise InvalidInput(f"the metadata have {size:,} bytes; at most {MAX_METADATA_BYTES:,}")
    if taken := [name for name in _OURS if name in kept]:
        raise InvalidInput(f"the metadata may not have {taken[0]!r}: that is said of the checkpoint already")
    return kept


def _why_not(found: Found, session: ExecutionSession | None) -> str | None:
    """Why what runs can neither be marked nor put back; None where it can."""
    if session is None:
        return f"it has ended ({found.life.status.value})" if found.life is not None else "it was never executed"
    status = session.lifecycle.status
    if status.is_terminal:
        return f"it has ended ({status.value})"
    if status in (S.IDLE, S.PENDING):
        return "nothing of it has begun (pending)"
    return f"it is {status.value} already" if status in _ENDING else None


def _shown(record: CheckpointRecord, task_id: str) -> dict[str, Json]:
    return {
        "checkpoint_id": record.checkpoint_id,
        "task_id": task_id,
        "execution_id": record.execution_id,
        "kind": record.kind,
        "step": record.metadata.get("step"),
        "sequence": record.sequence,
        "created_at": record.created_at,
        "completed_steps": record.metadata.get("completed_steps"),
        "metadata": {name: value for name, value in record.metadata.items() if name not in _OURS},
    }


def _restored(place: _Place, life: Lifecycle, cursor: int, *, in_place: bool, done: bool = False) -> Restored:
    return Restored(
        task_id=life.task_id,
        run_id=life.run_id,
        session_id=life.execution_id,
        status=life.status.value,
        checkpoint_id=place.record.checkpoint_id,
        in_place=in_place,
        cursor=cursor,
        done=done,
        message="It goes on from the checkpoint" if in_place else "A new execution goes on from the checkpoint",
    )
