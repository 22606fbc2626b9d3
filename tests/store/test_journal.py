"""The journal: what it promises to those who append and wait."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from deadlines import WITHIN

from vespera_exec.errors import Conflict, Fenced, StoreDamaged, StoreTooNew, StoreUnavailable
from vespera_exec.model.enums import EventType, ExecutionStatus, MessageLevel
from vespera_exec.model.events import ExecutionEvent
from vespera_exec.model.ledger import Batch, IdempotencyRecord, ResultRecord
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.task import Task
from vespera_exec.store.database import open_for_writing
from vespera_exec.store.feed import StoredEvent
from vespera_exec.store.journal import Journal
from vespera_exec.store.queries import Queries
from vespera_exec.store.writer import Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vespera_exec.model.progress import Progress
    from vespera_exec.store.decisions import Fact


@pytest.fixture
def path(data_dir: Path) -> Path:
    return data_dir / "vespera.db"


def rows(path: Path, sql: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        with connection:
            return connection.execute(sql).fetchall()
    finally:
        connection.close()


def event(stream: str, sequence: int, **fields: object) -> ExecutionEvent:
    return ExecutionEvent(
        event_type=EventType.INFO, task_id="task", execution_id=stream, sequence=sequence, **fields  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def batch(stream: str, sequence: int) -> Batch:
    return Batch((event(stream, sequence),))


def as_read(facts: Sequence[Fact], head: int) -> list[StoredEvent]:
    return [StoredEvent.of(fact, cursor) for cursor, fact in enumerate(facts, head - len(facts) + 1)]


def modes(folder: Path) -> list[int]:
    return [stat.S_IMODE(each.stat().st_mode) for each in folder.iterdir()]


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def content_of(path: Path) -> bytes:
    return path.read_bytes()


async def until(true: Callable[[], bool]) -> None:
    with anyio.fail_after(WITHIN):
        while not true():  # noqa: ASYNC110 - the journal tells nobody of what nobody waits for
            await anyio.sleep(0.005)


@pytest.mark.promise("acknowledged")
async def test_what_sync_covers_is_in_the_file(path: Path) -> None:
    async with Journal.open(path) as journal:
        task = Task(title="First", sink=journal)
        head = await journal.sync()
        assert head == journal.head == 1
        # Another connection sees committed rows only.
        assert rows(path, "SELECT cursor, type FROM events") == [(1, "task_created")]
        task.start_execution("role")
        await journal.sync()
        assert rows(path, "SELECT count(*) FROM executions WHERE status = 'preparing'") == [(1,)]


@pytest.mark.promise("power_loss")
def test_every_commit_reaches_the_disk_before_it_is_acknowledged(path: Path) -> None:
    connection = open_for_writing(path)
    try:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA wal_autocheckpoint").fetchone() == (0,)
    finally:
        connection.close()


async def test_sync_without_anything_new_returns_at_once(path: Path) -> None:
    async with Journal.open(path) as journal:
        Task(sink=journal)
        await journal.sync()
        groups = journal.statistics().groups
        assert await journal.sync() == journal.head
        assert journal.statistics().groups == groups


async def test_decisions_that_were_made_while_the_writer_was_at_work_share_a_commit(path: Path) -> None:
    at_work, go_on = threading.Event(), threading.Event()

    def hold(db: sqlite3.Connection) -> bool:
        at_work.set()
        return go_on.wait(WITHIN)

    async with Journal.open(path) as journal, anyio.create_task_group() as group:

        async def make(number: int) -> None:
            Task(title=str(number), sink=journal)
            await journal.sync()

        group.start_soon(journal.perform, hold)
        assert await anyio.to_thread.run_sync(at_work.wait, WITHIN)
        for number in range(100):
            group.start_soon(make, number)
        await anyio.wait_all_tasks_blocked()
        go_on.set()
        await until(lambda: journal.head == 100)
        assert journal.statistics().groups <= 5


async def test_what_nobody_waits_for_is_written_too(path: Path) -> None:
    async with Journal.open(path) as journal:
        Task(sink=journal)
        await until(lambda: journal.head == 1)


async def test_what_comes_soon_after_a_commit_waits_for_company_and_nothing_else_does(path: Path) -> None:
    async with Journal.open(path, linger_ms=60_000) as journal:
        Task(sink=journal)
        await until(lambda: journal.head == 1)
        for _ in range(20):
            Task(sink=journal)
            seen = await anyio.to_thread.run_sync(rows, path, "SELECT count(*) FROM events")
            assert seen == [(1,)]
        assert await journal.sync() == 21
        assert journal.statistics().groups == 2


async def test_whoever_syncs_in_the_same_turn_of_the_loop_joins_the_commit(path: Path) -> None:
    before = sys.getswitchinterval()
    async with Journal.open(path, linger_ms=60_000) as journal:
        Task(sink=journal)
        await until(lambda: journal.head == 1)

        async def make(number: int) -> None:
            Task(title=str(number), sink=journal)
            await journal.sync()

        sys.setswitchinterval(1e-5)  # the writer may begin at any moment of the turn
        try:
            async with anyio.create_task_group() as group:
                for number in range(50):
                    group.start_soon(make, number)
        finally:
            sys.setswitchinterval(before)
        assert (journal.statistics().groups, journal.statistics().largest_group) == (2, 50)


async def test_what_publishing_fails_at_is_told_and_nobody_waits_for_ever(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def publish(_: Sequence[Fact], __: int) -> None:
        raise RuntimeError("broken on purpose")

    async with Journal.open(path, publish=publish) as journal:
        Task(title="not heard", sink=journal)
        with anyio.fail_after(WITHIN):
            assert await journal.sync() == 1
    assert "broken on purpose" in caplog.text


async def test_events_are_published_before_the_sync_that_covers_them_returns(path: Path) -> None:
    published: list[StoredEvent] = []

    def publish(facts: Sequence[Fact], head: int) -> None:
        published.extend(as_read(facts, head))

    async with Journal.open(path, publish=publish) as journal:
        task = Task(title="Heard", sink=journal)
        head = await journal.sync()
        assert [each.cursor for each in published] == list(range(1, head + 1))
        message = published[0].message()
        assert (message["type"], message["task_id"], message["cursor"]) == ("task_created", task.id, 1)


async def test_a_published_event_is_the_one_shape_of_all_doors(path: Path) -> None:
    published: list[StoredEvent] = []
    decided: list[ExecutionEvent] = []

    def publish(facts: Sequence[Fact], head: int) -> None:
        published.extend(as_read(facts, head))

    async with Journal.open(path, publish=publish) as journal:
        task = Task(title="Ünïcode \U0001f600", sink=journal)
        task.ledger.listen(decided.append)
        session = task.start_execution("role")
        session.update_progress(12.5, message="half \x00 way")
        session.note(MessageLevel.WARNING, "careful", {"a": [1, None]})
        task.complete_execution(success=True, output="done")
        await journal.sync()
    shapes = [{**each.to_stream_message(), "cursor": number} for number, each in enumerate(decided, start=2)]
    assert [each.message() for each in published[1:]] == shapes


async def test_a_cancelled_sync_changes_nothing(path: Path) -> None:
    async with Journal.open(path) as journal:
        Task(sink=journal)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await journal.sync()
        assert scope.cancelled_caught
        Task(sink=journal)
        assert await journal.sync() == 2


async def test_an_event_out_of_sequence_is_refused_and_the_others_stand(path: Path) -> None:
    async with Journal.open(path) as journal:
        journal.append(batch("mine", 1))
        await journal.sync()
        faults: list[Fenced] = []

        async def fenced() -> None:
            journal.append(batch("mine", 1))
            with pytest.raises(Fenced) as caught:
                await journal.sync()
            faults.append(caught.value)

        async def gap() -> None:
            journal.append(batch("mine", 5))
            with pytest.raises(Fenced) as caught:
                await journal.sync()
            faults.append(caught.value)

        async def fine() -> None:
            journal.append(batch("other", 1))
            await journal.sync()

        async with anyio.create_task_group() as group:
            for act in (fenced, fine, gap):
                group.start_soon(act)
        assert len(faults) == 2
        assert journal.statistics().refused == 2
        journal.append(batch("mine", 2))
        assert await journal.sync() == 3
    assert rows(path, "SELECT max(cursor), count(*) FROM events") == [(3, 3)]


async def test_a_refusal_waits_for_the_next_sync_of_its_maker(path: Path) -> None:
    async with Journal.open(path) as journal:
        journal.append(batch("mine", 2))
        await until(lambda: journal.statistics().refused == 1)
        await anyio.lowlevel.checkpoint()
        with pytest.raises(Fenced):
            await journal.sync()
        assert await journal.sync() == 0


async def test_an_ended_execution_never_changes_its_status(path: Path) -> None:
    ended = Lifecycle(execution_id="e", task_id="t", run_id="e", status=ExecutionStatus.COMPLETED, generation=1)
    async with Journal.open(path) as journal:
        journal.append(Batch((event("e", 1),), (ended,)))
        await journal.sync()
        revived = Lifecycle(execution_id="e", task_id="t", run_id="e", status=ExecutionStatus.RUNNING, generation=2)
        journal.append(Batch((event("e", 2),), (revived,)))
        with pytest.raises(Fenced, match="ended"):
            await journal.sync()
    assert rows(path, "SELECT status FROM executions") == [("completed",)]


@pytest.mark.promise("one_end")
async def test_there_is_one_terminal_event_per_execution(path: Path) -> None:
    def end(sequence: int) -> Batch:
        ended = ExecutionEvent(
            event_type=EventType.STATUS_CHANGE, execution_id="e", sequence=sequence, new_status=ExecutionStatus.FAILED
        )
        return Batch((ended,))

    async with Journal.open(path) as journal:
        journal.append(end(1))
        await journal.sync()
        journal.append(end(2))
        with pytest.raises(Fenced):
            await journal.sync()
        assert journal.head == 1


async def test_a_decision_refused_in_the_midst_of_a_statement_leaves_nothing_of_itself(path: Path) -> None:
    def ends(sequence: int) -> ExecutionEvent:
        return ExecutionEvent(
            event_type=EventType.STATUS_CHANGE, execution_id="e", sequence=sequence, new_status=ExecutionStatus.FAILED
        )

    async with Journal.open(path) as journal:
        journal.append(batch("before", 1))
        journal.append(Batch((event("e", 1), ends(2), ends(3), event("e", 4))))
        journal.append(batch("after", 1))
        with pytest.raises(Fenced):
            await journal.sync()
        assert journal.statistics().refused == 1
        journal.append(batch("e", 1))
        assert await journal.sync() == 3
    kept = "SELECT e.cursor, s.name, e.sequence FROM log e JOIN streams s ON s.id = e.stream ORDER BY e.cursor"
    assert rows(path, kept) == [(1, "before", 1), (2, "after", 1), (3, "e", 1)]


async def test_an_older_owner_is_fenced_off(path: Path) -> None:
    def owned(generation: int) -> Lifecycle:
        return Lifecycle(
            execution_id="e", task_id="t", run_id="e", status=ExecutionStatus.RUNNING, generation=generation
        )

    async with Journal.open(path) as journal:
        journal.append(Batch((event("e", 1),), (owned(2),)))
        await journal.sync()
        journal.append(Batch((event("e", 2),), (owned(1),)))
        with pytest.raises(Fenced, match="owner"):
            await journal.sync()
        journal.append(Batch((event("e", 2),), (owned(2),)))
        assert await journal.sync() == 2


async def test_a_used_idempotency_key_refuses_the_whole_decision(path: Path) -> None:
    key = IdempotencyRecord(principal="local", key="k", operation="create", task_id="t")
    async with Journal.open(path) as journal:
        journal.append(Batch((event("a", 1),), (key,)))
        await journal.sync()
        journal.append(Batch((event("b", 1),), (key,)))
        with pytest.raises(Conflict, match="has been used"):
            await journal.sync()
    assert rows(path, "SELECT count(*) FROM events") == [(1,)]


async def test_what_a_refused_decision_taught_the_writer_is_forgotten_with_it(path: Path) -> None:
    key = IdempotencyRecord(principal="local", key="k", operation="create", task_id="t")
    async with Journal.open(path) as journal:
        journal.append(Batch((event("a", 1),), (key,)))
        journal.append(Batch((event("b", 1),), (key,)))
        journal.append(batch("b", 1))
        journal.append(batch("b", 2))
        with pytest.raises(Conflict):
            await journal.sync()
    found = rows(path, "SELECT e.cursor, s.name, e.sequence FROM log e JOIN streams s ON s.id = e.stream")
    assert found == [(1, "a", 1), (2, "b", 1), (3, "b", 2)]


async def test_threads_append_too(path: Path) -> None:
    async with Journal.open(path) as journal:

        def work(number: int) -> None:
            for sequence in range(1, 21):
                journal.append(batch(f"thread {number}", sequence))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await anyio.to_thread.run_sync(thread.join)
        assert await journal.sync() == journal.head == 160


async def test_a_refusal_in_a_thread_is_logged_and_told_to_nobody_else(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Journal.open(path) as journal:
        await anyio.to_thread.run_sync(journal.append, batch("t", 7))
        await journal.sync()
        await until(lambda: "nobody waits for" in caplog.text)


async def test_a_full_disk_is_said_and_nothing_is_lost_when_there_is_room_again(path: Path) -> None:
    async with Journal.open(path) as journal:
        task = Task(title="Before", sink=journal)
        await journal.sync()
        journal.limit_pages(1)
        described = "x" * 100_000
        Task(title="Full", description=described, sink=journal)
        with pytest.raises(StoreUnavailable, match="disk is full"):
            await journal.sync()
        assert isinstance(journal.fault, StoreUnavailable)
        with pytest.raises(StoreUnavailable):
            journal.check_writable()
        with pytest.raises(StoreUnavailable):
            await journal.sync()
        # What is decided meanwhile waits its turn, and reads go on.
        task.start_execution("role")
        assert rows(path, "SELECT count(*) FROM tasks") == [(1,)]
        journal.limit_pages(1_000_000)
        await until(lambda: journal.fault is None)
        journal.check_writable()
        await journal.sync()
        assert rows(path, "SELECT count(*) FROM tasks") == [(2,)]
        assert rows(path, "SELECT count(*) FROM executions") == [(1,)]
    numbers = rows(path, "SELECT cursor FROM events ORDER BY cursor")
    assert [number for (number,) in numbers] == list(range(1, len(numbers) + 1))


async def test_closing_on_a_full_disk_says_what_it_could_not_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vespera_exec.store.journal._CLOSING_SECONDS", 0.1)
    with pytest.raises(StoreUnavailable, match="disk is full"):  # noqa: PT012 - leaving the context is what raises
        async with Journal.open(path) as journal:
            await journal.sync()
            journal.limit_pages(1)
            Task(description="x" * 100_000, sink=journal)
    assert rows(path, "SELECT count(*) FROM events") == [(0,)]


async def test_a_reader_that_never_ends_holds_up_no_commit(path: Path) -> None:
    async with Journal.open(path) as journal:
        task = Task(sink=journal)
        await journal.sync()
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM events").fetchone() == (1,)
        for number in range(400):
            task.execution.change(execution_context={"number": number, "text": "x" * 50_000})
            with anyio.fail_after(WITHIN):
                await journal.sync()
        assert reader.execute("SELECT count(*) FROM events").fetchone() == (1,)
        reader.close()


async def test_closing_writes_what_is_queued(path: Path) -> None:
    async with Journal.open(path, linger_ms=10_000) as journal:
        for number in range(50):
            Task(title=str(number), sink=journal)
    assert rows(path, "SELECT count(*) FROM tasks") == [(50,)]
    with pytest.raises(StoreUnavailable, match="closed"):
        journal.append(batch("late", 1))
    with pytest.raises(StoreUnavailable, match="closed"):
        journal.check_writable()


async def test_closing_leaves_no_thread_no_descriptor_and_no_wal(path: Path) -> None:
    async with Journal.open(path):
        pass
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    async with Journal.open(path) as journal:
        Task(sink=journal)
        await journal.sync()
        assert path.with_name("vespera.db-wal").exists()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert sorted(each.name for each in path.parent.iterdir()) == ["vespera.db"]


async def test_the_log_goes_on_where_it_ended(path: Path) -> None:
    async with Journal.open(path) as journal:
        journal.append(batch("a", 1))
        await journal.sync()
    async with Journal.open(path) as journal:
        assert journal.head == 1
        journal.append(batch("a", 2))
        journal.append(batch("b", 1))
        assert await journal.sync() == 3
    assert rows(path, "SELECT cursor, stream, sequence FROM log ORDER BY cursor") == [(1, 2, 1), (2, 2, 2), (3, 3, 1)]


async def test_the_wal_stays_small_under_load(path: Path) -> None:
    wal = path.with_name("vespera.db-wal")
    largest = 0
    async with Journal.open(path) as journal:
        task = Task(sink=journal)
        for number in range(300):
            task.execution.change(execution_context={"number": number, "text": "x" * 50_000})
            await journal.sync()
            largest = max(largest, wal.stat().st_size)
        assert journal.statistics().checkpoints > 0
    assert largest < 64 * 1024 * 1024


async def test_the_wal_stays_small_under_a_load_of_large_results(path: Path) -> None:
    wal = path.with_name("vespera.db-wal")
    largest = 0
    async with Journal.open(path) as journal:
        task = Task(sink=journal)
        session = task.start_execution("role")
        for number in range(100):
            with task.ledger:
                session.note(MessageLevel.INFO, f"Result {number}")
                task.ledger.keep(ResultRecord(execution_id=session.session_id, body=b"%05d" % number * 100_000))
            await journal.sync()
            largest = max(largest, wal.stat().st_size)
    assert largest < 16 * 1024 * 1024


async def test_measurements_are_kept_when_there_is_room_and_dropped_when_not(path: Path) -> None:
    async with Journal.open(path) as journal:
        session = Task(sink=journal).start_execution("role")
        await journal.sync()
        at = session.lifecycle.created_at
        assert at is not None
        journal.append_samples([Sample(session.session_id, at, "cpu_usage", 12.5), Sample("nobody", at, "cpu", 1.0)])
        await until(lambda: rows(path, "SELECT metric, value FROM samples") == [("cpu_usage", 12.5)])
        journal.append_samples([Sample(session.session_id, at, "cpu_usage", 1.0)] * 5000)
        assert journal.statistics().dropped_samples >= 3000


async def test_the_database_is_ours_alone(path: Path) -> None:
    async with Journal.open(path) as journal:
        Task(sink=journal)
        await journal.sync()
        assert set(modes(path.parent)) == {0o600}


async def test_a_file_that_is_no_database_is_named(path: Path) -> None:
    write(path, b"This is a letter, not a database. " * 100)
    with pytest.raises(StoreDamaged, match=r"vespera\.db"):
        async with Journal.open(path):
            pytest.fail("opened")


async def test_a_newer_database_is_left_alone(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 999")
    connection.close()
    before = content_of(path)
    with pytest.raises(StoreTooNew, match="newer version") as caught:
        async with Journal.open(path):
            pytest.fail("opened")
    assert "upgrade" in caught.value.hint
    assert content_of(path) == before


async def test_a_folder_in_its_place_or_a_missing_one_around_it_is_unavailable(path: Path) -> None:
    for bad in (path.parent, path.parent / "missing" / "vespera.db"):
        with pytest.raises(StoreUnavailable) as caught:
            async with Journal.open(bad):
                pytest.fail("opened")
        assert caught.value.hint


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
async def test_a_read_only_file_is_unavailable(path: Path) -> None:
    async with Journal.open(path):
        pass
    path.chmod(0o400)  # noqa: ASYNC240
    with pytest.raises(StoreUnavailable):
        async with Journal.open(path):
            pytest.fail("opened")


@pytest.mark.promise("damage")
async def test_damage_is_looked_for_after_an_unclean_exit(path: Path) -> None:
    async with Journal.open(path) as journal:
        task = Task(sink=journal)
        for number in range(500):
            task.execution.change(execution_context={"number": number, "text": "x" * 500})
        await journal.sync()
    content = bytearray(content_of(path))
    # A page in the middle of the log: nothing that is read at the start.
    middle = len(content) // 4096 // 2 * 4096
    content[middle : middle + 16] = b"\xff" * 16
    write(path, bytes(content))
    async with Journal.open(path) as journal:
        assert journal.head == 501
    rows(path, "UPDATE meta SET value = '0' WHERE key = 'clean'")
    with pytest.raises(StoreDamaged, match="damaged"):
        async with Journal.open(path):
            pytest.fail("opened")


async def progress_of(path: Path, sessions: list[str]) -> dict[str, Progress]:
    async with Queries.open(path) as queries:
        known = {session: await queries.get_execution(session) for session in sessions}
        return {session: found[1] for session, found in known.items() if found is not None}


@pytest.mark.promise("acknowledged")
def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(path: Path) -> None:
    program = Path(__file__).with_name("acking_writer.py")
    acked: dict[str, tuple[int, int]] = {}
    for kill_after in range(4, 204, 10):
        with subprocess.Popen([sys.executable, str(program), str(path)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(kill_after)]
            child.kill()
            for line in [*lines, *child.stdout.read().splitlines(keepends=True)]:
                if line.endswith(b"\n"):
                    session, sequence, step = line.split()
                    acked[session.decode()] = (int(sequence), int(step))
        counted = "SELECT s.name, max(e.sequence), count(*) FROM log e JOIN streams s ON s.id = e.stream GROUP BY 1"
        stored = {name: (last, count) for name, last, count in rows(path, counted)}
        for session, (sequence, _) in acked.items():
            last, count = stored[session]
            assert isinstance(last, int)
            assert last >= sequence
            assert count == last
        for session, progress in anyio.run(progress_of, path, list(acked)).items():
            assert progress.overall.current >= acked[session][1]
            assert progress.sequence == stored[session][0]
        ((cursors, highest),) = rows(path, "SELECT count(*), max(cursor) FROM events")
        assert cursors == highest
    assert len(acked) >= 20
