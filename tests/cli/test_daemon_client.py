"""The client of the daemon against peers that misbehave, over a real socket, and against the daemon itself."""

from __future__ import annotations

import json
import re
import socketserver
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from deadlines import WITHIN

from vespera_exec import paths
from vespera_exec.cli.client import Daemon, DaemonError, Polls, segment
from vespera_exec.errors import DaemonUnavailable, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Generator

    from cli_harness import Cli


def http(body: bytes, status: str = "200 OK", kind: str = "application/json", *extra: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *extra, "", ""]
    return "\r\n".join(lines).encode() + body


class Peer:
    """A program on the daemon's socket that gives the answers it was told, one a connection; then it hangs up."""

    def __init__(self, folder: Path, answers: list[bytes]) -> None:
        self.asked: list[str] = []
        self.environ = {"VESPERA_RUNTIME_DIR": str(folder)}
        self.data_dir = folder / "data"
        peer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                head = ""
                while (line := self.rfile.readline()) not in (b"\r\n", b""):
                    head += line.decode()
                if not head:
                    return  # somebody looked whether we are there
                if length := re.search(r"Content-Length: (\d+)", head):
                    self.rfile.read(int(length[1]))
                peer.asked.append(head)
                self.wfile.write(answers.pop(0) if answers else b"")

        _, path = paths.socket_paths(self.data_dir, self.environ)
        self.server = socketserver.UnixStreamServer(str(path), Handler)

    def daemon(self) -> Daemon:
        return Daemon(self.data_dir, environ=self.environ, cwd="/some/größe", start=False)


@contextmanager
def peer(*answers: bytes) -> Generator[Peer]:
    with tempfile.TemporaryDirectory(prefix="vp-", dir="/tmp") as folder:
        made = Peer(Path(folder), list(answers))
        thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield made
        finally:
            made.server.shutdown()
            thread.join()
            made.server.server_close()


def test_a_connection_that_is_cut_is_tried_again() -> None:
    with peer(b"", b"", http(b'{"a": 1}')) as other, other.daemon() as daemon:
        assert daemon.get("/tasks", limit=3, page=None) == {"a": 1}
        assert [asked.split("\r\n")[0] for asked in other.asked] == ["GET /tasks?limit=3 HTTP/1.1"] * 3


def test_a_backup_is_not_asked_for_again_when_the_daemon_ends_meanwhile(cli: Cli, tmp_path: Path) -> None:
    with peer() as other:
        target = str(tmp_path / "copy.db")
        done = cli.run("backup", target, VESPERA_DATA_DIR=str(other.data_dir), **other.environ)
    assert [asked.split("\r\n")[0] for asked in other.asked] == ["POST /backup HTTP/1.1"]
    assert done.returncode == 125
    assert "the daemon ended while it made the backup (DAEMON_UNAVAILABLE)" in done.stderr
    assert f"look for {target}" in done.stderr


def test_a_connection_that_is_cut_again_and_again_is_given_up() -> None:
    with peer() as other, other.daemon() as daemon, pytest.raises(DaemonUnavailable, match="went away"):
        daemon.get("/tasks")
    with peer() as other, other.daemon() as daemon, Polls(daemon) as polls:
        polls.ask("events", "/tasks/1/events")
        assert [polls.wait(WITHIN), polls.wait(WITHIN)] == [{}, {}]
        with pytest.raises(DaemonUnavailable, match="went away"):
            polls.wait(WITHIN)


def test_a_poll_that_is_cut_is_asked_again() -> None:
    with peer(b"HTTP/1.1 200 OK\r\n", http(b'{"a": 1}')) as other, other.daemon() as daemon, Polls(daemon) as polls:
        polls.ask("events", "/tasks/1/events", cursor=4)
        arrived: dict[str, Any] = {}
        while not arrived:
            assert polls.asked("events")
            arrived = polls.wait(WITHIN)
        assert arrived == {"events": {"a": 1}}
        assert not polls.asked("events")


def test_a_refusal_carries_its_own_code_and_names_commands_instead_of_tools() -> None:
    said = {"error_code": "ROLE_NOT_FOUND", "detail": "Role not found: x", "hint": "list_roles shows them"}
    answer = http(json.dumps(said).encode(), "404 Not Found", "application/problem+json")
    with peer(answer) as other, other.daemon() as daemon, pytest.raises(DaemonError) as refused:
        daemon.get("/roles")
    assert refused.value.error_code == "ROLE_NOT_FOUND"
    assert refused.value.hint == "`vespera-exec roles` shows them"


