"""Plans: checked, started, and their steps cancelled, paused and resumed one by one."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

import anyio.lowlevel
import orjson

from roles import inputs as schema
from vespera_exec.app import checks, handles, views
from vespera_exec.app.callers import require
from vespera_exec.app.kept import request_kept
from vespera_exec.app.plans import views as plan_views
from vespera_exec.app.plans.apart import MOST_IN_LOOP, apart, wholly
from vespera_exec.app.plans.reading import executes_plan
from vespera_exec.app.plans.steps import PlanJobs
from vespera_exec.app.tasks import meant
from vespera_exec.errors import (
    AlreadyExecuting,
    Conflict,
    InvalidInput,
    InvalidPlan,
    PermissionDenied,
    RoleNotFound,
)
from vespera_exec.model.events import mapping
from vespera_exec.model.ledger import RequestRecord
from vespera_exec.model.plans.as_json import plan_from_dict, plan_to_dict
from vespera_exec.model.plans.board import PlanBoard
from vespera_exec.model.plans.check import checked
from vespera_exec.model.plans.plan import PLAN_ROLE
from vespera_exec.model.plans.references import references, resolve
from vespera_exec.model.plans.schedule import levels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from roles.definition import Role
    from vespera_exec.app.pausing import Pausing
    from vespera_exec.app.plans.step_cache import StepCache
    from vespera_exec.app.starting import Starter
    from vespera_exec.app.tasks import LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.engine.jobs import Job
    from vespera_exec.engine.plans.coordinator import Coordinator
    from vespera_exec.model.events import Json
    from vespera_exec.model.plans.plan import ExecutionPlan, PlanStep
    from vespera_exec.model.plans.steps import StepState
    from vespera_exec.model.principal import Caller
    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.model.task import Task
    from vespera_exec.settings import Settings
    from vespera_exec.store.store import Store


_MOST_LEVELS = 200
_MOST_PROBLEMS = 100
"""Steps of a plan that are gone through in the loop, before others get their turn."""
_NOT_OPEN = "the plan is not executed now"


class Plans:
    """The use cases about plans, as `vespera.plans`."""

    def __init__(
        self,
        *,
        store: Store,
        engine: Engine,
        tasks: LiveTasks,
        starter: Starter,
        settings: Settings,
        pausing: Pausing,
        cache: StepCache,
    ) -> None:
        self._store = store
        self._engine = engine
        self._tasks = tasks
        self._starter = starter
        self._settings = settings
        self._pausing = pausing
        self.jobs = PlanJobs(store=store, engine=engine, tasks=tasks, starter=starter, cache=cache)

    # starting

    async def execute(self, caller: Caller, request: plan_views.ExecutePlan) -> views.Handle:
        """Queue a plan as a task of its own; its acceptance is on disk when this returns, or its end, within `wait_ms`.

        Raises:
            InvalidPlan: all that is wrong with it, the roles of its steps included. Nothing was decided.
            Conflict: the queue is full, or the idempotency key stands for another request.
            StoreUnavailable: nothing new can be written now.
        """
        require(caller, "operate")
        plan = await self._parsed(caller, request)
        return await self._start(caller, plan, request)

    async def start(
        self,
        caller: Caller,
        plan: ExecutionPlan,
        *,
        title: str | None = None,
        description: str = "",
        priority: int | None = None,
        timeout_seconds: float | None = None,
        wait_ms: int = 0,
        idempotency_key: str | None = None,
    ) -> views.Handle:
        """As `execute`, for a program that has the plan as an object."""
        require(caller, "operate")
        request = plan_views.ExecutePlan(
            plan=plan_to_dict(plan),
            title=title,
            description=description,
            priority=priority,
            timeout_seconds=timeout_seconds,
            wait_ms=wait_ms,
            idempotency_key=idempotency_key,
        )
        return await self._start(caller, checked(plan), request)

    async def check(self, caller: Caller, spec: plan_views.CheckPlan) -> plan_views.PlanChecked:
        """Whether a plan could be executed by this caller, and which steps could run beside each other."""
        require(caller, "read")
        try:
            plan = await self._parsed(caller, spec)
            await self._check_roles(caller, plan)
        except InvalidPlan as error:
            problems = [plan_views.PlanProblem(step=step, problem=what) for step, what in error.problems]
            return plan_views.PlanChecked(valid=False, problems=problems, steps=_number(spec.plan), order=[])
        order = await apart(len(plan.steps), lambda: levels(plan))
        return plan_views.PlanChecked(
            valid=True,
            problems=[],
            steps=len(plan.steps),
            levels=len(order),
            widest=max(map(len, order)),
            order=order[:_MOST_LEVELS],
        )

    async def again(self, caller: Caller, request: views.Execute) -> Job | None:
        """The job of a plan's task that is executed again, as it was asked for last; None where it is no such task.

        Raises:
            InvalidInput: role "plan" without a plan; a role or inputs for one; or its plan is not known any more.
            AlreadyExecuting, InvalidPlan, TaskNotFound.
        """
        if request.role == PLAN_ROLE:
            raise InvalidInput("role plan executes a plan, and none was given", hint="use execute_plan")
        if request.task_id is None or request.title is not None:
            return None
        task = await self._tasks.get(request.task_id, caller)
        if task.record.assigned_role != PLAN_ROLE:
            return None
        if request.role is not None:
            raise InvalidInput(f"task {task.id} executes a plan, whose steps say who does them", hint="leave out role")
        if request.inputs:
            raise InvalidInput("a plan has no inputs", hint="execute_plan takes variables")
        known = mapping(request_kept(await self._store.queries.last_request(task.id)).get("plan"))
        if not known:
            raise InvalidInput("the plan of this task is not known any more", hint="give it to execute_plan again")
        plan = await apart(_number(known), lambda: plan_from_dict(known))
        await self._check_roles(caller, plan)
        session = task.execution.current_session
        if session is not None:
            raise AlreadyExecuting(task.id, session.session_id)
        asked = self._starter.asked(caller, timeout_seconds=request.timeout_seconds) | {"plan": known}
        key = None
        if request.idempotency_key is not None:
            key = (caller.principal, "execute", request.idempotency_key, checks.request_digest(request))
        return self.enqueue(task, plan, asked, priority=request.priority, key=key)

    async def started_again(
        self,
        task: Task,
        caller: Caller,
        asked: Mapping[str, Json],
        plan: ExecutionPlan,
        *,
        states: Mapping[str, StepState],
        variables: Mapping[str, Json],
        restored_from: str | None,
        parent_execution_id: str,
    ) -> Job:
        """Decide PENDING for a new session of a plan's task, which goes on from `states`. Submit it, then sync."""
        asked = {**asked, **self._starter.asked(caller, timeout_seconds=asked.get("timeout_seconds"))}
        decide = partial(
            self._enqueued,
            task,
            plan,
            asked,
            board={"states": states, "variables": variables, "restored_from": restored_from},
            parent_execution_id=parent_execution_id,
            restored_from=restored_from,
        )
        session, board = await wholly(len(plan.steps), decide)
        return self.jobs.job(task, session, asked, plan=plan, board=board)

    async def _start(self, caller: Caller, plan: ExecutionPlan, request: plan_views.ExecutePlan) -> views.Handle:
        self._store.journal.check_writable()
        async with self._starter.once(caller, "execute_plan", request) as known:
            if known is not None:
                return await handles.repeated(known, self._engine, self._store)
            checks.room(self._engine.queued, self._settings)
            await self._check_roles(caller, plan)
            told = await apart(len(plan.steps), lambda: plan_to_dict(plan))
            key = None
            if request.idempotency_key is not None:
                digest = await apart(len(plan.steps), lambda: checks.request_digest(request))
                key = (caller.principal, "execute_plan", request.idempotency_key, digest)
            # From here to the engine nothing comes between, a client that goes included.
            cursor = self._store.journal.head
            task = self._tasks.make(
                title=checks.title(request.title or plan.name or _untitled(plan), self._settings),
                description=checks.description(request.description or plan.description, self._settings),
                role=PLAN_ROLE,
                inputs={},
                priority=5 if request.priority is None else request.priority,
                sla_seconds=self._settings.sla_seconds,
                principal=caller.principal,
            )
            asked = self._starter.asked(caller, timeout_seconds=request.timeout_seconds)
            job = self.enqueue(task, plan, {**asked, "plan": told}, key=key)
            run = await handles.accepted(job, tasks=self._tasks, engine=self._engine, store=self._store)
        return await handles.within(run, cursor, wait_ms=request.wait_ms)

    def enqueue(self, task: Task, plan: ExecutionPlan, asked: Mapping[str, Json], **more: Any) -> Job:
        """As `_enqueued`, at once; the job of it."""
        session, board = self._enqueued(task, plan, asked, **more)
        return self.jobs.job(task, session, asked, plan=plan, board=board)

    def _enqueued(
        self,
        task: Task,
        plan: ExecutionPlan,
        asked: Mapping[str, Json],
        *,
        priority: int | None = None,
        board: Mapping[str, Any] | None = None,
        key: tuple[str, str, str, bytes] | None = None,
        **queueing: Any,
    ) -> tuple[ExecutionSession, PlanBoard]:
        """PENDING, the request with the plan, and its steps, in one decision. From any thread."""
        with task.ledger:
            session = task.enqueue_execution(
                PLAN_ROLE,
                priority=task.priority if priority is None else priority,
                owner=self._starter.owner,
                message="Accepted",
                **queueing,
            )
            task.ledger.keep(RequestRecord(run_id=session.run_id, body=orjson.dumps(asked)))
            opened = PlanBoard(session, plan)
            opened.open(**(board or {}))
            if key is not None:
                principal, operation, name, digest = key
                task.remember_key(principal, operation, name, session.run_id, digest=digest)
        return session, opened

    # checking

    async def _parsed(self, caller: Caller, asked: plan_views.ExecutePlan | plan_views.CheckPlan) -> ExecutionPlan:
        """
        Raises:
            InvalidPlan: all that is wrong with it; of its roles, where it has other faults, only that they are unknown
                or closed to the caller.
        """
        from vespera_exec.app.plans.files import parse_plan  # to make its models is a tenth of a daemon's start

        try:
            return await apart(_number(asked.plan), lambda: parse_plan(asked.plan, variables=asked.variables))
        except InvalidPlan as error:
            unusable = [
                (step, role)
                for step, name in _roles_named(asked.plan)
                if isinstance(role := self._role(caller, name), str)
            ]
            raise InvalidPlan([*error.problems, *unusable][:_MOST_PROBLEMS], hint=error.hint) from None

    async def _check_roles(self, caller: Caller, plan: ExecutionPlan) -> None:
        """
        Raises:
            InvalidPlan: a role that is unknown or closed to the caller, inputs that it refuses, capacity or recovery
                strategies that there are not.
        """
        found: list[tuple[str, str]] = []
        role = cache(partial(self._role, caller))
        for number, step in enumerate(plan.steps, start=1):
            found += self._problems(step, role)
            if number % MOST_IN_LOOP == 0:
                await anyio.lowlevel.checkpoint()
        if found:
            raise InvalidPlan(found[:_MOST_PROBLEMS])

    def _role(self, caller: Caller, name: str) -> Role | str:
        """The role, or why it cannot be used."""
        try:
            return self._starter.role(caller, name)
        except (RoleNotFound, PermissionDenied, InvalidInput) as error:
            return f"{error.message}; {error.hint}" if error.hint else error.message

    def _problems(self, step: PlanStep, find: Callable[[str], Role | str]) -> Iterator[tuple[str, str]]:
        doers = [(step.role, step.inputs)]
        if step.fallback is not None:
            inputs = step.inputs if step.fallback.inputs is None else step.fallback.inputs
            doers.append((step.fallback.role, inputs))
        for name, given in doers:
            role = find(name)
            if isinstance(role, str):
                yield step.id, role
                continue
            if step.approval and role.runner == "external":
                yield step.id, f"nobody asks for the approval of role {name}, which is done by workers"
            yield from ((step.id, problem) for problem in _input_problems(role, given))
            try:
                if wanted := step.capacity or role.capacity:
                    self._engine.grants.check(wanted)
            except InvalidInput as error:
                yield step.id, error.message
        for each in step.recovery or ():
            if each not in self._engine.strategies.ids:
                known = ", ".join(self._engine.strategies.ids) or "none"
                yield step.id, f"there is no recovery strategy {each!r}; there is {known}"

    # one step

    async def cancel_step(
        self, any_id: str, step_id: str, caller: Caller, *, reason: str = "User requested"
    ) -> views.Cancelled:
        """End one step, whether it has begun or not; what needs it is skipped. On disk when this returns.

        Raises:
            TaskNotFound, NotFound: there is no such plan, or step.
        """
        require(caller, "operate")
        coordinator, status, session_id = await self._coordinator(any_id, caller)
        if coordinator is None:
            return views.Cancelled(
                success=False,
                message="Cancellation not possible",
                reason=_NOT_OPEN,
                status=status,
                session_id=session_id,
            )
        accepted = coordinator.cancel_step(step_id, checks.reason(reason))
        await self._store.journal.sync()
        state = coordinator.board.step(step_id)
        return views.Cancelled(
            success=accepted,
            message="Cancellation requested" if accepted else "Cancellation not possible",
            reason=None if accepted else f"the step is {state.status.value} already",
            status=state.status.value,
            session_id=session_id,
        )

    async def pause_step(
        self, any_id: str, step_id: str, caller: Caller, *, reason: str = "User requested", wait_ms: int = 5000
    ) -> views.Paused:
        """Stop what runs of one step, until `resume_step`; refused where nothing of it runs.

        Raises:
            TaskNotFound, NotFound, PauseUnsupported, StoreUnavailable.
        """
        require(caller, "operate")
        coordinator, status, session_id = await self._coordinator(any_id, caller)
        task_id = _task_of(coordinator, step_id)
        if task_id is None:
            why = _NOT_OPEN if coordinator is None else "nothing of the step runs"
            return views.Paused(
                success=False, message="Pause not possible", reason=why, status=status, session_id=session_id
            )
        return await self._pausing.pause(task_id, caller, reason=reason, wait_ms=wait_ms)

    async def resume_step(
        self, any_id: str, step_id: str, caller: Caller, *, reason: str = "User requested"
    ) -> views.Resumed:
        """Let a paused step go on; refused where nothing of it has begun, or its plan is paused.

        Raises:
            TaskNotFound, NotFound, StoreUnavailable.
        """
        require(caller, "operate")
        coordinator, status, session_id = await self._coordinator(any_id, caller)
        task_id = _task_of(coordinator, step_id)
        if task_id is None:
            why = _NOT_OPEN if coordinator is None else "nothing of the step runs"
            return views.Resumed(
                success=False, message="Resume not possible", reason=why, status=status, session_id=session_id
            )
        return await self._pausing.resume(task_id, caller, reason=reason)

    async def _coordinator(self, any_id: str, caller: Caller) -> tuple[Coordinator | None, str, str | None]:
        """That of the plan that is meant, while it is executed; the status and the id of its session.

        Raises:
            Conflict: it executes no plan.
        """
        found = await self._tasks.find(any_id, caller)
        life = found.life
        if life is None or not executes_plan(life):
            raise Conflict("it executes no plan", hint="steps are those of what execute_plan has started")
        session = meant(found, self._engine.run_of(found.record.task_id))
        session_id = session.session_id if session is not None else life.execution_id
        return await self._engine.opened(session_id), life.status.value, session_id


