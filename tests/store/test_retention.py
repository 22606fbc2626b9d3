"""Retention: what ended long ago goes, whole and nothing else, and the writers beside it do not notice."""

from __future__ import annotations

import sqlite3
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import pytest
from deadlines import WITHIN

from vespera_exec.errors import Fenced
from vespera_exec.model.clock import Clock
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.ledger import CacheRecord, ResultRecord
from vespera_exec.model.plans.board import PlanBoard
from vespera_exec.model.plans.plan import PLAN_ROLE, ExecutionPlan, PlanStep
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store import database, retention
from vespera_exec.store.damage import examine
from vespera_exec.store.output import read_output
from vespera_exec.store.retention import RetentionReport
from vespera_exec.store.store import Store
from vespera_exec.store.writer import Sample

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from vespera_exec.model.session import ExecutionSession

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LONG_AGO = Clock(now=lambda: NOW - timedelta(days=100), monotonic=lambda: 0.0)
LATELY = Clock(now=lambda: NOW, monotonic=lambda: 0.0)
BEFORE = NOW - timedelta(days=30)
TABLES = (
    "streams", "segments", "events", "ends", "tasks", "executions", "progress", "progress_docs", "results",
    "requests", "idempotency", "samples", "plan_states", "steps", "checkpoints", "step_cache",
)  # fmt: skip


@asynccontextmanager
async def opened(data_dir: Path) -> AsyncGenerator[Store]:
    async with Store.open(Settings.load({}, data_dir=data_dir)) as store:
        yield store


class Done(NamedTuple):
    """What one job of the writer did."""

    rows: int
    pages: int


