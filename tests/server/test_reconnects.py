"""Whoever follows a run and loses the connection, again and again, hears everything once: at every door."""

from __future__ import annotations

import itertools
import json
import random
import socket
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse, IncompleteRead
from typing import TYPE_CHECKING, Any

import pytest
from asking_roles import write_asking_role
from daemon_place import Place
from deadlines import WITHIN
from echo_place import HELLO, eventually

from vespera_exec import paths
from vespera_exec.cli.client import UnixConnection
from vespera_exec.server.greeting import preamble
from vespera_exec.server.launch import accepts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Event = dict[str, Any]
Door = Callable[[Place, str, int, random.Random], Generator[Event]]
"""The events after a cursor, until the run is done or the connection is lost. After the last, `DONE`."""

DONE: Event = {}
LOST = (OSError, HTTPException)
NOBODY_THERE = (FileNotFoundError, ConnectionRefusedError)
GREETED = {"jsonrpc": "2.0", "method": "notifications/initialized"}

# A report with a checkpoint each, some milliseconds apart; goes on from the last. In the middle it waits for the kill.
_WORK = """
import json, os, sys, time
task = json.load(open(os.environ["VESPERA_TASK_FILE"]))
first = (task["checkpoint"] or {"page": 0})["page"]
total = int(sys.argv[1])
out = os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w", buffering=1)
for page in range(first + 1, total + 1):
    out.write(json.dumps({"done": page, "total": total, "checkpoint": {"page": page}}) + "\\n")
    time.sleep(0.005)
    while page == total // 2 and not os.path.exists(sys.argv[2]):
        time.sleep(0.005)
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        place.set(progress_interval_ms=0)
        yield place


def sse(place: Place, task_id: str, cursor: int, chance: random.Random) -> Generator[Event]:
    """The event stream of REST, resumed by `Last-Event-ID` or by the cursor in its address."""
    path, headers = f"/tasks/{task_id}/events", {"Accept": "text/event-stream"}
    if chance.random() < 0.5:
        headers["Last-Event-ID"] = str(cursor)
    else:
        path += f"?cursor={cursor}"
    with closing(http_socket(place)) as http:
        http.request("GET", path, headers=headers)
        kind = ""
        for line in lines_of(http.getresponse()):
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield DONE if kind == "done" else json.loads(line.removeprefix("data: "))


def long_poll(place: Place, task_id: str, cursor: int, chance: random.Random) -> Generator[Event]:
    """Pages over REST; now and then it hangs up before the answer."""
    with closing(http_socket(place)) as http:
        while True:
            http.request("GET", f"/tasks/{task_id}/events?cursor={cursor}&wait_ms=5000&max_events={few(chance)}")
            if chance.random() < 0.1:
                return
            page = json.loads(http.getresponse().read())
            yield from page["events"]
            if page["done"]:
                yield DONE
            cursor = page["next_cursor"]


def mcp_socket(place: Place, task_id: str, cursor: int, chance: random.Random) -> Generator[Event]:
    """The tool of MCP on the unix socket, as the bridge speaks to it."""
    path, _ = paths.socket_paths(place.data_dir, place.environ)
    with socket.socket(socket.AF_UNIX) as raw, raw.makefile("rwb") as lines:
        raw.settimeout(WITHIN)
        raw.connect(str(path))
        lines.write(preamble("/", {}, client="test"))
        for message in (HELLO, GREETED):
            lines.write(json.dumps(message).encode() + b"\n")
        lines.flush()
        assert json.loads(read_line(lines))["vespera"] == 1
        assert json.loads(read_line(lines))["id"] == 0
        for number in itertools.count(1):
            lines.write(json.dumps(asked(number, task_id, cursor, chance)).encode() + b"\n")
            lines.flush()
            page = json.loads(read_line(lines))["result"]["structuredContent"]
            yield from page["events"]
            if page["done"]:
                yield DONE
            cursor = page["next_cursor"]


def mcp_http(place: Place, task_id: str, cursor: int, chance: random.Random) -> Generator[Event]:
    """The same tool over streamable HTTP, in a session of its own."""
    with closing(http_socket(place)) as local:
        local.request("GET", "/daemon")
        address = json.loads(local.getresponse().read())["url"].removeprefix("http://")
    headers = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
    headers["Authorization"] = f"Bearer {(place.data_dir / 'token').read_text().strip()}"
    with closing(HTTPConnection(address, timeout=WITHIN)) as http:

        def posted(message: dict[str, Any]) -> tuple[HTTPResponse, list[str]]:
            http.request("POST", "/mcp", json.dumps(message), headers)
            answer = http.getresponse()
            lines = answer.read().decode().splitlines()
            return answer, [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]

        begun, _ = posted(HELLO)
        headers["Mcp-Session-Id"] = begun.headers["mcp-session-id"]
        posted(GREETED)
        for number in itertools.count(1):
            _, said = posted(asked(number, task_id, cursor, chance))
            page = json.loads(said[-1])["result"]["structuredContent"]
            yield from page["events"]
            if page["done"]:
                yield DONE
            cursor = page["next_cursor"]


def http_socket(place: Place) -> UnixConnection:
    _, path = paths.socket_paths(place.data_dir, place.environ)
    return UnixConnection(path)


def lines_of(answer: HTTPResponse) -> Iterator[str]:
    """
    Raises:
        HTTPException, OSError: it was cut off.
    """
    assert answer.status == 200
    while line := answer.readline():
        yield line.decode().rstrip("\n")
    if not answer.isclosed():
        raise IncompleteRead(b"")


def few(chance: random.Random) -> int:
    return chance.randint(1, 12)


def asked(number: int, task_id: str, cursor: int, chance: random.Random) -> dict[str, Any]:
    arguments = {"task_id": task_id, "cursor": cursor, "wait_ms": 5000, "max_events": few(chance)}
    called = {"name": "stream_task_execution_events", "arguments": arguments}
    return {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": called}


def read_line(lines: Any) -> bytes:
    """
    Raises:
        ConnectionResetError: it ended instead.
    """
    line = lines.readline()
    if not line.endswith(b"\n"):
        raise ConnectionResetError("the daemon is gone")
    return line


def started(place: Place, pages: int) -> str:
    """The id of the task that a quick reporter works on."""
    folder = place.folder / "roles-dir"
    folder.mkdir()
    (folder / "work.py").write_text(_WORK)
    argv = json.dumps([sys.executable, "-S", str(folder / "work.py"), str(pages), str(place.folder / "killed")])
    (folder / "reporter.yaml").write_text(f"name: reporter\nrunner: process\nargv: {argv}\non_interrupt: resume\n")
    place.start()
    with place.http() as http:
        return (
            http.post("/executions", json={"title": "Count", "role": "reporter"}).raise_for_status().json()["task_id"]
        )


def followed(
    place: Place, door: Door, task_id: str, *, killed_at: Callable[[Event], bool], succeeded: Callable[[], object]
) -> tuple[list[Event], int]:
    """What was heard up to the end, and how often a connection was lost or left on the way.

    The daemon is killed when an event `killed_at` has been heard, and `succeeded` in a thread while the follower tries.
    """
    chance, events, lost = random.Random(11), list[Event](), 0
    serving, _ = paths.socket_paths(place.data_dir, place.environ)
    successor = threading.Thread(target=succeeded)
    while True:
        left = chance.randint(1, 6)
        try:
            with closing(door(place, task_id, events[-1]["cursor"] if events else 0, chance)) as heard:
                for event in heard:
                    if event is DONE:
                        successor.join()
                        return events, lost
                    assert not events or event["cursor"] > events[-1]["cursor"]
                    events.append(event)
                    if killed_at(event) and successor.ident is None:
                        place.started[0].kill()
                        place.started[0].wait()
                        (place.folder / "killed").touch()
                        successor.start()
                    left -= 1
                    if not left:
                        break
        except NOBODY_THERE:
            assert eventually(lambda: accepts(serving))
            continue
        except LOST:
            pass
        lost += 1


def page_of(event: Event) -> int | None:
    return event["details"]["state"]["page"] if event["type"] == "checkpoint_created" else None


def written(place: Place, task_id: str) -> list[Event]:
    """The whole log of the task."""
    events, page = list[Event](), {"done": False, "next_cursor": 0}
    while not page["done"]:
        page = place.ask(f"/tasks/{task_id}/events", cursor=page["next_cursor"], max_events=1000)
        events += page["events"]
    return events


@pytest.mark.promise("reconnect")
@pytest.mark.parametrize(
    ("pages", "disconnects"),
    [(80, 30), pytest.param(1100, 500, marks=(pytest.mark.full, pytest.mark.timeout(300)))],
    ids=["30", "500"],
)
@pytest.mark.parametrize(
    "door",
    [sse, pytest.param(long_poll, marks=pytest.mark.full), pytest.param(mcp_socket, marks=pytest.mark.full), mcp_http],
)
def test_a_follower_cut_off_at_random_hears_everything_once_over_a_killed_daemon_too(
    place: Place, door: Door, pages: int, disconnects: int
) -> None:
    task_id = started(place, pages)
    heard, lost = followed(
        place, door, task_id, killed_at=lambda event: page_of(event) == pages // 2, succeeded=place.start
    )
    assert heard == written(place, task_id)
    assert lost >= disconnects
    types = [event["type"] for event in heard]
    assert "recovery_initiated" in types
    assert "execution_completed" in types
    assert {page_of(event) for event in heard} >= set(range(1, pages + 1))
    assert place.ask("/daemon")["pid"] == place.started[1].pid


@pytest.mark.promise("reconnect")
@pytest.mark.parametrize(
    "door",
    [sse, pytest.param(long_poll, marks=pytest.mark.full), pytest.param(mcp_socket, marks=pytest.mark.full), mcp_http],
)
def test_a_follower_of_a_run_that_asks_hears_question_and_answer_once_over_a_killed_daemon_too(
    place: Place, door: Door
) -> None:
    starts = place.folder / "starts"
    write_asking_role(place.folder / "roles-dir", starts)
    place.start()
    with place.http() as http:
        task_id = http.post("/executions", json={"title": "It asks", "role": "asker"}).json()["task_id"]

    def answered() -> None:
        place.start()
        with place.http() as http:
            given = http.post(f"/tasks/{task_id}/inputs", json={"content": {"target": "staging"}})
            assert given.json()["accepted"] == ["where"]

    heard, lost = followed(
        place, door, task_id, killed_at=lambda event: event["type"] == "execution_paused", succeeded=answered
    )
    assert heard == written(place, task_id)
    assert lost
    types = [event["type"] for event in heard]
    story = ["approval_requested", "execution_paused", "owner_changed", "approval_approved", "execution_completed"]
    assert [each for each in types if each in story] == story
    assert starts.read_text().split() == ["started", "started"]
