"""`capacity`: the pools that all work shares, what of them is in use, and who waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vespera_exec.cli import output
from vespera_exec.cli.client import Daemon, data_directory
from vespera_exec.cli.text import shown, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.model.events import Json


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
    pools: Sequence[Mapping[str, Json]] = view["pools"]
    if not pools:
        return ["no pools; the setting VESPERA_CAPACITY names them"]
    rows = [
        (shown(each["id"], 40), shown(each["type"], 40), f"{each['capacity']:g}", f"{each['available']:g}")
        for each in pools
    ]
    lines = table(("POOL", "TYPE", "THERE IS", "FREE"), rows, width)
    return [output.colour(lines[0], "bold"), *lines[1:]]
