"""What is unfinished in a directory that was renamed, copied, or restored from a backup."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import anyio
from deadlines import WITHIN

from vespera_exec.app import unowned, views
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from pathlib import Path

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]
ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})


async def left_unfinished(opening: Opening, data_dir: Path) -> tuple[str, str]:
    """Two runs in `data_dir`: one that its role would resume, paused, and one that is queued."""
    roles = data_dir.parent / "roles"
    roles.mkdir(exist_ok=True)
    definition = "name: sleeper\nrunner: process\nargv: [sleep, '60']\non_interrupt: resume\n"
    (roles / "sleeper.yaml").write_text(definition)
    async with opening(data_dir=data_dir, max_concurrent=1) as vespera:
        paused = await vespera.execute_task(ME, Execute(title="Paused", role="sleeper"))
        queued = await vespera.execute_task(ME, Execute(title="Queued", role="sleeper"))
        with anyio.fail_after(WITHIN):
            while (await vespera.get_status(ME, paused.task_id)).status != "running":  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert (await vespera.pause(ME, paused.task_id)).success
        await vespera.backup(ME, unowned_copy(data_dir))
    return paused.task_id, queued.task_id


def unowned_copy(data_dir: Path) -> views.Backup:
    return views.Backup(path=str(data_dir.parent / "copy.db"))


async def statuses(opening: Opening, data_dir: Path, *tasks: str) -> list[str]:
    async with opening(data_dir=data_dir, max_concurrent=1) as vespera:
        await anyio.sleep(0.05)
        return [(await vespera.get_status(ME, task)).status for task in tasks]


async def test_a_directory_that_was_renamed_is_still_ones_own(opening: Opening, tmp_path: Path) -> None:
    tasks = await left_unfinished(opening, tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    paused, queued = await statuses(opening, tmp_path / "after", *tasks)
    assert paused == "paused"
    assert queued not in ("failed", "cancelled")


async def test_nothing_unfinished_in_a_copy_is_run(opening: Opening, tmp_path: Path) -> None:
    tasks = await left_unfinished(opening, tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "copy")
    assert await statuses(opening, tmp_path / "copy", *tasks) == ["failed", "failed"]


async def test_what_is_unfinished_in_a_backup_goes_on_where_it_is_restored(opening: Opening, tmp_path: Path) -> None:
    tasks = await left_unfinished(opening, tmp_path / "before")
    unowned.restore(tmp_path / "restored", tmp_path / "copy.db")
    paused, queued = await statuses(opening, tmp_path / "restored", *tasks)
    assert paused == "paused"
    assert queued not in ("failed", "cancelled")
