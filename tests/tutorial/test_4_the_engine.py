"""Four: the same with a store and an engine: durable, in processes, with roles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vespera_exec import Caller, Execute, Role, Vespera

if TYPE_CHECKING:
    from pathlib import Path

ME = Caller()


async def test_a_built_in_role_surveys_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "a.py").write_text("print('hello')\n")
    async with Vespera.open(tmp_path / "data") as vespera:
        request = Execute(title="Survey", role="survey", inputs={"path": str(folder)}, wait_ms=20_000)
        handle = await vespera.execute_task(ME, request)
        assert handle.done
        assert (await vespera.get_result(ME, handle.task_id)).result["files"] == 1


async def test_what_was_done_is_there_when_the_directory_is_opened_again(tmp_path: Path) -> None:
    async with Vespera.open(tmp_path / "data") as vespera:
        request = Execute(title="Hello", role="command", inputs={"argv": ["echo", "hello"]}, wait_ms=20_000)
        handle = await vespera.execute_task(ME, request)
    async with Vespera.open(tmp_path / "data") as vespera:
        assert (await vespera.get_status(ME, handle.task_id)).status == "completed"
        assert (await vespera.read_output(ME, handle.task_id)).text == "hello\n"


async def test_a_role_of_your_own_is_a_callable(tmp_path: Path) -> None:
    async def count(context: Any) -> dict[str, int]:
        for done in range(1, context.inputs["to"] + 1):
            context.steps(done, context.inputs["to"], f"counted {done}")
        return {"counted": context.inputs["to"]}

    async with Vespera.open(tmp_path / "data") as vespera:
        vespera.roles.add(Role.from_callable(count, in_loop=True))
        handle = await vespera.execute_task(ME, Execute(title="Count", role="count", inputs={"to": 3}, wait_ms=5000))
        assert (await vespera.get_result(ME, handle.task_id)).result == {"counted": 3}
        messages = [event.message()["message"] async for event in vespera.follow_events(ME, handle.task_id)]
        assert "counted 3" in messages
