"""Random histories: what is stored is what was decided, over reopenings, and its fold is the snapshot."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from vespera_exec.errors import InvalidProgress, InvalidTransitionError, VesperaError
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus, MessageLevel
from vespera_exec.model.inputs import Answer, Question
from vespera_exec.model.ledger import ResultRecord
from vespera_exec.model.progress import ProgressReport
from vespera_exec.model.record import TaskRecord
from vespera_exec.model.replay import replayed, replayed_task
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.task import Task
from vespera_exec.store.journal import Journal
from vespera_exec.store.queries import Queries

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

TEXT = st.text(max_size=20)


class Histories(RuleBasedStateMachine):
    """Tasks and their executions in a real journal, against what they say of themselves."""

    tasks = Bundle("tasks")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "vespera.db"
        self.starter = start_blocking_portal("asyncio")
        self.portal = self.starter.__enter__()
        self.made: dict[str, Task] = {}
        self.open()

    def open(self) -> None:
        self.opened: AbstractContextManager[Journal] = self.portal.wrap_async_context_manager(
            self.portal.call(lambda: Journal.open(self.path))
        )
        self.journal = self.opened.__enter__()
        self.asked: AbstractContextManager[Queries] = self.portal.wrap_async_context_manager(
            self.portal.call(lambda: Queries.open(self.path))
        )
        self.queries = self.asked.__enter__()

    def close(self) -> None:
        self.asked.__exit__(None, None, None)
        self.opened.__exit__(None, None, None)

    def teardown(self) -> None:
        try:
            self.close()
        finally:
            self.starter.__exit__(None, None, None)
            self.folder.cleanup()

    def session(self, task: str) -> ExecutionSession | None:
        return self.made[task].execution.current_session

    @rule(target=tasks, title=TEXT)
    def make(self, title: str) -> str:
        task = Task(title=title, sink=self.journal)
        self.made[task.id] = task
        return task.id

    @rule(task=tasks, queued=st.booleans())
    def start(self, task: str, queued: bool) -> None:
        try:
            if queued:
                self.made[task].enqueue_execution("role")
            else:
                self.made[task].start_execution("role")
        except VesperaError:
            return

    @rule(task=tasks, status=st.sampled_from(ExecutionStatus))
    def move(self, task: str, status: ExecutionStatus) -> None:
        if session := self.session(task):
            try:
                session.update_status(status, "moved")
            except InvalidTransitionError:
                return

    @rule(task=tasks, phase=st.sampled_from(ExecutionPhase))
    def enter(self, task: str, phase: ExecutionPhase) -> None:
        if session := self.session(task):
            session.enter_phase(phase)

    @rule(task=tasks, done=st.integers(0, 10), message=TEXT)
    def report(self, task: str, done: int, message: str) -> None:
        if session := self.session(task):
            try:
                session.report(ProgressReport.steps(done, 10, message), ExecutionPhase.EXECUTION)
            except (InvalidProgress, InvalidTransitionError):
                return

    @rule(task=tasks, text=TEXT)
    def note(self, task: str, text: str) -> None:
        if session := self.session(task):
            session.note(MessageLevel.INFO, text)

    @rule(task=tasks)
    def checkpoint(self, task: str) -> None:
        if session := self.session(task):
            session.record_checkpoint({"at": [1, 2.5, None]})

    @rule(task=tasks, keys=st.sets(st.sampled_from("abc"), min_size=1), message=TEXT)
    def ask(self, task: str, keys: set[str], message: str) -> None:
        if session := self.session(task):
            try:
                session.ask([Question.made(key, message or "?") for key in sorted(keys)])
            except InvalidTransitionError:
                return

    @rule(task=tasks, key=st.sampled_from("abc"))
    def answer(self, task: str, key: str) -> None:
        if session := self.session(task):
            session.answer({key: Answer(action="accept")}, by="somebody")

    @rule(task=tasks)
    def retry(self, task: str) -> None:
        session = self.session(task)
        if session is not None and session.status is not ExecutionStatus.PENDING:
            self.made[task].execution.fail_for_retry("flaky", retry_at=datetime.now(UTC))

    @rule(task=tasks, success=st.booleans())
    def conclude(self, task: str, success: bool) -> None:
        session = self.session(task)
        if session is None or session.status is ExecutionStatus.PENDING:
            return
        record = ResultRecord(execution_id=session.session_id, body=b'{"a":1}')
        if success:
            session.complete("done", result=record)
        else:
            session.fail("broken", result=record)

    @rule()
    def sync(self) -> None:
        self.portal.call(self.journal.sync)

    @rule()
    def reopen(self) -> None:
        """A new owner: it knows what is stored, and nothing else."""
        self.close()
        self.open()
        for task_id in list(self.made):
            record = self.portal.call(self.queries.get_task, task_id)
            assert record is not None
            self.made[task_id] = Task.restored(record, sink=self.journal)
        for left in self.portal.call(self.queries.unfinished):
            task = self.made[left.lifecycle.task_id]
            task.execution.adopt(ExecutionSession.restored(left.lifecycle, left.progress, ledger=task.ledger))

    @invariant()
    def stored_is_decided(self) -> None:
        self.portal.call(self.journal.sync)
        events = [each.event() for each in self.portal.call(lambda: self.queries.events_after(0, limit=100_000))]
        assert [event.cursor for event in events] == list(range(1, len(events) + 1))
        for task in self.made.values():
            assert self.portal.call(self.queries.get_task, task.id) == task.record == replayed_task(events, task.id)
            assert replayed_task(events, task.id) != TaskRecord(task_id=task.id)
            for execution_id in {each.execution_id for each in events if each.task_id == task.id and each.execution_id}:
                found = self.portal.call(self.queries.get_execution, execution_id)
                assert found is not None
                life, progress = found
                own = [event for event in events if event.execution_id == life.execution_id]
                assert [event.sequence for event in own] == list(range(1, len(own) + 1))
                assert (life, progress) == replayed(events, life.execution_id)
            if (session := task.execution.current_session) is not None:
                stored = self.portal.call(self.queries.get_execution, session.session_id)
                assert stored is not None
                assert stored[0].status is session.lifecycle.status
                assert stored[1] == session.progress
        listed, _ = self.portal.call(lambda: self.queries.open_inputs(limit=1000))
        for task in self.made.values():
            session = task.execution.current_session
            waiting = session.lifecycle.open_inputs if session is not None else ()
            assert tuple(each.question for each in listed if each.task_id == task.id) == tuple(
                sorted(waiting, key=lambda each: (each.asked_at, each.key))
            )


Histories.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_the_fold_of_what_is_stored_is_the_snapshot_and_the_live_object = Histories.TestCase
