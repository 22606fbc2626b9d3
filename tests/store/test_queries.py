"""Questions to the database: what is found, counted, paged, and what is not."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import anyio
import pytest
from deadlines import WITHIN
from hypothesis import given
from hypothesis import strategies as st

from vespera_exec.errors import InvalidInput, StoreError
from vespera_exec.model.clock import Clock
from vespera_exec.model.enums import ExecutionStatus, MessageLevel, TaskStatus
from vespera_exec.model.ledger import ResultRecord
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.task import Task
from vespera_exec.settings import Settings
from vespera_exec.store.queries import percentile
from vespera_exec.store.store import Store
from vespera_exec.store.writer import Sample

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path


@asynccontextmanager
async def opened(data_dir: Path) -> AsyncGenerator[Store]:
    async with Store.open(Settings.load({}, data_dir=data_dir)) as store:
        yield store


class Time:
    """A clock that stands until it is turned."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.clock = Clock(
            now=lambda: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds),
            monotonic=lambda: self.seconds,
        )


async def test_a_task_and_its_execution_are_found_as_they_were_decided(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task = Task(title="T", description="D", inputs={"a": [1, {"b": None}]}, sink=store.journal)
        session = task.start_execution("role")
        session.update_progress(33.0, message="a third")
        await store.journal.sync()
        assert await store.queries.get_task(task.id) == task.record
        assert await store.queries.get_execution(session.session_id) == (session.lifecycle, session.progress)
        assert await store.queries.get_task("nobody") is None
        assert await store.queries.get_execution(task.id) is None


async def test_a_beginning_of_six_characters_stands_for_an_id(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task = Task("task-abcdef-1", sink=store.journal)
        Task("task-abcdef-2", sink=store.journal)
        session = task.start_execution("role")
        await store.journal.sync()
        locate = store.queries.locate
        assert await locate(task.id) == (task.id, None)
        assert await locate(session.session_id) == (task.id, session.session_id)
        assert await locate(session.session_id[:8]) == (task.id, session.session_id)
        assert await locate(session.session_id[:5]) is None
        assert await locate("") is None
        assert await locate("task-x") is None
        assert await locate("task-%") is None
        with pytest.raises(InvalidInput, match="more than one"):
            await locate("task-abc")


async def test_results_and_keys_are_found(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task = Task(sink=store.journal)
        session = task.start_execution("role")
        with task.ledger:
            record = ResultRecord(execution_id=session.session_id, body=b'{"n":1}', truncated=True)
            session.complete(result=record)
            task.remember_key("local", "execute", "key", session.run_id)
        await store.journal.sync()
        assert await store.queries.get_result(session.session_id) == record
        assert await store.queries.get_result("nobody") is None
        found = await store.queries.find_idempotent("local", "execute", "key")
        assert found is not None
        assert (found.task_id, found.run_id) == (task.id, session.run_id)
        assert await store.queries.find_idempotent("other", "execute", "key") is None


async def test_pages_cover_a_list_once_even_while_it_grows(data_dir: Path) -> None:
    time = Time()
    async with opened(data_dir) as store:
        made: list[str] = []
        for number in range(25):
            time.seconds += number % 3  # some share a stamp
            made.append(Task(title=f"task {number}", sink=store.journal, clock=time.clock).id)
        await store.journal.sync()
        seen: list[str] = []
        token = None
        while True:
            page = await store.queries.list_tasks(limit=7, page_token=token)
            seen += [row.task.task_id for row in page.items]
            time.seconds += 1
            Task(title="newer", sink=store.journal, clock=time.clock)
            await store.journal.sync()
            if (token := page.next_token) is None:
                break
        assert seen == made[::-1]


async def test_lists_are_filtered_and_say_how_many_there_are(data_dir: Path) -> None:
    time = Time()
    async with opened(data_dir) as store:
        first = Task(title="Read 100% of it", role="reader", sink=store.journal, clock=time.clock)
        time.seconds = 60
        second = Task(
            title="Write",
            description="a line_",
            role="writer",
            principal="token:x",
            sink=store.journal,
            clock=time.clock,
        )
        session = second.start_execution()
        session.update_status(ExecutionStatus.RUNNING)
        session.update_progress(40)
        await store.journal.sync()
        tasks = store.queries.list_tasks

        async def found(**filters: object) -> list[str]:
            page = await tasks(**filters)  # pyright: ignore[reportArgumentType]
            assert page.total == len(page.items)
            return [row.task.task_id for row in page.items]

        assert await found() == [second.id, first.id]
        assert await found(status=TaskStatus.DOING) == [second.id]
        assert await found(role="reader") == [first.id]
        assert await found(principal="token:x") == [second.id]
        assert await found(text="100%") == [first.id]
        assert await found(text="LINE_") == [second.id]
        assert await found(text="_ine") == []
        assert await found(since=datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC)) == [second.id]
        row = (await tasks(status=TaskStatus.DOING)).items[0]
        assert (row.execution_id, row.execution_status, row.percentage) == (
            session.session_id, ExecutionStatus.RUNNING, 40.0,
        )  # fmt: skip
        assert (await tasks(role="reader")).items[0].execution_id is None
        assert await found(status=ExecutionStatus.RUNNING) == [second.id]
        assert await found(status=ExecutionStatus.FAILED) == []


@pytest.mark.parametrize("token", ["", "x", "%%%", "WzEsMl0=", "bnVsbA=="])
async def test_a_page_token_that_is_not_ours_is_refused(data_dir: Path, token: str) -> None:
    async with opened(data_dir) as store:
        with pytest.raises(InvalidInput, match="page token"):
            await store.queries.list_tasks(page_token=token)


async def test_a_page_token_with_a_number_that_no_row_has_is_refused(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        for numbers in ((2**63, 1), (1, 2**63), (-(2**63) - 1, 1)):
            token = base64.urlsafe_b64encode(json.dumps(["tasks:updated", *numbers]).encode()).decode()
            with pytest.raises(InvalidInput, match="page token"):
                await store.queries.list_tasks(page_token=token)


async def test_a_text_to_search_for_is_bounded(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        assert (await store.queries.list_tasks(text="%" * 200)).total == 0
        with pytest.raises(InvalidInput, match="at most 200"):
            await store.queries.list_tasks(text="x" * 201)


async def test_a_lone_surrogate_finds_nothing(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        assert (await store.queries.list_tasks(text="\ud800")).total == 0
        assert await store.queries.get_task("\ud800") is None


async def test_a_message_of_the_database_does_not_say_where_it_lies(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        with pytest.raises(StoreError) as caught:
            await store.queries._rows("SELECT nothing FROM nowhere")  # pyright: ignore[reportPrivateUsage]
        assert str(data_dir) not in str(caught.value)


async def test_a_page_token_of_another_list_is_refused(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        for _ in range(3):
            Task(sink=store.journal).start_execution("role")
        await store.journal.sync()
        token = (await store.queries.list_tasks(limit=1)).next_token
        with pytest.raises(InvalidInput, match="another list"):
            await store.queries.list_tasks(sort="priority", page_token=token)
        with pytest.raises(InvalidInput, match="sort"):
            await store.queries.list_tasks(sort="title; DROP TABLE tasks")  # pyright: ignore[reportArgumentType]


async def test_a_whole_id_is_known_with_what_it_shows(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        idle = Task(title="Never executed", sink=store.journal)
        task = Task(title="Twice", sink=store.journal)
        first = task.start_execution("role")
        second = task.execution.fail_for_retry("broken", retry_at=datetime.now(UTC))
        assert second is not None
        await store.journal.sync()
        shown: list[tuple[str, str | None]] = []
        for any_id in (task.id, first.session_id, second.session_id, idle.id):
            known = await store.queries.get_known(any_id)
            assert known is not None
            shown.append((known.task.title, known.execution[0].execution_id if known.execution else None))
        assert shown == [
            ("Twice", second.session_id),
            ("Twice", first.session_id),
            ("Twice", second.session_id),
            ("Never executed", None),
        ]
        assert await store.queries.get_known(task.id[:8]) is None


async def test_attempts_come_in_order(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task = Task(sink=store.journal)
        first = task.start_execution("role")
        second = task.execution.fail_for_retry("broken", retry_at=datetime.now(UTC))
        assert second is not None
        await store.journal.sync()
        attempts = await store.queries.attempts_of(first.run_id)
        assert [(life.execution_id, life.attempt) for life, _ in attempts] == [
            (first.session_id, 1), (second.session_id, 2),
        ]  # fmt: skip


async def test_a_successor_counts_on_after_the_last_event_even_if_it_changed_nothing(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        session = Task(sink=store.journal).start_execution("role")
        ended = Task(sink=store.journal).start_execution("role")
        ended.complete()
        for _ in range(5):
            session.note(MessageLevel.INFO, "only a note")
        await store.journal.sync()
        (left,) = await store.queries.unfinished()
        life, progress = left.lifecycle, left.progress
        assert life.execution_id == session.session_id
        record = await store.queries.get_task(session.task_id)
        assert record is not None
        task = Task.restored(record, sink=store.journal)
        restored = ExecutionSession.restored(life, progress, ledger=task.ledger)
        restored.change_owner("next")
        await store.journal.sync()
        found = await store.queries.get_execution(session.session_id)
        assert found is not None
        assert (found[0].owner, found[0].generation) == ("next", 2)


async def test_statistics_count_every_execution_of_a_task(data_dir: Path) -> None:
    time = Time()
    async with opened(data_dir) as store:
        task = Task(max_retries=10, sink=store.journal, clock=time.clock)
        for seconds in (1, 2, 3, 4):
            session = task.start_execution("role")
            time.seconds += seconds
            session.complete()
        task.start_execution("role").fail("broken")
        task.start_execution("role").time_out()
        cancelled = task.start_execution("role")
        cancelled.request_cancellation("no")
        cancelled.end_cancelled()
        task.start_execution("role")
        Task(sink=store.journal).start_execution("role").complete()
        await store.journal.sync()
        seen = await store.queries.task_statistics(task.id)
        assert (seen.completed, seen.failed, seen.timed_out, seen.cancelled) == (4, 1, 1, 1)
        assert (seen.average_seconds, seen.min_seconds, seen.max_seconds) == (2.5, 1.0, 4.0)
        assert (seen.p50_seconds, seen.p95_seconds, seen.p99_seconds) == pytest.approx((2.5, 3.85, 3.97))
        assert await store.queries.durations(task_id=task.id, limit=3) == [4.0, 3.0, 2.0]
        assert (await store.queries.task_statistics("nobody")).average_seconds is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_a_percentile_lies_between_the_least_and_the_greatest(values: list[float], percent: float) -> None:
    ordered = sorted(values)
    found = percentile(ordered, percent)
    assert found is not None
    assert ordered[0] - 1e-6 <= found <= ordered[-1] + 1e-6
    assert percentile([], percent) is None


async def test_measurements_come_in_the_order_in_which_they_were_taken(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        session = Task(sink=store.journal).start_execution("role")
        await store.journal.sync()
        began = datetime(2026, 1, 1, tzinfo=UTC)
        taken = [Sample(session.session_id, began + timedelta(seconds=each), "cpu_usage", each) for each in range(5)]
        store.journal.append_samples(taken)
        with anyio.fail_after(WITHIN):
            while not (kept := await store.queries.samples(session.session_id)):
                await anyio.lowlevel.checkpoint()
        assert kept == taken


async def test_cancelled_questions_harm_nobody(data_dir: Path) -> None:
    async with opened(data_dir) as store:
        task = Task(sink=store.journal)
        await store.journal.sync()
        for _ in range(50):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    for _ in range(5):
                        group.start_soon(store.queries.get_task, task.id)
                    await anyio.lowlevel.checkpoint()
                    scope.cancel()
        assert await store.queries.get_task(task.id) == task.record


async def test_a_closed_store_leaves_no_thread(data_dir: Path) -> None:
    async with opened(data_dir):
        pass
    await anyio.to_thread.run_sync(lambda: None)
    before = threading.active_count()
    async with opened(data_dir) as store:
        await store.queries.get_task("nobody")
    assert threading.active_count() == before
