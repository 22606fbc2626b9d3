"""`doctor`, `backup` and `restore`: by the daemon where one runs, else with the directory's lock in hand."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from vespera_exec import paths
from vespera_exec.cli import output
from vespera_exec.cli.client import Daemon, DaemonError, DaemonGone, DaemonSilent, data_directory
from vespera_exec.cli.text import shown, size
from vespera_exec.errors import DaemonUnavailable, DataDirectoryInUse, VesperaError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vespera_exec.app.doctor import Check

_WRONG = 1
_TURN_SECONDS = 5.0
_LOOK_SECONDS = 0.05
_UPKEEP_SECONDS = 600.0
_COLOUR = {"ok": "green", "warning": "yellow", "error": "red"}
_T = TypeVar("_T")

_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


@click.command()
@_json
def doctor(*, as_json: bool) -> int:
    """Look for what is wrong with this data directory, and say what to do. Exit code 1 when something is."""
    from vespera_exec.app import doctor as checking

    data_dir = data_directory()
    checks: list[Check] = []
    # What needs no daemon comes first, and is shown before a daemon may keep us waiting.
    for look in (lambda: checking.surroundings(data_dir, os.environ), lambda: _contents(data_dir)):
        found = look()
        checks += found
        if not as_json:
            _show(found)
    healthy = all(check.level == "ok" for check in checks)
    if as_json:
        shown_checks = [{"name": c.name, "level": c.level, "what": c.what, "hint": c.hint} for c in checks]
        output.document({"healthy": healthy, "data_dir": str(data_dir), "checks": shown_checks})
    return 0 if healthy else _WRONG


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE where it exists.")
@_json
def backup(*, file: Path, force: bool, as_json: bool) -> None:
    """Copy the database to FILE while it is used. What the work wrote to stdout and stderr is not in it."""
    from vespera_exec.app import unowned

    data_dir, target = data_directory(), Path(os.path.abspath(file))

    def by_daemon(daemon: Daemon) -> int:
        try:
            answer = daemon.post("/backup", {"path": str(target), "overwrite": force}, once=True)
        except DaemonGone as gone:
            hint = f"look for {target}: a backup gets its name when it is complete; where it has not, repeat this"
            raise DaemonError(gone.code, "the daemon ended while it made the backup", hint) from gone
        return int(answer.body["size_bytes"])

    copied = _owned_or_not(data_dir, by_daemon, lambda: unowned.back_up(data_dir, target, overwrite=force))
    if as_json:
        output.document({"path": str(target), "size_bytes": copied})
    else:
        output.line(f"{shown(target, 1000)}: {size(copied)}")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@_json
def restore(*, file: Path, as_json: bool) -> None:
    """Make the backup FILE the database of a data directory that has none.

    What is queued in it will run, and what was at work goes on or ends as after the death of a server.
    """
    from vespera_exec.app import unowned

    data_dir = data_directory()
    size_bytes = unowned.restore(data_dir, Path(os.path.abspath(file)))
    if as_json:
        output.document({"data_dir": str(data_dir), "size_bytes": size_bytes})
    else:
        output.line(f"{shown(data_dir, 1000)}: {size(size_bytes)} restored")


def _show(checks: list[Check]) -> None:
    for check in checks:
        level = output.colour(f"{check.level:<8}", _COLOUR[check.level])
        output.line(f"{level}{check.name:<16}{shown(check.what, 1000)}")
        if check.hint:
            output.line(f"{'':24}→ {shown(check.hint, 500)}")
    output.flush()


def _contents(data_dir: Path) -> list[Check]:
    """What only the owner may look at; in place of it, why it could not be asked."""
    from vespera_exec.app import unowned
    from vespera_exec.app.doctor import Check, version_of_daemon

    def by_daemon(daemon: Daemon) -> list[Check]:
        view = daemon.get("/daemon")
        checks = [version_of_daemon(view["version"], view["pid"])]
        if view["store_fault"]:
            hint = "writing goes on by itself when the cause is gone"
            checks.append(Check(name="writing", level="error", what=view["store_fault"], hint=hint))
        return checks + [Check(**each) for each in daemon.post("/doctor", {}).body["checks"]]

    try:
        return _owned_or_not(data_dir, by_daemon, lambda: unowned.examine(data_dir, paths.roles_dir(os.environ)))
    except DaemonSilent as silent:
        return [Check(name="daemon", level="error", what=f"{silent.message} ({silent.code})", hint=silent.hint)]
    except VesperaError as error:
        return [Check(name="database", level="error", what=error.message, hint=error.hint)]


def _owned_or_not(data_dir: Path, by_daemon: Callable[[Daemon], _T], by_us: Callable[[], _T]) -> _T:
    """Asks the daemon, else does it; again for a moment where a daemon is starting or ending.

    Raises:
        DaemonError: the daemon refused.
        DaemonSilent: it does not answer.
        DataDirectoryInUse: another program owns it.
        VesperaError: as `by_us`.
    """
    deadline = time.monotonic() + _TURN_SECONDS
    while True:
        with Daemon(data_dir, cwd="/", start=False, patience=_UPKEEP_SECONDS) as daemon:
            try:
                return by_daemon(daemon)
            except DaemonSilent:
                raise
            except DaemonUnavailable:
                pass  # none, or no longer
        try:
            return by_us()
        except DataDirectoryInUse:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_LOOK_SECONDS)
