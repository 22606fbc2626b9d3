"""A daemon imports the MCP SDK with its first MCP client, and never for anybody else."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import httpx
import pytest
from daemon_place import Place, call, ends
from deadlines import WITHIN
from echo_place import HELLO, eventually
from mcp import Client
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

import vespera_exec
from vespera_exec import paths
from vespera_exec.app.service import Vespera
from vespera_exec.server.launch import accepts
from vespera_exec.server.mcp.door import mcp_door
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

_IMPORT = re.compile(r"^import time:[^|]*\|[^|]*\| +(\S+)$", re.MULTILINE)
JSON_SSE = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        yield place


@dataclass(frozen=True, slots=True)
class Told:
    """A daemon that tells what it imports."""

    process: subprocess.Popen[str]
    stderr: Path

    def imports(self, package: str) -> bool:
        """It has imported something of it by now."""
        return any(name.split(".")[0] == package for name in _IMPORT.findall(self.stderr.read_text()))


def telling(place: Place, *more: str) -> Told:
    """Ready."""
    argv = [sys.executable, "-X", "importtime", "-P", "-m", "vespera_exec.server.daemon"]
    said = place.folder / "said"
    with said.open("w") as stderr:
        daemon = subprocess.Popen(
            [*argv, "--data-dir", str(place.data_dir), *more], stderr=stderr, text=True, env=place.environ
        )
    place.started.append(daemon)
    socket_path, _ = paths.socket_paths(place.data_dir, place.environ)
    assert eventually(lambda: accepts(socket_path) or daemon.poll() is not None)
    return Told(daemon, said)


def shadow(place: Place, body: str) -> Path:
    """A folder with a package `mcp` that daemons find before the real one; its `__init__` is `body`."""
    folder = place.folder / "shadow"
    (folder / "mcp").mkdir(parents=True)
    (folder / "mcp" / "__init__.py").write_text(body)
    place.environ["PYTHONPATH"] = str(folder)
    return folder


def slow(place: Place) -> tuple[Path, Path]:
    """The import of `mcp` touches the first file, and goes on when somebody writes to the second."""
    begun, go = place.folder / "begun", place.folder / "go"
    os.mkfifo(go)
    shadow(
        place,
        f"""
