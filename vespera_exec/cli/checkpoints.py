"""`checkpoint`: places in the log of an execution to which it can be put back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from vespera_exec.cli import output
from vespera_exec.cli.client import Daemon, data_directory, segment
from vespera_exec.cli.inputs import parse_inputs
from vespera_exec.cli.text import age, shown, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.model.events import Json

_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
_id = click.argument("any_id", metavar="ID")


@click.group("checkpoint")
def group() -> None:
    """Places to which an execution can go back."""


@group.command()
@_id
@click.option("--set", "given", metavar="NAME=VALUE", multiple=True, help="Something to be kept with it.")
@_json
def create(*, any_id: str, given: tuple[str, ...], as_json: bool) -> None:
    """Make a checkpoint of what runs, as it stands now."""
    body: dict[str, Json] = {"metadata": parse_inputs(given)} if given else {}
    with Daemon(data_directory()) as daemon:
        made = daemon.post(f"/tasks/{segment(any_id)}/checkpoints", body, once=True).body
    if as_json:
        output.document(made)
    else:
        output.line(f"checkpoint {made['checkpoint_id']}")


@group.command("list")
@_id
@click.option("--limit", type=click.IntRange(1, 200), default=20, show_default=True)
@_json
def list_checkpoints(*, any_id: str, limit: int, as_json: bool) -> None:
    """The checkpoints of an execution, newest first."""
    with Daemon(data_directory()) as daemon:
        found = daemon.get(f"/tasks/{segment(any_id)}/checkpoints", limit=limit)
    if as_json:
        output.document(found)
    else:
        output.lines(_checkpoints(found["checkpoints"], output.width()))


@group.command()
@click.argument("checkpoint_id", metavar="CHECKPOINT")
@_json
def restore(*, checkpoint_id: str, as_json: bool) -> None:
    """Put an execution back to a checkpoint.

    Of one that has ended, a new execution begins there.
    """
    with Daemon(data_directory()) as daemon:
        restored = daemon.post(f"/checkpoints/{segment(checkpoint_id)}/restore", {}, once=True).body
    if as_json:
        output.document(restored)
    else:
        output.lines([f"task {restored['task_id']}", f"session {restored['session_id']}"])
        output.remark(f"vespera-exec: {shown(restored['message'])}")


def _checkpoints(rows: Sequence[Mapping[str, Json]], width: int | None) -> list[str]:
    if not rows:
        return ["no checkpoints"]
    cells = [
        (
            str(row["checkpoint_id"]),
            str(row["kind"]),
            "" if row["completed_steps"] is None else str(row["completed_steps"]),
            age(str(row["created_at"])),
            _kept(row),
        )
        for row in rows
    ]
    lines = table(("CHECKPOINT", "KIND", "STEPS", "MADE", "WITH"), cells, width)
    return [output.colour(lines[0], "bold"), *lines[1:]]


def _kept(row: Mapping[str, Json]) -> str:
    """The step at whose end it was made, and what was kept with it."""
    step = f"end of {shown(row['step'], 64)}" if row["step"] else ""
    metadata = shown(json.dumps(row["metadata"], ensure_ascii=False)) if row["metadata"] else ""
    return " ".join(part for part in (step, metadata) if part)
