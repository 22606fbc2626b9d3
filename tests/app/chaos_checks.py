"""What must hold of plans that have ended, by their logs, their tables, and what their work itself has written."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chaos_acts import ALL, ME
from chaos_work import POOLS

from vespera_exec.app.plans.files import parse_plan
from vespera_exec.model.enums import EventType, ExecutionStatus, StepStatus
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.plans.restoring import BoardReplay

if TYPE_CHECKING:
    from pathlib import Path

    from vespera_exec.app.service import Vespera
    from vespera_exec.model.events import ExecutionEvent
    from vespera_exec.model.plans.plan import ExecutionPlan, PlanStep
    from vespera_exec.model.plans.steps import StepState

Json = dict[str, Any]
S, T, E = ExecutionStatus, StepStatus, EventType

NEVER = ("twice", "early", "exceeded")
_ENDS = {E.STEP_COMPLETED: T.COMPLETED, E.STEP_SKIPPED: T.SKIPPED, E.STEP_CANCELLED: T.CANCELLED}
_WITH_THE_END = {
    each for each in EventType if each.value.startswith("execution_") and each is not E.EXECUTION_CREATED
} | {E.ERROR, E.WARNING, E.INFO}
"""Written in the decision that ends an execution."""
_WENT_BACK = E.VARIABLES_CHANGED
_OF_STEPS = {E.STEP_STARTED, E.STEP_PROGRESS, E.STEP_WAITING, E.STEP_FAILED, *_ENDS}


@dataclass
class Execution:
    """One execution as the database has it at the end."""

    life: Lifecycle
    task_id: str
    events: list[ExecutionEvent]

    @property
    def ended_at(self) -> int:
        """The place of its end in the log."""
        ends = (event for event in self.events if event.event_type is E.STATUS_CHANGE and _is_end(event))
        return next(ends).cursor or 0


@dataclass
class Seen:
    """All of a directory."""

    lines: list[Json]
    executions: dict[str, Execution]
    of_task: dict[str, list[Execution]] = field(default_factory=lambda: defaultdict(list))
    children: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    """Tasks, by the execution of the plan and the step."""

    def runs_of(self, execution_id: str, step: str) -> list[Execution]:
        return [each for task in self.children[execution_id, step] for each in self.of_task[task]]


async def seen(vespera: Vespera, place: Path) -> Seen:
    log = place / "log"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    with closing(sqlite3.connect(f"file:{place / 'data' / 'vespera.db'}?mode=ro", uri=True)) as reader:
        lives = reader.execute(
            "SELECT s.name, t.name, e.doc FROM executions e JOIN streams s ON s.id = e.id "
            "JOIN streams t ON t.id = e.task ORDER BY e.id"
        ).fetchall()
        children = reader.execute(
            "SELECT s.name, p.name, t.step FROM tasks t JOIN streams s ON s.id = t.id JOIN streams p ON p.id = t.parent"
        ).fetchall()
    queries = vespera._store.queries  # pyright: ignore[reportPrivateUsage]
    found = Seen(lines, {})
    for name, task, doc in lives:
        events = await queries.events_of(name, up_to=ALL, limit=ALL)
        made = Execution(Lifecycle.from_dict(json.loads(doc)), task, events)
        found.executions[name] = made
        found.of_task[task].append(made)
    for task, parent, step in children:
        found.children[parent, step].append(task)
    return found


async def check(vespera: Vespera, place: Path, plans: list[Json], tasks: dict[str, str], told: list[Json]) -> Seen:
    """Of every execution of these plans."""
    bugs = [each for each in told if "bug" in each]
    assert not bugs, "\n".join(str(each) for each in bugs)
    found = await seen(vespera, place)
    assert [line for line in found.lines if line["what"] in NEVER] == []
    for execution in found.executions.values():
        _check_end(execution)
    _check_capacity(vespera, found)
    for given in plans:
        plan = parse_plan(given)
        for execution in found.of_task[tasks[given["name"]]]:
            await _check_plan(vespera, found, plan, execution, told)
    _check_lines(found)
    await _check_acknowledged(vespera, found, told)
    return found


def _is_end(event: ExecutionEvent) -> bool:
    return event.new_status is not None and event.new_status.is_terminal


def _check_end(execution: Execution) -> None:
    events = execution.events
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    ends = [event for event in events if event.event_type is E.STATUS_CHANGE and _is_end(event)]
    assert len(ends) == 1, (execution.life.execution_id, execution.life.status)
    assert execution.life.status is ends[0].new_status
    assert not execution.life.held_capacity
    after = [event.event_type for event in events if event.sequence > ends[0].sequence]
    assert set(after) <= _WITH_THE_END, f"{execution.life.status}, then {after}"


def _check_capacity(vespera: Vespera, found: Seen) -> None:
    """Never exceeded, in the order of the log; all of it back, and told so once by the step and once by its plan."""
    events = [event for execution in found.executions.values() for event in execution.events if event.step_id is None]
    given: dict[str, tuple[str, float]] = {}
    held = dict.fromkeys(POOLS, 0.0)
    for event in sorted(events, key=lambda event: event.cursor or 0):
        if event.event_type is E.RESOURCE_ALLOCATED:
            for each in event.details["allocations"]:
                given[each["allocation_id"]] = pool, amount = each["pool"], each["amount"]
                held[pool] += amount
                assert held[pool] <= POOLS[pool], f"{pool}: {held[pool]} held at {event.cursor}"
        elif event.event_type is E.RESOURCE_RELEASED:
            for each in event.details["allocations"]:
                pool, amount = given.pop(each["allocation_id"])
                held[pool] -= amount
    assert not given
    told: dict[tuple[str, str], list[EventType]] = defaultdict(list)
    for event in (event for execution in found.executions.values() for event in execution.events):
        if event.event_type in (E.RESOURCE_ALLOCATED, E.RESOURCE_RELEASED):
            for each in event.details["allocations"]:
                told[event.stream, each["allocation_id"]].append(event.event_type)
    assert all(kinds == [E.RESOURCE_ALLOCATED, E.RESOURCE_RELEASED] for kinds in told.values())
    for pool in vespera.capacity.view(ME).pools:
        assert (pool.available, pool.holders) == (POOLS[pool.id], [])


async def _check_plan(
    vespera: Vespera, found: Seen, plan: ExecutionPlan, execution: Execution, told: list[Json]
) -> None:
    execution_id = execution.life.execution_id
    states = _check_order(found, plan, execution)
    queries = vespera._store.queries  # pyright: ignore[reportPrivateUsage]
    stored = await queries.plan_state(execution_id)
    assert stored is not None
    assert {state.step_id: state for state in stored[1]} == states
    counts = Counter(state.status for state in states.values())
    assert await queries.step_counts(execution_id) == counts
    assert all(state.status.is_terminal for state in states.values()), (execution_id, counts)
    for step in plan.steps:
        _check_step(found, step, states, execution)
    await _check_outcome(vespera, plan, states, execution, told)


def _check_order(found: Seen, plan: ExecutionPlan, execution: Execution) -> dict[str, StepState]:
    """Fold the log; each step begins when those that it needs let it, and leaves its end by a reset alone."""
    steps, replay = {step.id: step for step in plan.steps}, BoardReplay(plan, execution.life.execution_id)
    begun: dict[str, set[int]] = defaultdict(set)
    status: ExecutionStatus | None = None
    for event in execution.events:
        status = event.new_status if event.event_type is E.STATUS_CHANGE else status
        if event.step_id is not None and event.event_type in _OF_STEPS:
            before = replay.states[event.step_id]
            assert not before.status.is_terminal, f"{event.step_id} was {before.status}: {event.event_type}"
            if event.event_type is E.STEP_STARTED:
                needs = {each: replay.states[each] for each in steps[event.step_id].depends_on}
                assert all(state.lets_on for state in needs.values()), f"{event.step_id} began too early: {needs}"
                assert status not in (S.PAUSED, S.CANCELLING), f"{event.step_id} began in a plan that was {status}"
                assert event.details["attempt"] not in begun[event.step_id], "two runs have one number"
                begun[event.step_id].add(event.details["attempt"])
                _check_work_after(found, event, needs)
        replay.feed([event])
    assert replay.allocations == {}, "a step holds capacity for ever, as its plan tells"
    return replay.states


def _check_work_after(found: Seen, started: ExecutionEvent, needs: dict[str, StepState]) -> None:
    """By the work's own words: its first follows the last of each step that it needs."""
    sessions = {each.life.execution_id for each in found.of_task[started.details["task_id"]]}
    first = next((number for number, line in enumerate(found.lines) if line["session"] in sessions), None)
    if first is None:
        return
    for need, state in needs.items():
        if state.status is T.COMPLETED:
            ends = [
                n for n, line in enumerate(found.lines) if line["session"] == state.result_of and line["what"] == "end"
            ]
            assert ends, f"{need} is completed, and its work has not ended"
            assert ends[0] < first, f"{started.step_id} was at work before {need} had ended"