def jobs_of(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[Done]:
    """Grows by one with each job that the writer has done."""
    done: list[Done] = []
    perform = store.journal.perform

    def counted(job: Callable[[sqlite3.Connection], Any]) -> Awaitable[Any]:
        def run(db: sqlite3.Connection) -> Any:
            rows, pages = db.total_changes, pages_of(db)
            result = job(db)
            done.append(Done(db.total_changes - rows, pages - pages_of(db)))
            return result

        return perform(run)

    monkeypatch.setattr(store.journal, "perform", counted)
    return done


def pages_of(db: sqlite3.Connection) -> int:
    return db.execute("PRAGMA page_count").fetchone()[0]


def counts(data_dir: Path) -> dict[str, int]:
    with closing(sqlite3.connect(data_dir / "vespera.db")) as db:
        return {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}


def removed_to(data_dir: Path) -> int:
    with closing(sqlite3.connect(data_dir / "vespera.db")) as db:
        return database.removed_to(db)


def executed(store: Store, task: Task) -> ExecutionSession:
    session = task.start_execution("role")
    session.update_status(ExecutionStatus.RUNNING)
    session.update_progress(50.0, message="half way")
    output = store.open_output(session.session_id)
    output.write("stdout", b"said\n")
    output.close()
    with task.ledger:
        task.remember_key("local", "execute", f"key of {session.session_id}", session.run_id)
        session.complete(result=ResultRecord(execution_id=session.session_id, body=b'"done"'))
    return session


def attempted(task: Task, **attempt: Any) -> str:
    """The run id of an attempt that has failed."""
    session = task.enqueue_execution("role", **attempt)
    session.update_status(ExecutionStatus.PREPARING)
    session.update_status(ExecutionStatus.RUNNING)
    session.fail("once more")
    return session.run_id


def planned(store: Store, steps: int, *, clock: Clock = LONG_AGO) -> tuple[Task, PlanBoard]:
    """A plan that runs, and its board."""
    task = Task(title="plan", clock=clock, sink=store.journal)
    return task, opened_board(task, steps)


def opened_board(task: Task, steps: int) -> PlanBoard:
    plan = ExecutionPlan(id="p", steps=tuple(PlanStep(id=f"s{place}", role="role") for place in range(steps)))
    with task.ledger:
        session = task.start_execution(PLAN_ROLE)
        session.update_status(ExecutionStatus.RUNNING)
        board = PlanBoard(session, plan)
        board.open()
    return board


def step_done(store: Store, board: PlanBoard, step: str, *, clock: Clock = LONG_AGO) -> ExecutionSession:
    """A step that has ended, with a place in the cache."""
    plan = board.state.execution_id
    child = Task(title=step, parent_execution_id=plan, step_id=step, clock=clock, sink=store.journal)
    board.started(step, role="role", attempt=1, task_id=child.id)
    session = executed(store, child)
    board.completed(step, result_of=session.session_id)
    cached = CacheRecord(key=step.encode(), principal="local", role="role", execution_id=session.session_id)
    with child.ledger:
        child.ledger.keep(cached)
    return session


def ended(task: Task) -> None:
    assert task.execution.current_session is not None
    task.execution.current_session.complete()


async def test_a_task_that_ended_long_ago_goes_with_all_that_it_had(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        old = executed(store, Task(title="old", clock=LONG_AGO, sink=store.journal))
        await store.journal.sync()
        kept = executed(store, Task(title="new", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        store.journal.append_samples([Sample(each.session_id, NOW, "cpu_usage", 1.0) for each in (old, kept)])
        with anyio.fail_after(WITHIN):
            while not await store.queries.samples(kept.session_id):  # noqa: ASYNC110 - the journal tells nobody
                await anyio.sleep(0.001)
        report = await store.remove_ended(before=BEFORE)
        assert (report.tasks, report.executions) == (1, 1)
        assert report.events > 5
        assert await store.queries.get_task(old.task_id) is None
        assert await store.queries.locate(old.session_id) is None
        assert await store.queries.events_after(0, task_id=old.task_id) == []
        assert read_output(data_dir, old.session_id).total == 0
        assert not (data_dir / "outputs" / old.session_id).exists()
        assert await store.queries.find_idempotent("local", "execute", f"key of {old.session_id}") is None
        assert await store.queries.get_execution(kept.session_id) == (kept.lifecycle, kept.progress)
        assert read_output(data_dir, kept.session_id).text == "said\n"
    left = counts(data_dir)
    assert (left["tasks"], left["executions"], left["streams"], left["idempotency"]) == (1, 1, 2, 1)
    assert (left["progress"], left["results"], left["samples"]) == (1, 1, 1)
    assert [each.severity for each in examine(data_dir / "vespera.db")] == ["ok"] * 7


async def test_nothing_unfinished_goes_however_old(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        Task(title="never executed", clock=LONG_AGO, sink=store.journal)
        running = Task(title="running", clock=LONG_AGO, sink=store.journal)
        executed(store, running)
        running.start_execution("role").update_status(ExecutionStatus.RUNNING)
        executed(store, Task(title="new", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        report = await store.remove_ended(before=BEFORE)
        # Of the task that runs, only the run that it no longer shows.
        assert (report.tasks, report.executions) == (0, 1)
        assert (await store.queries.list_tasks()).total == 3
        assert len(await store.queries.unfinished()) == 1


async def test_the_cursor_never_runs_backwards_even_when_all_is_old(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        for number in range(3):
            executed(store, Task(title=str(number), clock=LONG_AGO, sink=store.journal))
        head = await store.journal.sync()
        assert (await store.remove_ended(before=BEFORE)).tasks == 2
    async with opened(data_dir) as store:
        assert store.journal.head == head
        Task(title="next", sink=store.journal)
        assert await store.journal.sync() == head + 1
    assert [each.severity for each in examine(data_dir / "vespera.db")] == ["ok"] * 7


async def test_a_reader_from_before_gets_what_is_left_and_can_know_it(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        assert removed_to(data_dir) == 0
        executed(store, Task(title="old", clock=LONG_AGO, sink=store.journal))
        gone = await store.journal.sync()
        kept = executed(store, Task(title="new", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        await store.remove_ended(before=BEFORE)
        assert removed_to(data_dir) == gone
    async with opened(data_dir) as store:
        events = await store.feed.read(after=2)
        assert {event.task_id for event in events} == {kept.task_id}
        assert [event.cursor for event in events] == list(range(gone + 1, store.journal.head + 1))


async def test_a_removal_that_was_interrupted_is_finished_by_the_next_one(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        for number in range(160):
            executed(store, Task(title=str(number), clock=LONG_AGO, sink=store.journal))
        executed(store, Task(title="new", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        before = counts(data_dir)["events"]
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: store.remove_ended(before=BEFORE))
            with anyio.fail_after(WITHIN):
                while counts(data_dir)["events"] == before:  # noqa: ASYNC110 - the deletion tells nobody
                    await anyio.sleep(0.001)
            group.cancel_scope.cancel()
    # What is hidden is not damage.
    assert [each.severity for each in examine(data_dir / "vespera.db")] == ["ok"] * 7
    assert counts(data_dir)["streams"] > 2
    async with opened(data_dir) as store:
        await store.remove_ended(before=BEFORE)
    assert (counts(data_dir)["streams"], counts(data_dir)["tasks"]) == (2, 1)
    assert len(list((data_dir / "outputs").iterdir())) == 1


async def test_nothing_is_added_to_a_log_that_is_being_removed(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task = Task(title="old", clock=LONG_AGO, sink=store.journal)
        executed(store, task)
        executed(store, Task(title="new", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        # As a removal leaves it between its two steps, while somebody still has the task in hand.
        hidden = "INSERT INTO removals SELECT id FROM streams WHERE name = ?"
        await store.journal.perform(lambda db: db.execute(hidden, (task.record.task_id,)).rowcount)
        again = task.start_execution("role")
        with pytest.raises(Fenced, match="is being removed"):
            await store.journal.sync()
        assert await store.queries.get_execution(again.session_id) is None
        await store.remove_ended(before=BEFORE)
        late = Task(title="late", clock=LATELY, sink=store.journal)
        await store.journal.sync()
        assert await store.queries.get_task(late.record.task_id) == late.record
        task.execution.change(execution_context={"too": "late"})
        with pytest.raises(Fenced):
            await store.journal.sync()


async def test_a_new_task_is_taken_while_the_newest_log_is_being_removed(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_ROWS", 2)
    async with opened(data_dir) as store:
        older = Task(title="older", clock=LATELY, sink=store.journal).start_execution("role")
        removed = executed(store, Task(title="old", clock=LONG_AGO, sink=store.journal))
        await store.journal.sync()
        store.journal.append_samples([Sample(removed.session_id, NOW, "cpu", 1.0)] * 5)
        older.update_status(ExecutionStatus.RUNNING)
        await store.journal.sync()
        made: list[ExecutionSession] = []
        perform = store.journal.perform

        async def with_a_task_amid(job: Callable[[sqlite3.Connection], Any]) -> Any:
            done = await perform(job)
            if not made and 0 < counts(data_dir)["samples"] < 5:
                made.append(Task(title="new", clock=LATELY, sink=store.journal).start_execution("role"))
                await store.journal.sync()
            return done

        monkeypatch.setattr(store.journal, "perform", with_a_task_amid)
        assert (await store.remove_ended(before=BEFORE)).tasks == 1
        assert sorted(row.task.title for row in (await store.queries.list_tasks()).items) == ["new", "older"]
    assert {each.severity for each in examine(data_dir / "vespera.db")} == {"ok"}


async def test_the_pages_that_became_free_go_back_many_at_a_time(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(data_dir) as store:
        for number in range(100):
            executed(store, Task(title=str(number), clock=LONG_AGO, sink=store.journal))
        executed(store, Task(title="new", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        jobs = jobs_of(store, monkeypatch)
        report = await store.remove_ended(before=BEFORE)
        # Each transaction is followed by 10 ms in which others have their turn; in it all others wait.
        assert report.pages > 100
        assert len(jobs) < report.pages
        assert max(each.pages for each in jobs) <= 64
        assert max(each.rows for each in jobs) < 700  # of 32 tasks


async def test_acknowledgements_do_not_wait_for_the_removal_and_the_file_shrinks(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = data_dir / "vespera.db"
    async with opened(data_dir) as store:
        for number in range(40):
            task = Task(title=str(number), clock=LONG_AGO, sink=store.journal)
            session = executed(store, task)
            for place in range(50):
                task.execution.change(execution_context={"session": session.session_id, "x": place * "some text"})
            await store.journal.sync()
    full = path.stat().st_size
    waited: list[int] = []
    report = RetentionReport()
    async with opened(data_dir) as store:
        session = Task(title="busy", sink=store.journal).start_execution("role")
        jobs = jobs_of(store, monkeypatch)

        async def write_on() -> None:
            while True:
                session.update_progress(1.0, message="on")
                before = len(jobs)
                await store.journal.sync()
                waited.append(len(jobs) - before)
                await anyio.sleep(0.001)

        async with anyio.create_task_group() as group:
            group.start_soon(write_on)
            report = await store.remove_ended(before=BEFORE)
            group.cancel_scope.cancel()
        assert report.tasks == 40
        assert report.pages > 0
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA freelist_count").fetchone() == (0,)
    assert len(waited) > 20
    assert max(waited) <= 2  # transactions of the removal between a write and its acknowledgement
    assert max(each.rows for each in jobs) < 2000
    assert path.stat().st_size < full - report.pages * 2048


async def test_a_run_goes_whole_wherever_the_removal_is_interrupted(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        now = NOW - timedelta(days=100)
        task = Task(title="often tried", clock=Clock(now=lambda: now, monotonic=lambda: 0.0), sink=store.journal)
        runs: list[str] = []
        for _ in range(17):
            runs.append(attempted(task))
            attempted(task, run_id=runs[-1], attempt=2)
            attempted(task, run_id=runs[-1], attempt=3)
        now = NOW
        task.execution.change(execution_context={"seen": "lately"})  # so it stays, with the run that it shows
        executed(store, Task(title="new", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        assert await store.queries.removed_before(task.record.task_id, 0) is None
        steps: list[list[int]] = []
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: store.remove_ended(before=BEFORE))
            with anyio.fail_after(WITHIN):
                while not steps or sum(steps[-1]) > 3:
                    steps.append([len(await store.queries.attempts_of(run)) for run in runs])
            group.cancel_scope.cancel()
        assert {count for counted in steps for count in counted} == {0, 3}
        assert steps[-1][-1] == 3  # the run that the task shows
        gone = removed_to(data_dir)
        assert await store.queries.removed_before(task.record.task_id, 0) == gone + 1
        assert await store.queries.removed_before(task.record.task_id, gone) is None
        (new,) = (row for row in (await store.queries.list_tasks()).items if row.task.title == "new")
        assert await store.queries.removed_before(new.task.task_id, 0) is None


async def test_a_task_whose_runs_failed_goes_though_it_could_be_tried_again(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        failed = Task(title="failed", max_retries=3, clock=LONG_AGO, sink=store.journal)
        attempted(failed)
        now = NOW - timedelta(days=100)
        reopened = Task(title="reopened since", clock=Clock(now=lambda: now, monotonic=lambda: 0.0), sink=store.journal)
        executed(store, reopened)
        now = NOW
        reopened.reopen()
        Task(title="never executed", clock=LONG_AGO, sink=store.journal)
        Task(title="lately", clock=LATELY, sink=store.journal)
        await store.journal.sync()
        assert (failed.status, reopened.status) == ("todo", "todo")
        report = await store.remove_ended(before=BEFORE)
        titles = [row.task.title for row in (await store.queries.list_tasks()).items]
        assert (report.tasks, sorted(titles)) == (1, ["lately", "never executed", "reopened since"])


async def test_the_steps_of_a_plan_go_with_it_and_never_before(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task, board = planned(store, 3)
        sessions = [step_done(store, board, step) for step in ("s0", "s1")]
        twice = Task(
            title="s2", parent_execution_id=board.state.execution_id, step_id="s2", clock=LONG_AGO, sink=store.journal
        )
        attempted(twice)
        attempted(twice)
        executed(store, Task(title="new", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        full = counts(data_dir)
        # Its children ended long ago, and it has not ended.
        report = await store.remove_ended(before=BEFORE)
        assert (report.tasks, report.executions) == (0, 0)
        assert counts(data_dir) == full
        assert (full["plan_states"], full["steps"], full["checkpoints"], full["step_cache"]) == (1, 3, 2, 2)
        assert await store.queries.cached(b"s0", "local") == sessions[0].session_id

        ended(task)
        executed(store, Task(title="newer", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        report = await store.remove_ended(before=BEFORE)
        assert (report.tasks, report.executions) == (4, 5)
        assert await store.queries.cached(b"s0", "local") is None
        assert await store.queries.locate(sessions[0].session_id) is None
        assert read_output(data_dir, sessions[0].session_id).total == 0
    left = counts(data_dir)
    assert (left["tasks"], left["executions"], left["streams"]) == (2, 2, 4)
    assert [left[table] for table in ("plan_states", "steps", "checkpoints", "step_cache")] == [0, 0, 0, 0]
    assert [each.severity for each in examine(data_dir / "vespera.db")] == ["ok"] * 7


async def test_an_older_run_of_a_plan_goes_with_its_steps_while_the_one_that_is_shown_stays(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        now = NOW - timedelta(days=100)
        task, board = planned(store, 1, clock=Clock(now=lambda: now, monotonic=lambda: 0.0))
        first = step_done(store, board, "s0")
        ended(task)
        second = step_done(store, opened_board(task, 1), "s0")
        ended(task)
        now = NOW
        task.execution.change(execution_context={"seen": "lately"})
        executed(store, Task(title="new", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        report = await store.remove_ended(before=BEFORE)
        assert (report.tasks, report.executions) == (1, 2)
        assert await store.queries.get_execution(first.session_id) is None
        assert await store.queries.get_task(first.task_id) is None
        assert await store.queries.get_execution(second.session_id) is not None
        assert counts(data_dir)["steps"] == 1


async def test_a_plan_that_has_ended_stays_while_a_step_of_it_has_not(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task, board = planned(store, 1)
        child = Task(
            title="s0", parent_execution_id=board.state.execution_id, step_id="s0", clock=LONG_AGO, sink=store.journal
        )
        child.start_execution("role")
        ended(task)
        executed(store, Task(title="new", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        assert (await store.remove_ended(before=BEFORE)).tasks == 0
        ended(child)
        executed(store, Task(title="newer", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        assert (await store.remove_ended(before=BEFORE)).tasks == 2


async def test_a_result_that_an_unfinished_plan_has_taken_from_another_one_stays(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        source, board = planned(store, 1)
        session = step_done(store, board, "s0")
        ended(source)
        taker, taking = planned(store, 1, clock=LATELY)
        taking.completed("s0", result_of=session.session_id, cached=True)
        executed(store, Task(title="new", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        assert (await store.remove_ended(before=BEFORE)).tasks == 0
        assert await store.queries.get_result(session.session_id) is not None
        ended(taker)
        executed(store, Task(title="newer", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        assert (await store.remove_ended(before=BEFORE)).tasks == 2
        assert await store.queries.get_result(session.session_id) is None


async def test_the_cursor_never_runs_backwards_when_a_step_wrote_last(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task, board = planned(store, 2)
        step_done(store, board, "s0")
        plan = board.state.execution_id
        last = Task(title="s1", parent_execution_id=plan, step_id="s1", clock=LONG_AGO, sink=store.journal)
        ended(task)
        last.execution.change(execution_context={"the": "last event"})
        head = await store.journal.sync()
        assert (await store.remove_ended(before=BEFORE)).tasks == 0
    async with opened(data_dir) as store:
        assert store.journal.head == head


async def test_a_large_plan_goes_bit_by_bit_and_wholly_wherever_that_is_interrupted(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task, board = planned(store, 600)
        for place in range(600):
            child = Task(
                title="step",
                parent_execution_id=board.state.execution_id,
                step_id=f"s{place}",
                clock=LONG_AGO,
                sink=store.journal,
            )
            session = child.start_execution("role")
            session.update_status(ExecutionStatus.RUNNING)
            session.complete()
        ended(task)
        executed(store, Task(title="new", clock=LATELY, sink=store.journal))
        await store.journal.sync()
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: store.remove_ended(before=BEFORE))
            with anyio.fail_after(WITHIN):
                while counts(data_dir)["tasks"] in (602, 601):  # noqa: ASYNC110 - the removal tells nobody
                    await anyio.sleep(0.001)
            group.cancel_scope.cancel()
    # Its first steps are hidden, and others not yet.
    assert 2 < counts(data_dir)["tasks"] < 600
    assert [each.severity for each in examine(data_dir / "vespera.db")] == ["ok"] * 7
    async with opened(data_dir) as store:
        await store.remove_ended(before=BEFORE)
    left = counts(data_dir)
    assert (left["tasks"], left["streams"], left["steps"]) == (1, 2, 0)
