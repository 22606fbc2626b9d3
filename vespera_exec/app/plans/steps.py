"""The steps of a plan as tasks of their own: who does each, by whose leave, under which limits."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import orjson

from roles.execution import APPROVAL
from roles.inputs import as_texts
from vespera_exec.app import checks
from vespera_exec.app.kept import request_kept
from vespera_exec.app.plans.step_limits import adapted, retry_rule
from vespera_exec.engine.jobs import Job, Policy
from vespera_exec.engine.plans.children import WAITS_FOR_WORKER, ReadyStep
from vespera_exec.engine.plans.coordinator import Coordinator
from vespera_exec.errors import ExecutionError, StoreUnavailable
from vespera_exec.model.enums import EventType
from vespera_exec.model.events import mapping
from vespera_exec.model.ledger import RequestRecord
from vespera_exec.model.plans.as_json import plan_from_dict, step_to_dict
from vespera_exec.model.plans.plan import ExecutionPlan, PlanStep

if TYPE_CHECKING:
    from collections.abc import Mapping

    from roles.definition import Role
    from vespera_exec.app.plans.step_cache import StepCache
    from vespera_exec.app.starting import Starter
    from vespera_exec.app.tasks import LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.engine.jobs import Run
    from vespera_exec.model.events import Json
    from vespera_exec.model.ledger import CacheRecord
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.plans.board import PlanBoard
    from vespera_exec.model.plans.steps import PlanState, StepState
    from vespera_exec.model.principal import Caller
    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.model.task import Task
    from vespera_exec.store.store import Store

_OUTPUTS_KEPT = 32
_OUTPUTS_KEPT_BYTES = 256 * 1024
_GRACE_SECONDS: Final = 8.0
"""For the children of a cancelled plan, each of which ends within five seconds: the plan ends after them."""
_DEFAULT_MAX_RETRIES = 3
_WHO = ("principal", "scopes", "over_tcp", "cwd", "env")
_TOLD = ("wait_timeout_seconds", "retries", "approval", "capacity", "on_interrupt")


class Steps:
    """`StepHost` of one plan that is executed."""

    def __init__(
        self,
        session: ExecutionSession,
        asked: Mapping[str, Json],
        *,
        store: Store,
        engine: Engine,
        tasks: LiveTasks,
        starter: Starter,
        cache: StepCache,
    ) -> None:
        self._session = session
        self._caller: Caller = starter.caller(asked)
        self._who = {name: asked[name] for name in _WHO if name in asked}
        self._store = store
        self._engine = engine
        self._tasks = tasks
        self._starter = starter
        self._cache = cache
        self._outputs: OrderedDict[str, Json] = OrderedDict()
        self._has_news = False
        """There are answers for the cache that may not be on disk yet."""

    async def stored(self) -> tuple[PlanState, list[StepState]] | None:
        return await self._store.queries.plan_state(self._session.session_id)

    async def attempts(self, run_id: str) -> list[Lifecycle]:
        return [life for life, _ in await self._store.queries.attempts_of(run_id)]

    async def capacity_told(self) -> tuple[dict[str, str], set[str]]:
        given, returned = dict[str, str](), set[str]()
        for event in await self._store.queries.capacity_of_steps(self._session.session_id):
            told = [each["allocation_id"] for each in event.details.get("allocations") or ()]
            if event.event_type is EventType.RESOURCE_ALLOCATED:
                given |= dict.fromkeys(told, event.step_id or "")
            else:
                returned.update(told)
        return given, returned

    async def output(self, execution_id: str) -> Json:
        if execution_id in self._outputs:
            self._outputs.move_to_end(execution_id)
            return self._outputs[execution_id]
        record = await self._store.queries.get_result(execution_id)
        if record is None:
            if await self._store.queries.get_execution(execution_id) is None:
                raise ExecutionError(
                    "the output of a step that is referred to has been removed with the old run that it is of",
                    code="OUTPUT_REMOVED",
                    recoverable=False,
                    hint="execute the plan from its beginning",
                )
            return None
        if record.truncated:
            raise ExecutionError(
                "the output of a step that is referred to was too large to be kept whole",
                code="OUTPUT_TRUNCATED",
                recoverable=False,
                hint="return the name of a file instead, or raise VESPERA_RESULT_LIMIT_BYTES",
            )
        output: Json = orjson.loads(record.body)
        if len(record.body) <= _OUTPUTS_KEPT_BYTES:
            self._outputs[execution_id] = output
            if len(self._outputs) > _OUTPUTS_KEPT:
                self._outputs.popitem(last=False)
        return output

    async def ready(
        self,
        step: PlanStep,
        role: str,
        inputs: Mapping[str, Json],
        *,
        task_id: str | None = None,
        after: str | None = None,
    ) -> ReadyStep:
        found = self._starter.role(self._caller, role)
        completed = self._starter.completed(self._caller, found, as_texts(found.inputs, inputs))
        asked = self._asked_of(step, approved=bool(step.approval) and await self._was_approved(after))
        cached = None
        if adapted(found, asked).pure and step.cache and not step.approval and task_id is None:
            cached = await self._known(role, completed)
        made = None
        if task_id is not None and await self._store.queries.get_task(task_id) is not None:
            made = await self._tasks.get(task_id, self._caller)
        return ReadyStep(found.name, cached, partial(self._begin, step, found, completed, asked, made))

    def answered(self, step: PlanStep, run: Run) -> CacheRecord | None:
        session = run.session
        task = self._tasks.known(session.task_id)
        if not step.cache or task is None:
            return None
        role = session.lifecycle.role_name or ""
        record = self._cache.record(self._caller.principal, role, task.inputs, session.session_id)
        self._has_news = self._has_news or record is not None
        return record

    async def _known(self, role: str, inputs: Mapping[str, Json]) -> str | None:
        if self._has_news:  # what earlier steps of this plan answered is to be found, too
            self._has_news = False
            with suppress(StoreUnavailable):
                await self._store.journal.sync()
        return await self._cache.lookup(self._caller.principal, role, inputs)

    async def _was_approved(self, run_id: str | None) -> bool:
        """Whether the step's approval was given to this run of it, or to one before."""
        asked = request_kept(await self._store.queries.request(run_id)) if run_id is not None else {}
        if run_id is None or not asked:
            return False
        if APPROVAL not in mapping(asked.get("step")):
            return True
        answers = [life.answers.get(APPROVAL) for life in await self.attempts(run_id)]
        return any(answer is not None and answer.accepted for answer in answers)

    def _asked_of(self, step: PlanStep, *, approved: bool) -> dict[str, Json]:
        """`approved`: it was asked for, and is not asked for again."""
        told = step_to_dict(step)
        of_step = {name: told[name] for name in _TOLD if told.get(name) and not (approved and name == APPROVAL)}
        of_step["priority"] = self._session.lifecycle.priority
        return {**self._who, "timeout_seconds": step.timeout_seconds or None, "step": of_step}

    def _begin(
        self,
        step: PlanStep,
        role: Role,
        inputs: dict[str, Json],
        asked: dict[str, Json],
        made: Task | None,
        task_id: str,
        run_id: str,
    ) -> Run:
        """Decide PENDING for the child, which the engine has from then on."""
        rule = retry_rule(role, asked)
        priority = self._session.lifecycle.priority
        task = made or self._tasks.make(
            id=task_id,
            title=checks.title((step.title or step.id)[: self._starter.settings.title_limit], self._starter.settings),
            description=step.description,
            role=role.name,
            inputs=inputs,
            priority=priority,
            max_retries=max(_DEFAULT_MAX_RETRIES, getattr(rule, "max_retries", 0) + 1),
            principal=self._caller.principal,
            parent_execution_id=self._session.session_id,
            step_id=step.id,
        )
        with task.ledger:
            session = task.enqueue_execution(
                role.name,
                session_id=run_id,
                priority=priority,
                owner=self._session.lifecycle.owner,
                message=WAITS_FOR_WORKER if role.runner == "external" else "Queued",
            )
            task.ledger.keep(RequestRecord(run_id=session.run_id, body=orjson.dumps(asked)))
        job = self._starter.job(task, session, role, asked)
        self._tasks.hold(task)
        return self._engine.submit(job)


