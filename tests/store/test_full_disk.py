"""A full disk: the write is refused by name, reads go on, it resumes by itself, nothing is lost or left open."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from deadlines import WITHIN
from stored import opened

from vespera_exec.errors import StoreUnavailable
from vespera_exec.model.replay import replayed_task
from vespera_exec.model.task import Task
from vespera_exec.store.damage import examine
from vespera_exec.store.output import read_output


async def numbers(data_dir: Path) -> list[int]:
    """The decisions that the log of the only task holds, in order; its fold is its row."""
    async with opened(data_dir) as store:
        events = [each.event() for each in await store.feed.read(limit=10_000)]
        (row,) = (await store.queries.list_tasks()).items
        assert replayed_task(events, row.task.task_id) == row.task
    fields: list[dict[str, Any]] = [event.details.get("fields", {}) for event in events]
    return [each["execution_context"]["number"] for each in fields if "number" in each.get("execution_context", {})]


async def fill_up_again_and_again(data_dir: Path, rounds: int) -> None:
    acked: list[int] = []
    async with opened(data_dir) as store:
        task = Task(title="on a full disk", sink=store.journal)
        await store.journal.sync()
        for number in range(rounds):
            store.journal.limit_pages(1)
            task.execution.change(execution_context={"number": number, "text": "x" * 100_000})
            with pytest.raises(StoreUnavailable, match="disk is full") as caught:
                await store.journal.sync()
            assert caught.value.error_code == "STORE_UNAVAILABLE"
            with pytest.raises(StoreUnavailable):
                store.journal.check_writable()
            assert (await store.queries.list_tasks()).total == 1
            store.journal.limit_pages(1_000_000)
            with anyio.fail_after(WITHIN):
                while store.journal.fault is not None:  # noqa: ASYNC110 - it resumes by itself
                    await anyio.sleep(0.005)
            await store.journal.sync()
            acked.append(number)
    assert await numbers(data_dir) == acked == list(range(rounds))
    assert {each.severity for each in examine(data_dir / "vespera.db")} == {"ok"}


@pytest.mark.promise("disk_full")
async def test_what_was_refused_for_want_of_room_is_there_once_there_is_room(data_dir: Path) -> None:
    await fill_up_again_and_again(data_dir, 10)


@pytest.mark.promise("disk_full")
@pytest.mark.full
async def test_forty_times_full_loses_nothing(data_dir: Path) -> None:
    await fill_up_again_and_again(data_dir, 40)


async def files_that_cannot_grow(data_dir: Path, rounds: int) -> None:
    program = Path(__file__).with_name("full_disk_writer.py")
    command = [sys.executable, str(program), str(data_dir), str(rounds)]
    done = await anyio.run_process(command, stderr=subprocess.DEVNULL)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    refused = [number for what, number, *_ in said if what == "refused"]
    assert refused == list(range(rounds))
    assert {each[2] for each in said if each[0] == "refused"} == {"STORE_UNAVAILABLE"}
    assert all("write files of 1 bytes at most" in each[3] for each in said if each[0] == "refused")
    assert [each for each in said if each[0] == "read"] == [["read", 1]] * rounds
    acked = [number for what, number, *_ in said if what == "acked"]
    assert await numbers(data_dir) == acked == list(range(rounds))
    assert {each.severity for each in examine(data_dir / "vespera.db")} == {"ok"}
    # Of the output nothing fitted; the record says so, to the last byte.
    (lost, stated) = next(each[1:] for each in said if each[0] == "output")
    page = read_output(data_dir, "run")
    assert not stated
    assert page.total == 5 * rounds + 5
    assert page.dropped == lost
    assert page.dropped + len(page.text) == page.total


@pytest.mark.promise("disk_full")
async def test_files_that_cannot_grow_lose_nothing_either(data_dir: Path) -> None:
    await files_that_cannot_grow(data_dir, 5)


@pytest.mark.full
async def test_files_that_cannot_grow_forty_times(data_dir: Path) -> None:
    await files_that_cannot_grow(data_dir, 40)
