"""Going back to a checkpoint, of work without steps: real store, engine and processes."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from deadlines import WITHIN
from worker_calls import ME, Defining, Opening, became, claimed, conclude, report, started

from roles.definition import Role
from vespera_exec.app.views import Execute, Handle, InputAnswer
from vespera_exec.errors import (
    AlreadyExecuting,
    CheckpointNotFound,
    Conflict,
    InvalidInput,
    LeaseLost,
    PermissionDenied,
    TaskNotFound,
)
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vespera_exec.app.service import Vespera

READER = Caller(principal="token:eve", over_tcp=True, scopes=frozenset({"read"}))
SOMEBODY = Caller(principal="token:ann", over_tcp=True, scopes=frozenset({"read", "operate"}), sees_only="token:ann")

# Reads five pages, each once the file `page<N>` is there. Notes where it begins, what it has read, and its pid.
_PAGES = """
import json, os, sys, time
place = sys.argv[1]
task = json.load(open(os.environ["VESPERA_TASK_FILE"]))
first = (task["checkpoint"] or {"page": 0})["page"]
open(place + "/pids", "a").write(f"{os.getpid()} ")
open(place + "/began", "a").write(f"{first} ")
out = os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w", buffering=1)
for page in range(first + 1, 6):
    while not os.path.exists(f"{place}/page{page}"):
        time.sleep(0.01)
    open(place + "/read", "a").write(f"{page} ")
    out.write(json.dumps({"done": page, "total": 5, "checkpoint": {"page": page}}) + "\\n")
