"""Many clients of one data directory at once: one daemon, no error, quick answers, also over its death."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from daemon_place import Place, call
from deadlines import WITHIN
from echo_place import HELLO, eventually

from vespera_exec.cli.client import Daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BRIDGES, COMMANDS = 4, 4
LEAST = 20
"""Writes of each client."""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        yield place


@dataclass
class Acks:
    """How long each write took until it was acknowledged, in seconds, and the tasks that it made."""

    seconds: list[float] = field(default_factory=list[float])
    made: set[str] = field(default_factory=set[str])

    def write(self, create: Callable[[str], dict[str, Any]], until: float) -> None:
        while (began := time.monotonic()) < until or len(self.seconds) < LEAST:
            self.made.add(create(f"task {began}")["task_id"])
            self.seconds.append(time.monotonic() - began)


@pytest.mark.promise("many_clients")
@pytest.mark.parametrize(
    ("seconds", "p99_seconds"), [(0.0, WITHIN), pytest.param(30.0, 0.25, marks=pytest.mark.full)], ids=["brief", "30 s"]
)
def test_four_bridges_and_four_commands_on_a_fresh_directory_share_one_daemon(
    place: Place, seconds: float, p99_seconds: float
) -> None:
    acks = [Acks() for _ in range(BRIDGES + COMMANDS)]

    def bridge(mine: Acks) -> tuple[int, str]:
        with place.client() as client:
            mine.write(lambda title: call(client, "create_task", title=title), time.monotonic() + seconds)
            return client.close()

    def command(mine: Acks) -> tuple[int, str]:
        with Daemon(place.data_dir, environ=place.environ, cwd="/") as daemon:
            daemon.get("/tasks")  # starts it
            mine.write(lambda title: daemon.post("/tasks", {"title": title}).body, time.monotonic() + seconds)
        return 0, ""

    with ThreadPoolExecutor(BRIDGES + COMMANDS) as pool:
        ends = [pool.submit(bridge if number < BRIDGES else command, mine) for number, mine in enumerate(acks)]
        assert [end.result() for end in ends] == [(0, "")] * len(acks)
    assert len(place.served_by()) == 1
    took = sorted(each for mine in acks for each in mine.seconds)
    assert took[int(len(took) * 0.99)] < p99_seconds
    made: set[str] = set[str]().union(*(mine.made for mine in acks))
    assert len(made) == len(took)
    assert place.ask("/tasks", limit=1)["total"] == len(made)


@pytest.mark.promise("many_clients")
@pytest.mark.parametrize("within", [WITHIN, pytest.param(2.0, marks=pytest.mark.full)], ids=["at all", "2 s"])
def test_four_bridges_outlive_a_killed_daemon_with_all_tasks_there(place: Place, within: float) -> None:
    clients = [place.client(greet=False) for _ in range(BRIDGES)]
    try:
        for client in clients:
            client.send(HELLO)
            assert client.read()["id"] == 0
        tasks = [
            call(client, "execute_task", title="work", role="command", inputs={"argv": ["sleep", "60"]})["task_id"]
            for client in clients
        ]
        (first,) = place.served_by()
        asked = [
            client.request("tools/call", name="stream_task_execution_events", arguments=waiting(task_id))
            for client, task_id in zip(clients, tasks, strict=True)
        ]
        assert eventually(lambda: place.ask("/daemon")["connections"] > BRIDGES)
        killed = time.monotonic()
        os.kill(first, signal.SIGKILL)
        for client, number in zip(clients, asked, strict=True):
            answer = client.read()
            assert (answer["id"], answer["error"]["data"]["retriable"]) == (number, True)
        for client in clients:
            assert {each["task_id"] for each in call(client, "list_tasks")["tasks"]} == set(tasks)
        assert time.monotonic() - killed < within
        assert len(place.served_by()) == 2
    finally:
        for client in clients:
            client.__exit__()


def waiting(task_id: str) -> dict[str, Any]:
    """Asks for events that will not come."""
    return {"task_id": task_id, "cursor": 1_000_000, "wait_ms": 25_000}
