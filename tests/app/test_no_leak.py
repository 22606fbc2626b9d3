"""Runs come and go, and leave nothing in the process that ran them."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

import anyio
import pytest
from crowd import Crowd, Held, resident_bytes, settles, warmed_up

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from vespera_exec.app.service import Vespera

    Opening = Callable[..., AbstractAsyncContextManager[Vespera]]

WAL_BYTES = 64 * 2**20
GROWTH_BYTES = 2**20
SLOTS = 8


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of this process and its children."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.promise("no_leak")
async def test_three_hundred_runs_thirty_with_processes_leave_nothing_behind(
    opening: Opening, tmp_path: Path, temporary: Path
) -> None:
    crowd = Crowd()
    async with opening(max_concurrent=SLOTS, sample_seconds=0.0) as vespera:
        vespera.roles.add(crowd.role())
        await warmed_up(vespera, crowd)
    outside = Held.now(temporary)
    async with opening(max_concurrent=SLOTS, sample_seconds=0.0) as vespera:
        vespera.roles.add(crowd.role())
        await warmed_up(vespera, crowd)
        folders = (temporary, tmp_path / "data" / "scratch")
        before = Held.now(*folders)
        await crowd.run(vespera, 300, processes=30)
        after = await settles(before, *folders)
        assert after == before
        assert after.files == 0
        assert after.children == 0
    assert await settles(outside, temporary) == outside


@pytest.mark.promise("no_leak")
@pytest.mark.full
@pytest.mark.timeout(900)
async def test_ten_thousand_runs_leave_memory_descriptors_threads_and_wal_flat(
    opening: Opening, tmp_path: Path, temporary: Path
) -> None:
    wal, largest = tmp_path / "data" / "vespera.db-wal", 0
    async with opening(max_concurrent=100, sample_seconds=0.0) as vespera:
        vespera.roles.add((crowd := Crowd()).role())
        await warmed_up(vespera, crowd)
        before = Held.now(temporary)
        sizes: list[int] = []
        held: list[Held] = []
        with anyio.fail_after(800):
            for _ in range(3):
                for _ in range(10):
                    await crowd.run(vespera, 1000, processes=10)
                    crowd.acks.clear()
                    crowd.task_ids.clear()
                    largest = max(largest, wal.stat().st_size)
                sizes.append(resident_bytes())
                held.append(await settles(before, temporary))
    assert held == [before] * 3
    assert largest < WAL_BYTES
    # The first ten thousand warm up: the ring of events fills, SQLite's caches do.
    assert (sizes[2] - sizes[1]) < GROWTH_BYTES, [size // 1024 for size in sizes]
