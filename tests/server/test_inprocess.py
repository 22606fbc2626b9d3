"""Server and engine in the stdio process: for containers and wherever no daemon is wanted."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemon_place import BRIDGE, WITHIN, Place, call, is_alive, run
from echo_place import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

IN_PROCESS = [*BRIDGE, "--in-process"]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        yield place


def test_it_lists_tools_and_runs_survey_where_the_client_stands(place: Place, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "main.py").write_text("print(1)\n")
    with place.client(IN_PROCESS, cwd=project) as client:
        tools = {tool["name"] for tool in client.call("tools/list")["tools"]}
        assert {"execute_task", "get_task_result"} <= tools
        done = call(client, "execute_task", title="look", role="survey", inputs={}, wait_ms=15_000)
        assert (done["done"], done["status"]) == (True, "completed")
        assert "main.py" in json.dumps(call(client, "get_task_result", task_id=done["task_id"]))
        began = time.monotonic()
        code, _ = client.close()
        assert (code, time.monotonic() - began < 2) == (0, True)
    assert list(place.runtime_dir.iterdir()) == []


def test_a_folder_and_a_variable_that_are_no_utf8_cost_no_call(place: Place, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    odd.mkdir()
    place.environ |= {"LOGNAME": os.fsdecode(b"jos\xe9"), "USER": "jo"}
    with place.client(IN_PROCESS, cwd=odd) as client:
        argv = ["/bin/sh", "-c", "echo ${USER-none} ${LOGNAME-none}"]
        done = call(client, "execute_task", title="t", role="command", inputs={"argv": argv}, wait_ms=15_000)
        assert done["status"] == "completed"
        assert "jo none" in json.dumps(call(client, "get_task_result", task_id=done["task_id"]))


def test_the_end_of_input_ends_the_work_with_it_and_leaves_no_process(place: Place) -> None:
    work = place.work()
    with place.client(IN_PROCESS) as client:
        task_id = run(client, work)["task_id"]
        pids = work.pids()
        began = time.monotonic()
        code, _ = client.close()
        assert (code, time.monotonic() - began < 2) == (0, True)
        assert [pid for pid in pids if is_alive(pid)] == []
    with place.client(IN_PROCESS) as client:
        view = call(client, "get_task_execution_status", task_id=task_id)
        assert view["status"] == "failed"
        assert call(client, "get_task_result", task_id=task_id)["error"]["code"] == "INTERRUPTED"


def test_a_killed_one_leaves_no_process(place: Place) -> None:
    work = place.work()
    with place.client(IN_PROCESS) as client:
        run(client, work)
        pids = work.pids()
        client.process.send_signal(signal.SIGKILL)
        assert eventually(lambda: not any(is_alive(pid) for pid in pids), within=1.0)


def test_it_says_who_owns_the_directory_and_what_to_do(place: Place) -> None:
    daemon = place.start()
    with place.client(IN_PROCESS, greet=False) as client:
        assert client.process.wait(WITHIN) == 1
        code, said = client.close()
    assert code == 1
    (line,) = said.splitlines()
    assert f"{daemon.pid}" in line
    assert "DATA_DIRECTORY_IN_USE" in line
    assert "daemon stop" in line
    assert place.ask("/daemon")["pid"] == daemon.pid
