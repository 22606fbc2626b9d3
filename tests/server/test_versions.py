"""Two versions on one data directory: an older daemon that nobody uses goes for a newer client, a busy one stays."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from daemon_place import Place, call, ends
from deadlines import WITHIN
from echo_place import eventually

import vespera_exec
from vespera_exec import __version__, paths

if TYPE_CHECKING:
    from collections.abc import Iterator

OLDER = "0.0.9"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Its daemons that are started with `start` are of an older version: the same code, but for the number."""
    ours = Path(vespera_exec.__file__).parent
    older = tmp_path / "older"
    (older / "vespera_exec").mkdir(parents=True)
    for each in (ours.parent / "roles", *ours.iterdir()):
        if each.name not in ("__init__.py", "__pycache__"):
            (older / each.relative_to(ours.parent)).symlink_to(each)
    text = (ours / "__init__.py").read_text()
    assert f'"{__version__}"' in text
    (older / "vespera_exec" / "__init__.py").write_text(text.replace(f'"{__version__}"', f'"{OLDER}"'))
    with Place(tmp_path) as place:
        place.environ["PYTHONPATH"] = str(older)
        place.start()
        del place.environ["PYTHONPATH"]
        yield place


def greeted(place: Place, **preamble: object) -> dict[str, Any]:
    """The daemon's answer to a first line."""
    path, _ = paths.socket_paths(place.data_dir, place.environ)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.settimeout(WITHIN)
        made.connect(str(path))
        made.sendall(json.dumps(preamble).encode() + b"\n")
        return json.loads(made.makefile("rb").readline())


def test_an_idle_older_daemon_goes_and_the_bridge_starts_its_own_version(place: Place) -> None:
    older = place.started[0]
    assert place.ask("/daemon")["version"] == OLDER
    with place.client() as client:
        assert call(client, "list_roles")["roles"]
        assert place.ask("/daemon")["version"] == __version__
        code, said = client.close()
    assert (code, f"was version {OLDER}; it yields" in said) == (0, True)
    assert older.wait(WITHIN) == 0


def test_an_older_daemon_with_work_stays_and_is_named(place: Place) -> None:
    work = place.work()
    with place.http() as http:
        body = {"title": "work", "role": "command", "inputs": {"argv": work.argv}}
        assert http.post("/executions", json=body).status_code == 202
    work.pids()
    with place.client() as client:
        assert call(client, "list_tasks")["total"] == 1
        assert place.ask("/daemon")["version"] == OLDER
        _, said = client.close()
    assert f"is version {OLDER}, this is {__version__}; it is in use" in said
    assert not ends(place.started[0].pid, within=0.1)
    work.let_go()


def test_an_older_daemon_that_serves_another_client_stays(place: Place) -> None:
    answer = greeted(place, vespera=1, version=OLDER)
    assert "yields" not in answer
    path, _ = paths.socket_paths(place.data_dir, place.environ)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.connect(str(path))
        other.sendall(json.dumps({"vespera": 1, "version": OLDER}).encode() + b"\n")
        assert other.recv(4096)
        assert eventually(lambda: place.ask("/daemon")["connections"] >= 1)
        assert "yields" not in greeted(place, vespera=1, version=__version__)


def test_another_protocol_is_refused_with_both_versions(place: Place) -> None:
    work = place.work()
    with place.http() as http:
        body = {"title": "work", "role": "command", "inputs": {"argv": work.argv}}
        assert http.post("/executions", json=body).status_code == 202
    answer = greeted(place, vespera=2, version="9.9.9")
    assert OLDER in answer["error"]["error"]
    assert "9.9.9" in answer["error"]["error"]
    assert "daemon stop" in answer["error"]["hint"]
    work.let_go()
