"""A cancel that a full disk did not take is not forgotten, not even by a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from vespera_exec.app.service import Vespera
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings
from vespera_exec.store.cancels import UnwrittenCancels

if TYPE_CHECKING:
    from pathlib import Path

ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})

# Runs one execution and queues another, cancels both while the disk takes nothing, says so, and waits to be killed.
_OWNER = """
import sys
from pathlib import Path
import anyio
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

async def main(place):
    settings = Settings.load({"HOME": place}, data_dir=Path(place, "data"), roles_dir=Path(place, "roles"),
                             max_concurrent=1)
    async with Vespera.open(settings=settings, purpose="daemon") as vespera:
        me = Caller(cwd="/")
        handles = [await vespera.execute_task(me, Execute(title="Sleep", role="sleeper")) for _ in range(3)]
        while (await vespera.get_status(me, handles[0].task_id)).status != "running":
            await anyio.sleep(0.01)
        vespera._store.journal.limit_pages(1)
        for handle in handles[:2]:
            answer = await vespera.cancel(me, handle.task_id, wait_ms=1500)
            assert answer.success, answer
        print(*(handle.session_id for handle in handles), flush=True)
        await anyio.sleep_forever()

anyio.run(main, sys.argv[1])
"""


def killed_owner(place: Path) -> list[str]:
    """The sessions that it had when it was killed: cancelled while it ran, cancelled in the queue, queued."""
    with subprocess.Popen([sys.executable, "-c", _OWNER, str(place)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        sessions = owner.stdout.readline().split()
        owner.kill()
    return sessions


async def test_what_was_cancelled_on_a_full_disk_stays_cancelled_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / "roles").mkdir()
    argv = json.dumps([sys.executable, "-c", "import time; time.sleep(1)"])
    definition = f"name: sleeper\nrunner: process\nargv: {argv}\non_interrupt: resume\n"
    (tmp_path / "roles" / "sleeper.yaml").write_text(definition)
    running, queued, wanted = killed_owner(tmp_path)
    settings = Settings.load({"HOME": str(tmp_path)}, data_dir=tmp_path / "data", roles_dir=tmp_path / "roles")
    async with Vespera.open(settings=settings) as vespera:
        assert (await vespera.get_status(ME, running)).status == "cancelled"
        assert (await vespera.get_status(ME, queued)).status == "cancelled"
        assert not (await vespera.get_status(ME, wanted)).done
    assert UnwrittenCancels(settings.data_dir).noted() == frozenset()


def test_notes_need_no_room_and_survive_what_comes_after(data_dir: Path) -> None:
    notes = UnwrittenCancels(data_dir)
    size = (data_dir / "cancels").stat().st_size
    assert notes.note("first")
    assert notes.note("second")
    assert (data_dir / "cancels").stat().st_size == size
    again = UnwrittenCancels(data_dir)
    assert again.noted() == {"first", "second"}
    assert again.note("third")
    assert again.noted() == {"first", "second", "third"}
    again.clear()
    assert again.noted() == frozenset()
    assert again.note("fourth")
    assert UnwrittenCancels(data_dir).noted() == {"fourth"}


def test_a_file_that_is_full_of_notes_takes_no_more(data_dir: Path) -> None:
    notes = UnwrittenCancels(data_dir)
    taken = [notes.note(str(number)) for number in range(513)]
    assert taken == [True] * 512 + [False]


def test_a_link_in_its_place_is_not_followed(data_dir: Path) -> None:
    target = data_dir.parent / "target"
    target.write_text("mine")
    (data_dir / "cancels").symlink_to(target)
    assert not UnwrittenCancels(data_dir).note("first")
    assert target.read_text() == "mine"


@pytest.mark.parametrize("what", [b"", b"\xff\xfe no id\n", b"\0" * 100])
def test_strange_contents_do_no_harm(data_dir: Path, what: bytes) -> None:
    (data_dir / "cancels").write_bytes(what)
    notes = UnwrittenCancels(data_dir)
    assert notes.note("first")
    assert "first" in notes.noted()
