"""What may be asked of a plan that is executed, or was: its steps, where it stands, what its steps ask."""

from __future__ import annotations

from heapq import nsmallest
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING

from vespera_exec.app import present, views
from vespera_exec.app.kept import request_kept
from vespera_exec.app.plans import views as plan_views
from vespera_exec.errors import Conflict, InvalidInput
from vespera_exec.model.enums import StepStatus
from vespera_exec.model.events import mapping
from vespera_exec.model.plans.plan import PLAN_ROLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vespera_exec.app.tasks import LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.engine.plans.coordinator import Coordinator
    from vespera_exec.model.events import Json
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.plans.plan import ExecutionPlan
    from vespera_exec.model.plans.steps import StepState
    from vespera_exec.model.principal import Caller
    from vespera_exec.model.progress import Progress
    from vespera_exec.store.store import Store

_GOING_ON = (StepStatus.RUNNING, StepStatus.WAITING)
_SHOWN = 5
_position = attrgetter("position")
MAX_STEPS_SHOWN = 1000


def executes_plan(life: Lifecycle) -> bool:
    return life.role_name == PLAN_ROLE


class PlanReading:
    """Reads from the coordinator's board while a plan is executed, else from its rows."""

    def __init__(self, store: Store, engine: Engine, tasks: LiveTasks) -> None:
        self._store = store
        self._engine = engine
        self._tasks = tasks

    def coordinator(self, life: Lifecycle) -> Coordinator | None:
        """That of a plan's session, from the moment on that it knows where its steps stand; else None."""
        return self._engine.coordinator(life.execution_id) if executes_plan(life) else None

    async def steps(
        self, any_id: str, caller: Caller, *, status: str | None = None, after: int = -1, limit: int = 100
    ) -> plan_views.StepPage:
        """Steps in the plan's order, behind the one at the position `after`; those in `status` alone, if it is given.

        Raises:
            TaskNotFound: the id is unknown.
            Conflict: it was never executed, or executes no plan.
            InvalidInput: an unknown status, `after` below -1, a limit outside 1 to 1000.
        """
        wanted = _status(status)
        if after < -1 or not 1 <= limit <= MAX_STEPS_SHOWN:
            raise InvalidInput(f"after is at least -1 and limit between 1 and {MAX_STEPS_SHOWN}")
        found = await self._tasks.find(any_id, caller)
        life = found.life
        if life is None or not executes_plan(life):
            raise Conflict("it executes no plan", hint="steps are those of what execute_plan has started")
        coordinator = self.coordinator(life)
        if coordinator is not None:
            plan, counts = coordinator.board.plan, dict(coordinator.board.counts)
            total = counts.get(wanted, 0) if wanted is not None else len(plan.steps)
            states = _behind(coordinator, wanted, after)
            page = [_of_plan(state, plan) for state in islice(states, limit + 1)]
        else:
            await self._settled()
            counts = await self._store.queries.step_counts(life.execution_id)
            stored, total = await self._store.queries.steps(
                life.execution_id, status=wanted, after=after, limit=limit + 1
            )
            told = await self._told(life.run_id) if stored else []
            page = [_view(state, told[state.position] if told else {}) for state in stored]
        shown = page[:limit]
        return plan_views.StepPage(
            task_id=life.task_id,
            session_id=life.execution_id,
            status=life.status.value,
            percentage=present.rounded(self._percentage(life, found.progress)),
            counts=_counted(counts),
            steps=shown,
            total=total,
            next_after=shown[-1].position if len(page) > limit else None,
        )

    async def summary(self, life: Lifecycle) -> plan_views.PlanSummary | None:
        """The plan of this session in a few words; None where it has none."""
        if not executes_plan(life):
            return None
        queries, coordinator = self._store.queries, self.coordinator(life)
        if coordinator is not None:
            board = coordinator.board
            head, counts = board.state, dict(board.counts)
            begun = (board.step(step) for step in coordinator.under_way)
            going_on = nsmallest(_SHOWN, (each for each in begun if each.status in _GOING_ON), key=_position)
            failed = _first(board.states.values(), counts, (StepStatus.FAILED,))
            last = board.last_checkpoint
        else:
            await self._settled()
            head, last = await queries.plan_head(life.execution_id), None
            if head is None:
                return None
            counts = await queries.step_counts(life.execution_id)
            going_on = await self._stored_first(life.execution_id, counts, _GOING_ON)
            failed = await self._stored_first(life.execution_id, counts, (StepStatus.FAILED,))
        if last is None and (stored := await queries.checkpoints(life.execution_id, limit=1)):
            last = stored[0].checkpoint_id
        return plan_views.PlanSummary(
            name=head.name,
            plan_id=head.plan_id,
            steps=head.steps,
            counts=_counted(counts),
            current=[
                plan_views.CurrentStep(
                    step=each.step_id,
                    status=each.status.value,
                    percentage=present.rounded(each.percentage),
                    waiting_for=each.waiting_for,
                )
                for each in going_on
            ],
            failed=[each.step_id for each in failed],
            last_checkpoint=last,
        )

    async def progress(self, life: Lifecycle, progress: Progress) -> views.ProgressInfo | None:
        """Document 004's body of a plan's session; None where nothing of it has been recorded."""
        seen = await self.summary(life)
        if seen is None:
            return None
        return views.ProgressInfo(
            current_step=seen.steps - seen.counts.get(StepStatus.PENDING, 0),
            total_steps=seen.steps,
            percentage=present.rounded(self._percentage(life, progress)) or 0.0,
            current_step_name=seen.current[0].step if seen.current else None,
        )

    def inputs(self, life: Lifecycle) -> list[views.InputView]:
        """The questions that wait for an answer: its own, and as `<step>/<key>` those of a plan's steps."""
        if not executes_plan(life):
            return present.open_inputs(life)
        return [
            present.question(asked, key=f"{step}/{asked.key}")
            for step, session in self._engine.asking(life.execution_id).items()
            for asked in session.lifecycle.open_inputs
        ]

    def _percentage(self, life: Lifecycle, progress: Progress | None) -> float | None:
        """Of the board, which is ahead of what is reported of it."""
        coordinator = self.coordinator(life)
        if coordinator is not None:
            return coordinator.board.percentage
        return progress.percentage if progress is not None else None

    async def _stored_first(
        self, execution_id: str, counts: Mapping[StepStatus, int], statuses: Sequence[StepStatus]
    ) -> list[StepState]:
        found: list[StepState] = []
        for status in statuses:
            if counts.get(status):
                found += (await self._store.queries.steps(execution_id, status=status, limit=_SHOWN))[0]
        return sorted(found, key=lambda each: each.position)[:_SHOWN]

    async def _told(self, run_id: str) -> list[Mapping[str, Json]]:
        """What the plan says of each step, by its position; nothing where it cannot be read any more."""
        return mapping(request_kept(await self._store.queries.request(run_id)).get("plan")).get("steps") or []

    async def _settled(self) -> None:
        if self._store.journal.fault is None:
            await self._store.journal.sync()


