"""Ready configurations for MCP clients, and how they start this installation."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.model.events import Json

NAME = "vespera-exec"
ClientName = Literal["claude-code", "cursor", "vscode", "generic"]

EXAMPLE: Mapping[str, Json] = {
    # Claude Code defers a server's tools behind a search unless told otherwise; others ignore the key.
    "mcpServers": {NAME: {"command": NAME, "args": [], "alwaysLoad": True}}
}
"""What `mcp.json.example` holds."""

_WHERE = {
    "claude-code": ".mcp.json in the project, or ~/.claude.json",
    "cursor": ".cursor/mcp.json in the project, or ~/.cursor/mcp.json",
    "vscode": ".vscode/mcp.json in the project",
    "generic": "the client's MCP configuration",
}


def executable() -> list[str]:
    """The command that starts this installation, with an absolute path, whatever PATH says."""
    beside = Path(sys.executable).parent / NAME
    if os.access(beside, os.X_OK):
        return [str(beside)]
    if found := shutil.which(NAME):
        return [os.path.abspath(found)]
    return [sys.executable, "-P", "-c", "import sys; from vespera_exec.cli.entry import main; sys.exit(main())"]


def stdio_config(client: ClientName, *, data_dir: Path | None = None) -> dict[str, Json]:
    """Starts the server as the client's child. `data_dir` pins its data directory; else it depends on the folder."""
    command, *args = executable()
    server: dict[str, Json] = {"command": command, "args": args}
    if data_dir is not None:
        server["env"] = {"VESPERA_DATA_DIR": str(data_dir)}
    if client == "vscode":
        server = {"type": "stdio", **server}
    return _wrapped(client, server)


def http_config(client: ClientName, *, url: str, token: str) -> dict[str, Json]:
    """Connects to the running daemon. `url` is its base."""
    server: dict[str, Json] = {"url": f"{url.rstrip('/')}/mcp", "headers": {"Authorization": f"Bearer {token}"}}
    if client != "cursor":
        server = {"type": "http", **server}
    return _wrapped(client, server)


def where(client: ClientName) -> str:
    """The file that the configuration belongs into."""
    return _WHERE[client]


def _wrapped(client: ClientName, server: dict[str, Json]) -> dict[str, Json]:
    if client == "claude-code":
        server["alwaysLoad"] = True
    return {"servers" if client == "vscode" else "mcpServers": {NAME: server}}
