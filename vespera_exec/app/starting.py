"""From a request to a job: who may, with which inputs, under which limits, and only once per key."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import orjson

from roles.execution import RoleExecutor
from roles.runners.external import Shifts
from vespera_exec.app import checks, views
from vespera_exec.app.plans.step_limits import adapted, retry_rule
from vespera_exec.engine.capacity.pools import CapacityPools
from vespera_exec.engine.jobs import Job, Policy
from vespera_exec.engine.work import WorkerNeeded
from vespera_exec.errors import AlreadyExecuting, Conflict, InvalidInput, PermissionDenied
from vespera_exec.model.capacity import CapacityRequirement, requirements
from vespera_exec.model.events import Json, mapping
from vespera_exec.model.ledger import RequestRecord
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from roles.definition import Role
    from roles.registry import RoleRegistry
    from vespera_exec.app.plans import views as plan_views
    from vespera_exec.app.tasks import LiveTasks
    from vespera_exec.engine.work import Work, WorkResult
    from vespera_exec.model.ledger import IdempotencyRecord
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.model.task import Task
    from vespera_exec.settings import Settings
    from vespera_exec.store.store import Store

COMMAND_ROLE = "command"
_log = logging.getLogger(__name__)
_LONGEST_GRACE_SECONDS = 4.0


class Starter:
    """Decides that something is to run."""

    def __init__(
        self,
        *,
        store: Store,
        tasks: LiveTasks,
        roles: RoleRegistry,
        settings: Settings,
        owner: str,
        pools: CapacityPools | None = None,
    ) -> None:
        self._store = store
        self._tasks = tasks
        self._roles = roles
        self.settings = settings
        self.owner = owner
        self._pools = CapacityPools() if pools is None else pools
        self._executor = RoleExecutor(allowed_roots=settings.allowed_roots)
        self.shifts = Shifts()
        self._allowed: Counter[str] = Counter()
        self._denied: Counter[str] = Counter()
        self._keys: WeakValueDictionary[tuple[str, str, str], asyncio.Lock] = WeakValueDictionary()

    def role(self, caller: Caller, name: str) -> Role:
        """The role, for a caller who wants to use it: that is counted, and a refusal logged.

        Raises:
            RoleNotFound: there is none of that name, or its file is broken.
            PermissionDenied: this caller may not use it.
        """
        role = self._roles.get(name)
        if not self.permits(caller, role):
            self._denied[role.name] += 1
            _log.warning("%s may not use the role %s", caller.principal, role.name)
            hint = "over TCP it needs VESPERA_ALLOW_COMMAND_OVER_TCP=1" if name == COMMAND_ROLE else ""
            raise PermissionDenied(
                f"Role {name} is not open to {caller.principal}", hint=hint or "list_roles shows what is allowed"
            )
        self._allowed[role.name] += 1
        return role

    def uses(self, role: Role) -> views.RoleUses:
        """How often it was asked for since this process started."""
        return views.RoleUses(allowed=self._allowed[role.name], denied=self._denied[role.name])

    def permits(self, caller: Caller, role: Role) -> bool:
        if role.name == COMMAND_ROLE and role.source == "builtin" and not caller.is_local:
            return self.settings.allow_command_over_tcp and "operate" in caller.scopes
        return role.permits(caller)

    def new_task(self, caller: Caller, new: views.NewTask) -> Task:
        """A recorded task.

        Raises:
            InvalidInput, RoleNotFound, PermissionDenied: nothing has been recorded.
        """
        return self._made(caller, new, self.role(caller, new.role) if new.role is not None else None)

    def _made(self, caller: Caller, new: views.NewTask, role: Role | None, *, complete: bool = False) -> Task:
        inputs = checks.inputs(new.inputs, self.settings)
        if complete and role is not None:
            inputs = self.completed(caller, role, inputs)
        return self._tasks.make(
            title=checks.title(new.title, self.settings),
            description=checks.description(new.description, self.settings),
            role=role.name if role else None,
            inputs=inputs,
            priority=new.priority,
            sla_seconds=new.sla_seconds or self.settings.sla_seconds,
            max_retries=new.max_retries,
            principal=caller.principal,
        )

    async def start(self, caller: Caller, request: views.Execute) -> Job:
        """Decide PENDING for the task that is named, or for a new one.

        Raises:
            InvalidInput, TaskNotFound, RoleNotFound, PermissionDenied, AlreadyExecuting: nothing was decided.
            Conflict: the task is a step of a plan. Nothing was decided.
        """
        if (request.task_id is None) == (request.title is None):
            raise InvalidInput(
                "give either task_id, to execute a known task, or title and role, to make one and execute it"
            )
        if request.title is not None:
            if request.role is None:
                raise InvalidInput("role is missing", hint="list_roles shows what there is")
            role = self.role(caller, request.role)
            self.check_capacity(role, request.capacity)
            new = views.NewTask(
                title=request.title,
                description=request.description,
                role=role.name,
                inputs=request.inputs or {},
                priority=5 if request.priority is None else request.priority,
            )
            task = self._made(caller, new, role, complete=True)
            return self._enqueue(task, role, dict(task.inputs), caller, request)
        task = await self._tasks.get(request.task_id or "", caller)
        name = request.role or task.record.assigned_role
        if name is None:
            raise InvalidInput(f"task {task.id} has no role", hint="name one in `role`; list_roles shows what there is")
        role = self.role(caller, name)
        session = task.execution.current_session
        if session is not None:
            raise AlreadyExecuting(task.id, session.session_id)
        given = task.inputs if request.inputs is None else request.inputs
        return self._enqueue(task, role, self.completed(caller, role, dict(given)), caller, request)

    @asynccontextmanager
    async def once(
        self, caller: Caller, operation: str, request: views.NewTask | views.Execute | plan_views.ExecutePlan
    ) -> AsyncGenerator[IdempotencyRecord | None]:
        """One request per idempotency key at a time; what the key stands for, where it has been used.

        Raises:
            Conflict: it has been used for a request that asked for something else.
            InvalidInput: the inputs cannot be compared, as they are no JSON.
        """
        key = request.idempotency_key
        if key is None:
            yield None
            return
        name = (caller.principal, operation, key)
        lock = self._keys.setdefault(name, asyncio.Lock())
        async with lock:
            known = await self._store.queries.find_idempotent(*name)
            if known is not None and known.digest not in (None, checks.request_digest(request)):
                raise Conflict(
                    f"the idempotency key {key[:100]!r} has been used for another request (task {known.task_id})",
                    hint="use another key, or repeat the first request unchanged",
                )
            yield known

    def check_capacity(self, role: Role, given: Json = None) -> None:
        """Whether a run of `role`, which asks for `given` (None: for what the role says), can ever begin.

        Raises:
            InvalidInput: `given` cannot be meant.
            CapacityUnknown, CapacityTooLarge: no pools could give it.
        """
        self._pools.check(role.capacity if given is None else requirements(given))

    def completed(self, caller: Caller, role: Role, given: Mapping[str, Json]) -> dict[str, Json]:
        """Inputs that the role takes, with its defaults.

        Raises:
            InvalidInput, PermissionDenied: it does not.
        """
        completed = role.validate_inputs(checks.inputs(given, self.settings))
        return role.resolve_paths(completed, caller, self.settings.allowed_roots)

    def _enqueue(
        self,
        task: Task,
        role: Role,
        inputs: dict[str, Json],
        caller: Caller,
        request: views.Execute,
        queueing: Mapping[str, Any] | None = None,
    ) -> Job:
        """The request's own values, who asked, and PENDING, in one decision; `queueing` as in `enqueue_execution`."""
        if task.record.parent_execution_id is not None:
            raise Conflict(
                f"task {task.id} is step {task.record.step_id} of a plan, which alone executes it",
                hint="restore the plan from a checkpoint, or execute it again",
            )
        asked = self.asked(caller, timeout_seconds=request.timeout_seconds)
        if request.capacity is not None:
            asked["capacity"] = [each.to_dict() for each in requirements(request.capacity)]
        self._pools.check(capacity_of(role, asked))
        with task.ledger:
            session = task.enqueue_execution(
                role.name,
                priority=task.priority if request.priority is None else request.priority,
                owner=self.owner,
                message="Waiting for a worker" if role.runner == "external" else "Queued",
                **(queueing or {}),
            )
            task.execution.change(inputs=inputs)
            task.ledger.keep(RequestRecord(run_id=session.run_id, body=orjson.dumps(asked)))
            if request.idempotency_key is not None:
                digest = checks.request_digest(request)
                task.remember_key(caller.principal, "execute", request.idempotency_key, session.run_id, digest=digest)
        return self.job(task, session, role, asked)

    def restored(
        self, caller: Caller, task: Task, asked: Mapping[str, Json], then: Lifecycle, *, checkpoint_id: str
    ) -> Job:
        """Decide PENDING for a new execution that begins where an ended one stood `then`, with its limits.

        Raises:
            InvalidInput, RoleNotFound, PermissionDenied, AlreadyExecuting: nothing was decided.
            Conflict: the task is a step of a plan. Nothing was decided.
        """
        role = self.role(caller, then.role_name or "")
        request = views.Execute(
            task_id=task.id,
            timeout_seconds=asked.get("timeout_seconds"),
            priority=then.priority,
            capacity=asked.get("capacity"),
        )
        return self._enqueue(
            task,
            role,
            self.completed(caller, role, dict(task.inputs)),
            caller,
            request,
            {
                "parent_execution_id": then.execution_id,
                "checkpoint": then.checkpoint,
                "checkpoint_at": then.checkpoint_at,
                "inputs": then.inputs,
                "restored_from": checkpoint_id,
            },
        )

    def asked(self, caller: Caller, *, timeout_seconds: float | None) -> dict[str, Json]:
        """What is kept of a request: who asked, from where, with which limit."""
        return {
            "principal": caller.principal,
            "scopes": sorted(caller.scopes),
            "over_tcp": caller.over_tcp,
            "cwd": caller.cwd,
            "env": dict(caller.env),
            "timeout_seconds": timeout_seconds,
        }

    def caller(self, asked: Mapping[str, Json]) -> Caller:
        """Who asked, out of what was kept of a request."""
        return Caller(
            principal=asked["principal"],
            scopes=frozenset(asked["scopes"]),
            over_tcp=asked["over_tcp"],
            cwd=asked["cwd"],
            env=mapping(asked.get("env")),
        )

    def job(self, task: Task, session: ExecutionSession, role: Role, asked: Mapping[str, Json]) -> Job:
        """What the engine is given, from what was `asked` for: also by a later owner, who takes its worker over."""
        role = adapted(role, asked)
        external = role.runner == "external"
        if external and session.lifecycle.lease is not None:
            self.shifts.take_over(session.session_id)

        async def run(work: Work) -> WorkResult:
            if not external:
                return await self._executor.execute_task_with_tracking(task, role, work)
            current = task.execution.current_session
            lease = current.lifecycle.lease if current is not None else None
            if lease is None:
                raise WorkerNeeded("No worker has it")
            return await self.shifts.serve(work, lease)

        return Job(
            task=task,
            session=session,
            run=run,
            caller=self.caller(asked),
            place="worker" if external else "slot",
            group=task.record.parent_execution_id,
            capacity=capacity_of(role, asked),
            policy=Policy(
                timeout_seconds=asked.get("timeout_seconds")
                or role.timeout_seconds
                or self.settings.default_timeout_seconds,
                wait_timeout_seconds=mapping(asked.get("step")).get("wait_timeout_seconds")
                or role.wait_timeout_seconds,
                grace_seconds=min(role.grace_seconds, _LONGEST_GRACE_SECONDS),
                retry=retry_rule(role, asked),
            ),
        )


def capacity_of(role: Role, asked: Mapping[str, Json]) -> tuple[CapacityRequirement, ...]:
    """What a run needs of the pools: what was asked for it, else what its step says, else its role."""
    if (given := asked.get("capacity")) is not None:
        return requirements(given)
    return requirements(mapping(asked.get("step")).get("capacity")) or role.capacity
