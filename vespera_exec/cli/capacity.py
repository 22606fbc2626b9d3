"""`capacity`: the pools that all work shares, what of them is in use, and who waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vespera_exec.cli import output
from vespera_exec.cli.client import Daemon, data_directory
from vespera_exec.cli.text import age, fit, shown, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.model.events import Json

_SHORT_ID = 8
_WIDE = 10_000


@click.command("capacity")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def capacity(*, as_json: bool) -> None:
    """What there is, what is in use, and who waits for it."""
    with Daemon(data_directory()) as daemon:
        view = daemon.get("/capacity")
    if as_json:
        output.document(view)
    else:
        output.lines(_pools(view, output.width()))


def _pools(view: Mapping[str, Json], width: int | None) -> list[str]:
    """A line per pool, then one per task that waits."""
    pools: Sequence[Mapping[str, Json]] = view["pools"]
    if not pools:
        return ["no pools; the setting VESPERA_CAPACITY names them"]
    rows = [
        (
            shown(each["id"], 64),
            shown(each["type"], 64),
            f"{each['available']:g}",
            f"{each['capacity']:g}",
            _holders(each["holders"], each["other_holders"]),
        )
        for each in pools
    ]
    lines = table(("POOL", "TYPE", "FREE", "OF", "HELD BY"), rows, width)
    waiting: Sequence[Mapping[str, Json]] = view["waiting"]
    lines += [
        fit(f"{_task(each)} waits for {shown(each['waiting_for'])}{_since(each['since'])}", width or _WIDE)
        for each in waiting
    ]
    more = [f"{view['waiting_total'] - len(waiting)} more wait"] if view["waiting_total"] > len(waiting) else []
    return [output.colour(lines[0], "bold"), *lines[1:], *more]


def _holders(holders: Sequence[Mapping[str, Json]], others: int) -> str:
    named = [_task(each) for each in holders]
    return ", ".join([*named, f"{others} more"] if others else named)


def _task(row: Mapping[str, Json]) -> str:
    return f"{str(row['task_id'])[:_SHORT_ID]} {shown(row['title'], 30)}"


def _since(stamp: str | None) -> str:
    return f", since {age(stamp)}" if stamp else ""
