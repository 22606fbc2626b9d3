"""Named tokens at the door: what they let in, what they refuse, and what their end ends, on real sockets."""

from __future__ import annotations

import json
import logging
import sqlite3
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest
from deadlines import WITHIN
from mcp.shared.exceptions import MCPError
from mcp_doors import eventually
from token_place import LOCAL, Place, bearer, opened

from vespera_exec.server.logs import configure

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

NOTHING = "vsp_0123456789ab_" + "0" * 40
FAR = 10**9
"""A cursor that is not reached: who reads from there waits."""
GATED = {"title": "Wait", "role": "gated"}


@pytest.fixture
async def place(tmp_path: Path, runtime_dir: Path) -> AsyncIterator[Place]:
    async with opened(tmp_path, runtime_dir / "http.sock") as made:
        yield made


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    said: dict[str, Any] = answer.json()
    assert said["error_code"] == code
    return said


# making


async def test_a_token_is_shown_once_and_kept_as_a_digest(place: Place, tmp_path: Path) -> None:
    answer = await place.local.post("/tokens", json={"name": "ci", "scopes": ["read"], "expires_seconds": 3600})
    assert answer.status_code == 201
    made = answer.json()
    assert made["principal"] == "token:ci"
    assert made["scopes"] == ["read"]
    assert made["state"] == "valid"
    assert made["created_by"] == "local"
    listed = (await place.local.get("/tokens")).json()["tokens"]
    assert [{**each, "token": made["token"]} for each in listed] == [made]
    assert (await (await place.by(made["token"])).get("/tasks")).json()["total"] == 0

    secret = made["token"].rpartition("_")[2]
    for file in (tmp_path / "data").rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "Big"},
        {"name": "a b"},
        {"name": "x" * 65},
        {"name": "-x"},
        {"name": "x\n"},
        {"name": "ü"},
        {"name": "default"},
        {"name": "0123456789ab"},
        {"name": "x", "scopes": []},
        {"name": "x", "scopes": ["admin"]},
        {"name": "x", "expires_seconds": 0},
        {"name": "x", "expires_seconds": -1},
        {"name": "x", "expires_seconds": 10**18},
        {"name": "x", "expires_seconds": 1.5},
        {"name": "x", "principal": "local"},
    ],
)
async def test_what_can_be_no_token_is_refused(place: Place, body: dict[str, Any]) -> None:
    assert_problem(await place.local.post("/tokens", json=body), 400, "INVALID_INPUT")
    assert (await place.local.get("/tokens")).json() == {"tokens": []}


async def test_a_name_is_used_once_unless_its_holder_is_given_a_new_token(place: Place) -> None:
    bob = await place.bob("ci")
    task = (await bob.post("/tasks", json={"title": "mine"})).json()
    for _ in ("valid", "revoked"):
        refused = assert_problem(await place.local.post("/tokens", json={"name": "ci"}), 409, "CONFLICT")
        assert "--replace" in refused["hint"]
        assert (await place.local.delete("/tokens/ci")).json()["state"] == "revoked"
    again = await place.by(await place.made("ci", replace=True))
    assert [row["task_id"] for row in (await again.get("/tasks")).json()["tasks"]] == [task["task_id"]]
    newer = await place.by(await place.made("ci", replace=True))
    assert_problem(await again.get("/tasks"), 401, "UNAUTHENTICATED")
    assert (await newer.get("/tasks")).json()["total"] == 1


async def test_two_that_ask_for_one_name_at_once_get_one_token(place: Place) -> None:
    codes: list[int] = []

    async def ask() -> None:
        codes.append((await place.local.post("/tokens", json={"name": "ci"})).status_code)

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(ask)
    assert sorted(codes) == [201] + [409] * 7


