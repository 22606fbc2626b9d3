"""The REST door over the real app: each route, each refusal, and the event stream."""

from __future__ import annotations

import logging
import random
import re
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
import httpx
import orjson
import pytest
from deadlines import WITHIN
from starlette.applications import Starlette
from starlette.routing import Route

from vespera_exec.app.service import Vespera
from vespera_exec.errors import StoreUnavailable, VesperaError
from vespera_exec.server.http.app import build_http_app
from vespera_exec.server.http.problems import problem_of
from vespera_exec.server.http.sse import EventStream, LogEvent
from vespera_exec.server.listeners import HttpListeners, serve_http
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from pathlib import Path

    from starlette.requests import Request
    from starlette.types import ASGIApp

    from vespera_exec.app.views import DaemonView

TOKEN = "a-token-for-tests-only"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
LIMIT = 100_000
UNKNOWN = "no-such-id-at-all"


@dataclass
class Doors:
    """The app behind both listeners. `local` comes by the socket, `remote` by TCP with the token."""

    app: Starlette
    vespera: Vespera
    listeners: HttpListeners
    local: httpx.AsyncClient
    remote: httpx.AsyncClient


@asynccontextmanager
async def opened(
    data_dir: Path, sock: Path, *, describe: Callable[[], DaemonView] | None = None
) -> AsyncGenerator[Doors]:
    settings = Settings(data_dir=data_dir, roles_dir=data_dir / "roles", sample_seconds=0.0)
    async with Vespera.open(settings=settings) as vespera:
        app = build_http_app(vespera, describe=describe)
        transport = httpx.AsyncHTTPTransport(uds=str(sock))
        async with serve_http(app, unix_path=sock, tcp=("127.0.0.1", 0), token=TOKEN, body_limit=LIMIT) as listeners:
            assert listeners.url is not None
            async with (
                httpx.AsyncClient(base_url="http://vespera", transport=transport, timeout=WITHIN) as local,
                httpx.AsyncClient(base_url=listeners.url, headers=BEARER, trust_env=False, timeout=WITHIN) as remote,
            ):
                yield Doors(app, vespera, listeners, local, remote)


@pytest.fixture
def sock(runtime_dir: Path) -> Path:
    return runtime_dir / "http.sock"


@pytest.fixture
async def doors(data_dir: Path, sock: Path) -> AsyncGenerator[Doors]:
    async with opened(data_dir, sock) as doors:
        yield doors


def run_python(program: str, **more: Any) -> dict[str, Any]:
    argv = [sys.executable, "-S", "-c", program]
    return {"title": "run", "role": "command", "inputs": {"argv": argv}, **more}


async def started(doors: Doors, program: str, **more: Any) -> dict[str, Any]:
    answer = await doors.local.post("/executions", json=run_python(program, **more))
    assert answer.status_code in (200, 202), answer.text
    return answer.json()


