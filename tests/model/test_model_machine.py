"""Random lives of several tasks: whatever is called, the log is the truth and a refusal changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model_harness import HandClock, KeptLog

from vespera_exec.errors import Conflict, InvalidInput
from vespera_exec.model import transitions
from vespera_exec.model.enums import ExecutionPhase, ExecutionStatus, MessageLevel, ProgressType, TaskStatus
from vespera_exec.model.inputs import Answer, Question
from vespera_exec.model.progress import ProgressReport
from vespera_exec.model.replay import replayed, replayed_task
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable

    from vespera_exec.model.ledger import Batch
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.progress import Progress
    from vespera_exec.model.record import TaskRecord

S = ExecutionStatus
_AT_WORK = (S.PREPARING, S.VALIDATING, S.RUNNING, S.COMPLETING, S.CANCELLING)
_TASKS = 3
# Seven draws of ten ask only for what the table allows.
_legal = st.sampled_from([True] * 7 + [False] * 3)
_which = st.integers(0, _TASKS - 1)
_numbers = st.one_of(
    st.floats(0, 100),
    st.integers(0, 100),
    st.sampled_from([-1.0, 101.0, float("nan"), float("inf"), 1e308, True]),
)
_ways = st.sampled_from(["complete", "fail", "time_out", "cancel", "end_cancelled", "pause", "resume", "recover"])
_keys = st.sampled_from(["a", "b", "c"])
_actions = st.sampled_from(["accept", "accept", "decline", "cancel"])
_FORM = {"type": "object", "properties": {"n": {"type": "integer"}}}
_totals = st.sampled_from([None, None, None, 100.0, 250.0, 0.0, -3.0])


class FoldingLog(KeptLog):
    """A log that is replayed as it is written, and that takes no gap and no second end."""

    def __init__(self) -> None:
        super().__init__()
        self.sequences: dict[str, int] = {}
        self.ends: dict[str, int] = {}
        self.folded: dict[str, tuple[Lifecycle, Progress]] = {}
        self.folded_tasks: dict[str, TaskRecord] = {}

    def append(self, batch: Batch) -> None:
        super().append(batch)
        for event in batch.events:
            stream = event.stream
            assert event.sequence == self.sequences.get(stream, 0) + 1
            self.sequences[stream] = event.sequence
            if event.execution_id is None:
                record = self.folded_tasks.get(stream) or replayed_task((), stream)
                self.folded_tasks[stream] = record.evolve(event)
            else:
                life, progress = self.folded.get(stream) or replayed((), stream)
                self.folded[stream] = life.evolve(event), progress.evolve(event)
                if event.new_status is not None and event.new_status.is_terminal:
                    self.ends[stream] = self.ends.get(stream, 0) + 1


class Lives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.hand = HandClock()
        self.log = FoldingLog()
        self.tasks: list[Task] = []
        self.sessions: list[ExecutionSession] = []
        self.shown: dict[str, float] = {}
        self.elapsed: dict[str, float] = {}
        self.ended: dict[str, tuple[Any, Any, float]] = {}

    @initialize()
    def tasks_exist(self) -> None:
        self.tasks = [
            Task(f"t{each}", role="r", sink=self.log, clock=self.hand.clock, max_retries=2) for each in range(_TASKS)
        ]

    def _tried(self, call: Callable[[], object]) -> bool:
        """Whether the call was accepted; a refused one must leave all as it was."""
        before = len(self.log.batches), self._state()
        try:
            call()
        except (Conflict, InvalidInput):
            assert (len(self.log.batches), self._state()) == before
            return False
        return True

    def _state(self) -> list[Any]:
        state: list[Any] = []
        for task in self.tasks:
            execution = task.execution
            state += [task.record, execution.current_session, execution.last_session, len(execution.execution_history)]
            state += [task.ledger.sequence(task.id)]
        for session in self.sessions:
            state += [
                session.lifecycle,
                session.progress,
                session.elapsed_seconds,
                session.ledger.sequence(session.session_id),
            ]
        return state

    def _session(self, which: int) -> ExecutionSession | None:
        return self.tasks[which].execution.current_session

    @rule(which=_which, queued=st.booleans())
    def start(self, which: int, queued: bool) -> None:
        task = self.tasks[which]
        free = task.execution.current_session is None
        accepted = self._tried(task.enqueue_execution if queued else task.start_execution)
        assert accepted is free
        session = task.execution.current_session
        assert session is not None
        if accepted:
            self.sessions.append(session)

    @rule(which=_which)
    def supersede(self, which: int) -> None:
        task = self.tasks[which]
        if self._tried(lambda: task.execution.start_new_session(task.id, supersede=True)):
            session = task.execution.current_session
            assert session is not None
            self.sessions.append(session)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), legal=_legal)
    def change_status(self, data: st.DataObject, legal: bool) -> None:
        session = data.draw(st.sampled_from(self.sessions[-4:]))
        life = session.lifecycle
        allowed = transitions.allowed_from(life.status, life.paused_from)
        new = data.draw(st.sampled_from(allowed)) if legal and allowed else data.draw(st.sampled_from(list(S)))
        accepted = self._tried(lambda: session.update_status(new, "drawn"))
        assert accepted is (new in allowed or new is life.status)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), number=_numbers, total=_totals, metric=st.booleans(), reset=st.booleans())
    def report(self, data: st.DataObject, number: float, total: float | None, metric: bool, reset: bool) -> None:
        session = data.draw(st.sampled_from(self.sessions[-4:]))
        phase = data.draw(st.sampled_from([None, None, *ExecutionPhase]))
        kind = data.draw(st.sampled_from(list(ProgressType) if total is not None else [ProgressType.PERCENTAGE]))
        report = ProgressReport(
            progress_type=kind,
            current=number,
            total=total,
            message=data.draw(st.sampled_from(["", "a", "ü", "\ud800"])),
            metric="lines" if metric else None,
            reset=reset and number == 0,
        )
        accepted = self._tried(lambda: session.report(report, phase))
        if accepted and report.reset and not metric:
            self.shown.pop(session.session_id, None)
        assert not (accepted and session.lifecycle.status.is_terminal)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def enter_phase(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(self.sessions[-4:]))
        phase = data.draw(st.sampled_from([None, *ExecutionPhase]))
        ended = session.lifecycle.status.is_terminal
        change = session.phases.exit if phase is None else lambda: session.enter_phase(phase)
        assert self._tried(change) is not ended
        assert ended or session.phases.current is phase

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def say(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(self.sessions[-4:]))
        what: Callable[[], object] = data.draw(
            st.sampled_from(
                [
                    lambda: session.note(MessageLevel.WARNING, "w", {"at": self.hand.now()}),
                    lambda: session.emit_status_event("system_alert", "a"),
                    lambda: session.emit_status_event("status_change", "a"),
                    lambda: session.emit_status_event("approval_requested", "a", {"key": "a"}),
                    lambda: session.record_checkpoint({"n": [1]}),
                    lambda: session.record_checkpoint(object()),
                    lambda: session.change_owner("other"),
                    lambda: session.milestone(50, "half"),
                ]
            )
        )
        self._tried(what)

    @rule(
        which=_which,
        how=_ways,
    )
    def end_or_hold(self, which: int, how: str) -> None:
        session = self._session(which)
        if session is None:
            return
        calls: dict[str, Callable[[], object]] = {
            "complete": lambda: session.complete("ok", outcome={"n": 1}),
            "fail": lambda: session.fail(ValueError("broken")),
            "time_out": session.time_out,
            "cancel": lambda: session.request_cancellation("stop"),
            "end_cancelled": session.end_cancelled,
            "pause": session.pause,
            "resume": session.resume,
            "recover": lambda: session.recover("fault"),
        }
        self._tried(calls[how])

    @rule(which=_which, keys=st.lists(_keys, max_size=3), kind=st.sampled_from(["form", "form", "approval"]))
    def ask(self, which: int, keys: list[str], kind: Any) -> None:
        session = self._session(which)
        if session is None:
            return
        known = {each.key: each.answer for each in session.lifecycle.inputs}
        questions = [Question.made(key, f"{key}?", kind=kind, schema=_FORM) for key in keys]
        accepted = self._tried(lambda: session.ask(questions))
        if accepted and any(known.get(key) is None for key in keys):
            assert session.lifecycle.status is S.PAUSED
            assert session.lifecycle.is_parked
        assert {key: known[key] for key in known} == {
            each.key: each.answer for each in session.lifecycle.inputs if each.key in known
        }

    @rule(which=_which, keys=st.sets(_keys), action=_actions, content=st.sampled_from([{}, {"n": 1}, {"n": "1"}]))
    def answer(self, which: int, keys: set[str], action: Any, content: dict[str, Any]) -> None:
        session = self._session(which)
        if session is None:
            return
        before = {each.key: each.answer for each in session.lifecycle.inputs}
        waiting = {each.key for each in session.lifecycle.open_inputs}
        fits = content != {"n": "1"} or action != "accept" or not keys & waiting
        given = {key: Answer(action=action, content=content) for key in keys}
        assert self._tried(lambda: session.answer(given, by="somebody")) is fits
        for each in session.lifecycle.inputs:
            if fits and each.key in keys & waiting:
                assert each.answer is not None
                assert (each.answer.action, each.answer.at) == (action, self.hand.now())
            else:
                assert each.answer == before[each.key]

    @rule(which=_which, success=st.booleans())
    def conclude(self, which: int, success: bool) -> None:
        task = self.tasks[which]
        self._tried(lambda: task.complete_execution(success, "out", "err"))

    @rule(which=_which)
    def retry(self, which: int) -> None:
        task = self.tasks[which]

        def fail() -> None:
            following = task.execution.fail_for_retry("flaky", retry_at=self.hand.now())
            if following is not None:
                self.sessions.append(following)

        self._tried(fail)

    @rule(which=_which, status=st.sampled_from(list(TaskStatus)))
    def change_task(self, which: int, status: TaskStatus) -> None:
        task = self.tasks[which]
        old = task.status
        accepted = self._tried(lambda: task.update_status(status, "by hand"))
        assert accepted is (status is old or status in transitions.TASK_ALLOWED[old])

    @rule(which=_which, undo=st.booleans(), nested=st.booleans())
    def several_at_once(self, which: int, undo: bool, nested: bool) -> None:
        """A decision of several changes; undone, nothing of it is left."""
        task, session = self.tasks[which], self._session(which)
        if session is None:
            return
        before = len(self.log.batches), self._state()
        try:
            with task.ledger:
                if nested:
                    with task.ledger:
                        session.note(MessageLevel.INFO, "in")
                session.pause("both")
                session.fail("both")
                if undo:
                    session.resume("what has ended")
        except Conflict:
            assert (len(self.log.batches), self._state()) == before
        else:
            assert len(self.log.batches) == before[0] + 1

    @rule(seconds=st.floats(0.001, 1000))
    def time_passes(self, seconds: float) -> None:
        self.hand.pass_(seconds)

    @precondition(lambda self: self.tasks)
    @rule(which=_which)
    def come_back_from_the_rows(self, which: int) -> None:
        """The owner dies and another reads the rows."""
        old = self.tasks[which]
        session = old.execution.current_session
        task = Task.restored(self.log.tasks[old.id], sink=self.log, clock=self.hand.clock)
        assert task.record == old.record
        if session is not None:
            name = session.session_id
            again = ExecutionSession.restored(self.log.lives[name], self.log.progress[name], ledger=task.ledger)
            task.execution.adopt(again)
            # What was at work after the last event is not known to the next owner; all before it is.
            silent = (self.hand.now() - session.progress.updated_at).total_seconds()
            works = session.status in _AT_WORK and not session.lifecycle.is_parked
            known = session.elapsed_seconds - (silent if works else 0.0)
            assert abs(again.elapsed_seconds - known) < 1e-4
            self.elapsed[name] = again.elapsed_seconds
            self.sessions[self.sessions.index(session)] = again
            again.change_owner("next")
        self.tasks[which] = task

    @invariant()
    def the_log_is_the_truth(self) -> None:
        for task in self.tasks:
            assert self.log.folded_tasks[task.id] == task.record == self.log.tasks[task.id]
        for session in self.sessions[-4:]:
            name = session.session_id
            assert self.log.folded[name] == (session.lifecycle, session.progress)
            assert self.log.lives[name] == session.lifecycle
            assert self.log.progress[name] == session.progress

    @invariant()
    def what_has_ended_has_ended_once_and_stays_as_it_is(self) -> None:
        for session in self.sessions:
            ended = session.lifecycle.status.is_terminal
            assert self.log.ends.get(session.session_id, 0) == int(ended)
            assert ended is (session.lifecycle.completed_at is not None)
            if ended:
                life, progress, elapsed = self.ended.setdefault(
                    session.session_id, (session.lifecycle, session.progress, session.elapsed_seconds)
                )
                assert (session.lifecycle, session.progress, session.elapsed_seconds) == (life, progress, elapsed)

    @invariant()
    def progress_only_grows_and_100_is_the_end(self) -> None:
        for session in self.sessions[-4:]:
            shown = session.progress.percentage
            if shown is None:
                continue
            assert shown >= self.shown.get(session.session_id, 0.0)
            assert (shown == 100) is (session.lifecycle.status is S.COMPLETED)
            self.shown[session.session_id] = shown

    @invariant()
    def clocks_only_grow(self) -> None:
        for session in self.sessions[-4:]:
            elapsed = session.elapsed_seconds
            assert elapsed >= self.elapsed.get(session.session_id, 0.0)
            self.elapsed[session.session_id] = elapsed
            life = session.lifecycle
            assert life.active_seconds >= sum(each.duration_seconds or 0 for each in life.phases) - 1e-3

    @invariant()
    def one_session_at_most_is_active(self) -> None:
        for task in self.tasks:
            session = task.execution.current_session
            active = [
                each for each in self.sessions if each.task_id == task.id and not each.lifecycle.status.is_terminal
            ]
            assert active == ([session] if session else [])
            assert (task.record.current_execution_id is None) is (session is None)


Lives.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestWhateverIsCalledTheLogIsTheTruth = Lives.TestCase