async def test_only_the_local_user_makes_lists_and_revokes_tokens(place: Place) -> None:
    bob = await place.bob(scopes=["read", "operate", "worker"])
    for client in (bob, place.user):
        assert_problem(await client.post("/tokens", json={"name": "mine"}), 403, "PERMISSION_DENIED")
        assert_problem(await client.get("/tokens"), 403, "PERMISSION_DENIED")
        assert_problem(await client.delete("/tokens/bob"), 403, "PERMISSION_DENIED")
    assert [each["name"] for each in (await place.local.get("/tokens")).json()["tokens"]] == ["bob"]


# at the door


async def test_who_shows_no_valid_token_is_told_no_more_than_he_knows(place: Place) -> None:
    whole = await place.made("ci")
    wrong = whole[:-1] + ("0" if whole[-1] != "0" else "1")
    said = set[str]()
    for given in ("x", NOTHING, wrong, whole[:-1], whole + "0", whole.upper(), "vsp__", "vsp_" + "x" * 60_000):
        answer = await place.user.get("/tasks", headers=bearer(given))
        said.add(assert_problem(answer, 401, "UNAUTHENTICATED")["detail"])
        assert answer.headers["www-authenticate"] == "Bearer"
    assert len(said) == 1
    for header in (whole, f"Basic {whole}", f"Bearer {whole} {whole}", f"Bearer{whole}", f"Token {whole}"):
        assert_problem(await place.user.get("/tasks", headers={"Authorization": header}), 401, "UNAUTHENTICATED")
    twice = httpx.Headers([("Authorization", f"Bearer {whole}"), ("Authorization", f"Bearer {whole}")])
    async with httpx.AsyncClient(base_url=place.url, trust_env=False, timeout=WITHIN) as http:
        assert_problem(await http.get("/tasks", headers=twice), 401, "UNAUTHENTICATED")
        assert (await http.get("/tasks", headers={"Authorization": "Bearer " + "x" * 200_000})).status_code >= 400
        assert (await http.get("/tasks", headers=bearer(whole))).status_code == 200


async def test_a_token_that_was_good_is_told_why_it_is_not(place: Place) -> None:
    gone, brief = await place.made("gone"), await place.made("brief", expires_seconds=1)
    await place.vespera.access.revoke(LOCAL, "gone")
    answer = await place.user.get("/tasks", headers=bearer(gone))
    assert "revoked" in assert_problem(answer, 401, "UNAUTHENTICATED")["detail"]
    with anyio.fail_after(WITHIN):
        while (answer := await place.user.get("/tasks", headers=bearer(brief))).is_success:  # noqa: ASYNC110
            await anyio.sleep(0.02)
    assert "expired" in assert_problem(answer, 401, "UNAUTHENTICATED")["detail"]
    states = {each["name"]: each["state"] for each in (await place.local.get("/tokens")).json()["tokens"]}
    assert states == {"gone": "revoked", "brief": "expired"}


async def test_who_was_let_in_before_the_end_of_his_token_is_told_the_same_as_who_comes_after_it(place: Place) -> None:
    answers = dict[str, httpx.Response]()

    async def wait(name: str, token: str) -> None:
        answers[name] = await place.user.post("/worker/claim", json={"wait_ms": 25_000}, headers=bearer(token))

    async with anyio.create_task_group() as group:
        group.start_soon(wait, "gone", await place.made("gone", scopes=["worker"]))
        await eventually(lambda: bool(place.vespera.workers.waiting))
        group.start_soon(wait, "brief", await place.made("brief", scopes=["worker"], expires_seconds=1))
        await place.vespera.access.revoke(LOCAL, "gone")
    for name, end in (("gone", "was revoked"), ("brief", "has expired")):
        assert assert_problem(answers[name], 401, "UNAUTHENTICATED")["detail"] == f"The token {name} {end}"


