"""What strategies decide about a step that has failed: who is asked, for how long, and what comes of an answer."""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
import pytest

from vespera_exec.app import plugins
from vespera_exec.engine.plans.strategies import (
    Decision,
    NetworkTimeoutRecovery,
    RecoveryContext,
    RecoveryResult,
    Strategies,
    decided,
)
from vespera_exec.errors import Conflict, ExecutionError, InvalidInput
from vespera_exec.model.enums import RecoveryAction, StepStatus
from vespera_exec.model.plans.board import PlanBoard
from vespera_exec.model.plans.plan import ExecutionPlan, Fallback, PlanStep
from vespera_exec.model.plans.restoring import ExecutionState, state_of_plan
from vespera_exec.model.plans.steps import StepState
from vespera_exec.model.session import ExecutionSession

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

A = RecoveryAction
DOWN = ExecutionError("the peer did not answer", code="NETWORK_TIMEOUT")


@dataclass
class Told:
    """A strategy of somebody else's, which notes what it is asked."""

    id: str
    answer: Callable[[RecoveryContext], Awaitable[RecoveryResult]]
    applicable_errors: tuple[str, ...] = ("*",)
    name: str = "Told"
    description: str = "Says what it was told to say"
    asked: int = 0

    async def execute(self, context: RecoveryContext) -> RecoveryResult:
        self.asked += 1
        return await self.answer(context)


def saying(id: str, action: RecoveryAction = A.SKIP, *codes: str, success: bool = True, **more: Any) -> Told:
    async def answer(context: RecoveryContext) -> RecoveryResult:
        return RecoveryResult(success=success, action=action, message=f"{id} says so", **more)

    return Told(id, answer, codes or ("*",))


def step(**more: Any) -> PlanStep:
    return PlanStep(id="fetch", role="fetcher", **more)


def state(**more: Any) -> StepState:
    return StepState(execution_id="plan-1", step_id="fetch", position=0, status=StepStatus.RUNNING, **more)


async def asked(
    strategies: Strategies,
    error: ExecutionError = DOWN,
    *,
    of: PlanStep | None = None,
    at: StepState | None = None,
    variables: dict[str, Any] | None = None,
) -> Decision | None:
    of, at = of or step(), at or state()
    states = {"fetch": at}
    return await decided(
        strategies,
        of,
        at,
        error,
        plan=ExecutionPlan(id="p", steps=(of,)),
        read_state=lambda: state_of_plan(states, variables or {}, current="fetch"),
    )


async def failing_again_and_again(strategies: Strategies, codes: list[str]) -> list[Decision | None]:
    """The decisions about one step that fails with these codes, each recorded as the coordinator does."""
    at, made = state(), list[Decision | None]()
    for code in codes:
        error = ExecutionError("it failed", code=code)
        decision = await asked(strategies, error, at=at)
        made.append(decision)
        again = decision is not None and decision.action is A.RETRY
        at = state(error={"code": code}, failures=at.failures_with(code), recoveries=at.recoveries + again)
    return made


async def test_a_network_timeout_is_tried_again_after_one_two_and_four_seconds_and_then_aborts() -> None:
    made = await failing_again_and_again(Strategies.built_in(), ["NETWORK_TIMEOUT"] * 4)
    *again, last = [each for each in made if each is not None]
    assert [each.action for each in again] == [A.RETRY] * 3
    for each, seconds in zip(again, (1, 2, 4), strict=True):
        assert seconds <= each.delay_seconds <= seconds * 1.1
    assert (last.action, last.message) == (A.ABORT, "Max retries (3) exceeded for network timeout")


async def test_each_code_counts_for_itself() -> None:
    strategies = Strategies([NetworkTimeoutRecovery(jitter=0.0, max_retries=1)])
    made = await failing_again_and_again(strategies, ["NETWORK_TIMEOUT", "CONNECTION_REFUSED", "CONNECTION_REFUSED"])
    assert [each and each.action for each in made] == [A.RETRY, A.RETRY, A.ABORT]


