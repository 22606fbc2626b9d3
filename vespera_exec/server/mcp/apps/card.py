"""The live card of a task, for hosts with MCP Apps: one HTML file, and what binds it to the tools that show a task."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Final

from mcp.server.apps import Apps

URI: Final = "ui://vespera/task.html"

TOOL_META: Final[dict[str, Any]] = {"ui": {"resourceUri": URI}}
"""`_meta` of a tool whose result names a task: the host shows the card beside the answer, which stays as it is."""


def card() -> Apps:
    """The extension that serves the card. It loads nothing from anywhere and wants no permissions."""
    apps = Apps()
    apps.add_html_resource(
        URI,
        files(__package__ or __name__).joinpath("card.html").read_text(encoding="utf-8"),
        name="task-card",
        title="Task card",
        description="Progress of a task, live, with a button to cancel it.",
        prefers_border=True,
    )
    return apps
