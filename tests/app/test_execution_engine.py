"""The engine of document 003 as a Python program uses it: real store, real engine, tasks and plans."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from deadlines import WITHIN
from engine_harness import Held, adding, collected, engine_over, until

from roles.definition import RetryPolicy, Role
from vespera_exec.app.executions import engine as execution_engine
from vespera_exec.app.executions.engine import DefaultExecutionEngine
from vespera_exec.app.executions.reading import COALESCED_SECONDS
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import NewTask
from vespera_exec.errors import (
    ExecutionError,
    ExecutionNotFound,
    InvalidInput,
    InvalidTransitionError,
    RoleNotFound,
)
from vespera_exec.model.enums import EventType, ExecutionStatus
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from vespera_exec.app.executions.result import ExecutionUpdate

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]
S = ExecutionStatus


@pytest.fixture
def engine(vespera: Vespera) -> DefaultExecutionEngine:
    return engine_over(vespera)


async def test_execute_gives_the_whole_result(engine: DefaultExecutionEngine) -> None:
    result = await engine.execute(adding())
    assert result.status is S.COMPLETED
    assert result.result == result.output == {"sum": 3, "quality_score": 0.5}
    assert result.plan_id == result.task_id
    assert result.error is None
    assert result.started_at is not None
    assert result.completed_at is not None
    assert result.started_at <= result.completed_at
    assert result.metrics.success_rate == 1.0
    assert result.metrics.error_rate == 0.0
    assert result.metrics.quality_score == 0.5
    assert (result.metrics.total_cost, result.metrics.resource_efficiency) == (None, None)
    assert result.metrics.total_duration is not None
    assert 0 < (result.metrics.effective_duration or 0) <= result.metrics.total_duration


async def test_the_timeline_is_the_log_of_the_execution_to_the_last_event(engine: DefaultExecutionEngine) -> None:
    async def chatty(context: Any) -> None:
        for number in range(700):  # more than a page of the log
            context.log(str(number))
            if number % 100 == 0:
                await anyio.lowlevel.checkpoint()

    engine.vespera.roles.add(Role.from_callable(chatty, in_loop=True, inputs=None))
    result = await engine.execute(NewTask(title="Talk", role="chatty"))
    assert [event.sequence for event in result.timeline] == list(range(1, len(result.timeline) + 1))
    assert result.timeline[-1].event_type is EventType.EXECUTION_COMPLETED
    assert [event.message for event in result.timeline if event.level == "info"] == [str(each) for each in range(700)]


async def test_a_failure_is_a_result_and_says_what_went_wrong(engine: DefaultExecutionEngine) -> None:
    result = await engine.execute(NewTask(title="Fail", role="fail"))
    assert result.status is S.FAILED
    assert result.error is not None
    assert (result.error.failure_code, result.error.message) == ("NETWORK", "the line is down")
    assert result.error.context == {"host": "a"}
    assert result.error.recoverable
    assert (result.error.task_id, result.error.timestamp) == (result.task_id, result.completed_at)
    assert (result.metrics.success_rate, result.metrics.error_rate) == (0.0, 1.0)


async def test_shapes_are_json_in_our_words_and_in_those_of_the_document(engine: DefaultExecutionEngine) -> None:
    result = await engine.execute(NewTask(title="Fail", role="fail"))
    ours = json.loads(json.dumps(result.to_dict()))
    theirs = json.loads(json.dumps(result.to_dict(by_alias=True)))
    assert {"executionId", "planId", "startedAt", "completedAt", "resourceUsage"} <= theirs.keys()
    assert theirs["metrics"]["successRate"] == ours["metrics"]["success_rate"] == 0.0
    assert theirs["error"]["taskId"] == ours["error"]["task_id"]
    assert theirs["error"]["context"] == {"host": "a"}
    assert {"id", "type", "timestamp", "taskId", "description", "data"} <= theirs["timeline"][0].keys()
    assert ours["timeline"][0] == result.timeline[0].to_stream_message()


async def test_a_task_made_in_memory_is_a_plan_of_one_step_too(engine: DefaultExecutionEngine) -> None:
    result = await engine.execute(Task(title="Add", role="add", inputs={"a": 4, "b": 5}, priority=7))
    assert result.output["sum"] == 9
    with pytest.raises(InvalidInput, match="no variables"):
        await engine.submit(adding(), variables={"a": 1})
    with pytest.raises(RoleNotFound):
        await engine.submit(NewTask(title="x", role="nobody"))


async def test_submit_answers_before_the_work_is_done_and_the_result_comes_later(
    engine: DefaultExecutionEngine,
) -> None:
    held = Held(engine)
    execution_id = await engine.submit(NewTask(title="Hold", role="held"))
    assert await engine.get_result(execution_id) is None
    await held.begun.wait()
    assert await engine.get_status(execution_id) is S.RUNNING
    held.go_on.set()
    updates = await collected(engine, execution_id)
    assert updates[-1].status is S.COMPLETED
    result = await engine.get_result(execution_id)
    assert result is not None
    assert (result.execution_id, result.output) == (execution_id, "made")
    assert await engine.get_result(result.task_id) == result


async def test_what_nobody_knows_has_no_status_and_no_result(engine: DefaultExecutionEngine) -> None:
    assert await engine.get_result("no-such-execution") is None
    for ask in (engine.get_status, engine.pause, engine.resume, engine.cancel):
        with pytest.raises(ExecutionNotFound):
            await ask("no-such-execution")
    with pytest.raises(ExecutionNotFound):
        await collected(engine, "no-such-execution")


async def test_a_task_that_was_never_executed_is_idle(engine: DefaultExecutionEngine) -> None:
    task = await engine.vespera.create_task(engine.caller, adding())
    assert await engine.get_status(task.task_id) is S.IDLE
    assert await engine.get_result(task.task_id) is None
    with pytest.raises(InvalidTransitionError, match="idle"):
        await engine.cancel(task.task_id)


async def test_monitor_begins_with_the_present_and_tells_each_event_once_up_to_one_end(
    engine: DefaultExecutionEngine,
) -> None:
    held = Held(engine)
    execution_id = await engine.submit(NewTask(title="Hold", role="held"))
    await held.begun.wait()
    updates: list[ExecutionUpdate] = []
    with anyio.fail_after(WITHIN):
        async for update in engine.monitor(execution_id):
            updates.append(update)
            if update.progress.percentage > 0:
                held.go_on.set()
    first, last = updates[0], updates[-1]
    assert (first.status, first.current_task) == (S.RUNNING, "Hold")
    assert (first.progress.completed_tasks, first.progress.total_tasks) == (0, 1)
    assert [update.status.is_terminal for update in updates] == [False] * (len(updates) - 1) + [True]
    told = [event.event_id for update in updates for event in update.events]
    result = await engine.get_result(execution_id)
    assert result is not None
    assert told == [event.event_id for event in result.timeline]
    assert last.events[-1].event_type is EventType.EXECUTION_COMPLETED
    assert (last.progress.percentage, last.progress.completed_tasks, last.current_task) == (100, 1, None)
    assert last.metrics == result.metrics


async def test_updates_come_at_most_ten_times_a_second_however_much_the_work_says(
    engine: DefaultExecutionEngine,
) -> None:
    async def busy(context: Any) -> None:
        for number in range(400):
            context.log(str(number))
            await anyio.sleep(0.001)

    engine.vespera.roles.add(Role.from_callable(busy, in_loop=True, inputs=None))
    execution_id = await engine.submit(NewTask(title="Busy", role="busy"))
    updates = await collected(engine, execution_id)
    gaps = [(after.timestamp - before.timestamp).total_seconds() for before, after in itertools.pairwise(updates[:-1])]
    assert len(gaps) >= 2
    assert min(gaps) >= COALESCED_SECONDS * 0.9
    assert sum(len(update.events) for update in updates) > 10 * len(updates)


async def test_an_execution_that_has_ended_gives_one_update_and_with_it_why(engine: DefaultExecutionEngine) -> None:
    result = await engine.execute(NewTask(title="Fail", role="fail"))
    (only,) = await collected(engine, result.execution_id)
    assert only.status is S.FAILED
    assert any(event.event_type is EventType.EXECUTION_FAILED for event in only.events)
    assert [(message.level.value, message.message) for message in only.messages] == [("error", "the line is down")]
    assert only.metrics == result.metrics


async def test_a_run_that_is_tried_again_is_one_execution_with_one_end(engine: DefaultExecutionEngine) -> None:
    tries: list[int] = []

    async def flaky(context: Any) -> str:
        tries.append(context.attempt)
        if len(tries) == 1:
            raise ExecutionError("once", code="FLAKY")
        return "in the end"

    retry = RetryPolicy(max_retries=1, retry_on=("FLAKY",), backoff_seconds=0.3)
    engine.vespera.roles.add(Role.from_callable(flaky, in_loop=True, inputs=None, retry=retry))
    execution_id = await engine.submit(NewTask(title="Try", role="flaky"))
    updates = await collected(engine, execution_id)
    assert [update.status for update in updates if update.status.is_terminal] == [S.COMPLETED]
    result = await engine.get_result(execution_id)
    assert result is not None
    assert result.output == "in the end"
    sessions = list(dict.fromkeys(event.execution_id for event in result.timeline))
    assert sessions[0] == execution_id
    assert len(sessions) == 2
    assert [event.event_id for update in updates for event in update.events] == [
        event.event_id for event in result.timeline
    ]
    assert (result.metrics.success_rate, result.metrics.error_rate) == (1.0, 0.5)
    assert result.metrics.total_duration is not None
    assert result.metrics.effective_duration is not None
    assert result.metrics.total_duration >= 300  # with the back-off, which is no work
    assert result.metrics.effective_duration <= result.metrics.total_duration - 290
    assert result == await engine.get_result(str(sessions[1]))


async def test_who_leaves_the_monitor_early_leaves_nothing_behind(engine: DefaultExecutionEngine) -> None:
    held = Held(engine)
    execution_id = await engine.submit(NewTask(title="Hold", role="held"))
    await held.begun.wait()
    async with aclosing(engine.monitor(execution_id)) as updates:
        async for update in updates:
            if update.progress.percentage:
                break
    assert await engine.get_status(execution_id) is S.RUNNING
    held.go_on.set()
    assert (await collected(engine, execution_id))[-1].status is S.COMPLETED


async def test_pause_returns_when_it_stands_still_and_resume_lets_it_go_on(engine: DefaultExecutionEngine) -> None:
    held = Held(engine)
    execution_id = await engine.submit(NewTask(title="Hold", role="held"))
    await held.begun.wait()
    await engine.pause(execution_id)
    assert await engine.get_status(execution_id) is S.PAUSED
    await engine.resume(execution_id)
    await engine.resume(execution_id)  # it goes on already
    assert await engine.get_status(execution_id) is S.RUNNING
    held.go_on.set()
    assert (await collected(engine, execution_id))[-1].status is S.COMPLETED


async def test_what_has_ended_is_neither_paused_nor_resumed_nor_cancelled(engine: DefaultExecutionEngine) -> None:
    result = await engine.execute(adding())
    for ask in (engine.pause, engine.resume, engine.cancel):
        with pytest.raises(InvalidTransitionError, match="completed") as refused:
            await ask(result.execution_id)
        assert "it has ended" in refused.value.message


async def test_a_pause_that_the_end_overtakes_is_refused(engine: DefaultExecutionEngine) -> None:
    begun, go_on = anyio.Event(), anyio.Event()

    async def deaf(context: Any) -> str:
        begun.set()
        await go_on.wait()
        return "made"

    engine.vespera.roles.add(Role.from_callable(deaf, in_loop=True, inputs=None))
    execution_id = await engine.submit(NewTask(title="Deaf", role="deaf"))
    await begun.wait()
    refusals: list[InvalidTransitionError] = []

    async def ask() -> None:
        try:
            await engine.pause(execution_id)
        except InvalidTransitionError as refusal:
            refusals.append(refusal)

    with anyio.fail_after(WITHIN):
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await anyio.sleep(0.05)
            go_on.set()
    assert [refusal.old for refusal in refusals] != []
    assert (await collected(engine, execution_id))[-1].status is S.COMPLETED


async def test_cancel_returns_when_it_is_over_and_may_be_repeated(engine: DefaultExecutionEngine) -> None:
    held = Held(engine)
    execution_id = await engine.submit(NewTask(title="Hold", role="held"))
    await held.begun.wait()
    with anyio.fail_after(WITHIN):
        await engine.cancel(execution_id, reason="enough")
    assert await engine.get_status(execution_id) is S.CANCELLED
    await engine.cancel(execution_id)
    result = await engine.get_result(execution_id)
    assert result is not None
    assert result.error is not None
    assert (result.error.failure_code, result.error.message) == ("CANCELLED", "enough")
    assert (result.metrics.success_rate, result.metrics.error_rate) == (None, None)


async def test_cancelled_in_the_queue_it_has_no_start(opening: Opening) -> None:
    async with opening(max_concurrent=1) as vespera:
        engine = DefaultExecutionEngine(vespera)
        held = Held(engine)
        first = await engine.submit(NewTask(title="Hold", role="held"))
        await held.begun.wait()
        second = await engine.submit(NewTask(title="Wait", role="held"))
        await engine.cancel(second)
        result = await engine.get_result(second)
        assert result is not None
        assert (result.status, result.started_at) == (S.CANCELLED, None)
        held.go_on.set()
        assert (await collected(engine, first))[-1].status is S.COMPLETED


async def test_a_subscriber_hears_in_order_what_monitor_tells_and_is_let_go_of_at_the_end(
    engine: DefaultExecutionEngine,
) -> None:
    heard: list[ExecutionUpdate] = []
    slow: list[ExecutionUpdate] = []

    async def slowly(update: ExecutionUpdate) -> None:
        await anyio.sleep(0.02)
        slow.append(update)

    held = Held(engine)
    execution_id = await engine.submit(NewTask(title="Hold", role="held"))
    engine.subscribe(execution_id, heard.append)
    engine.subscribe(execution_id, heard.append)  # the same is one
    engine.subscribe(execution_id, slowly)
    await held.begun.wait()
    held.go_on.set()
    await until(lambda: not len(engine.vespera.executions.subscriptions))
    for each in (heard, slow):
        assert [update.status.is_terminal for update in each] == [False] * (len(each) - 1) + [True]
        sequences = [event.sequence for update in each for event in update.events]
        assert sequences == list(range(1, len(sequences) + 1))


async def test_who_subscribes_after_the_end_hears_it_once(engine: DefaultExecutionEngine) -> None:
    result = await engine.execute(adding())
    heard: list[ExecutionUpdate] = []
    engine.subscribe(result.execution_id, heard.append)
    await until(lambda: not len(engine.vespera.executions.subscriptions))
    assert [update.status for update in heard] == [S.COMPLETED]


async def test_a_callback_that_fails_harms_neither_the_work_nor_its_neighbours(
    engine: DefaultExecutionEngine, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[ExecutionUpdate] = []

    def broken(update: ExecutionUpdate) -> None:
        raise RuntimeError("a fault of the callback's own")

    held = Held(engine)
    execution_id = await engine.submit(NewTask(title="Hold", role="held"))
    engine.subscribe(execution_id, broken)
    engine.subscribe(execution_id, heard.append)
    held.go_on.set()
    with caplog.at_level(logging.ERROR):
        await until(lambda: not len(engine.vespera.executions.subscriptions))
    assert heard[-1].status is S.COMPLETED
    assert "a fault of the callback's own" in caplog.text


async def test_nothing_is_heard_after_unsubscribe(engine: DefaultExecutionEngine) -> None:
    heard: list[ExecutionUpdate] = []
    once: list[ExecutionUpdate] = []
    held = Held(engine)
    execution_id = await engine.submit(NewTask(title="Hold", role="held"))

    async def only_once(update: ExecutionUpdate) -> None:
        engine.unsubscribe(execution_id, only_once)
        await anyio.lowlevel.checkpoint()  # what it has begun it may end
        once.append(update)

    engine.subscribe(execution_id, heard.append)
    engine.subscribe(execution_id, only_once)
    await until(lambda: len(heard) > 0 and len(once) > 0)
    engine.unsubscribe(execution_id, heard.append)
    engine.unsubscribe(execution_id, heard.append)
    known = len(heard)
    held.go_on.set()
    assert (await collected(engine, execution_id))[-1].status is S.COMPLETED
    assert len(engine.vespera.executions.subscriptions) == 0
    assert (len(heard), len(once)) == (known, 1)


async def test_an_unknown_id_is_logged_and_the_subscription_ends(
    engine: DefaultExecutionEngine, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[ExecutionUpdate] = []
    engine.subscribe("no-such-execution", heard.append)
    await until(lambda: not len(engine.vespera.executions.subscriptions))
    assert not heard
    assert "no-such-execution" in caplog.text


async def test_roles_given_at_the_opening_are_there_when_what_was_left_goes_on(tmp_path: Any) -> None:
    begun = anyio.Event()
    calls: list[str] = []

    async def resumed(context: Any) -> str:
        calls.append(context.execution_id)
        if len(calls) == 1:
            begun.set()
            await anyio.sleep_forever()
        return "made"

    role = Role.from_callable(resumed, in_loop=True, inputs=None, on_interrupt="resume")
    async with DefaultExecutionEngine.open(tmp_path / "data", roles=[role]) as engine:
        execution_id = await engine.submit(NewTask(title="Go on", role="resumed"))
        await begun.wait()
    async with DefaultExecutionEngine.open(tmp_path / "data", roles=[role]) as engine:
        updates = await collected(engine, execution_id)
        assert updates[-1].status is S.COMPLETED
        result = await engine.get_result(execution_id)
        assert result is not None
        assert (result.output, calls) == ("made", [execution_id] * 2)


async def test_an_end_that_the_disk_refuses_is_no_end_until_there_is_room(engine: DefaultExecutionEngine) -> None:
    held = Held(engine)
    execution_id = await engine.submit(NewTask(title="Hold", role="held"))
    await held.begun.wait()
    journal = engine.vespera._store.journal  # pyright: ignore[reportPrivateUsage]
    updates: list[ExecutionUpdate] = []

    async def listen() -> None:
        updates.extend(await collected(engine, execution_id))

    async with anyio.create_task_group() as group:
        group.start_soon(listen)
        journal.limit_pages(1)
        held.go_on.set()
        session = engine.vespera._engine.run(execution_id)  # pyright: ignore[reportPrivateUsage]
        assert session is not None
        await until(lambda: session.session.lifecycle.status is S.COMPLETED)
        assert await engine.get_status(execution_id) is S.COMPLETING
        assert await engine.get_result(execution_id) is None
        assert not any(update.status.is_terminal for update in updates)
        journal.limit_pages(1_000_000)
    assert [update.status.is_terminal for update in updates] == [False] * (len(updates) - 1) + [True]
    assert updates[-1].events[-1].event_type is EventType.EXECUTION_COMPLETED
    assert S.COMPLETING not in [update.status for update in updates]


async def test_who_reads_slowly_is_told_the_rest_with_the_end(engine: DefaultExecutionEngine) -> None:
    begun, go_on = anyio.Event(), anyio.Event()

    async def chatty(context: Any) -> None:
        begun.set()
        await go_on.wait()
        for number in range(1200):  # more than two pages of the log
            context.log(str(number))

    engine.vespera.roles.add(Role.from_callable(chatty, in_loop=True, inputs=None))
    execution_id = await engine.submit(NewTask(title="Talk", role="chatty"))
    await begun.wait()
    told: list[str] = []
    ends = 0
    with anyio.fail_after(WITHIN):
        async for update in engine.monitor(execution_id):
            told += [event.event_id for event in update.events]
            ends += update.status.is_terminal
            go_on.set()
            await engine.vespera.executions.ended(execution_id, engine.caller)
    result = await engine.get_result(execution_id)
    assert result is not None
    assert told == [event.event_id for event in result.timeline]
    assert ends == 1


async def test_pause_waits_for_as_long_as_the_work_needs_to_stand_still(
    engine: DefaultExecutionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution_engine, "_PAUSE_WAIT_MS", 20)
    begun, reached = anyio.Event(), anyio.Event()

    async def late(context: Any) -> str:
        begun.set()
        with anyio.move_on_after(0.3):
            await anyio.sleep_forever()
        reached.set()
        await context.pause_point()
        return "made"

    engine.vespera.roles.add(Role.from_callable(late, in_loop=True, inputs=None))
    execution_id = await engine.submit(NewTask(title="Late", role="late"))
    await begun.wait()
    with anyio.fail_after(WITHIN):
        await engine.pause(execution_id)
    assert reached.is_set()
    assert await engine.get_status(execution_id) is S.PAUSED
    await engine.resume(execution_id)
    assert (await collected(engine, execution_id))[-1].status is S.COMPLETED
