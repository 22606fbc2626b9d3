"""One daemon behind every door: found, shared, ended, killed and replaced, with the work never out of sight."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from daemon_place import GONE_WITHIN, STOPS_WITHIN, Place, call, ends, is_alive, run
from deadlines import WITHIN
from echo_place import eventually
from mcp import Client
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

from vespera_exec.store.lock import OwnerLock

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        yield place


def status(place: Place, task_id: str) -> dict[str, Any]:
    return place.ask(f"/tasks/{task_id}")


def url_of(place: Place) -> str:
    url = place.ask("/daemon")["url"]
    assert isinstance(url, str)
    return url


def bearer(place: Place) -> dict[str, str]:
    return {"Authorization": f"Bearer {(place.data_dir / 'token').read_text().strip()}"}


def refusal(daemon: subprocess.Popen[str], *, code: int = 1) -> str:
    """The last and only line it said besides its log, of one that exits with `code`."""
    _, said = daemon.communicate(timeout=WITHIN)
    assert daemon.returncode == code
    *log, line = said.splitlines()
    assert all(json.loads(each)["level"] != "error" for each in log)
    return line


# finding one


def test_two_bridges_at_once_start_one_daemon_and_share_it(place: Place) -> None:
    with place.client(greet=False) as one, place.client(greet=False) as two:
        hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "0"}}
        numbers = [client.request("initialize", **hello) for client in (one, two)]
        assert [one.read()["id"], two.read()["id"]] == numbers
        (pid,) = place.served_by()
        daemon = place.ask("/daemon")
        assert daemon["pid"] == pid
        assert daemon["connections"] >= 2
        tools = {tool["name"] for tool in one.call("tools/list")["tools"]}
        assert {"execute_task", "get_task_execution_status", "cancel_task_execution"} <= tools
        assert one.close() == (0, "")
        assert call(two, "list_roles")["roles"]


def test_a_second_daemon_names_the_owner_and_leaves_it_alone(place: Place) -> None:
    first = place.start()
    line = refusal(place.spawn(), code=os.EX_TEMPFAIL)  # it may be worth another try
    assert f"{first.pid}" in line
    assert "DATA_DIRECTORY_IN_USE" in line
    assert place.ask("/daemon")["pid"] == first.pid


def test_what_a_dead_daemon_left_behind_is_no_obstacle(place: Place) -> None:
    first = place.start()
    first.kill()
    first.wait(WITHIN)
    assert {"owner.lock", "vespera.db"} <= {each.name for each in place.data_dir.iterdir()}
    assert len(list(place.runtime_dir.glob("*.sock"))) == 2
    second = place.start()
    assert place.ask("/daemon")["pid"] == second.pid


def test_a_folder_with_packages_of_the_same_names_is_neither_imported_nor_an_obstacle(
    place: Place, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    (project / "roles").mkdir(parents=True)
    for name in ("roles/__init__.py", "json.py", "anyio.py", "vespera_exec.py"):
        (project / name).write_text("raise SystemExit('imported by accident')\n")
    with place.client(cwd=project) as client:
        done = call(client, "execute_task", title="look", role="survey", inputs={"path": "."}, wait_ms=25_000)
        assert (done["done"], done["status"]) == (True, "completed")
        result = call(client, "get_task_result", task_id=done["task_id"])
        assert "json.py" in json.dumps(result)


# sharing one


def test_four_clients_see_the_same_task_and_the_same_live_events(place: Place) -> None:
    work = place.work()
    with place.client() as starter, place.client() as watcher, place.client() as other, place.http() as http:
        task_id = run(starter, work)["task_id"]
        work.pids()
        asked = {"task_id": task_id, "cursor": 0, "wait_ms": 25_000, "follow": True}
        for client in (watcher, other):
            client.request("tools/call", name="stream_task_execution_events", arguments=asked)
        with http.stream("GET", f"/tasks/{task_id}/events", headers={"Accept": "text/event-stream"}) as stream:
            work.let_go()
            lines = [line for line in stream.iter_lines() if line.startswith("id: ")]
        streamed = [int(line.removeprefix("id: ")) for line in lines]
        pages = [client.read()["result"]["structuredContent"] for client in (watcher, other)]
        assert [page["done"] for page in pages] == [True, True]
        cursors = [[event["cursor"] for event in page["events"]] for page in pages]
        assert cursors[0] == cursors[1] == streamed == sorted(set(streamed))
        assert call(starter, "get_task_execution_status", task_id=task_id)["status"] == "completed"


def test_the_work_goes_on_when_its_starter_leaves(place: Place) -> None:
    work = place.work()
    with place.client() as starter:
        task_id = run(starter, work)["task_id"]
        work.pids()
        assert starter.close() == (0, "")
    assert status(place, task_id)["status"] == "running"
    work.let_go()
    assert eventually(lambda: status(place, task_id)["status"] == "completed")


# ending one


def test_sigterm_ends_streams_and_work_within_five_seconds(place: Place) -> None:
    daemon = place.start()
    work = place.work()
    with place.client() as client, place.http() as http, httpx.Client(timeout=WITHIN, trust_env=False) as remote:
        task_id = run(client, work)["task_id"]
        pids = work.pids()
        head = place.ask("/daemon")["head"]
        url = url_of(place)
        asked = {"task_id": task_id, "cursor": head, "wait_ms": 25_000}
        number = client.request("tools/call", name="stream_task_execution_events", arguments=asked)
        events = f"/tasks/{task_id}/events"
        sse = {"Accept": "text/event-stream"}
        with (
            http.stream("GET", events, headers=sse) as local,
            remote.stream("GET", url + events, headers=sse | bearer(place)) as over_tcp,
            remote.stream("GET", f"{url}/sse", headers=bearer(place)) as mcp_sse,
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as poll,
        ):
            assert [stream.status_code for stream in (local, over_tcp, mcp_sse)] == [200, 200, 200]
            token = bearer(place)["Authorization"]
            host = url.removeprefix("http://")
            target = f"{events}?cursor={head}&wait_ms=25000"
            poll.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nAuthorization: {token}\r\n\r\n".encode())
            assert eventually(lambda: place.ask("/daemon")["connections"] >= 5)
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(STOPS_WITHIN) == 0
        assert [pid for pid in pids if is_alive(pid)] == []
        answer = client.read()
        assert (answer["id"], answer["error"]["data"]["retriable"]) == (number, True)
    assert list(place.runtime_dir.glob("*.sock")) == []


def test_an_idle_daemon_goes_and_a_busy_or_connected_one_stays(place: Place) -> None:
    place.set(idle_exit_seconds=1.0)
    work = place.work()
    with place.client() as client:
        pid = place.ask("/daemon")["pid"]
        task_id = run(client, work)["task_id"]
        work.pids()
        assert client.close() == (0, "")
    assert not ends(pid, within=1.5)  # its work runs
    with place.client() as client:
        work.let_go()
        asked = {"task_id": task_id, "wait_ms": 25_000, "follow": True}
        assert call(client, "stream_task_execution_events", **asked)["done"]
        assert not ends(pid, within=1.5)  # somebody is connected
    assert ends(pid, within=WITHIN)
    assert place.log()[-1]["event"] == "stopped"
    assert list(place.runtime_dir.glob("*.sock")) == []


def test_a_daemon_whose_database_was_removed_goes_and_the_next_client_starts_afresh(place: Place) -> None:
    place.set(idle_exit_seconds=0)
    daemon = place.start()
    work = place.work()
    with place.client() as client:
        lost = run(client, work)["task_id"]
        pids = work.pids()
        for left in place.data_dir.iterdir():  # git clean -fdx
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        place.data_dir.rmdir()
        _, said = daemon.communicate(timeout=WITHIN)
        assert daemon.returncode == 1
        assert "vespera.db was removed" in said
        assert "STORE_UNAVAILABLE" in said.splitlines()[-1]
        assert "Traceback" not in said
        assert eventually(lambda: not any(is_alive(pid) for pid in pids), within=GONE_WITHIN)
        assert list(place.runtime_dir.glob("*.sock")) == []

        kept = call(client, "execute_task", title="on", role="command", inputs={"argv": ["true"]}, wait_ms=25_000)
        assert kept["status"] == "completed"
        assert [task["task_id"] for task in place.ask("/tasks")["tasks"]] == [kept["task_id"]]
        assert lost != kept["task_id"]
        assert place.served_by() != [daemon.pid]


# killing one


def test_after_a_kill_no_process_is_left_and_the_next_daemon_settles_everything(place: Place) -> None:
    place.set(max_concurrent=1)
    running, queued = place.work("running"), place.work("queued")
    queued.let_go()
    with place.client() as client:
        finished = call(
            client, "execute_task", title="one", role="command", inputs={"argv": ["/bin/echo", "kept"]}, wait_ms=25_000
        )
        assert finished["status"] == "completed"
        before = call(client, "get_task_result", task_id=finished["task_id"])
        interrupted = run(client, running)
        pids = running.pids()
        waiting = run(client, queued)
        (first,) = place.served_by()

        os.kill(first, signal.SIGKILL)
        assert eventually(lambda: not any(is_alive(pid) for pid in pids), within=GONE_WITHIN)
        number = client.request(
            "tools/call", name="get_task_execution_status", arguments={"task_id": interrupted["task_id"]}
        )
        answer = client.read()
        if "error" in answer:  # it was sent to the dead one
            assert answer["error"]["data"]["retriable"]
            view = call(client, "get_task_execution_status", task_id=interrupted["task_id"])
        else:
            assert answer["id"] == number
            view = answer["result"]["structuredContent"]
        assert place.served_by()[-1] != first

        assert view["status"] == "failed"
        assert view["session_id"] == interrupted["session_id"]
        error = call(client, "get_task_result", task_id=interrupted["task_id"])["error"]
        assert error["code"] == "INTERRUPTED"
        assert f"daemon:{first}:" in error["message"]
        assert call(client, "get_task_result", task_id=finished["task_id"]) == before
        asked = {"task_id": waiting["task_id"], "wait_ms": 25_000, "follow": True}
        page = call(client, "stream_task_execution_events", **asked)
        assert (page["done"], page["status"]) == (True, "completed")
        after = status(place, waiting["task_id"])
        assert after["session_id"] == waiting["session_id"]


# what stands in its way


def test_a_taken_port_is_reported_and_stops_nothing(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        place.set(tcp_port=port)
        with place.client() as client:
            assert call(client, "list_roles")["roles"]
            view = place.ask("/daemon")
        assert view["url"] is None
        assert str(port) in view["tcp_problem"]
        warnings = [line["event"] for line in place.log() if line["level"] == "warning"]
        assert any(str(port) in warning for warning in warnings)


def newer(data_dir: Path) -> None:
    data_dir.mkdir(mode=0o700)
    database = sqlite3.connect(data_dir / "vespera.db")
    database.execute("PRAGMA user_version = 9999")
    database.commit()
    database.close()


def no_database(data_dir: Path) -> None:
    data_dir.mkdir(mode=0o700)
    (data_dir / "vespera.db").write_bytes(b"These are the notes of a person, not a database.\n" * 200)


def no_folder(data_dir: Path) -> None:
    data_dir.write_text("a file stands here")


def read_only(data_dir: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    data_dir.mkdir(mode=0o500)


OBSTACLES = pytest.mark.parametrize(
    ("obstruct", "code", "says"),
    [
        (newer, "STORE_TOO_NEW", "newer version"),
        (no_database, "STORE_DAMAGED", "no database"),
        (no_folder, "STORE_UNAVAILABLE", "data directory"),
        (read_only, "STORE_UNAVAILABLE", "data directory"),
    ],
)


@OBSTACLES
def test_a_data_directory_that_cannot_be_used_is_refused_in_one_line(
    place: Place, obstruct: Any, code: str, says: str
) -> None:
    obstruct(place.data_dir)
    line = refusal(place.spawn())
    assert line.startswith("vespera-exec: ")
    assert f"({code})" in line
    assert says in line
    assert str(place.data_dir) in line


@OBSTACLES
def test_the_bridge_answers_with_the_daemons_own_reason_and_that_waiting_does_not_help(
    place: Place, obstruct: Any, code: str, says: str
) -> None:
    obstruct(place.data_dir)
    with place.client(greet=False) as client:
        number = client.request("tools/list")
        answer = client.read()
        assert answer["id"] == number
        assert says in answer["error"]["message"]
        assert answer["error"]["data"] == {"error_code": code, "retriable": False}
        ended, said = client.close()
    assert ended == 1
    assert says in said


def test_a_directory_that_another_program_holds_is_worth_another_try(place: Place) -> None:
    with OwnerLock.acquire(place.data_dir, purpose="backup"), place.client(greet=False) as client:
        client.request("tools/list")
        answer = client.read()
    assert answer["error"]["data"] == {"error_code": "DATA_DIRECTORY_IN_USE", "retriable": True}
    assert f"process {os.getpid()} (backup" in answer["error"]["message"]


# over TCP


@pytest.mark.parametrize("transport", ["streamable", "sse"])
async def test_a_token_holder_is_served_over_tcp_as_the_tokens_principal(place: Place, transport: str) -> None:
    place.start()
    url, token = url_of(place), bearer(place)
    async with AsyncExitStack() as stack:
        if transport == "sse":
            target: Any = sse_client(f"{url}/sse", headers=token, timeout=WITHIN)
        else:
            http = await stack.enter_async_context(create_mcp_http_client(headers=token))
            target = streamable_http_client(f"{url}/mcp", http_client=http)
        mode = "legacy" if transport == "sse" else "auto"
        client = await stack.enter_async_context(Client(target, mode=mode, read_timeout_seconds=WITHIN))
        roles = (await client.call_tool("list_roles", {})).structured_content
        assert roles is not None
        allowed = {role["name"]: role["allowed"] for role in roles["roles"]}
        assert allowed["command"] is False
        started = {"title": "no", "role": "command", "inputs": {"argv": ["/bin/true"]}}
        refused = (await client.call_tool("execute_task", started)).structured_content
        assert refused is not None
        assert refused["error_code"] == "PERMISSION_DENIED"
        assert "token:default" in refused["error"]
    assert place.ask("/tasks")["total"] == 0


@pytest.mark.promise("tcp_denies")
def test_nobody_comes_in_over_tcp_without_the_token(place: Place) -> None:
    place.start()
    wrong = {"Authorization": "Bearer " + "x" * 43}
    with httpx.Client(base_url=url_of(place), trust_env=False, timeout=WITHIN) as http:
        for path in ("/mcp", "/sse", "/messages/", "/daemon", "/tasks", "/nowhere"):
            for method in ("GET", "POST"):
                answer = http.request(method, path, json={})
                assert (path, answer.status_code) == (path, 401)
                assert answer.headers["www-authenticate"].startswith("Bearer")
                assert http.request(method, path, json={}, headers=wrong).status_code == 401
            assert http.get(path, headers=bearer(place) | {"Host": "evil.example"}).status_code == 403