def test_failures_in_a_row_are_counted_in_the_log_and_a_success_sets_them_back() -> None:
    session = ExecutionSession(task_id="t", role_name="plan")
    session.start_execution()
    board = PlanBoard(session, ExecutionPlan(id="p", steps=(step(), PlanStep(id="other", role="r"))))
    board.open()
    seen: list[int] = []
    for attempt, code in enumerate(("NETWORK_TIMEOUT", "NETWORK_TIMEOUT", "CONNECTION_REFUSED", "NETWORK_TIMEOUT")):
        board.started("fetch", role="fetcher", attempt=attempt + 1)
        board.failed("fetch", {"code": code, "message": "no"}, final=False)
        seen.append(board.step("fetch").failures)
    assert seen == [1, 2, 1, 1]
    assert board.step("other").failures == 0
    board.started("fetch", role="fetcher", attempt=5)
    board.completed("fetch")
    assert (board.step("fetch").failures, board.step("fetch").failures_with("NETWORK_TIMEOUT")) == (0, 1)


async def test_the_back_off_has_a_cap_and_little_jitter() -> None:
    strategy = NetworkTimeoutRecovery(max_retries=20, longest_seconds=10.0, drawn=lambda: 1.0)
    at = state(error={"code": "NETWORK_TIMEOUT"}, failures=15)
    decision = await asked(Strategies([strategy]), at=at)
    assert decision is not None
    assert decision.delay_seconds == pytest.approx(11.0)


async def test_what_no_strategy_is_for_is_left_to_the_plan_without_asking_anybody() -> None:
    strategies = Strategies.built_in()
    assert await asked(strategies, ExecutionError("a bug", code="BUG")) is None
    named = [each.id for each in strategies.applying(ExecutionError("x", code="BUG"), ("skip", "abort", "unknown"))]
    assert named == ["skip", "abort"]
    assert strategies.applying(ExecutionError("x", code="BUG"), None) == []
    assert strategies.applying(ExecutionError("x", code="NETWORK_TIMEOUT"), ()) == []


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("retry_once", A.RETRY),
        ("skip", A.SKIP),
        ("fallback", A.FALLBACK),
        ("abort", A.ABORT),
        ("restore_last_checkpoint", A.CHECKPOINT_RESTORE),
    ],
)
async def test_each_action_has_a_built_in_strategy_that_a_step_may_name(name: str, action: RecoveryAction) -> None:
    of = step(recovery=(name,), fallback=Fallback(role="other"))
    decision = await asked(Strategies.built_in(), ExecutionError("a bug", code="BUG"), of=of)
    assert decision is not None
    assert (decision.strategy_id, decision.action, decision.checkpoint_id) == (name, action, None)


async def test_retry_once_answers_once() -> None:
    of, again = step(recovery=("retry_once", "skip")), state(recoveries=1)
    decision = await asked(Strategies.built_in(), of=of, at=again)
    assert decision is not None
    assert decision.action is A.SKIP


async def test_strategies_are_asked_in_the_order_in_which_they_were_added() -> None:
    first, second, third = saying("a", A.RETRY, success=False), saying("b", A.SKIP), saying("c", A.ABORT)
    decision = await asked(Strategies([first, second, third]))
    assert decision is not None
    assert (decision.strategy_id, decision.message) == ("b", "b says so")
    assert (first.asked, second.asked, third.asked) == (1, 1, 0)


async def test_a_strategy_is_added_once_and_removed_by_its_id() -> None:
    strategies = Strategies([saying("a")])
    with pytest.raises(Conflict, match="'a'"):
        strategies.add(saying("a"))
    with pytest.raises(InvalidInput):
        strategies.add(Told("b", saying("b").answer, applicable_errors="*"))  # type: ignore[arg-type]
    assert strategies.remove("a")
    assert not strategies.remove("a")
    assert await asked(strategies) is None
    strategies.add(saying("a"))
    assert strategies.ids == ("a",)