def _task_of(coordinator: Coordinator | None, step_id: str) -> str | None:
    """The task of a step whose run is going on."""
    if coordinator is None:
        return None
    state = coordinator.board.step(step_id)
    return None if state.status.is_terminal else state.task_id


def _input_problems(role: Role, given: Mapping[str, Json]) -> list[str]:
    """What can be said of inputs before their references have values."""
    if role.inputs is None:
        return []
    open_names = {name for name, value in given.items() if references(value)}
    known = {name: spec for name, spec in role.inputs.items() if name not in open_names}
    fixed = {name: resolve(value, _no_value) for name, value in given.items() if name not in open_names}
    problems = schema.complete(known, schema.as_texts(known, fixed))[1]
    problems += [f"{name[:64]}: unknown input" for name in sorted(open_names) if name not in role.inputs]
    return [f"inputs of role {role.name}: {each}" for each in problems]


def _no_value(_: object) -> Json:
    return None


def _untitled(plan: ExecutionPlan) -> str:
    return "Plan of one step" if len(plan.steps) == 1 else f"Plan of {len(plan.steps)} steps"


def _number(plan: Mapping[str, Json]) -> int:
    steps = plan.get("steps")
    return len(cast("list[Json]", steps)) if isinstance(steps, list) else 0


def _roles_named(plan: Mapping[str, Json]) -> Iterator[tuple[str, str]]:
    """The steps and their roles, as far as they can be made out in a plan that has faults."""
    steps = plan.get("steps")
    for step in cast("list[Json]", steps)[:MOST_IN_LOOP] if isinstance(steps, list) else ():
        told = cast("dict[str, Json]", step) if isinstance(step, dict) else {}
        name, fallback = told.get("id"), told.get("fallback")
        second = cast("dict[str, Json]", fallback).get("role") if isinstance(fallback, dict) else fallback
        for role in (told.get("role"), second):
            if isinstance(name, str) and isinstance(role, str) and role not in ("", PLAN_ROLE):
                yield name[:80], role
