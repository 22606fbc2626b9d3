"""Questions that roles have asked: what waits for somebody, and what is answered."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vespera_exec.app import present, views
from vespera_exec.app.plans.reading import executes_plan
from vespera_exec.app.tasks import meant
from vespera_exec.errors import InvalidInput
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.inputs import Answer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.app.plans.reading import PlanReading
    from vespera_exec.app.tasks import LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.model.principal import Caller
    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.store.store import Store

S = ExecutionStatus
_MOST = 200


class Inputs:
    """The two use cases, whichever door asks."""

    def __init__(self, store: Store, engine: Engine, tasks: LiveTasks, reading: PlanReading) -> None:
        self._store = store
        self._engine = engine
        self._tasks = tasks
        self._reading = reading

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
        accepted = self._record(session, given, caller)
        waiting = [each.key for each in self._reading.inputs(session.lifecycle)]
        if not accepted:
            return _nothing_open(answers, session.lifecycle.status, session.session_id, waiting)
        await self._store.journal.sync()
        life = session.lifecycle
        waiting = [each.key for each in self._reading.inputs(life)]
        return views.Answered(
            success=True,
            message=f"Answered; it waits for {', '.join(waiting)}" if waiting else _became(life.status),
            status=life.status.value,
            session_id=session.session_id,
            accepted=accepted,
            ignored=[key for key in answers if key not in accepted],
            open=waiting,
        )

    def _record(self, session: ExecutionSession, given: Mapping[str, Answer], caller: Caller) -> list[str]:
        """The keys of what was open, and is answered now.

        Raises:
            InvalidInput: the content of one does not fit its form; none is recorded.
        """
        asked = self._asked(session, given)
        for asking, answers in asked:
            for question in asking.lifecycle.open_inputs:
                if (key := answers.get(question.key)) is not None:
                    replace(question, key=key).checked(given[key])  # a refusal names it as it was given
        accepted: list[str] = []
        for asking, answers in asked:
            taken = asking.answer({name: given[key] for name, key in answers.items()}, by=caller.principal)
            if taken:
                accepted += [answers[name] for name in taken]
                # The engine starts nothing of it before the answer is on disk.
                self._engine.unpark(asking)
        return accepted

    def _asked(
        self, session: ExecutionSession, given: Mapping[str, Answer]
    ) -> list[tuple[ExecutionSession, dict[str, str]]]:
        """Whose questions are answered: of each session the keys as it has asked them, and as they were given.

        A plan's session is answered with `<step>/<key>`.
        """
        if not executes_plan(session.lifecycle):
            return [(session, {key: key for key in given})]
        waiting, of_steps = self._engine.asking(session.session_id), dict[str, dict[str, str]]()
        for key in given:
            step, _, name = key.partition("/")
            if step in waiting:
                of_steps.setdefault(step, {})[name] = key
        return [(waiting[step], keys) for step, keys in of_steps.items()]

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
                parent_task_id=each.parent_task_id,
                step=each.step_id,
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
    waiting: Sequence[str] = (),
) -> views.Answered:
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
        open=list(waiting),
        reason=reason,
    )
