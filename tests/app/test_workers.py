"""Work that a worker elsewhere does: claimed once, reported on under a lease, never lost with the worker."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import pytest
from deadlines import CANCEL_SECONDS, WITHIN
from worker_calls import (
    ANN,
    BEN,
    ME,
    Defining,
    Opening,
    became,
    claimed,
    conclude,
    events,
    heard,
    recorded,
    report,
    started,
    until_refused,
)

from roles.definition import Role
from vespera_exec.app.views import InputAnswer
from vespera_exec.app.workers.views import Claim, Claimed, Concluded
from vespera_exec.errors import InvalidInput, LeaseLost, PermissionDenied, RoleNotFound
from vespera_exec.model.principal import Caller

# taking


async def test_it_waits_for_a_worker_as_pending_and_takes_no_slot(opening: Opening, define: Defining) -> None:
    async with opening(max_concurrent=1) as vespera:
        first, second = await started(vespera), await started(vespera)

        async def small(context: Any) -> str:
            return "done"

        vespera.roles.add(Role.from_callable(small, name="small", in_loop=True, inputs=None))
        own = await started(vespera, "small", wait_ms=25_000)
        assert own.status == "completed"
        await claimed(vespera)
        await claimed(vespera)
        other = await started(vespera, "small", wait_ms=25_000)
        assert other.status == "completed"
        for handle in (first, second):
            assert (await became(vespera, handle, "running")).done is False


async def test_a_claim_gives_the_oldest_of_the_highest_priority_that_the_worker_may_do(
    opening: Opening, define: Defining
) -> None:
    define("audit")
    define("secret", "workers: {principals: [ben]}")
    async with opening() as vespera:
        await started(vespera, title="old")
        await started(vespera, "audit", title="middle")
        await started(vespera, title="young")
        await started(vespera, "secret", title="bens", priority=9)
        await started(vespera, "audit", title="urgent", priority=8)
        got = [(await claimed(vespera, ANN)).title for _ in range(4)]
        assert got == ["urgent", "old", "middle", "young"]
        assert not (await vespera.workers.claim(ANN, Claim())).claimed
        assert (await claimed(vespera, BEN)).title == "bens"
        with pytest.raises(InvalidInput, match="secret"):
            await vespera.workers.claim(ANN, Claim(roles=["secret"]))
        with pytest.raises(RoleNotFound):
            await vespera.workers.claim(ANN, Claim(roles=["nothing"]))


async def test_a_claim_waits_for_a_task_and_says_what_there_is_to_know(opening: Opening, define: Defining) -> None:
    async with opening() as vespera, anyio.create_task_group() as group:
        got: list[Claimed] = []
        taken = anyio.Event()

        async def work() -> None:
            got.append(await claimed(vespera, ANN, worker="claude-1"))
            taken.set()

        group.start_soon(work)
        await anyio.wait_all_tasks_blocked()
        handle = await started(vespera, description="Is it right?", inputs={"file": "b.py"})
        with anyio.fail_after(WITHIN):
            await taken.wait()
        (claim,) = got
        assert (claim.session_id, claim.task_id, claim.attempt) == (handle.session_id, handle.task_id, 1)
        assert (claim.title, claim.description, claim.inputs) == ("Look at it", "Is it right?", {"file": "b.py"})
        assert (claim.role, claim.checkpoint, claim.answers, claim.cancel) == ("review", None, {}, False)
        assert claim.lease_seconds == 60
        assert "come from whoever asked" in (claim.notice or "")
        granted = [event for event in await events(vespera, handle) if event["type"] == "lease_granted"]
        assert [event["details"]["lease"]["worker"] for event in granted] == ["claude-1"]
        assert (claim.lease or "") not in str(await events(vespera, handle))


@pytest.mark.promise("workers")
@pytest.mark.parametrize("tasks", [300, pytest.param(1000, marks=pytest.mark.full)])
async def test_many_tasks_are_claimed_by_eight_workers_each_exactly_once(
    opening: Opening, define: Defining, tasks: int
) -> None:
    async with opening() as vespera:
        asked: list[str] = []
        got: list[str] = []

        async def request() -> None:
            handles = [await started(vespera) for _ in range(tasks // 50)]
            asked.extend(handle.session_id for handle in handles)

        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(request)

        async def work() -> None:
            while (claim := await vespera.workers.claim(ME, Claim())).claimed:
                got.append(claim.session_id or "")

        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(work)
        assert len(got) == tasks
        assert sorted(got) == sorted(asked)


async def test_nobody_came_for_it_in_time(opening: Opening, define: Defining) -> None:
    define("review", "wait_timeout_seconds: 0.1")
    async with opening() as vespera:
        handle = await started(vespera)
        await became(vespera, handle, "timed_out")
        assert not (await vespera.workers.claim(ME, Claim())).claimed


async def test_whoever_lacks_the_scope_is_refused(opening: Opening, define: Defining) -> None:
    reader = Caller("reader", frozenset({"read", "operate"}), over_tcp=True)
    async with opening() as vespera:
        await started(vespera)
        with pytest.raises(PermissionDenied, match="worker"):
            await vespera.workers.claim(reader, Claim())
        claim = await claimed(vespera)
        with pytest.raises(PermissionDenied, match="worker"):
            await report(vespera, claim, reader, percentage=5)
        with pytest.raises(PermissionDenied, match="worker"):
            await conclude(vespera, claim, reader)


@pytest.mark.promise("workers")
async def test_what_a_worker_is_answered_is_on_disk_by_then(opening: Opening, define: Defining) -> None:
    async with opening(linger_ms=60_000) as vespera:  # whoever does not wait for the disk waits for ever
        handle = await started(vespera)
        claim = await claimed(vespera)
        assert "lease_granted" in [event["type"] for event in await events(vespera, handle)]
        await report(vespera, claim, reports=[{"percentage": 10}, {"percentage": 20}, {"percentage": 30}])
        assert "Progress: 30%" in [event["message"] for event in await events(vespera, handle)]
        await report(vespera, claim, checkpoint=1)
        assert "checkpoint_created" in [event["type"] for event in await events(vespera, handle)]
        await conclude(vespera, claim)
        assert "execution_completed" in [event["type"] for event in await events(vespera, handle)]


# reporting


async def test_what_a_worker_reports_is_in_the_log_when_it_is_answered(opening: Opening, define: Defining) -> None:
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera, worker="w")
        answer = await report(
            vespera,
            claim,
            reports=[{"done": 1, "total": 4, "unit": "files"}, {"log": "one was odd", "level": "warning"}],
            done=2,
            total=4,
            unit="files",
            phase="reading",
            message="b.py",
            metrics={"findings": 250},
            checkpoint={"file": 2},
        )
        assert (answer.ok, answer.refused, answer.cancel, answer.pause) == (True, [], False, False)
        seen = await events(vespera, handle)
        assert ("warning", "one was odd") in [(event["type"], event["message"]) for event in seen]
        assert {"file": 2} in [event["details"].get("state") for event in seen]
        status = await vespera.get_status(ME, handle.task_id)
        assert status.session is not None
        assert status.session.overall_progress.message == "reading: b.py"
        custom = [event["details"].get("custom") for event in seen]
        assert 250 in [each["findings"]["current"] for each in custom if each]


async def test_a_metric_without_a_name_is_refused_and_leaves_the_progress_as_it_was(
    opening: Opening, define: Defining
) -> None:
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera)
        answer = await report(vespera, claim, percentage=40, metrics={"": 7})
        assert [each.reason for each in answer.refused] == ["a metric's name must be text that is not empty"]
        status = await vespera.get_status(ME, handle.task_id)
        assert status.session is not None
        assert status.session.overall_progress.percentage == 54


async def test_a_report_that_makes_no_sense_is_named_and_the_others_are_taken(
    opening: Opening, define: Defining
) -> None:
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera)
        said = [{"percentage": 40}, {"percentage": "much"}, {"percentage": 20}, {"colour": "red"}, {"percentage": 50}]
        answer = await report(vespera, claim, reports=said)
        assert not answer.ok
        assert [refusal.index for refusal in answer.refused] == [1, 2, 3]
        assert "went back from 40 to 20" in answer.refused[1].reason
        large = await report(vespera, claim, checkpoint="x" * 300_000)
        assert "256 KiB" in large.refused[0].reason or "bytes" in large.refused[0].reason
        progress = await vespera.get_progress(ME, handle.task_id)
        assert progress is not None
        assert progress.percentage == pytest.approx(30 + 50 * 0.6)


async def test_what_it_returned_is_the_result_and_a_repeated_call_changes_nothing(
    opening: Opening, define: Defining
) -> None:
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera, ANN)
        done = await conclude(vespera, claim, ANN, result={"findings": []}, warnings=["b.py was empty"])
        assert (done.ok, done.status, done.repeated) == (True, "completed", False)
        both: list[Concluded] = []

        async def end() -> None:
            both.append(await conclude(vespera, twice, ANN))

        again = await conclude(vespera, claim, ANN, success=False, error="no")
        assert (again.ok, again.status, again.repeated) == (True, "completed", True)
        result = await vespera.get_result(ME, handle.task_id)
        assert (result.status, result.result) == ("completed", {"findings": []})
        with pytest.raises(LeaseLost):
            await report(vespera, claim, ANN, percentage=99)
        await started(vespera)
        twice = await claimed(vespera, ANN)
        async with anyio.create_task_group() as group:
            group.start_soon(end)
            group.start_soon(end)
        assert sorted(each.repeated for each in both) == [False, True]


async def test_a_failure_that_the_role_retries_is_claimed_again_with_the_checkpoint(
    opening: Opening, define: Defining
) -> None:
    define("review", "retry: {max_retries: 1, retry_on: [FLAKY], backoff_seconds: 0.1}")
    async with opening() as vespera:
        handle = await started(vespera)
        first = await claimed(vespera)
        await report(vespera, first, checkpoint=7)
        failed = await conclude(vespera, first, success=False, error="net", error_code="FLAKY")
        assert failed.status == "failed"
        second = await claimed(vespera)
        assert (second.attempt, second.checkpoint) == (2, 7)
        assert second.session_id != handle.session_id
        await conclude(vespera, second, success=False, error="net", error_code="FLAKY")
        result = await vespera.get_result(ME, handle.task_id)
        assert (result.done, result.error and result.error["code"]) == (True, "FLAKY")


async def test_a_question_parks_the_task_until_another_worker_goes_on_with_the_answer(
    opening: Opening, define: Defining
) -> None:
    async with opening() as vespera:
        handle = await started(vespera)
        first = await claimed(vespera, ANN)
        schema = {"type": "object", "properties": {"depth": {"type": "integer"}}, "required": ["depth"]}
        with pytest.raises(InvalidInput, match="ask"):
            await report(vespera, first, ANN, ask={"message": "no key"})
        asked = await report(
            vespera, first, ANN, checkpoint=1, ask={"key": "depth", "message": "How deep?", "schema": schema}
        )
        assert (asked.ok, asked.parked) == (True, True)
        assert (await became(vespera, handle, "paused")).status == "paused"
        with pytest.raises(LeaseLost):
            await report(vespera, first, ANN)
        assert not (await vespera.workers.claim(BEN, Claim())).claimed
        await vespera.answer_input(ME, handle.task_id, {"depth": InputAnswer(action="accept", content={"depth": 3})})
        second = await claimed(vespera, BEN)
        assert (second.session_id, second.checkpoint) == (first.session_id, 1)
        assert second.answers == {"depth": {"action": "accept", "content": {"depth": 3}}}
        known = await report(vespera, second, BEN, ask={"key": "depth", "message": "How deep?", "schema": schema})
        assert (known.ok, known.parked, known.answers) == (True, False, second.answers)
        assert (await conclude(vespera, second, BEN)).status == "completed"


# stopping


async def test_a_worker_hears_of_a_cancel_with_its_next_answer_and_ends_it(opening: Opening, define: Defining) -> None:
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera)
        await vespera.cancel(ME, handle.task_id, reason="Not needed")
        answer = await heard(vespera, claim, lambda answer: answer.cancel)
        assert (answer.reason, answer.pause) == ("Not needed", False)
        done = await conclude(vespera, claim, result={"half": True})
        assert done.status == "cancelled"
        status = await vespera.cancel(ME, handle.task_id)
        assert status.reason == "it has ended (cancelled)"
        outcomes = [event["details"].get("outcome") for event in await events(vespera, handle)]
        assert [outcome["rung"] for outcome in outcomes if outcome] == ["token"]


async def test_a_worker_that_goes_on_after_a_cancel_is_fenced_off_and_called_abandoned(
    opening: Opening, define: Defining
) -> None:
    define("review", "grace_seconds: 0.2")
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera)
        began = anyio.current_time()
        cancelled = await vespera.cancel(ME, handle.task_id, wait_ms=25_000)
        assert (cancelled.status, cancelled.rung) == ("cancelled", "abandoned")
        assert anyio.current_time() - began < CANCEL_SECONDS
        before = await events(vespera, handle)
        with pytest.raises(LeaseLost):
            await report(vespera, claim, percentage=90)
        with pytest.raises(LeaseLost):
            await conclude(vespera, claim, result="too late")
        assert await events(vespera, handle) == before


async def test_time_at_work_is_limited_and_the_worker_is_told(opening: Opening, define: Defining) -> None:
    define("review", "timeout_seconds: 0.1", "grace_seconds: 2")
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera)
        answer = await heard(vespera, claim, lambda answer: answer.cancel)
        assert "Timeout" in answer.reason
        assert (await conclude(vespera, claim)).status == "timed_out"
        assert (await vespera.get_result(ME, handle.task_id)).status == "timed_out"


async def test_it_is_paused_when_the_worker_says_so_and_goes_on_when_it_is_told(
    opening: Opening, define: Defining
) -> None:
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera)
        assert not (await report(vespera, claim, state="paused")).pause
        asked = await vespera.pause(ME, handle.task_id, wait_ms=0)
        assert (asked.pending, asked.status) == (True, "running")
        assert (await heard(vespera, claim, lambda answer: answer.pause)).cancel is False
        await anyio.wait_all_tasks_blocked()
        assert (await vespera.get_status(ME, handle.task_id)).status == "running"  # the worker has not said so
        assert (await report(vespera, claim, state="paused")).pause
        await became(vespera, handle, "paused")
        assert (await report(vespera, claim, state="paused")).pause
        await vespera.resume(ME, handle.task_id)
        assert not (await report(vespera, claim)).pause
        assert (await became(vespera, handle, "running")).status == "running"
        assert (await conclude(vespera, claim)).status == "completed"


# losing


@pytest.mark.promise("workers")
async def test_when_reports_stop_the_next_worker_goes_on_and_the_lost_one_is_refused(
    opening: Opening, define: Defining
) -> None:
    define("review", "lease_seconds: 2")
    async with opening() as vespera:
        handle = await started(vespera)
        first = await claimed(vespera, ANN, worker="first")
        await report(vespera, first, ANN, percentage=80, checkpoint={"file": 8})
        second = await claimed(vespera, ANN, worker="second")
        assert (second.session_id, second.checkpoint) == (first.session_id, {"file": 8})
        assert second.lease != first.lease
        with anyio.fail_after(WITHIN):
            while "Worker second starts afresh" not in [event["message"] for event in await events(vespera, handle)]:
                await report(vespera, second, ANN)
        before = await events(vespera, handle)
        for late in (report(vespera, first, ANN, percentage=90), conclude(vespera, first, ANN, result="late")):
            with pytest.raises(LeaseLost):
                await late
        with pytest.raises(LeaseLost):
            await report(vespera, second, BEN, percentage=5)  # with another's lease
        assert await events(vespera, handle) == before
        recovered = [event for event in before if event["type"] == "recovery_initiated"]
        assert ["first" in event["message"] for event in recovered] == [True]
        assert [event["details"]["fence"] for event in before if event["type"] == "lease_ended"] == [1]
        assert [event["progress"]["percentage"] for event in before if event["type"] == "progress_update"][-1] == 30
        assert (await conclude(vespera, second, ANN)).status == "completed"


async def test_reports_however_empty_keep_the_lease(opening: Opening, define: Defining) -> None:
    define("review", "lease_seconds: 2")
    async with opening() as vespera:
        await started(vespera)
        claim = await claimed(vespera)
        until = anyio.current_time() + 3
        while anyio.current_time() < until:
            assert (await report(vespera, claim)).lease_seconds == 2
            await anyio.sleep(0.02)
        assert (await conclude(vespera, claim)).status == "completed"


async def test_after_the_last_recovery_it_fails_as_worker_lost(opening: Opening, define: Defining) -> None:
    define("review", "lease_seconds: 0.02")
    async with opening() as vespera:
        handle = await started(vespera)
        for _ in range(4):
            await claimed(vespera)
        await became(vespera, handle, "failed")
        result = await vespera.get_result(ME, handle.task_id)
        assert result.error is not None
        assert result.error["code"] == "WORKER_LOST"


async def test_a_paused_one_whose_worker_is_lost_stays_paused(opening: Opening, define: Defining) -> None:
    define("review", "lease_seconds: 2")
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera)
        await vespera.pause(ME, handle.task_id, wait_ms=0)
        await heard(vespera, claim, lambda answer: answer.pause)
        await report(vespera, claim, state="paused")
        await recorded(vespera, handle, "lease_ended")
        await became(vespera, handle, "paused")
        assert not (await vespera.workers.claim(ME, Claim(wait_ms=50))).claimed
        await vespera.resume(ME, handle.task_id)
        assert (await claimed(vespera)).session_id == handle.session_id


async def test_a_pause_that_the_lost_worker_has_not_heard_of_takes_effect_with_its_loss(
    opening: Opening, define: Defining
) -> None:
    define("review", "lease_seconds: 2")
    async with opening() as vespera:
        handle = await started(vespera)
        await claimed(vespera)
        await became(vespera, handle, "running")
        assert (await vespera.pause(ME, handle.task_id, reason="lunch", wait_ms=0)).pending
        await became(vespera, handle, "paused")
        assert not (await vespera.workers.claim(ME, Claim(wait_ms=50))).claimed
        await vespera.resume(ME, handle.task_id)
        assert (await claimed(vespera)).session_id == handle.session_id


@pytest.mark.parametrize("steps", range(8))
async def test_a_report_that_crosses_the_end_is_refused_at_once(opening: Opening, define: Defining, steps: int) -> None:
    async with opening() as vespera, anyio.create_task_group() as group:
        await started(vespera)
        claim = await claimed(vespera)
        group.start_soon(conclude, vespera, claim)
        for _ in range(steps):
            await anyio.lowlevel.checkpoint()
        with anyio.fail_after(WITHIN), pytest.raises(LeaseLost):
            await until_refused(vespera, claim)