async def test_a_strategy_that_fails_or_talks_nonsense_is_passed_over_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def failing(context: RecoveryContext) -> RecoveryResult:
        raise ZeroDivisionError

    async def nonsense(context: RecoveryContext) -> RecoveryResult:
        return "retry"  # type: ignore[return-value]

    bad_state = ExecutionState(variables={"at": object()})
    strategies = Strategies(
        [
            Told("failing", failing),
            Told("nonsense", nonsense),
            saying("endless", A.RETRY, delay_seconds=float("inf")),
            saying("unkept", A.RETRY, new_state=bad_state),
            saying("good"),
        ]
    )
    with caplog.at_level(logging.ERROR):
        decision = await asked(strategies)
    assert decision is not None
    assert decision.strategy_id == "good"
    told = [record.getMessage() for record in caplog.records]
    assert [message.split()[3] for message in told] == ["failing", "nonsense", "endless", "unkept"]


@pytest.mark.parametrize(
    "fault",
    [SystemExit(3), asyncio.CancelledError(), ExceptionGroup("two", [ValueError(), KeyError()]), StopAsyncIteration()],
    ids=lambda fault: type(fault).__name__,
)
async def test_however_a_strategy_fails_the_next_one_is_asked(fault: BaseException) -> None:
    async def failing(context: RecoveryContext) -> RecoveryResult:
        raise fault

    decision = await asked(Strategies([Told("failing", failing), saying("good")]))
    assert decision is not None
    assert decision.strategy_id == "good"


NONSENSE: list[dict[str, Any]] = [
    {"message": 7},
    {"delay_seconds": None},
    {"delay_seconds": "soon"},
    {"delay_seconds": float("nan")},
    {"delay_seconds": -1.0},
    {"action": "retry"},
    {"action": ["retry"]},
    {"checkpoint_id": 5},
    {"new_state": {"variables": {}}},
    {"new_state": ExecutionState(variables={"x": {1: float("nan")}})},
]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=str)
async def test_an_answer_that_cannot_be_meant_is_passed_over(nonsense: dict[str, Any]) -> None:
    async def answer(context: RecoveryContext) -> RecoveryResult:
        given: dict[str, Any] = {"success": True, "action": A.RETRY, **nonsense}
        return RecoveryResult(**given)

    decision = await asked(Strategies([Told("odd", answer), saying("good")]))
    assert decision is not None
    assert decision.strategy_id == "good"


async def test_words_of_a_strategy_are_cut_and_can_be_kept() -> None:
    async def wordy(context: RecoveryContext) -> RecoveryResult:
        return RecoveryResult(success=True, action=A.SKIP, message="\ud800" + "x" * 5000)

    decision = await asked(Strategies([Told("wordy", wordy)]))
    assert decision is not None
    assert len(decision.message.encode()) <= 2002


async def test_nothing_that_a_strategy_does_to_what_it_is_given_is_seen_by_anybody() -> None:
    of = step(inputs={"hosts": ["a"]})
    plan = ExecutionPlan(id="p", steps=(of,), variables={"n": [1]})
    error = ExecutionError("down", code="DOWN", context={"host": ["a"]})
    pools = ({"name": "cpu", "free": 1},)
    seen: list[str] = []

    async def meddling(context: RecoveryContext) -> RecoveryResult:
        found = (context.error.context, context.step.inputs, context.plan, context.state, context.resources)
        seen.append(f"{context.error.failure_code} {found}")
        context.error.failure_code = "FINE"
        context.error.context["host"].append("b")
        context.state.variables.clear()
        inputs: Any
        for inputs in (context.step.inputs, context.plan.steps[0].inputs, context.plan.variables, context.resources[0]):
            inputs.clear()
        return RecoveryResult(success=False, action=A.RETRY)

    strategies = Strategies([Told("one", meddling), Told("two", meddling)])
    given: dict[str, Any] = {"plan": plan, "read_state": lambda: ExecutionState(variables={"v": 1}), "resources": pools}
    for _ in range(2):
        await decided(strategies, of, state(), error, **given)
    assert len(seen) == 4
    assert len(set(seen)) == 1
    assert (of.inputs, plan.variables) == ({"hosts": ["a"]}, {"n": [1]})
    assert (error.failure_code, error.context, pools[0]["free"]) == ("DOWN", {"host": ["a"]}, 1)