def _check_step(found: Seen, step: PlanStep, states: dict[str, StepState], execution: Execution) -> None:
    state, runs = states[step.id], found.runs_of(execution.life.execution_id, step.id)
    announced = [each for each in execution.events if each.event_type is E.STEP_STARTED and each.step_id == step.id]
    tasks = [each.details["task_id"] for each in announced]
    assert len(set(tasks)) == len(tasks)
    made = found.children[execution.life.execution_id, step.id]
    assert set(made) <= set(tasks), f"{step.id} has runs that were not announced"
    for task in made:
        of_run = found.of_task[task]
        most = 1 + (step.retries.max_retries if step.retries is not None else 0)
        assert 1 <= len(of_run) <= most, f"{step.id}: {len(of_run)} attempts in one run"
        assert all(each.life.status is not S.COMPLETED for each in of_run[:-1])
    assert all(each.ended_at < execution.ended_at for each in runs), f"{step.id} has outlived its plan"
    lets_on = all(states[each].lets_on for each in step.depends_on)
    match state.status:
        case T.COMPLETED:
            of = found.executions[state.result_of or ""].life
            assert of.status is S.COMPLETED
        case T.FAILED:
            assert lets_on
            ended = [each.life for each in runs if each.life.execution_id == state.session_id]
            assert not state.session_id or ended[0].status in (S.FAILED, S.TIMED_OUT)
        case T.SKIPPED if not state.continues:
            assert not lets_on, f"{step.id} was skipped: {state.reason}"
            need = state.reason.removeprefix("needs ").partition(",")[0]
            assert not states[need].lets_on
        case _:
            pass