out.write(json.dumps({"result": {"pages": 5}}) + "\\n")
"""


class Book:
    """The role `pages`, and what has become of its reading."""

    def __init__(self, place: Path) -> None:
        self._place = place
        (place / "roles").mkdir(exist_ok=True)
        (place / "pages.py").write_text(_PAGES)
        argv = json.dumps([sys.executable, str(place / "pages.py"), str(place)])
        (place / "roles" / "pages.yaml").write_text(f"name: pages\nrunner: process\nargv: {argv}\n")

    def open_up_to(self, page: int) -> None:
        for each in range(1, page + 1):
            (self._place / f"page{each}").touch()

    def close_after(self, page: int) -> None:
        for each in range(page + 1, 6):
            (self._place / f"page{each}").unlink(missing_ok=True)

    def said(self, name: str) -> list[int]:
        return [int(each) for each in (self._place / name).read_text().split()]

    def alive(self) -> list[int]:
        return [pid for pid in self.said("pids") if (self._place.parent / f"/proc/{pid}").exists()]

    async def at(self, vespera: Vespera, handle: Handle, page: int) -> None:
        """Returns once the checkpoint of that page is in the log."""
        self.open_up_to(page)
        cursor = handle.cursor
        with anyio.fail_after(WITHIN):
            while True:
                read = await vespera.read_events(ME, handle.task_id, cursor=cursor, wait_ms=25_000)
                if any(event["details"].get("state") == {"page": page} for event in read.events):
                    return
                cursor = read.next_cursor

    async def began(self, times: int) -> None:
        """Returns once it has been called so often."""
        await until(lambda: (self._place / "began").exists() and len(self.said("began")) >= times)


async def until(fact: Callable[[], bool]) -> None:
    with anyio.fail_after(WITHIN):
        while True:
            if fact():
                return
            await anyio.sleep(0.01)


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path)


async def reading(vespera: Vespera, **more: Any) -> Handle:
    return await vespera.execute_task(ME, Execute(title="Read it", role="pages", **more))


async def result(vespera: Vespera, handle: Handle) -> Any:
    with anyio.fail_after(WITHIN):
        while True:
            read = await vespera.read_events(ME, handle.task_id, cursor=handle.cursor, wait_ms=25_000, max_events=1000)
            if read.done:
                return await vespera.get_result(ME, handle.task_id)
            handle = handle.model_copy(update={"cursor": read.next_cursor})


async def told(vespera: Vespera, handle: Handle) -> list[Any]:
    return (await vespera.read_events(ME, handle.session_id, max_events=1000)).events


async def test_work_that_runs_goes_back_in_place_and_is_called_again_from_there(vespera: Vespera, book: Book) -> None:
    handle = await reading(vespera)
    await book.at(vespera, handle, 2)
    marked = await vespera.checkpoints.create(ME, handle.task_id, metadata={"why": "before page three"})
    assert (marked.kind, marked.execution_id, marked.metadata) == (
        "call",
        handle.session_id,
        {"why": "before page three"},
    )
    await book.at(vespera, handle, 4)
    back = await vespera.checkpoints.restore(ME, marked.checkpoint_id)
    assert (back.in_place, back.session_id, back.checkpoint_id) == (True, handle.session_id, marked.checkpoint_id)
    await book.began(2)
    assert len(book.alive()) == 1
    book.open_up_to(5)
    ended = await result(vespera, handle)
    assert (ended.status, ended.session_id, ended.result["result"]) == ("completed", handle.session_id, {"pages": 5})
    assert (book.said("began"), book.said("read")) == ([0, 2], [1, 2, 3, 4, 3, 4, 5])
    events = await told(vespera, handle)
    statuses = [event["status"]["new"] for event in events if event["type"] == "status_change"]
    assert statuses[statuses.index("recovering") + 1] == "preparing"
    reached = [event["progress"]["percentage"] for event in events if event["progress"]]
    fell = [(before, after) for before, after in pairwise(reached) if after < before]
    assert fell == [(78.0, 54.0)]  # 4 of 5 pages and 2 of 5 pages, each from 30 to 90
    metrics = await vespera.get_metrics(ME, handle.task_id)
    assert (metrics.retry_count, metrics.total_executions) == (0, 1)


async def test_without_a_checkpoint_of_its_own_there_it_begins_anew(vespera: Vespera, book: Book) -> None:
    handle = await reading(vespera)
    await became(vespera, handle, "running")
    await book.began(1)
    marked = await vespera.checkpoints.create(ME, handle.task_id)
    await book.at(vespera, handle, 1)
    await vespera.checkpoints.restore(ME, any_id=handle.task_id)
    await book.began(2)
    book.open_up_to(5)
    assert (await result(vespera, handle)).status == "completed"
    assert book.said("began") == [0, 0]
    assert (await vespera.checkpoints.get(ME, marked.checkpoint_id)).state["task_states"][handle.task_id][
        "checkpoint"
    ] is None


async def test_checkpoints_are_listed_the_newest_first_each_with_the_state_of_its_place(
    vespera: Vespera, book: Book
) -> None:
    handle = await reading(vespera)
    made: list[str] = []
    for page in (1, 2, 3):
        await book.at(vespera, handle, page)
        made.append((await vespera.checkpoints.create(ME, handle.session_id)).checkpoint_id)
    first = await vespera.checkpoints.list(READER, handle.task_id, limit=2)
    assert [each.checkpoint_id for each in first.checkpoints] == made[:0:-1]
    rest = await vespera.checkpoints.list(READER, handle.task_id, limit=2, before=first.next_before)
    assert ([each.checkpoint_id for each in rest.checkpoints], rest.next_before) == (made[:1], None)
    for page, checkpoint in enumerate(made, 1):
        seen = await vespera.checkpoints.get(READER, checkpoint)
        known = await vespera.checkpoints.materialised(READER, checkpoint)
        assert seen.state == known.state.to_dict()
        assert known.state.task_states[handle.task_id]["checkpoint"] == {"page": page}
        assert (known.state.current_task_id, known.execution_id) == (handle.task_id, handle.session_id)
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)


async def test_one_that_has_ended_begins_again_from_there_as_a_new_linked_execution(
    vespera: Vespera, book: Book
) -> None:
    handle = await reading(vespera, timeout_seconds=50)
    await book.at(vespera, handle, 3)
    marked = await vespera.checkpoints.create(ME, handle.task_id)
    await book.at(vespera, handle, 4)
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)
    again = await vespera.checkpoints.restore(ME, marked.checkpoint_id)
    assert (again.in_place, again.task_id) == (False, handle.task_id)
    assert again.session_id != handle.session_id
    with pytest.raises(AlreadyExecuting):
        await vespera.checkpoints.restore(ME, marked.checkpoint_id)
    book.open_up_to(5)
    ended = await result(vespera, handle.model_copy(update={"cursor": again.cursor}))
    assert (ended.status, ended.session_id) == ("completed", again.session_id)
    assert (book.said("began"), book.said("read")) == ([0, 3], [1, 2, 3, 4, 4, 5])
    made = (await told(vespera, handle.model_copy(update={"session_id": again.session_id})))[0]["details"]["session"]
    assert (made["parent"], made["restored_from"]) == (handle.session_id, marked.checkpoint_id)
    old = await vespera.get_status(ME, handle.session_id)
    assert old.status == "cancelled"


async def test_what_was_paused_goes_back_and_stays_paused(vespera: Vespera, book: Book) -> None:
    handle = await reading(vespera)
    await book.at(vespera, handle, 1)
    marked = await vespera.checkpoints.create(ME, handle.task_id)
    await book.at(vespera, handle, 3)
    await vespera.pause(ME, handle.task_id)
    back = await vespera.checkpoints.restore(ME, marked.checkpoint_id)
    assert (back.status, book.said("began"), book.alive()) == ("paused", [0], [])
    book.open_up_to(5)
    await vespera.resume(ME, handle.task_id)
    assert (await result(vespera, handle)).status == "completed"
    assert book.said("began") == [0, 1]


async def test_what_waits_for_an_answer_is_called_again_and_keeps_its_question(vespera: Vespera) -> None:
    seen: list[Any] = []

    async def asks(context: Any) -> str:
        seen.append(context.last_checkpoint)
        context.checkpoint(len(seen))
        return str(context.ask("name", "Whose?").action)

    vespera.roles.add(Role.from_callable(asks, name="asks", in_loop=True, inputs=None))
    handle = await vespera.execute_task(ME, Execute(title="Ask", role="asks"))
    await became(vespera, handle, "paused")
    await vespera.checkpoints.create(ME, handle.task_id)
    await vespera.checkpoints.restore(ME, any_id=handle.task_id)
    await until(lambda: len(seen) == 2)
    await became(vespera, handle, "paused")
    await vespera.answer_input(ME, handle.task_id, {"name": InputAnswer(action="accept")})
    assert (await result(vespera, handle)).status == "completed"
    assert seen == [None, 1, 2]


async def test_a_worker_elsewhere_loses_it_and_the_next_one_goes_on_from_the_checkpoint(
    vespera: Vespera, define: Defining
) -> None:
    define("review", "grace_seconds: 0.1")
    handle = await started(vespera)
    claim = await claimed(vespera)
    await report(vespera, claim, checkpoint={"page": 1})
    marked = await vespera.checkpoints.create(ME, handle.task_id)
    await report(vespera, claim, checkpoint={"page": 2})
    await vespera.checkpoints.restore(ME, marked.checkpoint_id)
    with pytest.raises(LeaseLost):
        await report(vespera, claim, percentage=50)
    other = await claimed(vespera)
    assert (other.session_id, other.checkpoint) == (claim.session_id, {"page": 1})
    await conclude(vespera, other, result="done")
    assert (await became(vespera, handle, "completed")).session_id == handle.session_id


async def test_a_cancel_that_comes_while_it_goes_back_wins(vespera: Vespera) -> None:
    told_to_stop = anyio.Event()
    refused: list[Conflict] = []

    async def lingers(context: Any) -> None:
        await until(lambda: context.cancelled)
        told_to_stop.set()
        await anyio.sleep_forever()

    async def go_back() -> None:
        try:
            await vespera.checkpoints.restore(ME, marked.checkpoint_id)
        except Conflict as conflict:
            refused.append(conflict)

    vespera.roles.add(Role.from_callable(lingers, name="lingers", in_loop=True, inputs=None, grace_seconds=0.5))
    handle = await vespera.execute_task(ME, Execute(title="Linger", role="lingers"))
    await became(vespera, handle, "running")
    marked = await vespera.checkpoints.create(ME, handle.task_id)
    async with anyio.create_task_group() as group:
        group.start_soon(go_back)
        await told_to_stop.wait()
        await vespera.cancel(ME, handle.task_id, wait_ms=25_000)
    end = next(each for each in await told(vespera, handle) if each["status"]["new"] == "cancelled")
    assert end["details"]["outcome"]["rung"] == "scope"
    assert "asked for meanwhile" in str(refused[0])


async def test_going_back_counts_as_a_recovery_and_is_refused_when_they_are_used_up(vespera: Vespera) -> None:
    calls: list[Any] = []

    async def waits(context: Any) -> None:
        calls.append(context.last_checkpoint)
        context.checkpoint(len(calls))
        await anyio.sleep_forever()

    vespera.roles.add(Role.from_callable(waits, name="waits", in_loop=True, inputs=None, grace_seconds=0.1))
    handle = await vespera.execute_task(ME, Execute(title="Wait", role="waits"))
    await became(vespera, handle, "running")
    marked = await vespera.checkpoints.create(ME, handle.task_id)
    for times in (2, 3, 4):
        await vespera.checkpoints.restore(ME, marked.checkpoint_id)
        await until(lambda: len(calls) == times)  # noqa: B023 - it is called before the next turn
    with pytest.raises(Conflict, match="3 recoveries"):
        await vespera.checkpoints.restore(ME, marked.checkpoint_id)
    assert (await vespera.get_status(ME, handle.task_id)).status == "running"
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)
    assert calls == [None, 1, 1, 1]


async def test_what_does_not_run_has_no_checkpoint_to_be_made(opening: Opening, book: Book) -> None:
    async with opening(max_concurrent=1) as vespera:
        handle = await reading(vespera)
        queued = await reading(vespera)
        with pytest.raises(Conflict, match="has begun"):
            await vespera.checkpoints.create(ME, queued.task_id)
        await vespera.cancel(ME, queued.task_id)
        book.open_up_to(5)
        await result(vespera, handle)
        for ended, why in ((handle, "completed"), (queued, "cancelled")):
            with pytest.raises(Conflict, match=f"has ended \\({why}\\)"):
                await vespera.checkpoints.create(ME, ended.task_id)
        with pytest.raises(TaskNotFound):
            await vespera.checkpoints.create(ME, "nothing-of-that-name")
        with pytest.raises(CheckpointNotFound):
            await vespera.checkpoints.restore(ME, any_id=handle.task_id)


@pytest.mark.parametrize("metadata", [{"large": "x" * 20_000}, {"strange": object()}, {"step": "mine"}])
async def test_metadata_is_small_json_without_our_own_words(
    vespera: Vespera, book: Book, metadata: dict[str, Any]
) -> None:
    handle = await reading(vespera)
    await became(vespera, handle, "running")
    with pytest.raises(InvalidInput):
        await vespera.checkpoints.create(ME, handle.task_id, metadata=metadata)
    assert (await vespera.checkpoints.list(ME, handle.task_id)).checkpoints == []
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)


async def test_others_do_not_see_it_and_readers_change_nothing(vespera: Vespera, book: Book) -> None:
    handle = await reading(vespera)
    await became(vespera, handle, "running")
    marked = await vespera.checkpoints.create(ME, handle.task_id)
    for refused in (
        vespera.checkpoints.get(SOMEBODY, marked.checkpoint_id),
        vespera.checkpoints.restore(SOMEBODY, marked.checkpoint_id),
        vespera.checkpoints.restore(ME, "unknown"),
    ):
        with pytest.raises(CheckpointNotFound):
            await refused
    with pytest.raises(TaskNotFound):
        await vespera.checkpoints.list(SOMEBODY, handle.task_id)
    with pytest.raises(PermissionDenied):
        await vespera.checkpoints.create(READER, handle.task_id)
    with pytest.raises(PermissionDenied):
        await vespera.checkpoints.restore(READER, marked.checkpoint_id)
    with pytest.raises(InvalidInput):
        await vespera.checkpoints.restore(ME)
    await vespera.cancel(ME, handle.task_id, wait_ms=25_000)
