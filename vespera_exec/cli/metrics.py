"""`metrics`: how the runs of a task went, and what was measured of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vespera_exec.cli import output
from vespera_exec.cli.client import Daemon, data_directory, segment
from vespera_exec.cli.text import duration, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.model.events import Json

_ENDS = ("completed", "failed", "cancelled", "timed_out")


@click.command("metrics")
@click.argument("any_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def metrics(*, any_id: str, as_json: bool) -> None:
    """How the runs of a task went; of its last run, or of the one whose id this is, what was measured."""
    with Daemon(data_directory()) as daemon:
        view = daemon.get(f"/tasks/{segment(any_id)}/metrics")
    if as_json:
        output.document(view)
    else:
        output.lines([f"{name:<11} {value}" for name, value in _lines(view)])


def _lines(view: Mapping[str, Json]) -> list[tuple[str, str]]:
    ends = ", ".join(f"{view[each]} {each}" for each in _ENDS if view[each])
    lines = [("task", shown(view["task_id"])), ("runs", f"{view['total_executions']}{f': {ends}' if ends else ''}")]
    if view["success_rate"] is not None:
        lines.append(("success", _share(view["success_rate"])))
    if view["average_duration_seconds"] is not None:
        lines.append(("on average", duration(view["average_duration_seconds"])))
    run: Mapping[str, Json] = view["execution"] or {}
    lines += [(name, said(run[key])) for key, name, said in _OF_RUN if run.get(key) is not None]
    return lines


def _share(value: float) -> str:
    return f"{value:.0%}"


def _time(milliseconds: float) -> str:
    return duration(milliseconds / 1000)


def _rate(per_second: float) -> str:
    return f"{per_second:.3g} per second"


def _number(value: float) -> str:
    return f"{value:.4g}"


_OF_RUN = (
    ("total_duration", "took", _time),
    ("effective_duration", "at work", _time),
    ("success_rate", "completed", _share),
    ("error_rate", "errors", _share),
    ("throughput", "throughput", _rate),
    ("total_cost", "cost", _number),
    ("resource_efficiency", "efficiency", _share),
    ("quality_score", "quality", _number),
)
"""Of the run: the key of each, how it is called, and in which words it is said."""
