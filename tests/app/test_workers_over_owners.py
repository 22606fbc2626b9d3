"""What a worker has, and what became of it, when the owner of the data directory is another, or stood still."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest
from deadlines import WITHIN
from worker_calls import ANN, BEN, ME, Defining, Opening, became, claimed, conclude, events, heard, report, started

from vespera_exec.app.workers.views import Claim
from vespera_exec.errors import LeaseLost, StoreUnavailable

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.promise("workers")
async def test_a_worker_keeps_its_lease_under_the_next_owner_and_no_recovery_is_burnt(
    opening: Opening, define: Defining
) -> None:
    async with opening() as vespera:
        handle, waiting = await started(vespera), await started(vespera)
        claim = await claimed(vespera, ANN)
        await report(vespera, claim, ANN, percentage=40, checkpoint={"file": 4})
    async with opening() as vespera:
        assert (await report(vespera, claim, ANN, percentage=60)).ok
        status = await vespera.get_status(ME, handle.task_id)
        assert status.status == "running"
        kinds = [event["type"] for event in await events(vespera, handle)]
        assert "recovery_initiated" not in kinds
        assert kinds.count("lease_granted") == 1
        assert (await claimed(vespera, BEN)).session_id == waiting.session_id
        assert (await conclude(vespera, claim, ANN, result="all")).status == "completed"
    async with opening() as vespera:
        assert (await vespera.get_result(ME, handle.task_id)).result == "all"
        assert (await conclude(vespera, claim, ANN)).repeated


async def test_a_worker_that_died_with_the_owner_is_waited_for_as_long_as_its_lease(
    opening: Opening, define: Defining
) -> None:
    define("review", "lease_seconds: 2")
    async with opening() as vespera:
        await started(vespera)
        first = await claimed(vespera, ANN)
        await report(vespera, first, ANN, checkpoint=3)
    async with opening() as vespera:
        assert not (await vespera.workers.claim(BEN, Claim())).claimed
        second = await claimed(vespera, BEN)
        assert (second.session_id, second.checkpoint) == (first.session_id, 3)
        with pytest.raises(LeaseLost):
            await report(vespera, first, ANN)


async def test_one_that_was_paused_with_its_worker_stays_so_under_the_next_owner(
    opening: Opening, define: Defining
) -> None:
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera)
        await vespera.pause(ME, handle.task_id, wait_ms=0)
        await heard(vespera, claim, lambda answer: answer.pause)
        await report(vespera, claim, state="paused")
        await became(vespera, handle, "paused")
    async with opening() as vespera:
        assert (await report(vespera, claim, state="paused")).pause
        await vespera.resume(ME, handle.task_id)
        assert not (await report(vespera, claim)).pause
        assert (await conclude(vespera, claim)).status == "completed"


async def test_what_a_worker_has_is_not_told_as_what_the_next_restart_interrupts(
    opening: Opening, define: Defining
) -> None:
    define("review", "lease_seconds: 2")
    async with opening() as vespera:
        handle = await started(vespera)
        await claimed(vespera)
        await became(vespera, handle, "running")
        assert [(row.status, row.kept) for row in vespera.describe().work] == [("running", True)]
        await became(vespera, handle, "recovering")
        assert [(row.status, row.kept) for row in vespera.describe().work] == [("recovering", True)]


async def test_a_worker_whose_task_was_ended_by_the_next_owner_does_not_hear_that_its_result_was_taken(
    opening: Opening, define: Defining, tmp_path: Path
) -> None:
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera)
    (tmp_path / "roles" / "review.yaml").unlink()
    async with opening() as vespera:
        assert (await vespera.get_status(ME, handle.task_id)).status == "failed"
        with pytest.raises(LeaseLost):
            await conclude(vespera, claim, result="all")


@pytest.mark.parametrize("runner", ["process", "external"])
async def test_a_role_that_is_done_otherwise_under_the_next_owner_is_recovered_for_that(
    opening: Opening, define: Defining, tmp_path: Path, runner: str
) -> None:
    file = tmp_path / "roles" / "review.yaml"
    elsewhere = file.read_text()
    sleeps = elsewhere.replace("external", "process") + "argv: [sleep, '60']\non_interrupt: resume\n"
    before, after = (sleeps, elsewhere) if runner == "external" else (elsewhere, sleeps)
    file.write_text(before)
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera) if runner == "process" else None
        await became(vespera, handle, "running")
    file.write_text(after)
    async with opening() as vespera:
        kinds = [event["type"] for event in await events(vespera, handle)]
        assert kinds.count("recovery_initiated") == 1
        if claim is None:
            assert (await claimed(vespera)).session_id == handle.session_id
        else:
            await became(vespera, handle, "running")
            with pytest.raises(LeaseLost):
                await report(vespera, claim)


async def test_a_lease_does_not_run_out_while_the_owner_stands_still(opening: Opening, define: Defining) -> None:
    define("review", "lease_seconds: 1")
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera)
        await became(vespera, handle, "running")
        threading.Event().wait(2.3)  # as a stopped process, or a machine that swaps: nobody is heard meanwhile
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        assert (await report(vespera, claim)).ok
        await became(vespera, handle, "recovering")  # nobody keeps it now


async def test_a_claim_that_waits_gives_nothing_out_while_the_disk_is_full(opening: Opening, define: Defining) -> None:
    define("review", "lease_seconds: 2")
    async with opening() as vespera, anyio.create_task_group() as group:
        handle = await started(vespera)
        first = await claimed(vespera)
        await became(vespera, handle, "running")
        refused = anyio.Event()

        async def wait_for_work() -> None:
            with pytest.raises(StoreUnavailable):
                await claimed(vespera)
            refused.set()

        group.start_soon(wait_for_work)
        await anyio.wait_all_tasks_blocked()
        journal = vespera._store.journal  # pyright: ignore[reportPrivateUsage]
        journal.limit_pages(1)
        for number in range(1000):
            try:
                await report(vespera, first, log=f"{number}" * 1000)
            except StoreUnavailable:
                break
        with anyio.fail_after(WITHIN):
            await refused.wait()
        assert vespera.describe().queued == 1
        journal.limit_pages(100_000)
