"""Server and engine in the stdio process: for containers and wherever no daemon is wanted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemon_place import BRIDGE, GONE_WITHIN, Place, call, is_alive, run
from deadlines import WITHIN
from echo_place import HELLO, Client, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

IN_PROCESS = [*BRIDGE, "--in-process"]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        yield place


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a server of this module, for requests that change nothing."""
    with Place(tmp_path_factory.mktemp("shared")) as place, place.client(IN_PROCESS) as client:
        yield client


def test_it_lists_tools_and_runs_survey_where_the_client_stands(place: Place, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "main.py").write_text("print(1)\n")
    with place.client(IN_PROCESS, cwd=project) as client:
        tools = {tool["name"] for tool in client.call("tools/list")["tools"]}
        assert {"execute_task", "get_task_result"} <= tools
        done = call(client, "execute_task", title="look", role="survey", inputs={}, wait_ms=25_000)
        assert (done["done"], done["status"]) == (True, "completed")
        assert "main.py" in json.dumps(call(client, "get_task_result", task_id=done["task_id"]))
        assert client.close()[0] == 0
    assert list(place.runtime_dir.iterdir()) == []


def test_a_folder_and_a_variable_that_are_no_utf8_cost_no_call(place: Place, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    odd.mkdir()
    place.environ |= {"LOGNAME": os.fsdecode(b"jos\xe9"), "USER": "jo"}
    with place.client(IN_PROCESS, cwd=odd) as client:
        argv = ["/bin/sh", "-c", "echo ${USER-none} ${LOGNAME-none}"]
        done = call(client, "execute_task", title="t", role="command", inputs={"argv": argv}, wait_ms=25_000)
        assert done["status"] == "completed"
        assert "jo none" in json.dumps(call(client, "get_task_result", task_id=done["task_id"]))


def test_garbage_is_answered_as_on_a_socket_and_the_session_goes_on(shared: Client) -> None:
    deep = b"[" * 20_000 + b"]" * 20_000
    garbage: list[tuple[bytes, int, int | str | None]] = [
        (b"{not json", -32700, None),
        (b"\xff\xfe", -32700, None),
        (b"\0", -32700, None),
        (b'{"jsonrpc":"2.0","id":5,"method":"x","params":{"a":' + deep + b"}}", -32700, 5),
        (b'{"method":"x","params":{"a":"\\ud83d"},"jsonrpc":"2.0","id":"7a"}', -32700, "7a"),
        (b"[]", -32600, None),
        (b'{"jsonrpc":"2.0","id":5,"method":"x","params":[1]}', -32600, 5),
        (b'"' + b"x" * (5 * 1024 * 1024) + b'"', -32600, None),
        (b'{"jsonrpc":"2.0","id":6,"method":"x","params":{"a":[' + b"0," * 1_000_000 + b"0]}}", -32600, 6),
    ]
    for line, code, number in garbage:
        shared.write(line + b"\n")
        answer = shared.read()
        assert (answer["id"], answer["error"]["code"]) == (number, code), line[:100]
    assert shared.call("ping") == {}


def test_a_line_of_almost_four_mebibytes_is_read(shared: Client) -> None:
    frame = b'{"jsonrpc":"2.0","id":"long","method":"ping","params":{"_":"%s"}}\n'
    shared.write(frame % (b"," * (4 * 1024 * 1024 - len(frame))))
    assert shared.read() == {"jsonrpc": "2.0", "id": "long", "result": {}}


@pytest.mark.parametrize("over", ["pipe", "socketpair"])
def test_a_client_that_reads_late_gets_every_answer(place: Place, over: str) -> None:
    with Client(IN_PROCESS, place.environ, over=over, cwd=place.folder) as client:
        client.send(HELLO)
        assert client.read()["id"] == 0
        client.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        numbers = [client.request("tools/list") for _ in range(100)]  # about a megabyte of answers
        assert sorted(client.read()["id"] for _ in numbers) == numbers
        assert client.close() == (0, "")


def test_what_is_printed_by_accident_cannot_come_between_the_answers(shared: Client) -> None:
    streams = Path(f"/proc/{shared.process.pid}/fd")
    assert (streams / "0").readlink() == Path(os.devnull)
    assert (streams / "1").readlink() == (streams / "2").readlink()


def test_input_from_a_file_ends_in_order(place: Place) -> None:
    (place.folder / "requests").write_bytes(json.dumps(HELLO).encode())
    with open(place.folder / "requests", "rb") as requests, open(place.folder / "answers", "wb") as answers:
        done = subprocess.run(
            IN_PROCESS, env=place.environ, cwd=place.folder, stdin=requests, stdout=answers, timeout=WITHIN, check=False
        )
    assert done.returncode == 0
    answer = json.loads((place.folder / "answers").read_bytes())
    assert answer["id"] == HELLO["id"]


def test_closed_streams_are_named(place: Place) -> None:
    argv = ["/bin/sh", "-c", 'exec "$@" <&- >&-', "sh", *IN_PROCESS]
    done = subprocess.run(argv, env=place.environ, cwd=place.folder, capture_output=True, timeout=WITHIN, check=False)
    assert done.returncode == 1
    assert b"stdin or stdout is closed (INVALID_INPUT)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (b'"inputs":{"path":"a\\u0000b"}', "NUL"),
        (b'"inputs":{"a\\u0000b":1}', "NUL"),
        (b'"inputs":{"max_files":NaN}', "not finite"),
        (b'"inputs":{"max_files":-Infinity}', "not finite"),
        (b'"timeout_seconds":1e999', "not finite"),
        (b'"inputs":"{\\"path\\":\\"a\\\\u0000b\\"}"', "NUL"),
        (b'"inputs":"{\\"path\\":\\"\\\\ud800\\"}"', "surrogate"),
        (b'"inputs":"{\\"max_files\\":NaN}"', "not finite"),
        (b'"inputs":"{\\"path\\":[' + b"0," * 60_000 + b'0]}"', "more than 50000 values"),
    ],
)
def test_arguments_that_json_should_not_hold_are_refused(shared: Client, arguments: bytes, complaint: str) -> None:
    frame = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"execute_task","arguments":%s}}\n'
    shared.write(frame % (b'{"title":"t","role":"survey",' + arguments + b"}"))
    result = shared.read()["result"]
    assert result["isError"]
    assert result["structuredContent"]["error_code"] == "INVALID_INPUT"
    assert complaint in result["structuredContent"]["error"]
    frame = b'{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"list_tasks","arguments":{}}}\n'
    shared.write(frame)
    assert shared.read()["result"]["structuredContent"]["total"] == 0


def test_the_end_of_input_ends_the_work_with_it_and_leaves_no_process(place: Place) -> None:
    work = place.work()
    with place.client(IN_PROCESS) as client:
        task_id = run(client, work)["task_id"]
        pids = work.pids()
        assert client.close()[0] == 0
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
        assert eventually(lambda: not any(is_alive(pid) for pid in pids), within=GONE_WITHIN)


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