def assert_problem(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    said = answer.json()
    assert said["error_code"] == code
    assert said["status"] == status
    assert said.keys() == {"type", "title", "status", "detail", "error_code", "hint"}


def every_route(doors: Doors) -> list[tuple[str, str]]:
    """Method and path of each route that the router has, and of one that it does not have."""
    routes = [route for route in doors.app.routes if isinstance(route, Route)]
    found = [
        (method, re.sub(r"\{\w+\}", UNKNOWN, route.path)) for route in routes for method in sorted(route.methods or ())
    ]
    assert len(found) > 30
    return [*found, ("GET", "/no/such/route"), ("POST", "/no/such/route"), ("DELETE", "/tasks")]


@pytest.mark.promise("tcp_denies")
@pytest.mark.parametrize(
    ("case", "headers", "status"),
    [
        ("no token", {"Authorization": ""}, 401),
        ("wrong token", {"Authorization": "Bearer wrong"}, 401),
        ("wrong host", {"Host": "evil.example"}, 403),
        ("wrong origin", {"Origin": "http://evil.example"}, 403),
        ("null origin", {"Origin": "null"}, 403),
        ("text/plain", {"Content-Type": "text/plain"}, 415),
    ],
)
async def test_every_tcp_route_denies(doors: Doors, case: str, headers: dict[str, str], status: int) -> None:
    for method, path in every_route(doors):
        answer = await doors.remote.request(method, path, headers=headers, content=b"{}")
        assert answer.status_code == status, f"{method} {path} with {case}"


async def test_doctor_and_backup_are_for_the_local_user_alone(doors: Doors, tmp_path: Path) -> None:
    target = tmp_path / "stolen.db"
    for path, body in (("/doctor", {}), ("/backup", {"path": str(target)})):
        refused = await doors.remote.post(path, json=body)
        assert_problem(refused, 403, "PERMISSION_DENIED")
        assert str(tmp_path) not in refused.text
        assert not target.exists()
        assert (await doors.local.post(path, json=body)).is_success
    assert target.exists()


async def test_a_task_is_made_listed_and_shown(doors: Doors) -> None:
    made = await doors.remote.post("/tasks", json={"title": "Look around", "role": "survey", "priority": 7})
    assert made.status_code == 201
    task = made.json()
    assert task["title"] == "Look around"
    definition = await doors.local.get(f"/tasks/{task['task_id']}/definition")
    assert definition.json() == task
    page = (await doors.local.get("/tasks", params={"status": "todo", "role": "survey", "text": "around"})).json()
    assert [row["task_id"] for row in page["tasks"]] == [task["task_id"]]
    assert page["total"] == 1
    status = (await doors.local.get(f"/tasks/{task['task_id']}")).json()
    assert status["executing"] is False
    assert status["task_status"] == "todo"


async def test_a_run_that_ends_within_the_wait_is_answered_with_200_and_done(doors: Doors) -> None:
    answer = await doors.local.post("/executions", json=run_python("print('out')", wait_ms=25_000))
    assert answer.status_code == 200
    handle = answer.json()
    assert handle["done"] is True
    assert handle["status"] == "completed"
    for prefix in (f"/executions/{handle['session_id']}", f"/tasks/{handle['task_id']}"):
        result = (await doors.local.get(f"{prefix}/result")).json()
        assert result["status"] == "completed"
        assert result["output"] is None
        with_output = (await doors.local.get(f"{prefix}/result", params={"output_limit": 100})).json()
        assert with_output["output"]["text"] == "out\n"
        page = (await doors.local.get(f"{prefix}/output", params={"stream": "stdout", "offset": 1})).json()
        assert page["text"] == "ut\n"
        assert page["eof"] is True
        metrics = (await doors.local.get(f"{prefix}/metrics")).json()
        assert metrics["completed"] == 1
        assert metrics["success_rate"] == 1.0
        assert (await doors.local.get(prefix, params={"detail": ""})).json()["recent_events"]
        assert (await doors.local.get(prefix)).json()["recent_events"] is None


async def test_a_run_that_goes_on_is_answered_with_202_and_read_to_its_end(doors: Doors) -> None:
    answer = await doors.local.post("/executions", json=run_python("print('x')"))
    assert answer.status_code == 202
    handle = answer.json()
    assert handle["done"] is False
    cursor, types = handle["cursor"], list[str]()
    with anyio.fail_after(WITHIN):
        done = False
        while not done:
            page = (
                await doors.local.get(
                    f"/tasks/{handle['task_id']}/events", params={"cursor": cursor, "wait_ms": 25_000, "max_events": 3}
                )
            ).json()
            cursor, done = page["next_cursor"], page["done"]
            types += [event["type"] if "type" in event else event["event_type"] for event in page["events"]]
    assert "execution_completed" in types
    progress = await doors.local.get(f"/executions/{handle['session_id']}/progress")
    assert progress.status_code == 200
    assert progress.json()["percentage"] == 100.0


async def test_progress_is_204_before_any_was_recorded_and_404_for_the_unknown(doors: Doors) -> None:
    task = (await doors.local.post("/tasks", json={"title": "waits"})).json()
    answer = await doors.local.get(f"/tasks/{task['task_id']}/progress")
    assert answer.status_code == 204
    assert answer.content == b""
    assert_problem(await doors.local.get(f"/executions/{UNKNOWN}/progress"), 404, "TASK_NOT_FOUND")


async def test_every_route_with_an_id_answers_404_for_an_unknown_one(doors: Doors) -> None:
    asked = 0
    for method, path in every_route(doors):
        if UNKNOWN in path and method != "HEAD":
            other = {"tokens": "NOT_FOUND", "checkpoints": "CHECKPOINT_NOT_FOUND"}
            code = other.get(path.split("/")[1], "TASK_NOT_FOUND")
            assert_problem(await doors.local.request(method, path), 404, code)
            asked += 1
    assert asked >= 15


async def test_cancel_stops_the_run_and_a_second_one_is_409(doors: Doors) -> None:
    handle = await started(doors, "import time; time.sleep(60)")
    path = f"/tasks/{handle['task_id']}/cancel"
    answer = await doors.local.post(path, json={"reason": "enough", "wait_ms": 25_000})
    assert answer.status_code == 200
    assert answer.json()["success"] is True
    assert answer.json()["status"] == "cancelled"
    again = await doors.local.post(path)
    assert again.status_code == 409
    assert again.headers["content-type"] == "application/json"
    assert again.json()["success"] is False
    assert again.json()["reason"]


async def test_a_second_start_of_a_running_task_is_a_conflict(doors: Doors) -> None:
    handle = await started(doors, "import time; time.sleep(60)")
    again = await doors.local.post("/executions", json={"task_id": handle["task_id"]})
    assert_problem(again, 409, "ALREADY_EXECUTING")
    await doors.local.post(f"/tasks/{handle['task_id']}/cancel", json={"wait_ms": 25_000})


async def test_a_repeated_key_answers_with_the_first_ids(doors: Doors) -> None:
    first = await started(doors, "pass", idempotency_key="once")
    second = await started(doors, "pass", idempotency_key="once")
    assert second["session_id"] == first["session_id"]
    assert second["repeated"] is True


@pytest.mark.promise("commands")
async def test_commands_come_by_the_socket_only(doors: Doors) -> None:
    assert_problem(await doors.remote.post("/executions", json=run_python("pass")), 403, "PERMISSION_DENIED")
    roles = {role["name"]: role["allowed"] for role in (await doors.remote.get("/roles")).json()["roles"]}
    assert roles["command"] is False
    local = {role["name"]: role["allowed"] for role in (await doors.local.get("/roles")).json()["roles"]}
    assert local["command"] is True


async def test_work_starts_where_its_caller_stands(doors: Doors, tmp_path: Path) -> None:
    folder = tmp_path / "wörk dir"
    folder.mkdir()
    answer = await doors.local.post(
        "/executions",
        json=run_python("import os; print(os.getcwd())", wait_ms=25_000),
        headers={"X-Vespera-Cwd": quote(str(folder))},
    )
    page = (await doors.local.get(f"/executions/{answer.json()['session_id']}/output")).json()
    assert page["text"].strip() == str(folder.resolve())


async def test_the_daemon_and_its_health_are_shown(doors: Doors) -> None:
    assert (await doors.remote.get("/healthz")).json() == {"status": "ok"}
    view = (await doors.local.get("/daemon")).json()
    assert view["data_dir"] == str(doors.vespera.settings.data_dir)
    assert view["version"] == doors.vespera.version


BAD_BODIES: list[tuple[str, bytes]] = [
    ("not JSON", b"{"),
    ("an array", b"[]"),
    ("a string", b'"x"'),
    ("no title", b"{}"),
    ("an unknown key", b'{"title": "x", "tilte": "y"}'),
    ("a title of the wrong type", b'{"title": 7}'),
    ("a number as a string", b'{"title": "x", "priority": "5"}'),
    ("a truth value as a number", b'{"title": "x", "priority": true}'),
    ("a number out of range", b'{"title": "x", "priority": 11}'),
    ("a huge number", b'{"title": "x", "priority": 1' + b"0" * 400 + b"}"),
    ("an integer that would be rounded", b'{"title": "x", "inputs": {"a": 18446744073709551616}}'),
    ("NaN", b'{"title": "x", "inputs": {"a": NaN}}'),
    ("Infinity", b'{"title": "x", "inputs": {"a": -Infinity}}'),
    ("an infinite float", b'{"title": "x", "inputs": {"a": 1e999}}'),
    ("a lone surrogate", b'{"title": "x", "inputs": {"a": "\\ud800"}}'),
    ("a NUL", b'{"title": "x", "inputs": {"a": "b\\u0000"}}'),
    ("a NUL in a key", b'{"title": "x", "inputs": {"\\u0000": 1}}'),
    ("bytes that are no UTF-8", b'{"title": "\xff"}'),
    ("UTF-16", '{"title": "x"}'.encode("utf-16")),
    ("a byte order mark", b'\xef\xbb\xbf{"title": "x"}'),
    ("a little too deep", b'{"title": "x", "inputs": {"a": ' + b"[" * 70 + b"]" * 70 + b"}}"),
    ("far too deep", b'{"title": "x", "inputs": {"a": ' + b"[" * 40_000 + b"]" * 40_000 + b"}}"),
    ("never closed", b'{"title": ' + b"[" * 50_000),
    ("a control character in the title", b'{"title": "a\\u001b[31m"}'),
    ("an empty title", b'{"title": " "}'),
    ("a long title", b'{"title": "' + b"x" * 501 + b'"}'),
]


@pytest.mark.promise("malformed", "limits")
@pytest.mark.parametrize(("what", "body"), BAD_BODIES, ids=[what for what, _ in BAD_BODIES])
async def test_a_bad_body_is_a_400_that_says_why(doors: Doors, what: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = await doors.local.post("/tasks", content=body, headers=headers)
    assert_problem(answer, 400, "INVALID_INPUT")
    assert answer.json()["detail"], what
    assert (await doors.local.get("/tasks")).json()["total"] == 0


async def test_the_last_of_two_equal_keys_counts(doors: Doors) -> None:
    body = b'{"title": "first", "title": "second"}'
    answer = await doors.local.post("/tasks", content=body, headers={"Content-Type": "application/json"})
    assert answer.json()["title"] == "second"


async def test_a_body_beyond_the_limit_is_413(doors: Doors) -> None:
    large = {"title": "x", "description": "y" * LIMIT}
    assert_problem(await doors.remote.post("/tasks", json=large), 413, "BODY_TOO_LARGE")


@pytest.mark.parametrize(
    "query",
    [
        "cursor=x", "cursor=-1", "cursor=1.5", "cursor=", "cursor=99999999999999999999", "wait_ms=25001", "wait_ms=-1",
        "max_events=0", "max_events=1001", "cursor=1&cursor=1", "curser=1", "detail=true", "cursor=%00", "cursor=%ff",
    ],
)  # fmt: skip
async def test_a_query_that_means_nothing_is_a_400(doors: Doors, query: str) -> None:
    task = (await doors.local.post("/tasks", json={"title": "x"})).json()
    answer = await doors.local.get(f"/tasks/{task['task_id']}/events?{query}")
    assert_problem(answer, 400, "INVALID_INPUT")


async def test_routes_without_parameters_take_none(doors: Doors) -> None:
    for method, path in every_route(doors):
        if method != "HEAD" and "no/such" not in path and method != "DELETE":
            answer = await doors.local.request(method, f"{path}?surprise=1")
            assert_problem(answer, 400, "INVALID_INPUT")


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "status=bogus", "page=bogus", "text=a%00b"])
async def test_a_list_that_cannot_be_made_is_a_400(doors: Doors, query: str) -> None:
    assert_problem(await doors.local.get(f"/tasks?{query}"), 400, "INVALID_INPUT")


