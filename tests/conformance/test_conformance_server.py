"""The server of the conformance suite itself: that it is there when it says so, and gone when it should be."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    import pytest

WITHIN = 60
DISCOVER: dict[str, Any] = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "server/discover",
    "params": {
        "_meta": {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientCapabilities": {},
        }
    },
}
HEADERS = {
    "Accept": "application/json, text/event-stream",
    "MCP-Protocol-Version": "2026-07-28",
    "Mcp-Method": "server/discover",
}


@contextmanager
def conformance_server(root: Path) -> Generator[tuple[subprocess.Popen[str], str]]:
    """The process, and its URL."""
    argv = [sys.executable, "-m", "tests.conformance", "--port", "0"]
    with subprocess.Popen(argv, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = _piped(process.stdout).readline()
            assert line.startswith("ready ")
            yield process, line.split()[1]
        finally:
            process.terminate()


def test_it_offers_the_tasks_extension_and_ends_with_its_stdin(pytestconfig: pytest.Config) -> None:
    with conformance_server(pytestconfig.rootpath) as (process, url):
        answer = httpx.post(url, json=DISCOVER, headers=HEADERS, timeout=WITHIN)
        assert "io.modelcontextprotocol/tasks" in answer.text

        _piped(process.stdin).close()
        assert process.wait(WITHIN) == 0


def test_it_refuses_another_host_and_ends_on_sigterm(pytestconfig: pytest.Config) -> None:
    with conformance_server(pytestconfig.rootpath) as (process, url):
        answer = httpx.post(url, json=DISCOVER, headers=HEADERS | {"Host": "evil.example"}, timeout=WITHIN)
        assert answer.status_code == 403

        process.send_signal(signal.SIGTERM)
        assert process.wait(WITHIN) == 0


def _piped(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