class PlanJobs:
    """Makes the job that executes a plan: for a request, and for a later owner, who takes it over."""

    def __init__(self, *, store: Store, engine: Engine, tasks: LiveTasks, starter: Starter, cache: StepCache) -> None:
        self._parts: dict[str, Any] = {
            "store": store, "engine": engine, "tasks": tasks, "starter": starter, "cache": cache
        }  # fmt: skip
        self._store = store
        self._engine = engine
        self._starter = starter

    async def remains(self, execution_id: str) -> ExecutionPlan | None:
        """What its steps tell of a plan whose request is lost: enough to end it, too little to execute it.

        None where there are none.

        Raises:
            StoreDamaged: they cannot be read.
        """
        stored = await self._store.queries.plan_state(execution_id)
        if stored is None or not stored[1]:
            return None
        head, steps = stored
        return ExecutionPlan(
            id=head.plan_id,
            name=head.name,
            steps=tuple(PlanStep(id=each.step_id, role=each.role or "") for each in steps),
        )

    def job(
        self,
        task: Task,
        session: ExecutionSession,
        asked: Mapping[str, Json],
        *,
        plan: ExecutionPlan | None = None,
        board: PlanBoard | None = None,
        refused: ExecutionError | None = None,
    ) -> Job:
        """`asked` is what was kept of the request; `board` None: it is in the store.

        `refused`: why it does not go on, and ends once its steps have.

        Raises:
            InvalidInput: the plan that was kept cannot be read.
        """
        plan = plan or plan_from_dict(asked["plan"])
        host = Steps(session, asked, **self._parts)
        coordinator = Coordinator(session, plan, host, self._engine, board=board, refused=refused)
        return Job(
            task=task,
            session=session,
            run=coordinator.run,
            caller=self._starter.caller(asked),
            place="coordinator",
            coordinator=coordinator,
            policy=Policy(
                timeout_seconds=asked.get("timeout_seconds") or plan.timeout_seconds, grace_seconds=_GRACE_SECONDS
            ),
        )
