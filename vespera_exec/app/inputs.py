"""Questions that roles have asked: what waits for somebody, and what is answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.app import present, views
from vespera_exec.app.tasks import meant
from vespera_exec.errors import InvalidInput
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.inputs import Answer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.app.tasks import LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.model.principal import Caller
    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.store.store import Store

S = ExecutionStatus
_MOST = 200


class Inputs:
    """The two use cases, whichever door asks."""

    def __init__(self, store: Store, engine: Engine, tasks: LiveTasks) -> None:
        self._store = store
        self._engine = engine
        self._tasks = tasks

    async def answer(self, any_id: str, caller: Caller, answers: Mapping[str, views.InputAnswer]) -> views.Answered:
        """Answer open questions of the run that is meant; on disk when this returns.

        Raises:
            TaskNotFound: the id is unknown.
            InvalidInput: the content of one does not fit its form; none is recorded.
            StoreUnavailable: an answer could not be written now.
        """
        self._store.journal.check_writable()
        found = await self._tasks.find(any_id, caller)
        session = meant(found, self._engine.run_of(found.record.task_id))
        if session is None:
            status = found.life.status if found.life is not None else S.IDLE
            known = found.life.execution_id if found.life is not None else None
            return _nothing_open(answers, status, known)
        given = {key: Answer(action=each.action, content=each.content) for key, each in answers.items()}
        accepted = session.answer(given, by=caller.principal)
        if not accepted:
            return _nothing_open(answers, session.lifecycle.status, session.session_id, session)
        # The engine starts nothing of it before the answer is on disk.
        self._engine.unpark(session)
        await self._store.journal.sync()
        life = session.lifecycle
        waiting = [each.key for each in life.open_inputs]
        return views.Answered(
            success=True,
            message=f"Answered; it waits for {', '.join(waiting)}" if waiting else _became(life.status),
            status=life.status.value,
            session_id=session.session_id,
            accepted=list(accepted),
            ignored=[key for key in answers if key not in accepted],
            open=waiting,
        )

    async def open(self, caller: Caller, *, limit: int) -> views.OpenInputs:
        """What waits for an answer, over all tasks that `caller` sees, oldest first.

        Raises:
            InvalidInput: a limit outside 1 to 200.
        """
        if not 1 <= limit <= _MOST:
            raise InvalidInput(f"limit is between 1 and {_MOST}")
        if self._store.journal.fault is None:
            await self._store.journal.sync()
        found, total = await self._store.queries.open_inputs(principal=caller.sees_only, limit=limit)
        shown = [
            views.OpenInput(
                task_id=each.task_id,
                run_id=each.run_id,
                session_id=each.execution_id,
                title=each.title,
                role=each.role,
                input=present.question(each.question),
            )
            for each in found
        ]
        return views.OpenInputs(inputs=shown, total=total)


def _became(status: ExecutionStatus) -> str:
    return "Not approved; the run has ended" if status is S.FAILED else "Answered; it goes on"


def _nothing_open(
    answers: Mapping[str, views.InputAnswer],
    status: ExecutionStatus,
    session_id: str | None,
    session: ExecutionSession | None = None,
) -> views.Answered:
    waiting = [each.key for each in session.lifecycle.open_inputs] if session is not None else []
    if not answers:
        reason = "no answer was given"
    elif waiting:
        reason = f"it asks {', '.join(waiting)}"
    else:
        reason = f"it has ended ({status.value})" if status.is_terminal else f"it asks nothing ({status.value})"
    return views.Answered(
        success=False,
        message="Nothing was answered",
        status=status.value,
        session_id=session_id,
        accepted=[],
        ignored=list(answers),
        open=waiting,
        reason=reason,
    )