async def test_a_token_in_an_address_is_refused_whoever_sends_it(place: Place) -> None:
    whole = await place.made("ci")
    async with httpx.AsyncClient(base_url=place.url, trust_env=False, timeout=WITHIN) as stranger:
        for query in (f"token={whole}", f"access_token={whole}", whole, f"a={whole}"):
            assert_problem(await stranger.get(f"/tasks?{query}"), 401, "UNAUTHENTICATED")
            for token in (whole, place.user.headers["authorization"].partition(" ")[2]):
                answer = await stranger.get(f"/tasks?{query}", headers=bearer(token))
                assert_problem(answer, 400, "INVALID_INPUT")
                assert whole not in answer.text


@pytest.mark.promise("masked")
async def test_no_log_line_shows_a_token(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = await place.made("ci")
    root = logging.getLogger()
    before = root.handlers, root.level
    try:
        configure("debug", file=tmp_path / "log")
        logging.getLogger("x").warning("asked for /tasks?token=%s", whole, extra={"also": whole})
        await place.user.get(f"/tasks?token={whole}", headers=bearer(whole))
    finally:
        for handler in set(root.handlers) - set(before[0]):
            handler.close()
        root.handlers, _ = before
        root.setLevel(before[1])
    said = (tmp_path / "log").read_text() + capsys.readouterr().err
    assert "asked for /tasks?token=***" in said
    assert whole not in said


# scopes


REFUSED_WITHOUT = {
    "read": [("GET", "/tasks"), ("GET", "/roles"), ("GET", "/inputs")],
    "operate": [("POST", "/tasks"), ("POST", "/executions")],
}


async def test_what_lies_outside_a_scope_is_refused_by_its_name(place: Place) -> None:
    worker, reader = await place.bob("worker", scopes=["worker"]), await place.bob("reader", scopes=["read"])
    for client, scope in ((worker, "read"), (worker, "operate"), (reader, "operate")):
        for method, path in REFUSED_WITHOUT[scope]:
            body = GATED if path == "/executions" else {"title": "t"}
            answer = await client.request(method, path, json=body if method == "POST" else None)
            refused = assert_problem(answer, 403, "PERMISSION_DENIED")
            assert f"--scope {scope}" in refused["hint"]
    task = (await reader.get("/tasks")).json()
    assert task["total"] == 0


async def test_who_may_start_may_also_look(place: Place) -> None:
    bob = await place.bob(scopes=["operate"])
    handle = (await bob.post("/executions", json=GATED)).json()
    assert (await bob.get(f"/tasks/{handle['task_id']}")).json()["executing"] is True
    assert (await place.local.get("/tokens")).json()["tokens"][0]["scopes"] == ["operate", "read"]


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume", "inputs"])
async def test_a_reader_changes_nothing_of_his_own_name(place: Place, verb: str) -> None:
    bob = await place.bob()
    handle = (await bob.post("/executions", json=GATED)).json()
    reader = await place.bob("bob", replace=True, scopes=["read"])
    body = {"answers": {"k": {"action": "accept"}}} if verb == "inputs" else {}
    refused = await reader.post(f"/tasks/{handle['task_id']}/{verb}", json=body)
    assert_problem(refused, 403, "PERMISSION_DENIED")
    assert (await reader.get(f"/tasks/{handle['task_id']}")).json()["executing"] is True


async def test_a_tool_outside_the_scope_says_so_in_its_result(place: Place) -> None:
    async with place.agent(await place.made("reader", scopes=["read"])) as agent:
        refused = await agent.call_tool("execute_task", GATED)
        assert refused.is_error
        assert refused.structured_content is not None
        assert refused.structured_content["error_code"] == "PERMISSION_DENIED"
        assert "--scope operate" in refused.structured_content["hint"]
        allowed = await agent.call_tool("list_tasks", {})
        assert not allowed.is_error


# the end of a token


@asynccontextmanager
async def ending_at_once(place: Place, name: str = "bob") -> AsyncGenerator[None]:
    """The block ends with the token, and would not without that."""
    await place.vespera.access.revoke(LOCAL, name)
    with anyio.fail_after(WITHIN):
        yield


@pytest.mark.promise("revoked")
async def test_a_revoked_token_ends_its_event_stream(place: Place) -> None:
    bob = await place.bob()
    task_id = (await bob.post("/executions", json=GATED)).json()["task_id"]
    async with bob.stream("GET", f"/tasks/{task_id}/events", headers={"Accept": "text/event-stream"}) as stream:
        lines = stream.aiter_lines()
        while not (await anext(lines)).startswith("id:"):
            pass
        async with ending_at_once(place):
            rest = [line async for line in lines]
    assert "event: done" not in rest
    assert_problem(await bob.get(f"/tasks/{task_id}"), 401, "UNAUTHENTICATED")
    assert (await place.user.get(f"/tasks/{task_id}")).json()["executing"] is True


@pytest.mark.promise("revoked")
async def test_a_revoked_token_ends_its_long_poll(place: Place) -> None:
    bob = await place.bob()
    handle = (await bob.post("/executions", json=GATED)).json()
    path = f"/tasks/{handle['task_id']}/events"
    answers: list[httpx.Response] = []

    async def poll() -> None:
        answers.append(await bob.get(path, params={"cursor": FAR, "wait_ms": 25_000}))

    async with anyio.create_task_group() as group:
        group.start_soon(poll)
        await eventually(lambda: following(place))
        async with ending_at_once(place):
            await eventually(lambda: bool(answers))
    assert_problem(answers[0], 401, "UNAUTHENTICATED")


def following(place: Place) -> bool:
    """Somebody waits for news of a task."""
    return place.vespera._store.feed.followers() > 0  # pyright: ignore[reportPrivateUsage]


@pytest.mark.promise("revoked")
async def test_a_token_whose_time_is_over_ends_its_streams_too(place: Place) -> None:
    task_id = (await (await place.bob()).post("/executions", json=GATED)).json()["task_id"]
    bob = await place.bob("bob", replace=True, expires_seconds=1)
    with anyio.fail_after(WITHIN):
        async with bob.stream("GET", f"/tasks/{task_id}/events", headers={"Accept": "text/event-stream"}) as stream:
            rest = [line async for line in stream.aiter_lines()]
    assert "event: done" not in rest


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.promise("revoked")
async def test_a_revoked_token_ends_its_mcp_call_and_its_session(place: Place, mode: str) -> None:
    token = await place.made("bob")
    over = anyio.Event()

    async def follow() -> None:
        async with place.agent(token, mode=mode) as agent:
            handle = (await agent.call_tool("execute_task", GATED)).structured_content
            assert handle is not None
            asked = {"task_id": handle["task_id"], "cursor": FAR, "wait_ms": 25_000}
            await agent.call_tool("stream_task_execution_events", asked)

    async def fail() -> None:
        with pytest.RaisesGroup(MCPError, flatten_subgroups=True):
            await follow()
        over.set()

    async with anyio.create_task_group() as group:
        group.start_soon(fail)
        await eventually(lambda: following(place))
        async with ending_at_once(place):
            await over.wait()
            await eventually(lambda: not following(place))


@pytest.mark.promise("revoked")
async def test_a_revoked_token_ends_its_sse_session(place: Place) -> None:
    token = await place.made("bob")
    async with httpx.AsyncClient(base_url=place.url, headers=bearer(token), trust_env=False, timeout=WITHIN) as bob:
        async with bob.stream("GET", "/sse") as stream:
            lines = stream.aiter_lines()
            while not (line := await anext(lines)).startswith("data:"):
                pass
            async with ending_at_once(place):
                _ = [line async for line in lines]
        hello = await bob.post(line.removeprefix("data:").strip(), json={"jsonrpc": "2.0", "id": 1, "method": "ping"})
        assert hello.status_code == 401


@pytest.mark.promise("revoked")
async def test_a_new_token_of_the_name_does_not_get_the_old_session(place: Place) -> None:
    """Else a session that was opened with more scopes would keep them."""
    hello = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "0"}},
    }
    both = {"Accept": "application/json, text/event-stream"}
    bob = await place.bob()
    session = (await bob.post("/mcp", json=hello, headers=both)).headers["mcp-session-id"]
    reader = await place.bob("bob", replace=True, scopes=["read"])
    call = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "execute_task", "arguments": GATED}}
    answer = await reader.post("/mcp", json=call, headers={**both, "mcp-session-id": session})
    assert answer.status_code == 404
    assert (await reader.get("/tasks")).json()["total"] == 0


