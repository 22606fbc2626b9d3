"""The configurations that are printed for MCP clients."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vespera_exec.cli import config


def test_the_example_in_the_repository_is_the_one_that_the_demo_uses() -> None:
    example = Path(__file__).parents[2] / "mcp.json.example"
    assert json.loads(example.read_text(encoding="utf-8")) == config.EXAMPLE


def test_the_command_is_absolute_and_exists() -> None:
    command, *arguments = config.executable()
    assert os.path.isabs(command)
    assert os.access(command, os.X_OK)
    assert arguments == []


def test_each_client_gets_its_own_shape() -> None:
    command = config.executable()[0]
    server: dict[str, Any] = {"command": command, "args": []}
    assert config.stdio_config("generic") == {"mcpServers": {"vespera-exec": server}}
    assert config.stdio_config("cursor") == {"mcpServers": {"vespera-exec": server}}
    assert config.stdio_config("claude-code") == {"mcpServers": {"vespera-exec": {**server, "alwaysLoad": True}}}
    assert config.stdio_config("vscode") == {"servers": {"vespera-exec": {"type": "stdio", **server}}}


def test_a_named_data_directory_is_pinned(tmp_path: Path) -> None:
    made = config.stdio_config("generic", data_dir=tmp_path)
    assert made["mcpServers"]["vespera-exec"]["env"] == {"VESPERA_DATA_DIR": str(tmp_path)}


def test_by_url_the_token_goes_into_a_header() -> None:
    made = config.http_config("vscode", url="http://127.0.0.1:8000/", token="secret")
    assert made == {
        "servers": {
            "vespera-exec": {
                "type": "http",
                "url": "http://127.0.0.1:8000/mcp",
                "headers": {"Authorization": "Bearer secret"},
            }
        }
    }
    assert "type" not in config.http_config("cursor", url="http://h", token="t")["mcpServers"]["vespera-exec"]
