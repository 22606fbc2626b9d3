"""Who comes through the HTTP door, on real sockets: token, Host, Origin, bodies, and how the door closes."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import stat
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
import httpx
import pytest
from deadlines import WITHIN

from vespera_exec.app.callers import current_caller
from vespera_exec.app.tokens import default_token
from vespera_exec.errors import DaemonUnavailable, StoreUnavailable
from vespera_exec.server.listeners import HttpListeners, serve_http

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

    from starlette.types import Message, Receive, Scope, Send

TOKEN = "correct-horse-battery-staple"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
LIMIT = 1000


class Echo:
    """Answers with the caller it was given and the body it got; `/stream` sends until told that the client left."""

    def __init__(self) -> None:
        self.calls = 0
        self.lifespans: list[str] = []
        self.streaming = anyio.Event()
        self.stream_ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "lifespan":
                await self._lifespan(receive, send)
            case "websocket":
                assert (await receive())["type"] == "websocket.connect"
                await send({"type": "websocket.accept"})
                await send({"type": "websocket.close", "code": 1000})
            case _:
                await self._http(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        for _ in range(2):
            kind = (await receive())["type"]
            self.lifespans.append(kind)
            await send({"type": f"{kind}.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        message: Message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        if scope["path"] == "/stream":
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            self.streaming.set()
            assert (await receive())["type"] == "http.disconnect"
            self.stream_ended = True
            await send({"type": "http.response.body", "body": b"last"})
            return
        if scope["path"] == "/deaf":
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            self.streaming.set()
            await anyio.sleep_forever()
        caller = current_caller.get()
        said = {
            "principal": caller.principal,
            "over_tcp": caller.over_tcp,
            "scopes": sorted(caller.scopes),
            "cwd": caller.cwd,
            "env": dict(caller.env),
            "body": message["body"].decode(),
        }
        await send({"type": "http.response.body", "body": json.dumps(said).encode()})


@pytest.fixture
def echo() -> Echo:
    return Echo()


@asynccontextmanager
async def tcp(echo: Echo, **options: Any) -> AsyncGenerator[httpx.AsyncClient]:
    async with serve_http(echo, tcp=("127.0.0.1", 0), token=TOKEN, body_limit=LIMIT, **options) as listeners:
        assert listeners.url is not None
        async with httpx.AsyncClient(base_url=listeners.url, trust_env=False, timeout=WITHIN) as client:
            yield client


@asynccontextmanager
async def unix(echo: Echo, path: Path) -> AsyncGenerator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with (
        serve_http(echo, unix_path=path, body_limit=LIMIT),
        httpx.AsyncClient(base_url="http://any", transport=transport, trust_env=False, timeout=WITHIN) as client,
    ):
        yield client


@pytest.fixture
def sock(runtime_dir: Path) -> Path:
    return runtime_dir / "http.sock"


async def raw(client: httpx.AsyncClient, *lines: str) -> int:
    """The status that answers a request sent byte for byte."""
    return await exchange(client, "\r\n".join([*lines, "", ""]).encode())


async def exchange(client: httpx.AsyncClient, request: bytes) -> int:
    assert client.base_url.port is not None
    answer = b""
    with anyio.fail_after(WITHIN):
        async with await anyio.connect_tcp(client.base_url.host, client.base_url.port) as stream:
            await stream.send(request)
            while b"\r\n\r\n" not in answer:
                answer += await stream.receive()
    return int(answer.split()[1])


def host_of(client: httpx.AsyncClient) -> str:
    return f"Host: {client.base_url.host}:{client.base_url.port}"


def assert_problem(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    said = answer.json()
    assert said["error_code"] == code
    assert said["status"] == status
    assert said["type"] == "about:blank"
    assert said["title"]
    assert said["detail"]
    assert "hint" in said


async def test_the_token_lets_a_tcp_caller_in_as_itself_and_never_as_local(echo: Echo) -> None:
    async with tcp(echo) as client:
        headers = {**BEARER, "X-Vespera-Cwd": "/etc", "X-Vespera-Env": base64.b64encode(b'{"PATH": "/x"}').decode()}
        said = (await client.get("/", headers=headers)).json()
    assert said["principal"] == "token:default"
    assert said["over_tcp"] is True
    assert said["scopes"] == ["operate", "read", "worker"]
    assert said["cwd"] is None
    assert said["env"] == {}


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {TOKEN}x",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN.upper()}",
    ],
)
async def test_without_the_token_nothing_is_answered(echo: Echo, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    async with tcp(echo) as client:
        for path in ("/", "/healthz", "/no/such/path"):
            answer = await client.get(path, headers=headers)
            assert_problem(answer, 401, "UNAUTHENTICATED")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert TOKEN not in answer.text
    assert echo.calls == 0


async def test_a_token_in_the_query_string_is_no_token(echo: Echo) -> None:
    async with tcp(echo) as client:
        for query in (f"token={TOKEN}", f"access_token={TOKEN}"):
            assert_problem(await client.get(f"/?{query}"), 401, "UNAUTHENTICATED")


async def test_two_tokens_are_no_token(echo: Echo) -> None:
    async with tcp(echo) as client:
        bearer = f"Authorization: Bearer {TOKEN}"
        status = await raw(client, "GET / HTTP/1.1", host_of(client), bearer, bearer)
    assert status == 401


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]"])
async def test_it_answers_to_its_own_names(echo: Echo, name: str) -> None:
    async with tcp(echo) as client:
        answer = await client.get("/", headers={**BEARER, "Host": f"{name}:{client.base_url.port}"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:{port}",
        "127.0.0.1",
        "localhost",
        "127.0.0.1:1",
        "127.0.0.2:{port}",
        "localhost.:{port}",
        "127.0.0.1:{port}.evil.example",
        "a@127.0.0.1:{port}",
        "2130706433:{port}",
        "0.0.0.0:{port}",
    ],
)
async def test_a_foreign_host_is_refused_even_with_the_token(echo: Echo, host: str) -> None:
    async with tcp(echo) as client:
        answer = await client.get("/", headers={**BEARER, "Host": host.format(port=client.base_url.port)})
        assert_problem(answer, 403, "WRONG_HOST")
    assert echo.calls == 0


async def test_no_host_or_two_hosts_are_refused(echo: Echo) -> None:
    async with tcp(echo) as client:
        bearer = f"Authorization: Bearer {TOKEN}"
        none = await raw(client, "GET / HTTP/1.0", bearer)
        two = await raw(client, "GET / HTTP/1.1", host_of(client), "Host: evil.example", bearer)
    assert none == 403
    assert two in (400, 403)
    assert echo.calls == 0


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "https://127.0.0.1:{port}",
        "http://127.0.0.1",
        "http://127.0.0.1:1",
        "http://evil.example",
        "http://localhost:{port}.evil.example",
        "http://localhost:{port}/",
        "file://",
    ],
)
async def test_a_foreign_origin_is_refused_even_with_the_token(echo: Echo, origin: str) -> None:
    async with tcp(echo) as client:
        answer = await client.get("/", headers={**BEARER, "Origin": origin.format(port=client.base_url.port)})
        assert_problem(answer, 403, "WRONG_ORIGIN")
    assert echo.calls == 0


async def test_our_own_origins_may_call(echo: Echo) -> None:
    async with tcp(echo) as client:
        for name in ("127.0.0.1", "localhost", "[::1]"):
            origin = f"http://{name}:{client.base_url.port}"
            assert (await client.get("/", headers={**BEARER, "Origin": origin})).status_code == 200


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=latin-1",
        "application/jsonx",
        "text/json",
        "",
    ],
)
async def test_a_body_that_does_not_call_itself_json_is_refused(echo: Echo, content_type: str) -> None:
    async with tcp(echo) as client:
        answer = await client.post("/", headers={**BEARER, "Content-Type": content_type}, content=b"{}")
        assert_problem(answer, 415, "WRONG_MEDIA_TYPE")
        answer = await client.post("/", headers=BEARER, content=b"{}")
        assert_problem(answer, 415, "WRONG_MEDIA_TYPE")
    assert echo.calls == 0


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"']
)
async def test_json_comes_in_whole(echo: Echo, content_type: str) -> None:
    async with tcp(echo) as client:
        answer = await client.post("/", headers={**BEARER, "Content-Type": content_type}, content=b'{"a": 1}')
    assert answer.json()["body"] == '{"a": 1}'


async def test_a_post_without_a_body_needs_no_content_type(echo: Echo) -> None:
    async with tcp(echo) as client:
        assert (await client.post("/", headers=BEARER)).status_code == 200


@pytest.mark.promise("limits")
async def test_a_body_of_exactly_the_limit_passes_and_one_byte_more_does_not(echo: Echo) -> None:
    headers = {**BEARER, "Content-Type": "application/json"}
    async with tcp(echo) as client:
        fits = await client.post("/", headers=headers, content=b"x" * LIMIT)
        assert len(fits.json()["body"]) == LIMIT
        assert_problem(await client.post("/", headers=headers, content=b"x" * (LIMIT + 1)), 413, "BODY_TOO_LARGE")


@pytest.mark.promise("limits")
async def test_a_body_without_a_declared_length_is_counted(echo: Echo) -> None:
    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 100

    headers = {**BEARER, "Content-Type": "application/json"}
    async with tcp(echo) as client:
        fits = await client.post("/", headers=headers, content=pieces(LIMIT // 100))
        assert len(fits.json()["body"]) == LIMIT
        answer = await client.post("/", headers=headers, content=pieces(LIMIT // 100 + 1))
        assert_problem(answer, 413, "BODY_TOO_LARGE")
    assert echo.calls == 1


async def test_a_client_that_leaves_in_mid_body_reaches_nobody(echo: Echo) -> None:
    async with tcp(echo) as client:
        assert client.base_url.port is not None
        head = (
            f"POST / HTTP/1.1\r\n{host_of(client)}\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json"
        )
        async with await anyio.connect_tcp("127.0.0.1", client.base_url.port) as stream:
            await stream.send(f"{head}\r\nContent-Length: 500\r\n\r\nhalf".encode())
        assert (await client.get("/", headers=BEARER)).status_code == 200
    assert echo.calls == 1


UPGRADE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


@pytest.mark.promise("tcp_denies")
@pytest.mark.parametrize("websockets", [True, False])
async def test_a_websocket_is_guarded_like_everything_else(echo: Echo, websockets: bool) -> None:
    if websockets:
        pytest.importorskip("websockets")
    async with tcp(echo, websockets=websockets) as client:

        async def upgrade(*more: str, host: str | None = None) -> int:
            lines = ("GET /ws HTTP/1.1", host or host_of(client), *UPGRADE, *more)
            return await raw(client, *lines)

        bearer = f"Authorization: Bearer {TOKEN}"
        assert await upgrade() == 401
        assert await upgrade("Authorization: Bearer wrong") == 401
        assert await upgrade(bearer, "Origin: null") == 403
        assert await upgrade(bearer, "Origin: http://evil.example") == 403
        assert await upgrade(bearer, host="Host: evil.example") == 403
        assert echo.calls == 0
        if websockets:
            assert await upgrade(bearer) == 101


async def test_a_socket_caller_is_local_and_says_where_it_stands(echo: Echo, sock: Path) -> None:
    env = {"PATH": "/usr/bin", "LANG": "de", "AWS_SECRET_ACCESS_KEY": "x", "LD_PRELOAD": "y", "TERM": 7}
    headers = {
        "X-Vespera-Cwd": quote("/home/jürgen/a b"),
        "X-Vespera-Env": base64.b64encode(json.dumps(env).encode()).decode(),
        "Host": "anything",
    }
    async with unix(echo, sock) as client:
        said = (await client.get("/", headers=headers)).json()
        plain = (await client.get("/")).json()
    assert said["principal"] == "local"
    assert said["over_tcp"] is False
    assert said["cwd"] == "/home/jürgen/a b"
    assert said["env"] == {"PATH": "/usr/bin", "LANG": "de"}
    assert plain["cwd"] is None
    assert plain["env"] == {}


async def test_no_page_may_call_the_socket(echo: Echo, sock: Path) -> None:
    async with unix(echo, sock) as client:
        for origin in ("null", "http://127.0.0.1", "http://localhost"):
            assert_problem(await client.get("/", headers={"Origin": origin}), 403, "WRONG_ORIGIN")


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Vespera-Cwd": "relative"},
        {"X-Vespera-Cwd": "/nul%00"},
        {"X-Vespera-Cwd": "/not-utf8%ff"},
        {"X-Vespera-Env": "not base64!"},
        {"X-Vespera-Env": base64.b64encode(b"[1]").decode()},
        {"X-Vespera-Env": base64.b64encode(b"{").decode()},
    ],
)
async def test_a_caller_that_garbles_its_place_is_told(echo: Echo, sock: Path, headers: dict[str, str]) -> None:
    async with unix(echo, sock) as client:
        assert_problem(await client.get("/", headers=headers), 400, "INVALID_INPUT")


async def test_body_rules_hold_on_the_socket_too(echo: Echo, sock: Path) -> None:
    async with unix(echo, sock) as client:
        plain = await client.post("/", headers={"Content-Type": "text/plain"}, content=b"{}")
        assert_problem(plain, 415, "WRONG_MEDIA_TYPE")
        large = await client.post("/", headers={"Content-Type": "application/json"}, content=b"x" * (LIMIT + 1))
        assert_problem(large, 413, "BODY_TOO_LARGE")


async def test_the_socket_is_ours_alone_and_goes_with_the_server(echo: Echo, sock: Path) -> None:
    async with unix(echo, sock):
        assert stat.S_IMODE(os.stat(sock).st_mode) == 0o600
        assert os.listdir(sock.parent) == [sock.name]
    assert os.listdir(sock.parent) == []


async def test_a_socket_that_a_dead_server_left_is_taken_over(echo: Echo, sock: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(sock))
    async with unix(echo, sock) as client:
        assert (await client.get("/")).status_code == 200


async def test_a_socket_that_somebody_serves_is_left_alone(echo: Echo, sock: Path) -> None:
    async with unix(echo, sock) as client:
        with pytest.raises(DaemonUnavailable):
            async with serve_http(Echo(), unix_path=sock, body_limit=LIMIT):
                pass
        assert (await client.get("/")).status_code == 200


async def test_a_file_in_the_place_of_the_socket_is_left_alone(echo: Echo, sock: Path) -> None:
    os.mkfifo(sock)
    with pytest.raises(DaemonUnavailable):
        async with serve_http(echo, unix_path=sock, body_limit=LIMIT):
            pass
    assert stat.S_ISFIFO(os.stat(sock).st_mode)


async def test_a_taken_port_is_reported_and_stops_nothing_else(echo: Echo, sock: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        async with serve_http(
            echo, unix_path=sock, tcp=("127.0.0.1", port), token=TOKEN, body_limit=LIMIT
        ) as listeners:
            assert listeners.url is None
            assert listeners.tcp_problem is not None
            assert str(port) in listeners.tcp_problem
            transport = httpx.AsyncHTTPTransport(uds=str(sock))
            async with httpx.AsyncClient(base_url="http://any", transport=transport, timeout=WITHIN) as client:
                assert (await client.get("/")).status_code == 200


async def test_an_address_that_is_no_number_is_reported(echo: Echo) -> None:
    async with serve_http(echo, tcp=("no-such-host.invalid", 0), token=TOKEN, body_limit=LIMIT) as listeners:
        assert listeners.url is None
        assert listeners.tcp_problem is not None


async def test_a_tcp_door_without_a_token_is_not_built(echo: Echo) -> None:
    with pytest.raises(ValueError, match="token"):
        async with serve_http(echo, tcp=("127.0.0.1", 0), body_limit=LIMIT):
            pass


async def test_the_lifespan_runs_once_for_all_listeners(echo: Echo, sock: Path) -> None:
    async with serve_http(echo, unix_path=sock, tcp=("127.0.0.1", 0), token=TOKEN, body_limit=LIMIT):
        assert echo.lifespans == ["lifespan.startup"]
    assert echo.lifespans == ["lifespan.startup", "lifespan.shutdown"]


async def test_signal_handlers_stay_as_they_were(echo: Echo) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with tcp(echo) as client:
        assert (await client.get("/", headers=BEARER)).status_code == 200
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


async def serve_until(echo: Echo, stop: anyio.Event, ready: anyio.Event, found: list[HttpListeners]) -> None:
    async with serve_http(echo, tcp=("127.0.0.1", 0), token=TOKEN, body_limit=LIMIT) as listeners:
        found.append(listeners)
        ready.set()
        await stop.wait()


@pytest.mark.parametrize("path", ["/stream", "/deaf"])
async def test_an_open_stream_does_not_hang_the_shutdown(echo: Echo, path: str) -> None:
    stop, ready, found = anyio.Event(), anyio.Event(), list[HttpListeners]()
    async with anyio.create_task_group() as group:
        group.start_soon(serve_until, echo, stop, ready, found)
        await ready.wait()
        assert found[0].url is not None
        async with (
            httpx.AsyncClient(base_url=found[0].url, trust_env=False, timeout=WITHIN) as client,
            client.stream("GET", path, headers=BEARER) as response,
        ):
            with anyio.fail_after(WITHIN):
                await echo.streaming.wait()
            assert found[0].connections == 1
            stop.set()
            with anyio.fail_after(WITHIN):
                if path == "/stream":
                    assert (await response.aread()).endswith(b"last")
                else:
                    with pytest.raises(httpx.RemoteProtocolError):
                        await response.aread()
    assert found[0].connections == 0
    assert echo.stream_ended is (path == "/stream")


async def test_a_cancelled_server_closes_its_connections_too(echo: Echo, sock: Path) -> None:
    async with anyio.create_task_group() as group:
        ready = anyio.Event()
        group.start_soon(serve_until, echo, anyio.Event(), ready, list[HttpListeners]())
        await ready.wait()
        group.cancel_scope.cancel()
    assert echo.lifespans == ["lifespan.startup", "lifespan.shutdown"]


def test_the_token_is_made_once_and_only_we_can_read_it(tmp_path: Path) -> None:
    made = default_token(tmp_path)
    assert len(made) >= 32
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert default_token(tmp_path) == made


@pytest.mark.parametrize(("content", "mode"), [("", 0o600), ("\n", 0o600), ("short\n", 0o600), ("x" * 40, 0o644)])
def test_a_token_file_that_holds_none_or_is_open_to_others_is_refused(tmp_path: Path, content: str, mode: int) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(StoreUnavailable):
        default_token(tmp_path)
    assert path.read_text() == content


def test_a_token_file_that_is_a_link_a_fifo_or_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    path, other = tmp_path / "token", tmp_path / "other"
    other.write_text("x" * 40)
    other.chmod(0o600)

    def refused() -> None:
        with pytest.raises(StoreUnavailable, match="is a link, no regular file"):
            default_token(tmp_path)

    for target in (other, tmp_path / "not-there"):
        path.symlink_to(target)
        refused()
        path.unlink()
    os.mkfifo(path, 0o600)
    refused()
    path.unlink()
    path.mkdir(mode=0o700)
    refused()
    assert not (tmp_path / "not-there").exists()
