"""The rows of plans: what is decided on the board is what the database answers, and its fold."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import content, opened

from vespera_exec.errors import InvalidTransitionError, StoreError
from vespera_exec.model.enums import ExecutionStatus, StepStatus, TaskStatus
from vespera_exec.model.inputs import Question
from vespera_exec.model.ledger import CacheRecord, RequestRecord, ResultRecord
from vespera_exec.model.plans.board import PlanBoard
from vespera_exec.model.plans.plan import PLAN_ROLE, ExecutionPlan, PlanStep
from vespera_exec.model.task import Task
from vespera_exec.store.damage import examine

if TYPE_CHECKING:
    from vespera_exec.model.plans.steps import StepState
    from vespera_exec.model.session import ExecutionSession
    from vespera_exec.store.store import Store


def plan_of(steps: int) -> ExecutionPlan:
    return ExecutionPlan(id="p1", name="plan", steps=tuple(PlanStep(id=f"s{n}", role="role") for n in range(steps)))


def begun(store: Store, steps: int) -> tuple[Task, PlanBoard]:
    """A plan that runs, with its board."""
    task = Task(title="the plan", sink=store.journal)
    with task.ledger:
        session = task.start_execution(PLAN_ROLE)
        session.update_status(ExecutionStatus.RUNNING)
        board = PlanBoard(session, plan_of(steps))
        board.open(variables={"n": 1})
    return task, board


def step_done(store: Store, board: PlanBoard, step: str) -> Task:
    """A step that has run as a task of its own, and what it returned."""
    task = Task(title=step, parent_execution_id=board.state.execution_id, step_id=step, sink=store.journal)
    board.started(step, role="role", attempt=1, task_id=task.id)
    session = task.start_execution("role")
    session.update_status(ExecutionStatus.RUNNING)
    session.complete(result=ResultRecord(execution_id=session.session_id, body=b"1"))
    board.completed(step, session_id=session.session_id, result_of=session.session_id)
    return task


async def test_where_a_plan_stands_is_read_as_it_was_decided(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        _task, board = begun(store, 5)
        plan = board.state.execution_id
        board.started("s0", role="role", attempt=1)
        board.progress("s0", 50.0, "half way")
        board.failed("s1", {"code": "X", "message": "broken"})
        await store.journal.sync()

        assert await store.queries.plan_state(plan) == (board.state, list(board.states.values()))
        assert await store.queries.plan_head(plan) == board.state
        assert await store.queries.step(plan, "s0") == board.step("s0")
        assert await store.queries.step(plan, "unknown") is None
        assert await store.queries.step_counts(plan) == {
            StepStatus.PENDING: 3,
            StepStatus.RUNNING: 1,
            StepStatus.FAILED: 1,
        }
        assert await store.queries.plan_state("unknown") is None
        assert await store.queries.steps("unknown") == ([], 0)


async def test_steps_are_read_in_pages_of_one_status(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        _task, board = begun(store, 10)
        plan = board.state.execution_id
        for place in (1, 4, 8):
            board.failed(f"s{place}", {"code": "X", "message": "broken"})
        await store.journal.sync()

        first, total = await store.queries.steps(plan, limit=4)
        assert ([each.step_id for each in first], total) == (["s0", "s1", "s2", "s3"], 10)
        rest, _ = await store.queries.steps(plan, after=first[-1].position)
        assert [each.position for each in rest] == list(range(4, 10))
        failed, total = await store.queries.steps(plan, status=StepStatus.FAILED, after=1, limit=1)
        assert ([each.step_id for each in failed], total) == (["s4"], 3)


async def test_a_step_that_begins_and_ends_in_the_decision_that_opens_its_plan_is_kept_as_it_ended(
    data_dir: Path,
) -> None:
    async with opened(data_dir) as store:
        task = Task(title="the plan", sink=store.journal)
        with task.ledger:
            board = PlanBoard(task.start_execution(PLAN_ROLE), plan_of(2))
            board.open()
            board.skipped("s0", "not wanted")
        await store.journal.sync()
        steps, _ = await store.queries.steps(board.state.execution_id)
        assert steps == list(board.states.values())


async def test_the_tasks_of_steps_stand_in_no_list_but_their_plans(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task, board = begun(store, 3)
        plan = board.state.execution_id
        children = [step_done(store, board, f"s{place}") for place in (0, 1)]
        again = step_done(store, board, "s2")
        await store.journal.sync()

        assert [row.task for row in (await store.queries.list_tasks()).items] == [task.record]
        assert (await store.queries.list_tasks(text="s1")).total == 0
        page = await store.queries.list_tasks(parent=plan, sort="created")
        assert {row.task.step_id for row in page.items} == {"s0", "s1", "s2"}
        assert page.total == 3
        assert await store.queries.children(plan) == [each.record for each in (*children, again)]
        assert await store.queries.children(plan, "s2") == [again.record]
        assert await store.queries.children("unknown") == []
        # By its id it is found as any task is.
        assert await store.queries.locate(children[0].id[:10]) == (children[0].id, None)


async def test_a_step_of_a_plan_that_is_not_there_is_refused(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        orphan = Task(title="orphan", parent_execution_id="nobody", step_id="s0", sink=store.journal)
        with pytest.raises(StoreError, match="of which a task is to be a step"):
            await store.journal.sync()
        assert await store.queries.get_task(orphan.id) is None


async def test_checkpoints_are_listed_newest_first_and_read_with_the_log_up_to_them(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        _task, board = begun(store, 2)
        plan = board.state.execution_id
        made = [board.checkpoint("call", metadata={"why": "before"})]
        board.started("s0", role="role", attempt=1)
        made.append(board.checkpoint("interval"))
        made.append(board.checkpoint("call"))
        await store.journal.sync()

        assert await store.queries.checkpoint(made[0].checkpoint_id) == made[0]
        assert await store.queries.checkpoint("unknown") is None
        assert await store.queries.checkpoints(plan) == made[::-1]
        assert await store.queries.checkpoints(plan, kind="call") == [made[2], made[0]]
        assert await store.queries.checkpoints(plan, before=made[2].checkpoint_id, limit=1) == [made[1]]
        assert await store.queries.checkpoints(plan, before="unknown") == []

        events = await store.queries.events_of(plan, up_to=made[1].sequence)
        assert [each.sequence for each in events] == list(range(1, made[1].sequence + 1))
        assert await store.queries.events_of(plan, after=2, up_to=made[1].sequence, limit=1) == [events[2]]


async def test_a_request_is_read_by_its_run_and_the_last_one_by_its_task(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task = Task(title="twice", sink=store.journal)
        for body in (b"first", b"second"):
            with task.ledger:
                session = task.start_execution("role")
                task.ledger.keep(RequestRecord(run_id=session.run_id, body=body))
                session.update_status(ExecutionStatus.RUNNING)
                session.complete()
            await store.journal.sync()
            assert await store.queries.request(session.run_id) == body
            assert await store.queries.last_request(task.id) == body
        unasked = task.start_execution("role")
        await store.journal.sync()
        assert await store.queries.request(unasked.run_id) is None
        assert await store.queries.last_request(task.id) is None
        assert await store.queries.last_request("unknown") is None


async def test_the_cache_answers_its_own_principal_with_the_last_whole_result(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task, board = begun(store, 3)
        key = bytes(32)
        for step in ("s0", "s1"):
            child = step_done(store, board, step)
            source = child.record.last_execution_id or ""
            with task.ledger:
                task.ledger.keep(CacheRecord(key=key, principal="ann", role="role", execution_id=source))
        await store.journal.sync()
        assert await store.queries.cached(key, "ann") == source
        assert await store.queries.cached(key, "ben") is None
        assert await store.queries.cached(bytes(31) + b"1", "ann") is None

        cut = Task(title="cut", parent_execution_id=board.state.execution_id, step_id="s2", sink=store.journal)
        session = cut.start_execution("role")
        session.update_status(ExecutionStatus.RUNNING)
        session.complete(result=ResultRecord(execution_id=session.session_id, body=b"{", truncated=True))
        with task.ledger:
            task.ledger.keep(CacheRecord(key=key, principal="ann", role="role", execution_id=session.session_id))
        await store.journal.sync()
        assert await store.queries.cached(key, "ann") is None


async def test_a_question_of_a_step_says_whose_plan_asks(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task, board = begun(store, 1)
        child = Task(title="s0", parent_execution_id=board.state.execution_id, step_id="s0", sink=store.journal)
        for each in (child, Task(title="alone", sink=store.journal)):
            session = each.start_execution("role")
            session.update_status(ExecutionStatus.RUNNING)
            session.ask([Question.made("a", "A?")])
        await store.journal.sync()
        found, total = await store.queries.open_inputs()
        assert total == 2
        assert {(each.task_id == child.id, each.parent_task_id, each.step_id) for each in found} == {
            (True, task.id, "s0"),
            (False, None, None),
        }


async def test_what_a_disk_has_changed_of_a_step_or_its_task_is_found(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        _task, board = begun(store, 3)
        step_done(store, board, "s0")
        await store.journal.sync()
    database = data_dir / "vespera.db"
    assert {each.severity for each in examine(database)} == {"ok"}
    for change in (
        "UPDATE steps SET status = 'failed' WHERE step = 's0'",
        "UPDATE steps SET doc = json_set(doc, '$.attempt', 7) WHERE step = 's0'",
        "UPDATE plan_states SET doc = json_set(doc, '$.variables.n', 2)",
        "UPDATE tasks SET parent = NULL WHERE step = 's0'",
        "DELETE FROM plan_states",
    ):
        with closing(sqlite3.connect(database)) as db:
            before = "".join(db.iterdump())
            db.execute(change)
            db.commit()
        assert "error" in {each.severity for each in examine(database)}, change
        database.unlink()
        with closing(sqlite3.connect(database)) as db:
            db.executescript(before)


async def test_an_update_costs_the_same_however_large_the_plan_is(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task, board = begun(store, 5000)
        await store.journal.sync()
        before = len(content_rows(data_dir))
        changed = await store.journal.perform(lambda db: db.total_changes)
        for place in range(200):
            board.started(f"s{place}", role="role", attempt=1)
        await store.journal.sync()
        assert await store.journal.perform(lambda db: db.total_changes) - changed < 2000
        assert len(content_rows(data_dir)) == before == 5000
        assert await store.queries.step_counts(board.state.execution_id) == {
            StepStatus.PENDING: 4800,
            StepStatus.RUNNING: 200,
        }
        assert task.execution.current_session is not None


def content_rows(data_dir: Path) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(data_dir / "vespera.db")) as db:
        return db.execute("SELECT position FROM steps").fetchall()


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["start", "progress", "wait", "complete", "fail", "again", "skip", "cancel", "vars", "reset"]),
        st.integers(0, 3),
    ),
    max_size=25,
)


def changed(board: PlanBoard, what: str, step: str, number: int) -> None:
    match what:
        case "start":
            board.started(step, role="role", attempt=board.step(step).attempt + 1)
        case "progress":
            board.progress(step, number * 4.0)
        case "wait":
            board.waiting(step, "slot")
        case "complete":
            board.completed(step)
        case "fail":
            board.failed(step, {"code": "X", "message": "broken"}, continues=bool(number % 2))
        case "again":
            board.failed(step, {"code": "X", "message": "broken"}, final=False, recoveries=number)
        case "skip":
            board.skipped(step, "why not")
        case "cancel":
            board.cancelled(step, "not any more")
        case "vars":
            board.set_variables({"n": number})
        case _:
            kept: dict[str, StepState] = {step: board.step(step)}
            board.reset(kept, {"n": -1}, checkpoint_id=board.checkpoint("call").checkpoint_id)


@given(groups=st.lists(CHANGES, min_size=1, max_size=3))
@settings(max_examples=25)
def test_the_rows_of_a_plan_are_the_fold_of_its_log_and_the_live_board(groups: list[list[tuple[str, int]]]) -> None:
    async def history(folder: Path) -> None:
        async with opened(folder) as store:
            _task, board = begun(store, 4)
            for changes in groups:
                for place, (what, number) in enumerate(changes):
                    try:
                        changed(board, what, f"s{number}", place)
                    except InvalidTransitionError:
                        continue
                await store.journal.sync()
                assert await store.queries.plan_state(board.state.execution_id) == (
                    board.state,
                    list(board.states.values()),
                )

    with tempfile.TemporaryDirectory() as name:
        anyio.run(history, Path(name))
        assert {each.severity for each in examine(Path(name) / "vespera.db")} == {"ok"}
        assert len(content(Path(name) / "vespera.db")["steps"]) == 4


async def test_dead_letters_are_the_tasks_that_stand_still_after_a_failure_and_no_others(data_dir: Path) -> None:
    async with opened(data_dir) as store:

        def made(title: str, *, max_retries: int = 3, **more: Any) -> tuple[Task, ExecutionSession]:
            task = Task(title=title, max_retries=max_retries, sink=store.journal, **more)
            return task, task.start_execution("role")

        made("running")
        Task(title="never executed", sink=store.journal)
        made("open")[1].fail("it broke")
        made("failed", max_retries=1)[1].fail("it broke")
        made("late")[1].time_out()
        completed, session = made("completed, and open again")
        session.update_status(ExecutionStatus.RUNNING)
        session.complete()
        completed.reopen()
        cancelled, session = made("cancelled, and open again")
        session.request_cancellation()
        session.end_cancelled()
        cancelled.reopen()
        retried, session = made("to be tried again")
        retried.execution.fail_for_retry("it broke", retry_at=datetime.now(UTC))
        again, session = made("executed again")
        session.fail("it broke")
        again.start_execution("role")
        discarded, session = made("discarded")
        session.fail("it broke")
        discarded.update_status(TaskStatus.CANCELLED)
        _plan, board = begun(store, 1)
        step = Task(title="s0", parent_execution_id=board.state.execution_id, step_id="s0", sink=store.journal)
        step.start_execution("role").fail("it broke")
        await store.journal.sync()

        page = await store.queries.dead_letters()
        assert [each.task.title for each in page.items] == ["late", "failed", "open"]
        assert {each.lifecycle.status for each in page.items} == {ExecutionStatus.FAILED, ExecutionStatus.TIMED_OUT}
        first = await store.queries.dead_letters(limit=1)
        rest = await store.queries.dead_letters(limit=5, page_token=first.next_token)
        assert ([each.task.title for each in rest.items], rest.next_token, rest.total) == (["failed", "open"], None, 3)
        assert (await store.queries.dead_letters(role="other")).total == 0