# what is kept


async def test_tokens_outlive_a_restart_and_so_does_their_end(tmp_path: Path, runtime_dir: Path) -> None:
    sock = runtime_dir / "http.sock"
    async with opened(tmp_path, sock) as place:
        kept, gone = await place.made("kept"), await place.made("gone")
        assert (await (await place.by(kept)).get("/tasks")).is_success
        await place.vespera.access.revoke(LOCAL, "gone")
    async with opened(tmp_path, sock) as place:
        assert (await (await place.by(kept)).get("/tasks")).is_success
        assert_problem(await (await place.by(gone)).get("/tasks"), 401, "UNAUTHENTICATED")
        listed = {each.name: each for each in place.vespera.access.listed(LOCAL).tokens}
        assert listed["kept"].last_used_at is not None
        assert listed["gone"].last_used_at is None


async def test_a_copied_directory_brings_no_tokens_with_it(tmp_path: Path, runtime_dir: Path) -> None:
    """What comes with a cloned repository may have been made by anybody, with a token that he knows."""
    sock = runtime_dir / "http.sock"
    async with opened(tmp_path, sock) as place:
        token = await place.made("planted")
        task = (await (await place.by(token)).post("/tasks", json={"title": "mine"})).json()
    (tmp_path / "clone").mkdir()
    (tmp_path / "data").rename(tmp_path / "clone" / "data")
    for file in (tmp_path / "clone" / "data").iterdir():  # a copy has other inodes, the rename keeps that of the folder
        if file.name == "instance":
            file.write_text("0123456789abcdef0123456789abcdef\n")
    async with opened(tmp_path / "clone", sock) as place:
        assert_problem(await (await place.by(token)).get("/tasks"), 401, "UNAUTHENTICATED")
        assert_problem(await place.local.post("/tokens", json={"name": "planted"}), 409, "CONFLICT")
        assert (await place.local.get(f"/tasks/{task['task_id']}")).is_success