async def test_wrong_methods_and_paths_are_problems_too(doors: Doors) -> None:
    wrong = await doors.local.delete("/tasks")
    assert_problem(wrong, 405, "METHOD_NOT_ALLOWED")
    assert "GET" in wrong.headers["allow"] or "POST" in wrong.headers["allow"]
    for path in ("/", "/tasks/", "/tasks/a/b", "/tasks/../etc/passwd", "/%2e%2e/x", "//tasks"):
        assert_problem(await doors.local.get(path), 404, "NOT_FOUND")


@pytest.mark.parametrize("any_id", ["%00", "%ff%fe", "a" * 5000, "'; drop table tasks; --", "%25", "ab", "..", "*"])
async def test_a_hostile_id_is_refused_without_a_500(doors: Doors, any_id: str) -> None:
    for suffix in ("", "/progress", "/events", "/output"):
        answer = await doors.local.get(f"/tasks/{any_id}{suffix}")
        assert answer.status_code in (400, 404), answer.text


@pytest.mark.promise("malformed")
async def test_mutated_requests_never_end_in_a_500(doors: Doors) -> None:
    chance = random.Random(20261120)
    seed = orjson.dumps(run_python("pass", priority=3, timeout_seconds=1.5, idempotency_key="k"))
    seen: set[int] = set()
    for _ in range(150):
        body = bytearray(seed)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(body))
            match chance.randrange(3):
                case 0:
                    body[at] = chance.randrange(256)
                case 1:
                    del body[at : at + chance.randint(1, 20)]
                case _:
                    body[at:at] = chance.choice([b"\\u0000", b'"', b"[[", b"}", b"null", b"-1", b"1e9", b"\xc3\x28"])
            body = body or bytearray(b"x")
        answer = await doors.remote.post(
            "/executions", content=bytes(body), headers={"Content-Type": "application/json"}
        )
        seen.add(answer.status_code)
    assert seen <= {400, 403, 404}
    assert 400 in seen