import importlib, sys
open({str(begun)!r}, "w").close()
open({str(go)!r}).read()
sys.path.remove({str(place.folder / "shadow")!r})
del sys.modules["mcp"]
importlib.import_module("mcp")
""",
    )
    return begun, go


def url_of(place: Place) -> str:
    url = place.ask("/daemon")["url"]
    assert isinstance(url, str)
    return url


def bearer(place: Place) -> dict[str, str]:
    return {"Authorization": f"Bearer {(place.data_dir / 'token').read_text().strip()}"}


def cli(place: Place, *arguments: str) -> str:
    argv = [sys.executable, "-P", "-c", "import sys; from vespera_exec.cli.entry import main; sys.exit(main())"]
    done = subprocess.run([*argv, *arguments], env=place.environ, capture_output=True, text=True, timeout=WITHIN)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_who_speaks_no_mcp_or_may_not_come_in_has_the_daemon_import_none_of_it(place: Place) -> None:
    daemon = telling(place)
    assert cli(place, "run", "--", "echo", "hello") == "hello\n"
    assert "echo hello" in cli(place, "list")
    with httpx.Client(base_url=url_of(place), trust_env=False, timeout=WITHIN) as stranger:
        assert stranger.post("/mcp", json=HELLO, headers=JSON_SSE).status_code == 401
        assert stranger.get("/sse").status_code == 401
        assert stranger.post("/messages/", json=HELLO).status_code == 401
        elsewhere = stranger.post("/mcp", json=HELLO, headers=bearer(place) | {"Host": "elsewhere.example"})
        assert elsewhere.status_code == 403
    assert daemon.imports("starlette")
    assert not daemon.imports("mcp")
    assert not daemon.imports("mcp_types")

    with place.client() as client:
        assert call(client, "list_roles")["roles"]
    assert daemon.imports("mcp")


def test_a_daemon_that_a_bridge_starts_is_told_to_be_ready_for_it(place: Place) -> None:
    with place.client() as client:
        assert call(client, "list_roles")["roles"]
        (pid,) = place.served_by()
        assert b"--expect-mcp" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_daemon_that_expects_an_mcp_client_does_not_wait_for_it_to_import(place: Place) -> None:
    daemon = telling(place, "--expect-mcp")
    assert eventually(lambda: daemon.imports("mcp"))


async def test_clients_that_come_at_once_by_every_door_open_a_cold_daemon(place: Place) -> None:
    begun, go = slow(place)
    place.start()
    url, mine = url_of(place), bearer(place)
    heard: list[int] = []

    async def over_http() -> None:
        async with (
            create_mcp_http_client(headers=mine) as http,
            Client(streamable_http_client(f"{url}/mcp", http_client=http)) as client,
        ):
            heard.append(len((await client.list_tools()).tools))

    async def over_sse() -> None:
        async with Client(sse_client(f"{url}/sse", headers=mine), mode="legacy") as client:
            heard.append(len((await client.list_tools()).tools))

    def over_the_socket() -> None:
        with place.client() as client:
            heard.append(len(client.call("tools/list")["tools"]))

    with anyio.fail_after(WITHIN):
        async with anyio.create_task_group() as group:
            group.start_soon(over_http)
            group.start_soon(over_sse)
            for _ in range(2):
                group.start_soon(anyio.to_thread.run_sync, over_the_socket)
            await anyio.to_thread.run_sync(eventually, begun.exists)
            assert place.ask("/healthz") == {"status": "ok"}  # other doors answer meanwhile
            assert heard == []
            await anyio.to_thread.run_sync(go.write_text, "now")
    assert len(heard) == 4
    assert len(set(heard)) == 1


async def test_many_who_come_at_once_share_one_opening(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mcp.server.streamable_http_manager")
    settings = Settings.load({"HOME": str(tmp_path)}, data_dir=tmp_path / "data", roles_dir=tmp_path / "roles")
    statuses: list[int] = []
    async with Vespera.open(settings=settings) as vespera, mcp_door(vespera) as door:
        transport = httpx.ASGITransport(app=door)
        async with httpx.AsyncClient(transport=transport, base_url="http://door", timeout=WITHIN) as http:

            async def greet() -> None:
                statuses.append((await http.post("/mcp", json=HELLO, headers=JSON_SSE)).status_code)

            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(greet)
    assert statuses == [200] * 4
    assert [record.getMessage() for record in caplog.records].count("StreamableHTTP session manager started") == 1


def test_what_cannot_be_imported_is_told_and_tried_again_for_the_next_request(place: Place) -> None:
    folder = shadow(place, "raise ImportError('broken on purpose')")
    daemon = place.start()
    with place.client(greet=False) as client, place.http() as http:
        client.send(HELLO)
        error = client.read()["error"]
        assert "ImportError: broken on purpose" in error["message"]
        assert (error["data"]["error_code"], error["data"]["retriable"]) == ("DAEMON_UNAVAILABLE", True)
        answer = http.post("/mcp", json=HELLO, headers=JSON_SSE)
        assert (answer.status_code, answer.json()["error_code"]) == (503, "DAEMON_UNAVAILABLE")
        assert "broken on purpose" in answer.json()["detail"]
        assert "broken on purpose" in (place.data_dir / paths.DAEMON_LOG).read_text()
        assert daemon.poll() is None

        shutil.rmtree(folder / "mcp")
        client.send({**HELLO, "id": 1})
        assert client.read()["result"]["serverInfo"]["name"] == "vespera-exec"
        assert call(client, "list_roles")["roles"]
        assert http.post("/mcp", json=HELLO, headers=JSON_SSE).status_code == 200


def test_a_daemon_that_is_stopped_while_it_imports_goes_in_order(place: Place) -> None:
    begun, go = slow(place)
    daemon = place.start()
    socket_path, _ = paths.socket_paths(place.data_dir, place.environ)
    with place.client(greet=False) as client:
        client.send(HELLO)
        assert eventually(begun.exists)
        daemon.send_signal(signal.SIGTERM)
        assert eventually(lambda: not os.path.lexists(socket_path))
        client.end_input()
        assert eventually(lambda: '"event":"stopped"' in (place.data_dir / paths.DAEMON_LOG).read_text())
    go.write_text("now")  # a thread cannot be cut off in an import
    assert ends(daemon.pid, within=WITHIN)
    assert daemon.wait() == 0


def test_a_daemon_whose_code_was_replaced_says_so_instead_of_importing_the_rest(place: Place) -> None:
    ours = Path(vespera_exec.__file__).parent.parent
    for package in ("vespera_exec", "roles"):
        shutil.copytree(ours / package, place.folder / "own" / package, ignore=shutil.ignore_patterns("__pycache__"))
    place.environ["PYTHONPATH"] = str(place.folder / "own")
    place.start()
    (place.folder / "own" / "vespera_exec" / "__init__.py").touch()
    with place.client(greet=False) as client:
        client.send(HELLO)
        error: dict[str, Any] = client.read()["error"]
        assert "installed since" in error["message"]
        assert "daemon stop" in error["data"]["hint"]
        assert place.ask("/tasks")["tasks"] == []