def test_an_answer_that_is_not_ours_is_an_error_and_no_crash() -> None:
    for answer, code in (
        (http(b"<html>", "500 Oops", "text/html"), "HTTP_ERROR"),
        (http(b"[]", "400 Bad", "application/problem+json"), "HTTP_ERROR"),
        (http(b"{"), "BAD_ANSWER"),
    ):
        with peer(answer) as other, other.daemon() as daemon, pytest.raises(DaemonError) as refused:
            daemon.get("/tasks")
        assert refused.value.error_code == code


def test_an_answer_of_another_shape_is_told_in_one_line_without_a_traceback(cli: Cli) -> None:
    with peer(http(b"[1]")) as other:
        done = cli.run("list", VESPERA_DATA_DIR=str(other.data_dir), **other.environ)
    assert done.returncode == 125
    assert done.stderr.count("\n") == 1
    assert "(INTERNAL_ERROR); VESPERA_DEBUG=1" in done.stderr
    with peer(http(b"[1]")) as other:
        done = cli.run("list", VESPERA_DATA_DIR=str(other.data_dir), VESPERA_DEBUG="1", **other.environ)
    assert "Traceback" in done.stderr


def test_no_content_is_none_and_a_late_cancel_is_an_answer() -> None:
    no_content = b"HTTP/1.1 204 No Content\r\n\r\n"
    late = http(b'{"success": false}', "409 Conflict", "application/json", "Connection: close")
    with peer(no_content) as other, other.daemon() as daemon:
        assert daemon.get("/tasks/1/progress") is None
    with peer(late, http(b"1")) as other, other.daemon() as daemon:
        answer = daemon.post("/tasks/1/cancel", {"reason": "x"})
        assert (answer.status, answer.body) == (409, {"success": False})
        assert daemon.get("/tasks") == 1


def test_requests_say_where_the_caller_stands() -> None:
    with peer(http(b"1")) as other, other.daemon() as daemon:
        daemon.get("/tasks")
        assert "X-Vespera-Cwd: /some/gr%C3%B6%C3%9Fe" in other.asked[0]


def test_what_cannot_be_sent_is_refused_before_it_is_sent() -> None:
    with peer() as other, other.daemon() as daemon:
        for value in (float("nan"), "\udcff"):
            with pytest.raises(InvalidInput):
                daemon.post("/executions", {"title": value})
        assert other.asked == []


def test_an_id_can_be_no_path() -> None:
    assert segment("a?b#c d%") == "a%3Fb%23c%20d%25"
    for bad in ("", "..", "a/b", "x" * 201, "a\nb"):
        with pytest.raises(InvalidInput):
            segment(bad)


def test_a_task_that_was_never_executed_is_shown_as_such(cli: Cli) -> None:
    with Daemon(cli.data_dir, environ=cli.environ, cwd="/") as daemon:
        task_id = daemon.post("/tasks", {"title": "Later", "role": "survey"}).body["task_id"]
    assert "never executed" in cli.run("status", task_id, "--watch").stdout
    for command in ("result", "logs"):
        refused = cli.run(command, task_id)
        assert (refused.returncode, "never executed" in refused.stderr) == (125, True)


def test_what_was_typed_reaches_the_task(cli: Cli) -> None:
    task_id = cli.task("--priority", "9", "--description", "In full", "--timeout", "30", "--title", "T", "--", "true")
    with Daemon(cli.data_dir, environ=cli.environ, cwd="/") as daemon:
        task = daemon.get(f"/tasks/{task_id}/definition")
    assert (task["title"], task["priority"], task["description"], task["role"]) == ("T", 9, "In full", "command")
    assert task["inputs"] == {"argv": ["true"], "cwd": str(cli.cwd)}


def test_a_process_that_has_neither_lock_nor_socket_is_not_stopped_whatever_answers(cli: Cli) -> None:
    with subprocess.Popen(["sleep", "300"]) as bystander:
        view = {"pid": bystander.pid, "version": "1", "work": None, "queued": 0}
        with peer(*[http(json.dumps(view).encode())] * 4) as other:
            refused = cli.run("daemon", "stop", "--now", VESPERA_DATA_DIR=str(other.data_dir), **other.environ)
        alive = bystander.poll() is None
        bystander.kill()
    assert (refused.returncode, "(OWNER_UNCLEAR)" in refused.stderr, alive) == (125, True, True)


def test_a_daemon_whose_lock_says_nothing_is_known_by_its_socket_and_stopped(fresh: Cli) -> None:
    pid = fresh.json("daemon", "start")["daemon"]["pid"]
    (fresh.data_dir / "owner.lock").write_bytes(b'{"pid": 1}')
    assert fresh.json("daemon", "stop")["daemon"]["pid"] == pid
    assert fresh.run("daemon", "status").returncode == 3