async def test_a_fault_of_ours_is_a_generic_500_whose_incident_is_in_the_log(
    data_dir: Path, sock: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def describe() -> DaemonView:
        raise LookupError("a secret detail")

    async with opened(data_dir, sock, describe=describe) as doors:
        with caplog.at_level(logging.ERROR):
            answer = await doors.local.get("/daemon")
        assert (await doors.local.get("/healthz")).status_code == 200
    assert_problem(answer, 500, "INTERNAL_ERROR")
    assert "secret" not in answer.text
    incident = re.search(r"incident (\w+)", answer.json()["detail"])
    assert incident is not None
    assert incident[1] in caplog.text
    assert "a secret detail" in caplog.text


def test_a_store_that_cannot_be_written_asks_to_come_again() -> None:
    answer = problem_of(StoreUnavailable("disk full", hint="free some space"))
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0


@dataclass(frozen=True)
class Record:
    """One server-sent event."""

    id: int | None
    event: str
    data: dict[str, Any]


async def sse(client: httpx.AsyncClient, path: str, **headers: str) -> list[Record]:
    """The whole stream, to its end."""
    with anyio.fail_after(WITHIN):
        answer = await client.get(path, headers={"Accept": "text/event-stream", **headers})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return parsed(answer.text)


def parsed(text: str) -> list[Record]:
    records: list[Record] = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if fields:
            at = int(fields["id"]) if "id" in fields else None
            records.append(Record(at, fields["event"], orjson.loads(fields["data"])))
    return records


async def test_the_event_stream_follows_a_run_to_done(doors: Doors) -> None:
    handle = await started(doors, "print('x')")
    records = await sse(doors.local, f"/tasks/{handle['task_id']}/events?cursor={handle['cursor']}")
    *events, done = records
    cursors = [event.id for event in events if event.id is not None]
    assert len(cursors) == len(events)
    assert all(a < b for a, b in pairwise(cursors))
    assert [event.data["cursor"] for event in events] == cursors
    assert "execution_completed" in [event.event for event in events]
    assert done.event == "done"
    assert done.data["status"] == "completed"
    assert done.data["next_cursor"] == cursors[-1]


@pytest.mark.promise("reconnect")
async def test_a_stream_resumed_anywhere_has_no_gap_and_no_repeat(doors: Doors) -> None:
    handle = await started(doors, "print('x')", wait_ms=25_000)
    path = f"/executions/{handle['session_id']}/events"
    whole = [record.id for record in await sse(doors.remote, path) if record.id is not None]
    assert len(whole) >= 4
    for at, cursor in enumerate(whole):
        for resumed in (
            await sse(doors.remote, f"{path}?cursor=0", **{"Last-Event-ID": str(cursor)}),
            await sse(doors.remote, f"{path}?cursor={cursor}"),
        ):
            assert [record.id for record in resumed if record.id is not None] == whole[at + 1 :]
            assert resumed[-1].event == "done"


async def test_the_stream_and_the_pages_tell_the_same(doors: Doors) -> None:
    handle = await started(doors, "print('x')", wait_ms=25_000)
    path = f"/tasks/{handle['task_id']}/events"
    page = (await doors.local.get(path, params={"max_events": 1000})).json()
    assert page["done"] is True
    assert [record.data for record in await sse(doors.local, path) if record.id is not None] == page["events"]


async def test_a_stream_that_cannot_begin_is_a_plain_problem(doors: Doors) -> None:
    accept = {"Accept": "text/event-stream"}
    assert_problem(await doors.local.get(f"/tasks/{UNKNOWN}/events", headers=accept), 404, "TASK_NOT_FOUND")
    task = (await doors.local.post("/tasks", json={"title": "x"})).json()
    for bad in ("x", "-1", "1.5", "9" * 30, "١"):
        headers = {**accept, "Last-Event-ID": bad}
        answer = await doors.local.get(
            f"/tasks/{task['task_id']}/events", headers=[(k.encode(), v.encode()) for k, v in headers.items()]
        )
        assert_problem(answer, 400, "INVALID_INPUT")


async def test_an_open_event_stream_does_not_hang_the_shutdown(data_dir: Path, sock: Path) -> None:
    received: list[str] = []
    async with anyio.create_task_group() as group:
        reading = anyio.Event()
        async with opened(data_dir, sock) as doors:
            handle = await started(doors, "import time; time.sleep(600)")

            async def read() -> None:
                transport = httpx.AsyncHTTPTransport(uds=str(sock))
                async with (
                    httpx.AsyncClient(base_url="http://vespera", transport=transport, timeout=WITHIN) as client,
                    client.stream(
                        "GET", f"/tasks/{handle['task_id']}/events", headers={"Accept": "text/event-stream"}
                    ) as answer,
                ):
                    async for piece in answer.aiter_text():
                        received.append(piece)
                        reading.set()

            group.start_soon(read)
            with anyio.fail_after(WITHIN):
                await reading.wait()
    assert "event: done" not in "".join(received)


class _Event:
    cursor = 7
    event_type = "info"

    def message(self) -> dict[str, Any]:
        return {"cursor": 7, "text": "one\ntwo"}


async def _served_stream(
    sock: Path, events: Callable[[], AsyncIterator[LogEvent]], until: str, *, heartbeat_seconds: float
) -> str:
    async def summary() -> dict[str, Any]:
        return {"done": True}

    async def endpoint(request: Request) -> ASGIApp:
        return EventStream(events(), summary, heartbeat_seconds=heartbeat_seconds)

    app = Starlette(routes=[Route("/", endpoint)])
    transport = httpx.AsyncHTTPTransport(uds=str(sock))
    text = ""
    with anyio.fail_after(WITHIN):
        async with (
            serve_http(app, unix_path=sock, body_limit=LIMIT),
            httpx.AsyncClient(base_url="http://any", transport=transport, timeout=WITHIN) as client,
            client.stream("GET", "/") as answer,
        ):
            async for piece in answer.aiter_text():
                text += piece
                if until in text:
                    break
    return text


async def test_a_silent_stream_shows_that_it_lives(sock: Path) -> None:
    async def silent() -> AsyncIterator[LogEvent]:
        yield _Event()
        await anyio.sleep_forever()

    text = await _served_stream(sock, silent, "still here\n\n: still here", heartbeat_seconds=0.05)
    assert text.startswith(": connected\n\nid: 7\nevent: info\ndata: {")
    assert parsed(text)[0].data["text"] == "one\ntwo"


async def test_an_error_in_mid_stream_is_said_before_the_end(sock: Path) -> None:
    async def failing() -> AsyncIterator[LogEvent]:
        yield _Event()
        raise VesperaError("the log is gone", hint="look")

    text = await _served_stream(sock, failing, "never said", heartbeat_seconds=10)
    assert [record.event for record in parsed(text)] == ["info", "error"]
    assert parsed(text)[1].data["error"] == "the log is gone"


async def test_a_client_that_leaves_ends_the_reading_of_the_log(sock: Path) -> None:
    closed = anyio.Event()

    async def watched() -> AsyncIterator[LogEvent]:
        try:
            yield _Event()
            await anyio.sleep_forever()
        finally:
            closed.set()

    await _served_stream(sock, watched, "id: 7", heartbeat_seconds=10)
    with anyio.fail_after(WITHIN):
        await closed.wait()