async def test_a_backup_holds_no_token_that_could_be_used(place: Place, tmp_path: Path) -> None:
    await place.made("ci")
    copy = tmp_path / "copy.db"
    assert (await place.local.post("/backup", json={"path": str(copy)})).status_code == 201
    with closing(sqlite3.connect(copy)) as connection:
        rows = connection.execute("SELECT name, digest, revoked IS NULL FROM tokens").fetchall()
    assert rows == [("ci", b"", 0)]


async def test_the_holder_of_a_token_learns_of_the_server_what_concerns_him(place: Place) -> None:
    await place.user.post("/executions", json=GATED)
    whole = (await place.user.get("/daemon")).json()
    assert whole["work"][0]["title"] == "Wait"
    bob = await place.bob()
    seen = (await bob.get("/daemon")).json()
    assert seen == {
        "version": whole["version"],
        "url": whole["url"],
        "principal": "token:bob",
        "scopes": ["operate", "read"],
    }


async def test_what_work_writes_of_a_token_is_masked(place: Place) -> None:
    """The token came from somewhere; the engine knows it by its form alone."""
    token = await place.made("ci")
    script = f"print({json.dumps(token[:30])}, end='', flush=True); print({json.dumps(token[30:])}); print('end')"
    asked = {"title": "t", "role": "command", "inputs": {"argv": ["python3", "-c", script]}, "wait_ms": 25_000}
    handle = (await place.local.post("/executions", json=asked)).json()
    output = (await place.local.get(f"/tasks/{handle['task_id']}/output")).json()["text"]
    assert output == "***\nend\n"
