"""The owner of a plan is killed: the next one restores it, and nothing that was done is done again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN
from plan_owner import PLAN
from worker_calls import ME, became, recorded

from vespera_exec.app.plans.views import ExecutePlan
from vespera_exec.app.views import Handle
from vespera_exec.engine.plans.strategies import RecoveryContext, RecoveryResult
from vespera_exec.model.enums import RecoveryAction

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from vespera_exec.app.service import Vespera

    Opening = Callable[..., AbstractAsyncContextManager[Vespera]]

# Notes that it was done, and for which step; step four waits for the file `go`.
_NOTE = """
import json, os, sys, time
place, task = sys.argv[1], json.load(open(os.environ["VESPERA_TASK_FILE"]))
with open(place + "/done", "a") as done:
    done.write(task["title"] + " ")
while task["title"] == "s4" and not os.path.exists(place + "/go"):
    time.sleep(0.01)
out = os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w", buffering=1)
out.write(json.dumps({"result": task["title"]}) + "\\n")
"""
# Notes when it was called; fails while the file `broken` is there.
_BREAKS = """
import os, sys, time
with open(sys.argv[1] + "/at", "a") as at:
    at.write(str(time.time()) + " ")
sys.exit(os.path.exists(sys.argv[1] + "/broken"))
"""


@pytest.fixture
def killed_at_four(tmp_path: Path) -> Handle:
    """A plan whose owner was killed when step four was at work."""
    (tmp_path / "roles").mkdir()
    (tmp_path / "note.py").write_text(_NOTE)
    argv = json.dumps([sys.executable, str(tmp_path / "note.py"), str(tmp_path)])
    (tmp_path / "roles" / "note.yaml").write_text(f"name: note\nrunner: process\nargv: {argv}\n")
    script = Path(__file__).with_name("plan_owner.py")
    owner = [sys.executable, str(script), str(tmp_path), str(tmp_path)]
    with subprocess.Popen(owner, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        handle = Handle.model_validate_json(process.stdout.readline())
        try:
            anyio.run(until_done, tmp_path, ["s1", "s2", "s3", "s4"])
        finally:
            process.kill()
    return handle


async def until_done(place: Path, steps: list[str]) -> None:
    with anyio.fail_after(WITHIN):
        while True:
            if (place / "done").exists() and done(place) == steps:
                return
            await anyio.sleep(0.01)


def done(place: Path) -> list[str]:
    return (place / "done").read_text().split()


async def result(vespera: Vespera, handle: Handle) -> Any:
    return await vespera.get_result(ME, handle.task_id)


async def test_after_a_kill_the_restore_repeats_no_step_that_was_done_and_keeps_the_variables(
    opening: Opening, killed_at_four: Handle, tmp_path: Path
) -> None:
    handle = killed_at_four
    (tmp_path / "go").touch()
    async with opening() as vespera:
        await became(vespera, handle, "failed")  # role note does not resume
        listed = (await vespera.checkpoints.list(ME, handle.session_id)).checkpoints
        third = next(each for each in listed if each.step == "s3")
        again = await vespera.checkpoints.restore(ME, third.checkpoint_id)
        await became(vespera, handle, "completed")
        seen = await result(vespera, handle)
        assert seen.session_id == again.session_id != handle.session_id
        assert seen.result["output"] == {"colour": "red", "third": "s3"}
        state = (await vespera.checkpoints.get(ME, third.checkpoint_id)).state
        assert (state["variables"], state["completed_tasks"]) == (PLAN["variables"], ["s1", "s2", "s3"])
        stored = await vespera._store.queries.plan_head(again.session_id)  # pyright: ignore[reportPrivateUsage]
        assert stored is not None
        assert (stored.variables, stored.restored_from) == (PLAN["variables"], third.checkpoint_id)
    assert done(tmp_path) == ["s1", "s2", "s3", "s4", "s4", "s5"]


async def test_a_restored_plan_survives_the_next_kill_too(
    opening: Opening, killed_at_four: Handle, tmp_path: Path
) -> None:
    handle = killed_at_four
    async with opening() as vespera:
        await became(vespera, handle, "failed")
        again = await vespera.checkpoints.restore(ME, any_id=handle.task_id)
        await until_done(tmp_path, ["s1", "s2", "s3", "s4", "s4"])
    (tmp_path / "go").touch()
    async with opening() as vespera:
        await became(vespera, handle, "failed")
        once_more = await vespera.checkpoints.restore(ME, any_id=handle.task_id)
        await became(vespera, handle, "completed")
        assert (await result(vespera, handle)).result["output"] == {"colour": "red", "third": "s3"}
        assert len({again.session_id, once_more.session_id}) == 2
    assert done(tmp_path) == ["s1", "s2", "s3", "s4", "s4", "s4", "s5"]


class WaitABit:
    """Has a step run again after a second, whatever failed."""

    id = name = description = "wait_a_bit"
    applicable_errors = ("*",)

    async def execute(self, context: RecoveryContext) -> RecoveryResult:
        return RecoveryResult(success=True, action=RecoveryAction.RETRY, delay_seconds=1.0)


async def test_the_delay_that_a_strategy_has_asked_for_survives_the_owner(opening: Opening, tmp_path: Path) -> None:
    (tmp_path / "roles").mkdir()
    (tmp_path / "broken").touch()
    (tmp_path / "breaks.py").write_text(_BREAKS)
    argv = json.dumps([sys.executable, str(tmp_path / "breaks.py"), str(tmp_path)])
    (tmp_path / "roles" / "breaks.yaml").write_text(f"name: breaks\nrunner: process\nargv: {argv}\n")
    async with opening() as vespera:
        vespera.strategies.add(WaitABit())
        plan = {"name": "Once more", "steps": [{"id": "s1", "role": "breaks"}]}
        handle = await vespera.plans.execute(ME, ExecutePlan(plan=plan))
        await recorded(vespera, handle, "recovery_initiated")
    (tmp_path / "broken").unlink()
    async with opening() as vespera:
        step = (await vespera.list_steps(ME, handle.task_id)).steps[0]
        assert (step.status, step.waiting_for) == ("pending", "backoff")
        assert (await became(vespera, handle, "completed")).session_id == handle.session_id
    first, second = (float(at) for at in (tmp_path / "at").read_text().split())
    assert second - first >= 1.0
