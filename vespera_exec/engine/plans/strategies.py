"""Recovery strategies: what is to become of a step that has failed, beyond the attempts of its own run."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final, Protocol

import anyio

from vespera_exec.errors import Conflict, ExecutionError, InvalidInput, failure_names_of
from vespera_exec.model.enums import RecoveryAction
from vespera_exec.model.jsonable import clean_text, exact_json

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

    from vespera_exec.model.events import Json
    from vespera_exec.model.plans.plan import ExecutionPlan, PlanStep
    from vespera_exec.model.plans.restoring import ExecutionState
    from vespera_exec.model.plans.steps import StepState

ANY_ERROR: Final = "*"
DECIDING_SECONDS: Final = 5.0
"""That one strategy may take to decide."""
LONGEST_DELAY_SECONDS: Final = 86_400.0
_LONGEST_MESSAGE: Final = 2000

A = RecoveryAction
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RecoveryContext:
    """What a strategy knows of a failure. Nothing that it changes here changes the plan."""

    execution_id: str
    """Of the plan."""
    step_id: str
    error: ExecutionError
    failures: int
    """Of this step in a row with the code of `error`, this one included; a success sets it back."""
    recoveries: int = 0
    """How often strategies have had this step run again so far."""
    step: PlanStep
    read_plan: Callable[[], ExecutionPlan] = field(repr=False)
    """Gives `plan`."""
    read_state: Callable[[], ExecutionState] = field(repr=False)
    """Gives `state`; it costs as much as the plan is large."""
    resources: tuple[Mapping[str, Json], ...] = ()
    """The capacity pools as they stand: name, type, total, free."""

    @cached_property
    def state(self) -> ExecutionState:
        """The state of the whole plan, a copy of its own."""
        return self.read_state()

    @cached_property
    def plan(self) -> ExecutionPlan:
        """The whole plan, a copy of its own."""
        return deepcopy(self.read_plan())

    def copy(self) -> RecoveryContext:
        """One that shares nothing with this that anybody could change."""
        said = self.error
        error = ExecutionError(
            said.message,
            code=said.failure_code,
            task_id=said.task_id,
            recoverable=said.recoverable,
            context=deepcopy(said.context),
            timestamp=said.timestamp,
        )
        return replace(self, error=error, step=deepcopy(self.step), resources=deepcopy(self.resources))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryResult:
    """What a strategy has decided.

    `success` False means that it has found no way: the next strategy is asked, except after ABORT. `new_state` changes
    the variables of the plan. `checkpoint_id` is for CHECKPOINT_RESTORE; None is the last one before the step began.
    A strategy does not sleep: `delay_seconds` pass before a RETRY, also over a restart of the server.
    """

    success: bool
    action: RecoveryAction
    new_state: ExecutionState | None = None
    message: str = ""
    delay_seconds: float = 0.0
    checkpoint_id: str | None = None


class RecoveryStrategy(Protocol):
    """`applicable_errors` are error codes; "*" is any."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def applicable_errors(self) -> Sequence[str]: ...

    async def execute(self, context: RecoveryContext) -> RecoveryResult: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the coordinator does about a failed step, whatever becomes of it in the end.

    RETRY: the step runs again after `delay_seconds`. SKIP: it is skipped, and what depends on it runs. FALLBACK: its
    fallback role does it now. ABORT: the plan ends FAILED with `message`. CHECKPOINT_RESTORE: the plan goes back to
    `checkpoint_id`, None being the last one before the step began. `variables` are the plan's from then on; None
    leaves them.
    """

    strategy_id: str
    action: RecoveryAction
    message: str
    delay_seconds: float = 0.0
    checkpoint_id: str | None = None
    variables: Mapping[str, Json] | None = None


class Strategies:
    """The strategies of one engine, in the order in which they are asked."""

    def __init__(self, strategies: Iterable[RecoveryStrategy] = (), *, seconds: float = DECIDING_SECONDS) -> None:
        self._seconds = seconds
        self._known: dict[str, RecoveryStrategy] = {}
        self._codes: dict[str, frozenset[str]] = {}
        """What each is for, as it said when it was added."""
        self._by_name_only: set[str] = set()
        for each in strategies:
            self.add(each)

    @classmethod
    def built_in(cls) -> Strategies:
        """`network_timeout_recovery`, and those that apply only where a step names them in `recovery`."""
        made = cls([NetworkTimeoutRecovery()])
        for each in NAMED:
            made.add(each, by_name_only=True)
        return made

    def add(self, strategy: RecoveryStrategy, *, by_name_only: bool = False) -> None:
        """Ask it from now on, after those that are there; `by_name_only`: for steps that name it in `recovery`.

        Raises:
            Conflict: there is one of this id.
            InvalidInput: it has no id, or is for no error.
        """
        if not strategy.id or isinstance(strategy.applicable_errors, str) or not strategy.applicable_errors:
            raise InvalidInput("a recovery strategy has an id, and a list of the error codes that it is for")
        if strategy.id in self._known:
            raise Conflict(f"there is a recovery strategy {strategy.id!r} already", hint="remove that one first")
        self._known[strategy.id] = strategy
        self._codes[strategy.id] = frozenset(strategy.applicable_errors)
        if by_name_only:
            self._by_name_only.add(strategy.id)

    def remove(self, strategy_id: str) -> bool:
        """Ask it no more; False where there is none of this id."""
        self._by_name_only.discard(strategy_id)
        self._codes.pop(strategy_id, None)
        return self._known.pop(strategy_id, None) is not None

    def __iter__(self) -> Iterator[RecoveryStrategy]:
        return iter(tuple(self._known.values()))

    @property
    def ids(self) -> tuple[str, ...]:
        """All of them, in the order in which they are asked."""
        return tuple(self._known)

    def applying(self, error: ExecutionError, allowed: Sequence[str] | None) -> list[RecoveryStrategy]:
        """Those that are asked about `error`: `allowed` are ids, None means all that need not be named."""
        names = (ANY_ERROR, *failure_names_of(error))
        return [
            each
            for name, each in self._known.items()
            if (name not in self._by_name_only if allowed is None else name in allowed)
            and not self._codes[name].isdisjoint(names)
        ]

    async def decide(
        self, context: RecoveryContext, allowed: Sequence[str] | None
    ) -> tuple[str, RecoveryResult] | None:
        """The first answer, with the id of who gave it; None where nobody has one.

        A strategy that fails, takes longer than it may, or returns something else is logged and passed over.
        """
        for each in self.applying(context.error, allowed):
            if (result := await self._asked(each, context.copy())) is None:
                continue
            if result.success or result.action is A.ABORT:
                return each.id, result
        return None

    async def _asked(self, strategy: RecoveryStrategy, context: RecoveryContext) -> RecoveryResult | None:
        # The boundary to somebody else's code: its fault must not be the plan's.
        try:
            with anyio.move_on_after(self._seconds):
                result: object = await _alone(strategy.execute(context))
                problem = _problem(result)
                if isinstance(result, RecoveryResult) and problem is None:
                    return result
                _log.error("The recovery strategy %s %s", strategy.id, problem)
                return None
        except (Exception, SystemExit):  # noqa: BLE001
            _log.exception("The recovery strategy %s failed", strategy.id)
            return None
        _log.error("The recovery strategy %s took longer than %g s", strategy.id, self._seconds)
        return None


async def decided(
    strategies: Strategies,
    step: PlanStep,
    state: StepState,
    error: ExecutionError,
    *,
    plan: ExecutionPlan,
    read_state: Callable[[], ExecutionState],
    resources: tuple[Mapping[str, Json], ...] = (),
    most: int = 3,
) -> Decision | None:
    """What the strategies say about a step that has failed, in a form that can be done.

    `state` is the step's, before this failure is recorded; `most` are the recoveries that a step may have. None: it
    fails as if there were no strategies, which is first its fallback, then the end of the step.
    """
    if not strategies.applying(error, step.recovery):
        return None
    context = RecoveryContext(
        execution_id=state.execution_id,
        step_id=step.id,
        error=error,
        failures=state.failures_with(error.failure_code),
        recoveries=state.recoveries,
        step=step,
        read_plan=lambda: plan,
        read_state=read_state,
        resources=resources,
    )
    found = await strategies.decide(context, step.recovery)
    return None if found is None else possible(*found, step, state, most=most)


def possible(
    strategy_id: str, result: RecoveryResult, step: PlanStep, state: StepState, *, most: int
) -> Decision | None:
    """The decision that a result comes to for this step; None where it cannot be done, or the step's own rule goes
    before it.

    No step is run again by strategies, and the plan not set back for it, more than `most` times. A FALLBACK needs a
    fallback that was not used. An ABORT by a strategy that the step does not name leaves it to an unused fallback and
    to `continue_on_failure`.
    """
    has_fallback = step.fallback is not None and not state.is_fallback
    match result.action:
        case A.RETRY | A.CHECKPOINT_RESTORE if state.recoveries >= most:
            _log.warning("Step %s has had its %d recoveries; %s is not asked any more", step.id, most, strategy_id)
            return None
        case A.FALLBACK if not has_fallback:
            return None
        case A.ABORT if step.recovery is None and (has_fallback or step.continue_on_failure):
            return None
        case _:
            pass
    return Decision(
        strategy_id=strategy_id,
        action=result.action,
        message=clean_text(result.message[:_LONGEST_MESSAGE]) or f"{strategy_id}: {result.action.value}",
        delay_seconds=min(result.delay_seconds, LONGEST_DELAY_SECONDS),
        checkpoint_id=result.checkpoint_id,
        variables=None if result.new_state is None else exact_json(result.new_state.variables, "the variables"),
    )


async def _alone(answer: Awaitable[object]) -> object:
    """What it gives. A cancellation that comes from within is a fault like any other, and not one of the plan.

    Raises:
        ExecutionError: it was cancelled, and not by us.
    """
    try:
        return await answer
    except asyncio.CancelledError as error:
        if anyio.current_effective_deadline() == -math.inf:
            raise
        raise ExecutionError("it was cancelled from within") from error


def _problem(result: object) -> str | None:
    """What is wrong with what a strategy has returned."""
    if not isinstance(result, RecoveryResult):
        return f"returned {type(result).__name__}, not a RecoveryResult"
    said: dict[str, object] = {each.name: getattr(result, each.name) for each in fields(result)}
    if not isinstance(said["action"], RecoveryAction):
        return f"asks for {result.action!r}, which is no action"
    if not isinstance(said["message"], str) or not isinstance(said["checkpoint_id"], str | None):
        return "returned a message, or a checkpoint_id, that is no text"
    if not math.isfinite(result.delay_seconds) or result.delay_seconds < 0:
        return f"asks for a delay of {result.delay_seconds} s"
    if result.new_state is not None:
        try:
            exact_json(result.new_state.variables, "the variables")
        except InvalidInput as error:
            return f"returned a state that cannot be kept: {error.message}"
    return None


class NetworkTimeoutRecovery:
    """Tries again after 1, 2 and 4 seconds, then gives up. Each step and each code counts for itself."""

    id = "network_timeout_recovery"
    name = "Network Timeout Recovery"
    description = "Retry with exponential backoff for network timeouts"
    applicable_errors = ("NETWORK_TIMEOUT", "CONNECTION_REFUSED")

    def __init__(
        self,
        *,
        max_retries: int = 3,
        base_seconds: float = 1.0,
        longest_seconds: float = 60.0,
        jitter: float = 0.1,
        drawn: Callable[[], float] = random.random,
    ) -> None:
        """`jitter`: up to this share is added to each delay, by chance (`drawn` gives 0 to 1)."""
        self._max_retries = max_retries
        self._base_seconds = base_seconds
        self._longest_seconds = longest_seconds
        self._jitter = jitter
        self._drawn = drawn

    async def execute(self, context: RecoveryContext) -> RecoveryResult:
        if context.failures > self._max_retries:
            told = f"Max retries ({self._max_retries}) exceeded for network timeout"
            return RecoveryResult(success=False, action=A.ABORT, message=told)
        delay = min(self._base_seconds * 2 ** (context.failures - 1), self._longest_seconds)
        delay *= 1 + self._jitter * self._drawn()
        told = f"Retrying after {delay:.3g} s (attempt {context.failures}/{self._max_retries})"
        return RecoveryResult(success=True, action=A.RETRY, message=told, delay_seconds=delay)


@dataclass(frozen=True, slots=True)
class Always:
    """One answer to any error. `once`: only where no strategy has had the step run again before."""

    id: str
    name: str
    description: str
    action: RecoveryAction
    once: bool = False
    applicable_errors: tuple[str, ...] = (ANY_ERROR,)

    async def execute(self, context: RecoveryContext) -> RecoveryResult:
        answers = not self.once or context.recoveries == 0
        return RecoveryResult(success=answers, action=self.action, message=f"{self.description}: {context.error}")


NAMED: Final = (
    Always("retry_once", "Retry once", "Run the step once more", A.RETRY, once=True),
    Always("skip", "Skip", "Go on without the step", A.SKIP),
    Always("fallback", "Fallback", "Let the fallback role do the step", A.FALLBACK),
    Always("abort", "Abort", "End the plan", A.ABORT),
    Always(
        "restore_last_checkpoint",
        "Restore the last checkpoint",
        "Go back to the last checkpoint before the step began",
        A.CHECKPOINT_RESTORE,
    ),
)
"""They apply only to steps that name them in `recovery`."""
