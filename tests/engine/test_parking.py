"""Work that waits for somebody holds no slot, and is called again in its session: real store, in-loop work."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest
from deadlines import WITHIN
from test_engine import Body, Place, holding, place
from test_pausing import eventually, lasting

from vespera_exec.engine.work import InputNeeded, Parked, Work, WorkResult
from vespera_exec.errors import CancellationException
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus
from vespera_exec.model.inputs import MAX_QUESTIONS, Answer, Question

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vespera_exec.engine.jobs import Run

S = ExecutionStatus
YES = Answer(action="accept")


def asking(*keys: str, calls: list[Work]) -> Body:
    """Work that asks these questions together, and returns once they are answered."""

    async def body(work: Work) -> WorkResult:
        calls.append(work)
        work.tracking.enter_phase(ExecutionPhase.EXECUTION, "Working")
        work.tracking.checkpoint(len(calls))
        if waiting := [Question.made(key, f"{key}?") for key in keys if key not in work.answers]:
            raise InputNeeded(waiting)
        return WorkResult(output={key: each.action for key, each in work.answers.items()})

    return body


async def parked(run: Run) -> None:
    await eventually(lambda: run.session.lifecycle.status is S.PAUSED)


def answer(here: Place, run: Run, keys: Sequence[str], given: Answer = YES) -> None:
    assert run.session.answer(dict.fromkeys(keys, given), by="ann") == tuple(keys)
    here.engine.unpark(run.session)


async def test_a_run_that_asks_gives_its_slot_to_another(data_dir: Path) -> None:
    calls: list[Work] = []
    async with place(data_dir, max_concurrent=1) as here:
        _, run = await here.submit(asking("a", calls=calls))
        await parked(run)
        assert (here.engine.active, here.engine.idle) == (0, False)
        assert await here.still_works()
        answer(here, run, ["a"])
        life = await here.ended(run)
        assert (life.status, life.attempt, life.recovery_attempts) == (S.COMPLETED, 1, 0)
    assert [work.checkpoint for work in calls] == [None, 1]
    assert [dict(work.answers) for work in calls] == [{}, {"a": life.inputs[0].answer}]


async def test_it_waits_for_its_turn_like_any_other_and_that_is_no_time_at_work(data_dir: Path) -> None:
    calls: list[Work] = []
    body, begun, let = holding()
    async with place(data_dir, max_concurrent=1) as here:
        _, run = await here.submit(asking("a", calls=calls), timeout_seconds=1.5)
        await parked(run)
        await here.submit(body)
        await begun.wait()
        answer(here, run, ["a"])
        await lasting(1.6)
        assert (run.session.status, len(calls)) == (S.RUNNING, 1)
        let.set()
        life = await here.ended(run)
        assert (life.status, life.active_seconds < 1.5, life.queue_seconds >= 1.6) == (S.COMPLETED, True, True)


async def test_what_is_called_again_is_known_on_disk_to_have_begun(data_dir: Path) -> None:
    """Or the next owner would take it for one of which nothing ran."""
    seen: list[bool] = []

    async def body(work: Work) -> WorkResult:
        stored = await here.store.queries.get_execution(work.execution_id)
        assert stored is not None
        seen.append(stored[0].is_parked)
        if not work.answers:
            raise InputNeeded([Question.made("a", "A?")])
        return WorkResult()

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        await parked(run)
        answer(here, run, ["a"])
        assert (await here.ended(run)).status is S.COMPLETED
    assert seen == [False, False]


async def test_what_parked_work_has_left_behind_does_not_speak_for_it_any_more(data_dir: Path) -> None:
    """Or what a thread of it still says would look like work that was lost with its owner."""
    calls: list[Work] = []
    async with place(data_dir) as here:
        _, run = await here.submit(asking("a", calls=calls))
        await parked(run)
        with pytest.raises(CancellationException, match="is over"):
            calls[0].tracking.enter_phase(ExecutionPhase.EXECUTION, "Still here")
        answer(here, run, ["a"])
        assert (await here.ended(run)).status is S.COMPLETED


async def test_it_may_ask_again_and_again(data_dir: Path) -> None:
    calls: list[Work] = []

    async def body(work: Work) -> WorkResult:
        calls.append(work)
        if len(work.answers) < 5:
            raise InputNeeded([Question.made(f"q{len(work.answers)}", "More?")])
        return WorkResult(output=sorted(work.answers))

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        for number in range(5):
            await eventually(lambda number=number: len(run.session.lifecycle.inputs) == number + 1)
            answer(here, run, [f"q{number}"])
        assert (await here.ended(run)).status is S.COMPLETED
    assert len(calls) == 6


@pytest.mark.parametrize("slot", ["free", "taken"])
async def test_a_cancel_ends_it_wherever_it_waits(data_dir: Path, slot: str) -> None:
    body, begun, let = holding()
    async with place(data_dir, max_concurrent=1) as here:
        _, run = await here.submit(asking("a", calls=[]))
        await parked(run)
        if slot == "taken":
            await here.submit(body)
            await begun.wait()
            answer(here, run, ["a"])
        assert run.session.request_cancellation("enough")
        assert (await here.ended(run)).status is S.CANCELLED
        let.set()


async def test_a_cancel_from_another_thread_is_never_lost_on_the_way_to_parking(data_dir: Path) -> None:
    """At some forty different moments around that at which it is parked."""
    async with place(data_dir, max_concurrent=8) as here:
        for number in range(40):
            _, run = await here.submit(asking("a", calls=[]))
            session = run.session
            reached = threading.Event()

            def cancel(number: int = number, run: Run = run, reached: threading.Event = reached) -> None:
                if number % 2:
                    reached.wait(WITHIN)
                run.session.request_cancellation("now")

            def heard(event: object, reached: threading.Event = reached) -> None:
                if getattr(event, "event_type", None) is EventType.APPROVAL_REQUESTED:
                    reached.set()

            session.ledger.listen(heard)
            thread = threading.Thread(target=cancel)
            thread.start()
            assert (await here.ended(run)).status is S.CANCELLED
            thread.join()
        assert here.engine.idle


async def test_a_rejected_approval_lets_go_whoever_waits_for_the_run(data_dir: Path) -> None:
    async def body(work: Work) -> WorkResult:
        raise InputNeeded([Question.made("go", "Go?", kind="approval")])

    other, begun, let = holding()
    async with place(data_dir, max_concurrent=1) as here:
        task, run = await here.submit(body)
        await parked(run)
        await here.submit(other)
        await begun.wait()  # there is no slot that could be waited for
        answer(here, run, ["go"], Answer(action="decline"))
        life = await here.ended(run)
        assert (life.status, life.error["code"], task.status.value) == (S.FAILED, "APPROVAL_REJECTED", "failed")
        assert [job.key for job in here.let_go] == [run.session.session_id]
        let.set()


async def test_it_waits_as_long_as_its_role_allows_and_no_longer(data_dir: Path) -> None:
    async with place(data_dir) as here:
        _, run = await here.submit(asking("a", calls=[]), wait_timeout_seconds=0.3)
        _, patient = await here.submit(asking("a", calls=[]))
        await parked(run)
        here.engine.unpark(run.session)  # nothing, since nobody has answered
        life = await here.ended(run)
        assert (life.status, life.paused_seconds > 0.2) == (S.TIMED_OUT, True)
        assert patient.session.status is S.PAUSED


async def test_an_answer_takes_the_wait_back(data_dir: Path) -> None:
    body, begun, let = holding()
    async with place(data_dir, max_concurrent=1) as here:
        _, run = await here.submit(asking("a", calls=[]), wait_timeout_seconds=2.5)
        await parked(run)
        await here.submit(body)
        await begun.wait()
        await lasting(1.3)
        answer(here, run, ["a"])
        await lasting(1.3)
        let.set()
        assert (await here.ended(run)).status is S.COMPLETED


@pytest.mark.parametrize("count", [0, MAX_QUESTIONS + 1])
async def test_what_cannot_be_asked_fails_the_run(data_dir: Path, count: int) -> None:
    async def body(work: Work) -> WorkResult:
        raise InputNeeded([Question.made(f"q{each}", "?") for each in range(count)])

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        life = await here.ended(run)
        assert (life.status, life.error["code"], life.inputs) == (S.FAILED, "BAD_QUESTION", ())


async def test_asking_what_was_answered_fails_the_run_and_does_not_go_round(data_dir: Path) -> None:
    calls: list[Work] = []

    async def body(work: Work) -> WorkResult:
        calls.append(work)
        raise InputNeeded([Question.made("a", "Again?")])

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        await parked(run)
        answer(here, run, ["a"])
        assert (await here.ended(run)).error["code"] == "BAD_QUESTION"
    assert len(calls) == 2


async def test_work_may_be_parked_for_another_reason_and_stays_so_until_it_is_told(data_dir: Path) -> None:
    calls: list[Work] = []

    async def body(work: Work) -> WorkResult:
        calls.append(work)
        if len(calls) == 1:
            raise Parked("Waiting for the tide")
        return WorkResult()

    async with place(data_dir) as here:
        _, run = await here.submit(body)
        await parked(run)
        assert run.session.lifecycle.status_message == "Waiting for the tide"
        here.engine.unpark(run.session)  # nothing, since it has not left PAUSED
        assert await here.still_works()
        assert (run.session.status, len(calls)) == (S.PAUSED, 1)
        run.session.resume("High water")
        here.engine.unpark(run.session)
        assert (await here.ended(run)).status is S.COMPLETED


async def test_runs_that_wait_hold_no_slot_and_no_task(data_dir: Path) -> None:
    async with place(data_dir, max_concurrent=4) as here:
        before = len(asyncio.all_tasks())
        runs = [(await here.submit(asking("a", calls=[])))[1] for _ in range(60)]
        for run in runs:
            await parked(run)
        await eventually(lambda: len(asyncio.all_tasks()) == before)
        assert here.engine.active == 0
        assert await here.still_works()
        for run in runs:
            answer(here, run, ["a"])
        for run in runs:
            assert (await here.ended(run)).status is S.COMPLETED