async def test_a_strategy_that_takes_too_long_is_passed_over_and_the_wait_can_be_cancelled() -> None:
    async def slow(context: RecoveryContext) -> RecoveryResult:
        await anyio.sleep_forever()
        raise AssertionError("unreachable")

    strategies = Strategies([Told("slow", slow), saying("good")], seconds=0.05)
    decision = await asked(strategies)
    assert decision is not None
    assert decision.strategy_id == "good"
    with anyio.move_on_after(0.05) as scope:
        await asked(Strategies([Told("slow", slow)]))
    assert scope.cancelled_caught


async def test_what_a_strategy_does_to_its_state_stays_its_own_and_new_variables_are_a_decision() -> None:
    variables: dict[str, Any] = {"seen": {"pages": [1]}}

    async def meddling(context: RecoveryContext) -> RecoveryResult:
        context.state.variables["seen"]["pages"].append(2)
        context.state.task_states.clear()
        return RecoveryResult(success=True, action=A.RETRY, new_state=context.state)

    decision = await asked(Strategies([Told("meddling", meddling)]), variables=variables)
    assert variables == {"seen": {"pages": [1]}}
    assert decision is not None
    assert decision.variables == {"seen": {"pages": [1, 2]}}


async def test_the_state_of_a_large_plan_is_made_only_for_a_strategy_that_reads_it() -> None:
    def unread() -> ExecutionState:
        raise AssertionError("nobody asked for it")

    of = step()
    decision = await decided(
        Strategies.built_in(), of, state(), DOWN, plan=ExecutionPlan(id="p", steps=(of,)), read_state=unread
    )
    assert decision is not None


async def test_no_step_is_recovered_more_often_than_it_may_be_but_it_may_still_be_given_up() -> None:
    spent = state(recoveries=3)
    assert await asked(Strategies([saying("again", A.RETRY)]), at=spent) is None
    assert await asked(Strategies([saying("back", A.CHECKPOINT_RESTORE)]), at=spent) is None
    decision = await asked(Strategies([saying("away", A.SKIP)]), at=spent)
    assert decision is not None
    assert decision.action is A.SKIP


async def test_a_fallback_is_used_once_and_only_where_there_is_one() -> None:
    strategies, other = Strategies([saying("other", A.FALLBACK)]), step(fallback=Fallback(role="other"))
    assert await asked(strategies) is None
    assert await asked(strategies, of=other, at=state(is_fallback=True)) is None
    decision = await asked(strategies, of=other)
    assert decision is not None
    assert decision.action is A.FALLBACK


@pytest.mark.parametrize("own", [{"fallback": Fallback(role="other")}, {"continue_on_failure": True}])
async def test_what_a_step_says_of_its_own_failure_goes_before_an_abort_that_it_did_not_name(
    own: dict[str, Any],
) -> None:
    strategies = Strategies([saying("end", A.ABORT, success=False)])
    assert await asked(strategies, of=step(**own)) is None
    decision = await asked(strategies, of=step(**own, recovery=("end",)))
    assert decision is not None
    assert decision.action is A.ABORT


def test_strategies_of_other_packages_are_found_by_entry_point(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    info = tmp_path / "other-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[vespera_exec.recovery_strategies]\n"
        "good = other_strategies:Good\nhalf = other_strategies:Half\ngone = other_strategies:Gone\n"
    )
    (tmp_path / "other_strategies.py").write_text(
        "class Good:\n"
        "    id = name = description = 'good'\n"
        "    applicable_errors = ['DISK_FULL']\n"
        "    async def execute(self, context): ...\n"
        "class Half:\n"
        "    id = 'half'\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with caplog.at_level(logging.ERROR):
        found = plugins.recovery_strategies()
    assert [each.id for each in found] == ["good"]
    assert [each.id for each in Strategies(found).applying(ExecutionError("x", code="DISK_FULL"), None)] == ["good"]
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "half has no name, description, applicable_errors, execute" in told
    assert "gone of vespera_exec.recovery_strategies cannot be loaded" in told
