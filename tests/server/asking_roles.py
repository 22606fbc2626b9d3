"""Work that asks its user something, and a client's host that answers as it is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from mcp_doors import in_loop
from mcp_types import ElicitRequestFormParams, ElicitResult

FORM = {
    "type": "object",
    "properties": {
        "target": {"type": "string", "enum": ["staging", "production"]},
        "copies": {"type": "integer", "minimum": 1, "maximum": 5, "default": 1},
    },
    "required": ["target"],
}

# A process that asks, and is started again when it was answered; each start leaves a line in the file that is named.
_PROCESS = """
import json, os, sys
with open(sys.argv[1], "a") as starts:
    starts.write("started\\n")
task = json.load(open(os.environ["VESPERA_TASK_FILE"]))
out = os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w")
if "where" in task["answers"]:
    out.write(json.dumps({"result": task["answers"]["where"]}) + "\\n")
else:
    out.write(json.dumps({"ask": {"key": "where", "message": "Where to?", "schema": FORM}}) + "\\n")
"""

if TYPE_CHECKING:
    from pathlib import Path

    from mcp.client import ClientRequestContext

    from roles.definition import Role

Said = Callable[[str], Awaitable[ElicitResult]]


def asks_twice() -> Role:
    """Asks for an approval, then fills a form; returns what the form said."""

    async def work(context: Any) -> dict[str, Any]:
        context.approve("sure", "Are you sure?")
        form = context.ask("where", "Where to?", schema=FORM)
        return {"action": form.action, "content": form.content}

    return in_loop(work, "asks-twice")


def asks_once() -> Role:
    """Fills a form; returns what it said."""

    async def work(context: Any) -> dict[str, Any]:
        form = context.ask("where", "Where to?", schema=FORM)
        return {"action": form.action, "content": form.content}

    return in_loop(work, "asks-once")


def write_asking_role(folder: Path, starts: Path) -> None:
    """The role `asker` as a file: it outlives the daemon, as roles of a program do not."""
    folder.mkdir(exist_ok=True)
    (folder / "work.py").write_text(f"FORM = {FORM!r}\n{_PROCESS}")
    argv = json.dumps([sys.executable, "-S", str(folder / "work.py"), str(starts)])
    permissions = "permissions:\n  principals: [local]\n  scopes: [operate]\n"
    (folder / "asker.yaml").write_text(f"name: asker\nrunner: process\nargv: {argv}\n{permissions}")


def accept(**content: Any) -> ElicitResult:
    return ElicitResult(action="accept", content=content or None)


class User:
    """In front of a host: says what is in `replies` by the message of the question, and remembers what was asked."""

    def __init__(self, replies: Mapping[str, ElicitResult | Said]) -> None:
        self.replies = dict(replies)
        self.asked: list[str] = []

    async def __call__(self, context: ClientRequestContext, params: Any) -> ElicitResult:
        assert isinstance(params, ElicitRequestFormParams)
        self.asked.append(params.message)
        reply = self.replies[params.message]
        return reply if isinstance(reply, ElicitResult) else await reply(params.message)