def _behind(coordinator: Coordinator, wanted: StepStatus | None, after: int) -> Iterable[StepState]:
    board = coordinator.board
    for step in islice(board.plan.steps, after + 1, None):
        state = board.step(step.id)
        if wanted is None or state.status is wanted:
            yield state


def _first(
    states: Iterable[StepState], counts: Mapping[StepStatus, int], statuses: Sequence[StepStatus]
) -> list[StepState]:
    most = min(sum(counts.get(each, 0) for each in statuses), _SHOWN)
    return list(islice((each for each in states if each.status in statuses), most)) if most else []


def _of_plan(state: StepState, plan: ExecutionPlan) -> plan_views.StepView:
    step = plan.steps[state.position]
    return _view(state, {"title": step.title, "role": step.role, "depends_on": list(step.depends_on)})


def _view(state: StepState, told: Mapping[str, Json]) -> plan_views.StepView:
    return plan_views.StepView(
        id=state.step_id,
        position=state.position,
        title=told.get("title") or state.step_id,
        role=state.role or told.get("role"),
        status=state.status.value,
        percentage=present.rounded(state.percentage),
        message=state.message,
        attempt=state.attempt,
        recoveries=state.recoveries,
        is_fallback=state.is_fallback,
        cached=state.cached,
        depends_on=list(told.get("depends_on") or ()),
        waiting_for=state.waiting_for,
        not_before=state.not_before,
        error=dict(state.error) or None,
        reason=state.reason or None,
        task_id=state.task_id,
        session_id=state.session_id,
        started_at=state.started_at,
        ended_at=state.ended_at,
    )


def _counted(counts: Mapping[StepStatus, int]) -> dict[str, int]:
    return {status.value: counts[status] for status in StepStatus if counts.get(status)}


def _status(status: str | None) -> StepStatus | None:
    if status is None:
        return None
    try:
        return StepStatus(status)
    except ValueError:
        raise InvalidInput(f"unknown status {status[:50]!r}; one of {', '.join(StepStatus)}") from None
