"""Work that is done elsewhere: under a lease, a worker claims a task, reports on it, and concludes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
from pydantic import ValidationError

from vespera_exec.app.callers import require
from vespera_exec.app.workers import views
from vespera_exec.app.workers.reading import checked, complaint, reports_of
from vespera_exec.engine.work import InputNeeded, WorkResult
from vespera_exec.errors import CancellationException, InvalidInput, LeaseLost, RoleNotFound, StoreUnavailable
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.inputs import MAX_QUESTIONS, Question
from vespera_exec.model.jsonable import exact_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from roles.registry import RoleRegistry
    from roles.runners.external import Shift, Shifts
    from vespera_exec.engine.engine import Engine
    from vespera_exec.engine.jobs import Job
    from vespera_exec.engine.running import RunningExecution
    from vespera_exec.model.events import Json
    from vespera_exec.model.principal import Caller
    from vespera_exec.settings import Settings
    from vespera_exec.store.store import Store

S = ExecutionStatus

_OPENING_SECONDS = 10.0
_ALL = -1
"""The index of what is refused with all reports of a call."""
_MAX_REFUSALS = 50


class Workers:
    """The three calls of a worker, whichever door it comes through."""

    def __init__(
        self, *, store: Store, engine: Engine, roles: RoleRegistry, shifts: Shifts, settings: Settings
    ) -> None:
        self._store = store
        self._engine = engine
        self._roles = roles
        self._shifts = shifts
        self._settings = settings
        self.waiting = 0
        """How many claims wait for a task."""

    async def claim(self, caller: Caller, asked: views.Claim) -> views.Claimed:
        """The oldest of the highest priority that this worker may do, within `wait_ms`; on disk when this returns.

        Raises:
            PermissionDenied: the caller lacks the scope.
            RoleNotFound, InvalidInput: a role that was named is unknown, or is not for this worker.
            StoreUnavailable: nothing can be written now.
        """
        require(caller, "worker")
        self._store.journal.check_writable()
        open_to = self._open_to(caller, asked.roles)
        worker = asked.worker or caller.principal
        claimed: list[views.Claimed] = []

        def grant(job: Job) -> None:
            claimed.append(self._granted(job, caller, worker))

        self.waiting += 1
        try:
            with anyio.move_on_after(asked.wait_ms / 1000):
                while self._engine.claim(open_to, grant) is None:
                    await self._engine.offered(open_to)
                    self._store.journal.check_writable()
        finally:
            self.waiting -= 1
        if not claimed:
            return views.Claimed(claimed=False)
        await self._store.journal.sync()
        return claimed[0]

    async def report(self, caller: Caller, asked: views.Report) -> views.Reported:
        """Take what a worker says; all that was not refused is on disk when this returns, and the lease begins anew.

        Raises:
            PermissionDenied: the caller lacks the scope.
            LeaseLost: the caller no longer has this execution. Nothing was taken.
            InvalidInput: the question may not be asked. The reports that came with it were taken.
            StoreUnavailable: nothing can be written now; the lease begins anew all the same.
        """
        require(caller, "worker")
        execution, shift = await self._held(caller, asked.session_id, asked.lease)
        refused = self._taken(shift, asked)
        if asked.state == "paused":
            shift.stand()
        answers = None
        if asked.ask is not None:
            answers = _answered(execution, question := _question(asked.ask))
            if answers is None:
                _check_room(execution)
                return await self._parked(execution, shift, question, refused)
        await self._store.journal.sync()
        life = execution.job.session.lifecycle
        cancel = shift.is_cancelled or life.status is S.CANCELLING
        pause = not cancel and (life.status is S.PAUSED or execution.pause_pending)
        return views.Reported(
            ok=not refused,
            cancel=cancel,
            pause=pause,
            reason=shift.cancellation_reason if cancel else "a pause was asked for" if pause else "",
            answers=answers,
            lease_seconds=life.lease.seconds if life.lease is not None else None,
            refused=refused,
        )

    async def conclude(self, caller: Caller, asked: views.Conclude) -> views.Concluded:
        """The worker is done; its end is on disk when this returns. One that was to be cancelled ends CANCELLED.

        Raises:
            PermissionDenied: the caller lacks the scope.
            LeaseLost: the caller no longer has this execution. Nothing has changed.
            InvalidInput: the result would not come back as it was given. Nothing has changed; to be called again.
            StoreUnavailable: nothing can be written now; to be called again.
        """
        require(caller, "worker")
        try:
            execution, shift = await self._held(caller, asked.session_id, asked.lease)
        except LeaseLost:
            if (known := await self._concluded_before(caller, asked)) is not None:
                return known
            raise
        shift.end(
            WorkResult(
                output=exact_json(asked.result, "the result"),
                success=asked.success,
                error=asked.error,
                error_code=asked.error_code,
                recoverable=asked.recoverable,
                warnings=tuple(asked.warnings),
            )
        )
        await execution.concluded.wait()
        await self._store.journal.sync()
        session = execution.job.session
        life = session.lifecycle
        if not life.status.is_terminal:
            raise StoreUnavailable("the server ends, and could not conclude it", hint="call again")
        run = self._engine.run_of(life.task_id)
        if run is not None and run.session is session:  # no other attempt follows
            await run.done.wait()
        return views.Concluded(ok=True, status=life.status.value, session_id=life.execution_id)

    # inside

    def _open_to(self, caller: Caller, names: Sequence[str]) -> list[str]:
        if not names:
            return [role.name for role in self._roles.all() if role.admits(caller)]
        for name in names:
            if not self._roles.get(name).admits(caller):
                raise InvalidInput(
                    f"role {name} is not done by {caller.principal}",
                    hint="a role with `runner: external` is, whose `workers` are left out or name it",
                )
        return list(names)

    def _granted(self, job: Job, caller: Caller, worker: str) -> views.Claimed:
        """The lease, recorded, and what its worker has to know."""
        session, record = job.session, job.task.record
        before = session.lifecycle
        try:
            own = self._roles.get(before.role_name or "").lease_seconds
        except (RoleNotFound, InvalidInput):
            own = 0.0
        seconds = own or self._settings.worker_lease_seconds
        key = session.grant_lease(worker, caller.principal, seconds=seconds)
        self._shifts.begin(session.session_id)
        return views.Claimed(
            claimed=True,
            task_id=record.task_id,
            session_id=session.session_id,
            lease=key,
            lease_seconds=seconds,
            attempt=before.attempt,
            role=before.role_name,
            title=record.title,
            description=record.description,
            inputs=dict(record.inputs),
            checkpoint=before.checkpoint,
            answers={key: each.told() for key, each in before.answers.items()},
            notice=views.NOTICE,
        )

    async def _held(self, caller: Caller, session_id: str, key: str) -> tuple[RunningExecution, Shift]:
        """The execution that this lease is of.

        Raises:
            LeaseLost: it is of none, or of none any more.
            StoreUnavailable: nothing can be taken now. The lease has begun anew all the same.
        """
        execution = self._engine.execution_of(session_id)
        lease = execution.job.session.lifecycle.lease if execution is not None else None
        if execution is None or lease is None or not lease.admits(key, caller.principal):
            raise LeaseLost(session_id)
        shift = self._shifts.of(session_id)
        if shift is None:
            raise LeaseLost(session_id)  # it is being concluded
        shift.prolong()
        self._store.journal.check_writable()
        if shift.is_open:
            await anyio.lowlevel.checkpoint()  # a worker that has nothing to say must not keep the loop to itself
        else:
            with anyio.move_on_after(_OPENING_SECONDS) as opening:
                await shift.opened()
            if opening.cancelled_caught:
                raise StoreUnavailable("its claim is not on disk yet", hint="call again")
        if shift.over:
            raise LeaseLost(session_id)
        return execution, shift

    def _taken(self, shift: Shift, asked: views.Report) -> list[views.Refusal]:
        refused: list[views.Refusal] = []
        try:
            for index, given in enumerate(asked.reports):
                try:
                    said = checked(given)
                except ValidationError as error:
                    refused.append(views.Refusal(index=index, reason=complaint(error)))
                else:
                    _take(shift, said, index, refused)
            # What the call says of itself comes last.
            _take(shift, asked, len(asked.reports), refused)
            if (reason := shift.flush()) is not None:
                refused.append(views.Refusal(index=_ALL, reason=reason))
        except CancellationException:
            raise LeaseLost(asked.session_id) from None
        if (more := len(refused) - _MAX_REFUSALS) > 0:
            refused[_MAX_REFUSALS:] = [views.Refusal(index=_ALL, reason=f"and {more} more were refused")]
        return refused

    async def _parked(
        self, execution: RunningExecution, shift: Shift, question: Question, refused: list[views.Refusal]
    ) -> views.Reported:
        shift.end(InputNeeded([question]))
        await execution.concluded.wait()
        await self._store.journal.sync()
        life = execution.job.session.lifecycle
        cancel = life.status in (S.CANCELLING, S.CANCELLED)
        waiting = life.status is S.PAUSED
        return views.Reported(
            ok=not refused and waiting,
            cancel=cancel,
            parked=waiting,
            reason=life.status_message,
            refused=refused,
        )

    async def _concluded_before(self, caller: Caller, asked: views.Conclude) -> views.Concluded | None:
        """What became of it, where this lease concluded it and the answer was lost on its way."""
        going_on = self._engine.execution_of(asked.session_id)
        lease = going_on.job.session.lifecycle.lease if going_on is not None else None
        if going_on is not None and lease is not None and lease.admits(asked.lease, caller.principal):
            await going_on.concluded.wait()  # it has been told, and is about to
            await self._store.journal.sync()
        known = await self._store.queries.get_known(asked.session_id)
        if known is None or known.execution is None:
            return None
        life = known.execution[0]
        told = (
            life.execution_id == asked.session_id
            and life.status.is_terminal
            and life.outcome.get("rung") != "abandoned"
        )
        if life.lease is None or not told or not life.lease.admits(asked.lease, caller.principal):
            return None
        return views.Concluded(ok=True, status=life.status.value, session_id=life.execution_id, repeated=True)


def _take(shift: Shift, said: views.WorkReport, index: int, refused: list[views.Refusal]) -> None:
    reasons = [reason for each in reports_of(said) if (reason := shift.take(each)) is not None]
    refused.extend(views.Refusal(index=index, reason=reason) for reason in dict.fromkeys(reasons))


def _question(given: dict[str, Json]) -> Question:
    try:
        ask = views.Ask.model_validate(given)
    except ValidationError as error:
        raise InvalidInput(f"ask: {complaint(error)}", hint="ask is {key, message, kind, schema}") from None
    kind = ask.kind or ("approval" if ask.schema_ is None else "form")
    return Question.made(ask.key, ask.message, kind=kind, schema=ask.schema_)


def _answered(execution: RunningExecution, question: Question) -> dict[str, Json] | None:
    """What was answered to it before, or None."""
    answer = execution.job.session.lifecycle.answers.get(question.key)
    return {question.key: answer.told()} if answer is not None else None


def _check_room(execution: RunningExecution) -> None:
    if len(execution.job.session.lifecycle.inputs) >= MAX_QUESTIONS:
        raise InvalidInput(f"a run asks at most {MAX_QUESTIONS} questions")