async def _check_outcome(
    vespera: Vespera, plan: ExecutionPlan, states: dict[str, StepState], execution: Execution, told: list[Json]
) -> None:
    life = execution.life
    stopped = [each for each in states.values() if each.status in (T.FAILED, T.CANCELLED) and not each.continues]
    if life.status is S.CANCELLED:
        assert any(each.get("sent", {}).get("do") == "cancel" for each in told), "nobody cancelled it"
        return
    if life.status is S.TIMED_OUT:
        assert plan.timeout_seconds
        return
    assert life.status is (S.FAILED if stopped else S.COMPLETED), (life.error, states)
    result = await vespera._store.queries.get_result(life.execution_id)  # pyright: ignore[reportPrivateUsage]
    assert result is not None
    body = json.loads(result.body)
    by = {status: [each for each in plan.steps if states[each.id].status is status] for status in StepStatus}
    assert body["counts"] == {status.value: len(steps) for status, steps in by.items() if steps}
    assert body["skipped"] == [{"step": each.id, "reason": states[each.id].reason} for each in by[T.SKIPPED]]
    assert all(each["reason"] for each in body["skipped"])
    assert [each["step"] for each in body["failed"]] == [each.id for each in by[T.FAILED]]
    needed = {each for step in plan.steps for each in step.depends_on}
    assert set(body["output"]) == {each.id for each in by[T.COMPLETED] if each.id not in needed}
    if stopped:
        assert life.error["code"] == "STEP_FAILED", life.error
        assert life.error["context"]["skipped"] == len(by[T.SKIPPED])


def _check_lines(found: Seen) -> None:
    """Each execution began once, and once more for every recovery, every question and every other worker."""
    by_session: dict[str, Counter[str]] = defaultdict(Counter)
    for line in found.lines:
        by_session[line["session"]][line["what"]] += 1
    for session, counts in by_session.items():
        life = found.executions[session].life
        again = life.recovery_attempts + max(0, life.claims - 1)
        assert counts["begin"] <= 1 + again + counts["ask"], (session, counts, again)
        if life.status is S.COMPLETED:
            assert counts["end"] >= 1
            assert counts["end"] <= 1 + again


async def _check_acknowledged(vespera: Vespera, found: Seen, told: list[Json]) -> None:
    """What was said to be done was, whoever died then."""
    _check_paused(told)
    for each in told:
        if "did" not in each or not each["ok"]:
            continue
        life = found.executions[each["session"]].life
        if each["did"]["do"] == "cancel":
            assert life.status is S.CANCELLED, (each, life.status)
        if each["did"]["do"] == "checkpoint":
            queries = vespera._store.queries  # pyright: ignore[reportPrivateUsage]
            assert await queries.checkpoint(each["checkpoint"]) is not None
        if each["did"]["do"] == "restore":
            changes = [event for event in found.executions[each["session"]].events if event.event_type is _WENT_BACK]
            assert each["checkpoint"] in [event.details.get("restored_from") for event in changes], each


def _check_paused(told: list[Json]) -> None:
    """Who had been told that a plan stands found it so under the next owner, or ended."""
    paused: set[str] = set()
    moving: list[str] = []
    """Plans that are to go on, or end, by an act that was not answered."""
    for each in told:
        act: Json = each.get("sent") or each.get("did") or {"do": ""}
        if act["do"] in ("resume", "cancel"):
            paused.discard(act["plan"])
            if "sent" in each:
                moving.append(act["plan"])
            else:
                moving.remove(act["plan"])
        elif "did" in each and act["do"] == "pause" and each["ok"] and each.get("status") == "paused":
            paused.add(act["plan"])
        if "standing" in each:
            paused.difference_update(moving)
            moving.clear()
            for plan in paused.intersection(each["standing"]):
                now = S(each["standing"][plan])
                assert now is S.PAUSED or now.is_terminal, f"{plan} was paused, and is {now}"
