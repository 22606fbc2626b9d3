"""The configurations in docs/clients.md: each is read as its client reads it, and each way in is really taken."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import pytest
from deadlines import WITHIN
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

from vespera_exec.cli import config

if TYPE_CHECKING:
    from cli_harness import Cli

DOC = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^<!-- config: (stdio|http) -->\n```(json|toml)\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
CLIENTS = ("Claude Code", "Claude Desktop", "VS Code", "Cursor", "Codex", "Gemini CLI", "opencode")


class Given(NamedTuple):
    """The entry of our server in the configuration of a client."""

    client: str
    way: str
    entry: dict[str, Any]


def configurations() -> list[Given]:
    found: list[Given] = []
    for section in re.split(r"^## ", DOC, flags=re.MULTILINE)[1:]:
        client = section.splitlines()[0]
        for way, language, text in FENCE.findall(section):
            document = json.loads(text) if language == "json" else tomllib.loads(text)
            (servers,) = (value for name, value in document.items() if name != "inputs")
            assert servers.keys() == {"vespera-exec"}
            found.append(Given(client, way, servers["vespera-exec"]))
    return found


GIVEN = configurations()


def command_of(entry: dict[str, Any]) -> list[str]:
    """With its arguments; one client has both in one list."""
    command: str | list[str] = entry["command"]
    return [command, *entry["args"]] if isinstance(command, str) else command


def test_every_client_has_a_configuration_and_all_but_one_also_by_url() -> None:
    assert tuple(given.client for given in GIVEN if given.way == "stdio") == CLIENTS
    by_url = {given.client for given in GIVEN if given.way == "http"}
    assert set(CLIENTS) - by_url == {"Claude Desktop"}
    assert len(re.findall(r"^```(json|toml)$", DOC, re.MULTILINE)) == len(GIVEN), "no fence without its mark"
    rows = re.findall(r"^\| ([A-Za-z ]+?)(?: [\d.]+)? \|", DOC, re.MULTILINE)
    assert tuple(rows) == CLIENTS


def test_what_the_program_prints_itself_is_what_the_page_says() -> None:
    printed: dict[str, config.ClientName] = {"Claude Code": "claude-code", "Cursor": "cursor", "VS Code": "vscode"}
    for client, name in printed.items():
        (stdio,) = (given.entry for given in GIVEN if given[:2] == (client, "stdio"))
        (made,) = config.stdio_config(name)["mcpServers" if name != "vscode" else "servers"].values()
        assert made | {"command": "vespera-exec"} == stdio


@pytest.mark.parametrize("command", sorted({tuple(command_of(given.entry)) for given in GIVEN if given.way == "stdio"}))
async def test_each_command_starts_the_server(command: tuple[str, ...], cli: Cli) -> None:
    path = f"{Path(config.executable()[0]).parent}:{cli.environ['PATH']}"
    started = StdioServerParameters(
        command=command[0], args=[*command[1:]], env=cli.environ | {"PATH": path}, cwd=cli.cwd
    )
    with anyio.fail_after(WITHIN):
        async with Client(stdio_client(started)) as client:
            assert "execute_task" in {tool.name for tool in (await client.list_tools()).tools}


async def test_each_url_and_header_reaches_the_daemon_with_the_token(cli: Cli) -> None:
    assert cli.run("daemon", "start").returncode == 0
    base = cli.json("daemon", "status")["daemon"]["url"]
    token = cli.run("token", "--show").stdout.strip()
    ways: set[tuple[str, str]] = set()
    for given in GIVEN:
        if given.way == "stdio":
            continue
        url: str = given.entry.get("url") or given.entry["httpUrl"]
        header = given.entry.get("headers", {"Authorization": f"Bearer ${given.entry.get('bearer_token_env_var')}"})
        assert re.fullmatch(
            r"Bearer (\$\{?|\{)((input|env):)?(VESPERA_TOKEN|vespera-token)\}?", header["Authorization"]
        )
        ways.add((url.replace("http://127.0.0.1:8765", base), f"Bearer {token}"))
    for url, authorization in ways:
        async with (
            create_mcp_http_client(headers={"Authorization": authorization}) as http,
            Client(streamable_http_client(url, http_client=http)) as client,
        ):
            assert "execute_task" in {tool.name for tool in (await client.list_tools()).tools}
