"""`vespera-exec daemon`: the process that owns a data directory, as its user sees it."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from vespera_exec import __version__, paths
from vespera_exec.cli import output
from vespera_exec.cli.client import Daemon, data_directory, start_daemon
from vespera_exec.cli.text import age, duration, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.model.events import Json

NOT_RUNNING = 3

_json = click.option("--json", "as_json", is_flag=True, help="One JSON document (a line each where it follows).")


@click.group("daemon", no_args_is_help=True)
def group() -> None:
    """The background process that owns a data directory."""


@group.command()
@_json
def start(*, as_json: bool) -> None:
    """Start the daemon, where none runs."""
    data_dir = data_directory()
    start_daemon(data_dir, os.environ)
    with Daemon(data_dir) as daemon:
        view = daemon.get("/daemon")
    _show(view, as_json=as_json)


@group.command()
@_json
def status(*, as_json: bool) -> int:
    """Ask the daemon how it is; starts none. Exit code 3 when none runs."""
    from vespera_exec.app.owning import latest_owner
    from vespera_exec.cli import owner

    data_dir = data_directory()
    view = owner.running(data_dir)
    if view is not None:
        _show(view, as_json=as_json)
        return 0
    last = latest_owner(data_dir)
    if as_json:
        known = None
        if last is not None:
            known = {"pid": last.pid, "purpose": last.purpose, "version": last.version, "since": last.since}
        output.document({"daemon": None, "data_dir": str(data_dir), "last_owner": known})
        return NOT_RUNNING
    output.line(f"not running: {shown(data_dir, 500)}")
    if last is not None:
        output.line(f"  the last to own it was process {last.pid} ({last.purpose}, since {last.since})")
    return NOT_RUNNING


@group.command()
@click.option("--now", is_flag=True, help="Also when executions are running, or it does not answer.")
@_json
def stop(*, now: bool, as_json: bool) -> None:
    """Stop the daemon. What waits or is paused to resume is kept; what runs would be interrupted: that needs --now."""
    from vespera_exec.cli import owner

    data_dir = data_directory()
    view = owner.stop(data_dir, now=now)
    if as_json:
        output.document({"stopped": view is not None, "daemon": view, "data_dir": str(data_dir)})
        return
    if view is None:
        output.line(f"not running: {shown(data_dir, 500)}")
        return
    output.line(f"stopped: process {view['pid']} (version {view['version']})")
    for each in view["work"] or ():
        became = f"kept for the next start, {each['status']}" if each.get("kept") else "interrupted"
        output.line(f"  {became}: {shown(each['title'], 100)} (task {each['task_id']})")
    if view["queued"]:
        output.line(f"  kept for the next start: {view['queued']} queued")


@group.command()
@click.option("--follow", "-f", is_flag=True, help="Wait for more, until Ctrl-C.")
@click.option("--lines", "-n", type=click.IntRange(0), default=50, show_default=True, help="The last so many.")
@_json
def logs(*, follow: bool, lines: int, as_json: bool) -> None:
    """What the daemon wrote into its log; --json as it stands there."""
    from vespera_exec.cli import logfile

    for line in logfile.lines(data_directory() / paths.DAEMON_LOG, last=lines, follow=follow):
        output.line(line if as_json else logfile.readable(line))
        if follow:
            sys.stdout.flush()


@group.command()
def unit() -> None:
    """Print a systemd user unit that keeps the daemon running, also over a restart of the machine."""
    from vespera_exec.cli import unit as units

    data_dir = data_directory()
    output.line(units.systemd_unit(data_dir, os.environ).rstrip("\n"))
    for line in units.how_to_enable(data_dir):
        output.remark(line)


def _show(view: Mapping[str, Json], *, as_json: bool) -> None:
    mcp_path, http_path = paths.socket_paths(data_directory(), os.environ)
    log = data_directory() / paths.DAEMON_LOG
    if as_json:
        uptime = (datetime.now(UTC) - datetime.fromisoformat(str(view["started_at"]))).total_seconds()
        where = {"sockets": {"mcp": str(mcp_path), "http": str(http_path)}, "log": str(log)}
        more = {"uptime_seconds": round(uptime, 3), "installed_version": __version__}
        output.document({"daemon": view, "data_dir": view["data_dir"]} | where | more)
        return
    owners: Sequence[Mapping[str, Json]] = view["owners"]
    other = "" if view["version"] == __version__ else f" (installed: {__version__})"
    lines = [
        f"running: version {view['version']}{other}, process {view['pid']}, started {age(str(view['started_at']))}",
        _field("data", shown(view["data_dir"], 1000)),
        _field("sockets", shown(mcp_path, 1000)),
        _field("", shown(http_path, 1000)),
        _field("url", str(view["url"] or f"none ({shown(view['tcp_problem'] or 'switched off')})")),
        _field("log", shown(log, 1000)),
        _field("work", f"{view['running']} running, {view['queued']} queued"),
        *(_field("", f"{shown(each['title'], 60)} ({each['task_id'][:8]}, {each['status']})") for each in view["work"]),
        _field("clients", f"{view['connections']} connected"),
        _field("owner", f"number {owners[0]['generation']} of this directory, {owners[0]['owner']}"),
    ]
    if len(owners) > 1:
        lines.append(_field("before", _tenure(owners[1])))
    if view["store_fault"]:
        lines.append(_field("fault", shown(view["store_fault"], 500)))
    if view.get("damage"):
        lines.append(_field("damage", f"{shown(view['damage'], 500)}; `vespera-exec doctor` says more"))
    output.lines(lines)


def _tenure(before: Mapping[str, Json]) -> str:
    began, ended = (datetime.fromisoformat(str(before[name])) for name in ("since", "until"))
    how = "ended" if before["ended"] == "clean" else "found dead"
    return f"process {before['pid']} ({before['purpose']}), for {duration((ended - began).total_seconds())}, {how}"


def _field(name: str, value: str) -> str:
    return f"  {name:<10}{value}"
