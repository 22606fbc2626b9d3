"""What can be read by URI: the roles, a task as it stands, and the last lines of its log."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import orjson
from mcp.shared.exceptions import MCPError
from mcp_types import INTERNAL_ERROR, INVALID_PARAMS

from vespera_exec.app.callers import current_caller
from vespera_exec.errors import InvalidInput, NotFound, PermissionDenied, VesperaError
from vespera_exec.server.mcp import answers

if TYPE_CHECKING:
    from collections.abc import Generator

    from mcp.server.mcpserver import MCPServer

    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import Json
    from vespera_exec.model.principal import Caller

ROLES: Final = "vespera://roles"
TASK: Final = "vespera://tasks/{id}"
EVENTS: Final = "vespera://tasks/{id}/events"

LAST_EVENTS = 50
_RESULT_CHARACTERS = 2000
_JSON = "application/json"
_REFUSED = (NotFound, InvalidInput, PermissionDenied)


def add_resources(server: MCPServer[Any], vespera: Vespera) -> None:
    """Whoever reads is found in `current_caller`; what he does not see is not there for him (-32602)."""

    @server.resource(
        ROLES, name="roles", title="Roles", mime_type=_JSON, description="Who can do work here, and with which inputs."
    )
    async def roles() -> str:
        with told(uri=ROLES):
            return _text(answers.of(vespera.list_roles(current_caller.get())))

    @server.resource(
        TASK,
        name="task",
        title="A task",
        mime_type=_JSON,
        description="Where a task stands: status, phase, progress, open questions, and at the end the result in short.",
    )
    async def task(id: str) -> str:
        with told(uri=_uri(TASK, id)):
            return _text(await task_summary(vespera, current_caller.get(), id))

    @server.resource(
        EVENTS,
        name="task-events",
        title="Events of a task",
        mime_type=_JSON,
        description=f"The last {LAST_EVENTS} events of a task, with the cursor from which to follow it.",
    )
    async def events(id: str) -> str:
        with told(uri=_uri(EVENTS, id)):
            return _text(await last_events(vespera, current_caller.get(), id))

    _ = roles, task, events


def task_of(uri: str) -> str | None:
    """The id in the URI of a task or of its events; None for any other URI."""
    scheme, _, rest = uri.partition("://tasks/")
    name, _, tail = rest.partition("/")
    return name if scheme == "vespera" and name and tail in ("", "events") and rest[-1] != "/" else None


async def task_summary(vespera: Vespera, caller: Caller, any_id: str) -> dict[str, Json]:
    """Its status as the tool shows it, `result` (cut to 2000 characters of JSON) once it is done, and where to read on.

    Raises:
        TaskNotFound: the id is unknown, or stands for what the caller does not see.
    """
    status = await vespera.get_status(caller, any_id)
    shown = answers.status(status, detail=False)
    if status.done and status.session_id is not None:
        ended = await vespera.get_result(caller, status.session_id)
        body = orjson.dumps(ended.result).decode()
        whole = len(body) <= _RESULT_CHARACTERS
        shown["result"] = ended.result if whole else body[:_RESULT_CHARACTERS]
        shown["result_truncated"] = ended.result_truncated or not whole
        if ended.error is not None:
            shown["error"] = str(ended.error.get("message"))
    shown["events"] = _uri(EVENTS, status.task_id)
    return shown


async def last_events(vespera: Vespera, caller: Caller, any_id: str) -> dict[str, Json]:
    """`{events, next_cursor, done, status, more}`; as many of the last events as an answer may hold.

    Raises:
        TaskNotFound: the id is unknown, or stands for what the caller does not see.
    """
    page = await vespera.last_events(caller, any_id, limit=LAST_EVENTS)
    last = answers.fitting(reversed(page.events), answers.PAGE_CHARACTERS)
    shown = answers.of(page.model_copy(update={"events": last[::-1]}))
    shown["more"] = (
        f"newer: stream_task_execution_events with cursor {page.next_cursor}; all of them: from cursor 0, page by page"
    )
    return shown


@contextmanager
def told(**known: str) -> Generator[None]:
    """While it is entered, our errors leave as the protocol's, with `error_code` and what is `known` as their data.

    Raises:
        MCPError: -32602 for what is not there or is refused, -32603 for what failed.
    """
    try:
        yield
    except VesperaError as error:
        code = INVALID_PARAMS if isinstance(error, _REFUSED) else INTERNAL_ERROR
        text = f"{error.message} — {error.hint}" if error.hint else error.message
        raise MCPError(code, text, data={"error_code": error.error_code, **known}) from error


def _uri(template: str, any_id: str) -> str:
    return template.replace("{id}", any_id)


def _text(answer: dict[str, Json]) -> str:
    return answers.dumped(answer).decode()
