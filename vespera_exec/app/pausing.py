"""Pausing a run and letting it go on: what may be paused, and what became of the request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from vespera_exec.app import checks, views
from vespera_exec.app.tasks import meant
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.transitions import AT_WORK

if TYPE_CHECKING:
    from vespera_exec.app.tasks import LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.engine.running import RunningExecution
    from vespera_exec.model.principal import Caller
    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.store.store import Store

S = ExecutionStatus

_RESUME_SECONDS = 5.0
_OVER = "its work is over"
_PAUSED = "It is paused already"


class Pausing:
    """The two use cases, whichever door asks."""

    def __init__(self, store: Store, engine: Engine, tasks: LiveTasks) -> None:
        self._store = store
        self._engine = engine
        self._tasks = tasks

    async def pause(self, any_id: str, caller: Caller, *, reason: str, wait_ms: int) -> views.Paused:
        """Ask for it, and wait up to `wait_ms` until the work stands still and that is on disk.

        Raises:
            TaskNotFound: the id is unknown.
            PauseUnsupported: it has processes, which this system cannot stop.
            StoreUnavailable: a pause could not be written now.
        """
        self._store.journal.check_writable()
        session, status, _ = await self._meant(any_id, caller)
        why = _why_not(status)
        if session is None or why is not None:
            return _not_paused(session, status, why or _OVER)
        execution = self._engine.execution_of(session.session_id)
        if execution is None:
            accepted = _stay(session, checks.reason(reason))
        elif accepted := execution.pause(checks.reason(reason)):
            with anyio.move_on_after(wait_ms / 1000):
                await execution.settled()
                if execution.over and session.lifecycle.status in AT_WORK:
                    await execution.concluded.wait()  # it may be parked with a question, and stand still for that
        await self._store.journal.sync()
        now = session.lifecycle.status
        if now is S.PAUSED:
            already = status is S.PAUSED
            message = _standing(session) if already else "Paused"
            return views.Paused(
                success=True, message=message, status=now.value, session_id=session.session_id, already=already
            )
        if execution is not None and execution.pause_pending:
            message = "Pause requested; it takes effect where the work can next stop"
            return views.Paused(
                success=True, message=message, status=now.value, session_id=session.session_id, pending=True
            )
        over = not accepted or execution is None or execution.over
        return _not_paused(session, now, _why_not(now) or (_OVER if over else "it was resumed meanwhile"))

    async def resume(self, any_id: str, caller: Caller, *, reason: str) -> views.Resumed:
        """Let it go on, or take back a pause that has not taken effect; on disk when this returns.

        Refused for a step whose plan is paused: it goes on with that.

        Raises:
            TaskNotFound: the id is unknown.
            StoreUnavailable: a resume could not be written now; it stays paused.
        """
        self._store.journal.check_writable()
        session, status, plan = await self._meant(any_id, caller)
        why = _why_not(status)
        if session is None or why is not None:
            return _not_resumed(session, status, why or _OVER)
        if plan is not None and plan.pause_reason is not None:
            return _not_resumed(session, status, f"its plan is paused: resume {plan.job.session.task_id}")
        execution = self._engine.execution_of(session.session_id)
        pending = execution is not None and execution.pause_pending
        if execution is None:
            if asked := session.lifecycle.open_inputs:
                keys = ", ".join(each.key for each in asked)
                return _not_resumed(session, status, f"it waits for an answer: {keys}")
            self._unpark(session, checks.reason(reason))
        elif not execution.resume(checks.reason(reason)):
            return _not_resumed(session, session.lifecycle.status, _OVER)
        else:
            with anyio.move_on_after(_RESUME_SECONDS):
                await execution.settled()
        await self._store.journal.sync()
        message = "Resumed" if status is S.PAUSED else "It is not paused"
        return views.Resumed(
            success=True,
            message="The pause was taken back before it took effect" if pending else message,
            status=session.lifecycle.status.value,
            session_id=session.session_id,
            already=status is not S.PAUSED and not pending,
        )

    async def _meant(
        self, any_id: str, caller: Caller
    ) -> tuple[ExecutionSession | None, ExecutionStatus, RunningExecution | None]:
        """The session that is to be acted on, its status, and, of a step, the execution of its plan."""
        found = await self._tasks.find(any_id, caller)
        session = meant(found, self._engine.run_of(found.record.task_id))
        parent = found.record.parent_execution_id
        plan = self._engine.execution_of(parent) if parent is not None else None
        if session is not None:
            return session, session.lifecycle.status, plan
        return None, found.life.status if found.life is not None else S.IDLE, plan

    def _unpark(self, session: ExecutionSession, reason: str) -> None:
        """Of one that has no slot. The engine starts nothing of it before that is on disk."""
        with session.ledger:
            if session.lifecycle.status is not S.PAUSED:
                return
            session.resume(reason, queued=True)
        self._engine.unpark(session)


def _stay(session: ExecutionSession, reason: str) -> bool:
    """Pause what waits for its turn to go on, after a dead owner or an answer: nothing of it runs."""
    with session.ledger:
        if session.lifecycle.status is S.RECOVERING:
            session.update_status(S.PREPARING, "It has not gone on yet")
        if session.lifecycle.status in AT_WORK:
            session.pause(reason)
        return session.lifecycle.status is S.PAUSED


def _standing(session: ExecutionSession) -> str:
    """What is said of one that stands still already."""
    if asked := session.lifecycle.open_inputs:
        return f"It stands still already: it waits for an answer: {', '.join(each.key for each in asked)}"
    return f"It stands still already: {session.lifecycle.status_message}" if session.lifecycle.is_parked else _PAUSED


def _why_not(status: ExecutionStatus) -> str | None:
    """Why an execution in this status is neither paused nor resumed; None where it may be."""
    match status:
        case S.IDLE:
            return "it was never executed"
        case S.PENDING:
            return "it is still queued (pending): nothing of it runs yet"
        case S.COMPLETING | S.CANCELLING:
            return f"it is {status.value} already"
        case _:
            return f"it has ended ({status.value})" if status.is_terminal else None


def _not_paused(session: ExecutionSession | None, status: ExecutionStatus, reason: str) -> views.Paused:
    known = session.session_id if session is not None else None
    return views.Paused(
        success=False, message="Pause not possible", status=status.value, session_id=known, reason=reason
    )


def _not_resumed(session: ExecutionSession | None, status: ExecutionStatus, reason: str) -> views.Resumed:
    known = session.session_id if session is not None else None
    return views.Resumed(
        success=False, message="Resume not possible", status=status.value, session_id=known, reason=reason
    )
