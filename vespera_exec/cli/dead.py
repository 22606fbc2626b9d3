"""`dead`: the tasks whose last run used up its retries, and what becomes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vespera_exec.cli import output
from vespera_exec.cli.client import Daemon, data_directory
from vespera_exec.cli.plans.state import failure
from vespera_exec.cli.text import age, shown, table
from vespera_exec.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.model.events import Json

_SHORT_ID = 8
_SOME_REFUSED = 1

_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
_ids = click.argument("task_ids", metavar="[ID]...", nargs=-1)
_every = click.option("--all", "every", is_flag=True, help="All that are in the list, up to 1000 at once.")
_role = click.option("--role", help="Only those that this role failed at.")


@click.group("dead")
def group() -> None:
    """What has failed, and nobody tries again.

    Look at it, put it back, or take it off the list.
    """


@group.command("list")
@click.option("--limit", type=click.IntRange(1, 200), default=50, show_default=True)
@click.option("--page", help="As the last list named it.")
@_json
def list_dead(*, limit: int, page: str | None, as_json: bool) -> None:
    """What has failed for good, the last first."""
    with Daemon(data_directory()) as daemon:
        found = daemon.get("/dead-letters", limit=limit, page=page)
    if as_json:
        output.document(found)
    else:
        output.lines(_letters(found, output.width()))


@group.command()
@_ids
@_every
@_role
@_json
def requeue(*, task_ids: tuple[str, ...], every: bool, role: str | None, as_json: bool) -> int:
    """Execute them again.

    A task from its beginning; a plan keeps the steps that it has completed.
    """
    answer = _decided("requeue", task_ids, every=every, role=role)
    if as_json:
        output.document(answer)
    else:
        output.lines([f"task {each['task_id']} session {each['session_id']}" for each in answer["requeued"]])
        _say_rest(answer, "requeued")
    return _SOME_REFUSED if answer["refused"] else 0


@group.command()
@_ids
@_every
@_role
@_json
def discard(*, task_ids: tuple[str, ...], every: bool, role: str | None, as_json: bool) -> int:
    """Take them off the list, as cancelled. All that is known of them stays."""
    answer = _decided("discard", task_ids, every=every, role=role)
    if as_json:
        output.document(answer)
    else:
        output.lines([f"task {each}" for each in answer["discarded"]])
        _say_rest(answer, "discarded")
    return _SOME_REFUSED if answer["refused"] else 0


def _decided(verb: str, task_ids: Sequence[str], *, every: bool, role: str | None) -> Json:
    if every == bool(task_ids):
        raise InvalidInput("which ones?", hint=f"vespera-exec dead {verb} ID..., or --all")
    if role is not None and not every:
        raise InvalidInput("--role chooses among all", hint="give --all with it, or leave it out")
    body: dict[str, Json] = {"all": True, "role": role} if every else {"task_ids": list(task_ids)}
    with Daemon(data_directory()) as daemon:
        return daemon.post(f"/dead-letters/{verb}", body, once=True).body


def _letters(page: Mapping[str, Json], width: int | None) -> list[str]:
    rows: Sequence[Mapping[str, Json]] = page["dead_letters"]
    if not rows:
        return ["nothing has failed for good"]
    cells = [
        (
            str(row["task_id"])[:_SHORT_ID],
            str(row["attempts"]),
            shown(row["role"] or "", 24),
            age(str(row["ended_at"])),
            shown(row["title"], 40),
            failure(row["error"]),
        )
        for row in rows
    ]
    lines = table(("TASK", "TRIES", "ROLE", "FAILED", "TITLE", "ERROR"), cells, width)
    more = [f"{len(rows)} of {page['total']}; more with --page {page['next_page']}"] if page["next_page"] else []
    return [output.colour(lines[0], "bold"), *lines[1:], *more]


def _say_rest(answer: Mapping[str, Json], what: str) -> None:
    if not answer[what] and not answer["refused"]:
        output.remark(f"vespera-exec: nothing was {what}")
    for each in answer["refused"]:
        said = f"{shown(each['task_id'], 64)}: {shown(each['reason'], 300)} ({shown(each['error_code'], 60)})"
        output.remark(f"vespera-exec: not {what}: {said}")
    if answer["left"]:
        output.remark(f"vespera-exec: {answer['left']} are still in the list")
