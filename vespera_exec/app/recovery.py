"""What becomes of the executions that a dead owner left: they go on, or they end in a state that says why."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from roles.execution import APPROVAL
from vespera_exec.app.plans.step_limits import adapted
from vespera_exec.errors import ExecutionError, InvalidInput, InvalidTransitionError, RoleNotFound, StoreError
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus
from vespera_exec.model.plans.as_json import plan_from_dict
from vespera_exec.model.plans.plan import PLAN_ROLE
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from datetime import datetime

    from roles.definition import Role
    from roles.registry import RoleRegistry
    from vespera_exec.app.plans.steps import PlanJobs
    from vespera_exec.app.starting import Starter
    from vespera_exec.app.tasks import LiveTasks
    from vespera_exec.engine.engine import Engine
    from vespera_exec.engine.jobs import Job
    from vespera_exec.model.events import Json
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.plans.plan import ExecutionPlan
    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.model.task import Task
    from vespera_exec.store.queries import Unfinished

S = ExecutionStatus

_log = logging.getLogger(__name__)


_UNREADABLE = "what was asked for cannot be read any more"


@dataclass(frozen=True, slots=True)
class _PlanLeft:
    """A plan that a dead owner left, and what was kept of its request; `refused`: why it does not go on.

    `plan` None: not even its steps can be read.
    """

    asked: dict[str, Json]
    plan: ExecutionPlan | None
    refused: str | None


@dataclass(slots=True)
class Recovered:
    """How many went which way."""

    queued: int = 0
    """Had not begun, and wait for their turn as before."""
    resumed: int = 0
    """Had begun, and go on from their last checkpoint."""
    paused: int = 0
    """As those, but stay paused."""
    ended: int = 0
    """Are over: interrupted, or cancelled as was asked."""


class Recovery:
    """Takes over, for the owner of a data directory, what another left unfinished."""

    def __init__(
        self,
        *,
        tasks: LiveTasks,
        roles: RoleRegistry,
        starter: Starter,
        engine: Engine,
        owner: str,
        plans: PlanJobs,
        trusted: bool,
        cancelled: Collection[str] = (),
    ) -> None:
        """`trusted` False: the directory was not made here by this user, and nothing that comes out of it is run.

        `cancelled` are sessions whose cancel the log could not take.
        """
        self._tasks = tasks
        self._roles = roles
        self._starter = starter
        self._engine = engine
        self._plans = plans
        self._owner = owner
        self._trusted = trusted
        self._cancelled = cancelled

    async def take_over(self, left: list[Unfinished]) -> Recovered:
        """Decide about all of them. It is on disk after the next `sync`; the engine starts nothing before."""
        plans = {
            each.lifecycle.execution_id: await self._read(each)
            for each in left
            if each.lifecycle.role_name == PLAN_ROLE
        }
        return self._decide(left, plans)

    def _decide(self, left: list[Unfinished], plans: Mapping[str, _PlanLeft]) -> Recovered:
        done = Recovered()
        ending: set[str] = set()
        """The plans whose steps do not go on."""
        for each in sorted(left, key=lambda each: each.lifecycle.role_name != PLAN_ROLE):
            task = self._tasks.adopt(each)
            session = task.execution.current_session
            if session is None:
                continue
            with session.ledger:
                session.change_owner(self._owner)
                if session.lifecycle.lease is None:  # else a worker has it, and uses it still
                    session.release_capacity("Its owner ended", at=_last_sign(each))
                parent = task.record.parent_execution_id
                if parent is not None and (parent in ending or parent not in plans):
                    session.request_cancellation("Its plan does not go on")
                if session.lifecycle.status.is_terminal:
                    job = None
                elif session.lifecycle.role_name == PLAN_ROLE:
                    found = plans[session.session_id]
                    job = self._plan(task, session, each, found)
                    if found.refused is not None or job is None or session.lifecycle.status is S.CANCELLING:
                        ending.add(session.session_id)
                else:
                    job = self._continued(task, session, each)
            if job is None:
                done.ended += 1
                continue
            self._tasks.hold(task)
            self._engine.submit(job)
            match session.lifecycle.status:
                case S.PENDING:
                    done.queued += 1
                case S.PAUSED:
                    done.paused += 1
                case _:
                    done.resumed += 1
        if left:
            _log.warning(
                "Took over from a dead owner: %d queued, %d going on, %d paused, %d ended",
                done.queued, done.resumed, done.paused, done.ended,
            )  # fmt: skip
        return done

    async def _read(self, left: Unfinished) -> _PlanLeft:
        """The plan of an execution; what its steps tell of it, where it does not go on since nobody can read it."""
        asked, plan, refused = dict[str, "Json"](), None, None
        try:
            asked = _asked(left.request)
            self._starter.caller(asked)
            plan = plan_from_dict(asked["plan"])
            self._check_trusted()
        except _Refused as error:
            refused = f"{error}"
        # The boundary to what has been kept: whatever is wrong with that, it cannot be read.
        except Exception:  # noqa: BLE001
            _log.exception("The request of plan %s cannot be read", left.lifecycle.execution_id)
            refused = _UNREADABLE
        if plan is None:
            nobody = Caller(principal=left.task.principal, scopes=frozenset())
            asked = self._starter.asked(nobody, timeout_seconds=None)
            try:
                plan = await self._plans.remains(left.lifecycle.execution_id)
            except StoreError:
                _log.exception("The steps of plan %s cannot be read either", left.lifecycle.execution_id)
        return _PlanLeft(asked, plan, refused)

    def _plan(self, task: Task, session: ExecutionSession, left: Unfinished, found: _PlanLeft) -> Job | None:
        """The job of a plan, of which nothing ran but its steps: it goes on, or ends once they have ended."""
        if left.lifecycle.execution_id in self._cancelled:
            session.request_cancellation("Asked for while the disk was full")
            if session.lifecycle.status.is_terminal:
                return None
        if found.refused is None:
            return self._plans.job(task, session, found.asked, plan=found.plan)
        said = f"The plan cannot go on: {found.refused}"
        refused = ExecutionError(said, code="INTERRUPTED", context={"owner": left.lifecycle.owner})
        if found.plan is None:
            session.fail(refused)
            return None
        return self._plans.job(task, session, found.asked, plan=found.plan, refused=refused)

    def _continued(self, task: Task, session: ExecutionSession, left: Unfinished) -> Job | None:
        """The job of an execution that goes on; None where it has ended here."""
        life = left.lifecycle
        if life.execution_id in self._cancelled:
            session.request_cancellation("Asked for while the disk was full")
            if session.lifecycle.status.is_terminal:
                return None
        if session.lifecycle.status is S.CANCELLING:
            session.end_lease("It was cancelled")
            session.end_cancelled(outcome={"owner_died": life.owner})
            return None
        began = life.status is not S.PENDING and not life.is_parked
        died = f"The server that ran it ({life.owner}) ended in the middle" if began else ""
        try:
            role, job = self._as_asked(task, session, left)
            # What is done elsewhere went on without us: its worker has it still.
            if began and not (role.runner == "external" and life.lease is not None):
                session.end_lease("Its role is no longer done by workers")
                self._recover(session, life, died)
        except _Refused as error:
            said = f"{died}; {error}" if began else f"{error}"[:1].upper() + f"{error}"[1:]
            session.end_lease(said)  # or its worker would hear that what it concluded was taken
            session.fail(ExecutionError(said, code="INTERRUPTED", context={"owner": life.owner}))
            return None
        return job

    def _as_asked(self, task: Task, session: ExecutionSession, left: Unfinished) -> tuple[Role, Job]:
        """The role it goes on with, and its job.

        Raises:
            _Refused: why it does not.
        """
        try:
            role, asked = self._may_go_on(left.lifecycle, left.request)
            return role, self._starter.job(task, session, role, asked)
        except _Refused:
            raise
        # The boundary to what has been kept, as in `_read`: one request that cannot be read keeps nobody else out.
        except Exception:  # noqa: BLE001
            _log.exception("The request of execution %s cannot be read", left.lifecycle.execution_id)
            raise _Refused(_UNREADABLE) from None

    def _may_go_on(self, life: Lifecycle, request: bytes | None) -> tuple[Role, dict[str, Json]]:
        """The role it goes on with, and what was asked for.

        Raises:
            _Refused: why it does not.
        """
        self._check_trusted()
        try:
            role = self._roles.get(life.role_name or "")
        except (RoleNotFound, InvalidInput) as error:
            raise _Refused(f"its role cannot be used any more: {error.message}") from error
        asked = _asked(request)
        try:
            role = adapted(role, asked)
        except InvalidInput as error:
            raise _Refused(f"its role cannot be used any more: {error.message}") from error
        if not self._starter.permits(self._starter.caller(asked), role):
            raise _Refused(f"role {role.name} is not open any more to whoever asked for it")
        if life.is_parked:
            return role, asked  # nothing of it ran
        if role.approval and APPROVAL not in life.answers:
            return role, asked  # nor here: it is asked before anything else
        if life.status is S.COMPLETING:
            raise _Refused("its result was not yet written")
        if role.runner == "external":
            return role, asked  # it is done elsewhere, and that went on
        if life.status is not S.PENDING and role.on_interrupt != "resume":
            raise _Refused(f"role {role.name} does not resume")
        return role, asked

    def _check_trusted(self) -> None:
        if not self._trusted:
            raise _Refused("it lay in a data directory that was not made here by you, and was not run")

    def _recover(self, session: ExecutionSession, life: Lifecycle, died: str) -> None:
        """To RECOVERING; one that was paused goes on to PAUSED, since nothing of it runs.

        Raises:
            _Refused: it has done so too often.
        """
        paused = life.status is S.PAUSED
        if paused and life.current_phase is ExecutionPhase.RECOVERY:
            return  # it has not gone on since an earlier owner died: nothing was lost with this one
        if life.status is not S.RECOVERING:
            known = {"owner": life.owner, "checkpoint_at": life.checkpoint_at and life.checkpoint_at.isoformat()}
            try:
                session.recover(died, details=known)
            except InvalidTransitionError:
                raise _Refused(f"that was the last of {session.max_recovery_attempts} recoveries") from None
            session.enter_phase(ExecutionPhase.RECOVERY, died)
        if paused:
            session.update_status(S.PREPARING, "It was paused, and stays so")
            session.pause(life.status_message)


def _last_sign(left: Unfinished) -> datetime | None:
    """When the work is last known to have run."""
    known = (left.measured_at, left.progress.updated_at, left.lifecycle.clock_read_at)
    return max((each for each in known if each is not None), default=None)


def _asked(request: bytes | None) -> dict[str, Json]:
    """
    Raises:
        _Refused: it is lost.
    """
    if request is None:
        raise _Refused("who asked for it is not known any more")
    try:
        return orjson.loads(request)
    except orjson.JSONDecodeError:
        raise _Refused(_UNREADABLE) from None


class _Refused(Exception):
    """An execution does not go on; the argument says why."""
