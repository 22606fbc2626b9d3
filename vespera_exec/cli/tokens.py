"""`token`: where the user's own token is kept, and the named ones that he makes for others."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from vespera_exec import paths
from vespera_exec.cli import output
from vespera_exec.cli.client import Daemon, DaemonError, data_directory, segment
from vespera_exec.cli.text import shown

if TYPE_CHECKING:
    from pathlib import Path

    from vespera_exec.model.events import Json

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"([1-9][0-9]{0,8})([smhdw])\Z")

_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


def _duration(text: str) -> int:
    """Seconds.

    Raises:
        BadParameter: it is no duration.
    """
    found = _DURATION.match(text)
    if found is None:
        raise click.BadParameter(f"{shown(text, 50)!r} is no duration such as 90s, 45m, 12h, 30d or 4w")
    return int(found[1]) * _SECONDS[found[2]]


@click.group("token", invoke_without_command=True)
@click.option("--show", is_flag=True, help="The token itself.")
@_json
@click.pass_context
def group(context: click.Context, *, show: bool, as_json: bool) -> None:
    """Where your own token for the TCP door is kept; and tokens for others, each with a name and what it may do."""
    if context.invoked_subcommand is not None:
        return
    data_dir = data_directory()
    paths.create_data_dir(data_dir)
    value = own_token(data_dir)
    path = str(data_dir / paths.TOKEN)
    if as_json:
        output.document({"path": path} | ({"token": value} if show else {}))
    else:
        output.line(value if show else path)


@group.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["read", "operate", "worker"]),
    multiple=True,
    help="What it may do, once for each: look; start, stop and answer (and look); do work. Else read and operate.",
)
@click.option("--expires", "seconds", type=_duration, metavar="DURATION", help="Such as 12h or 30d; else never.")
@click.option("--replace", is_flag=True, help="In place of an earlier token of this name, which ends.")
@_json
def create(*, name: str, scopes: tuple[str, ...], seconds: int | None, replace: bool, as_json: bool) -> None:
    """Make a token. It is shown this once, and sees only the tasks that are made with its name."""
    body: dict[str, Json] = {"name": name, "replace": replace}
    if scopes:
        body["scopes"] = list(scopes)
    if seconds is not None:
        body["expires_seconds"] = seconds
    with Daemon(data_directory()) as daemon:
        made = daemon.post("/tokens", body, once=True).body
    if as_json:
        output.document(made)
        return
    output.line(made["token"])
    until = f" until {_moment(made['expires_at'])} UTC" if made["expires_at"] else ""
    output.remark(f"vespera-exec: {made['name']} may {', '.join(made['scopes'])}{until}; this is shown only now")


@group.command("list")
@_json
def list_tokens(*, as_json: bool) -> None:
    """The tokens there are, and those there have been."""
    with Daemon(data_directory()) as daemon:
        found = daemon.get("/tokens")
    if as_json:
        output.document(found)
        return
    rows = [("NAME", "ID", "STATE", "SCOPES", "EXPIRES", "LAST USED")]
    for token in found["tokens"]:
        scopes, expires, used = ",".join(token["scopes"]), _moment(token["expires_at"]), _moment(token["last_used_at"])
        rows.append((token["name"], token["id"], token["state"], scopes, expires, used))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    output.lines(
        ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    )


@group.command()
@click.argument("name_or_id", metavar="NAME|ID")
@_json
def revoke(*, name_or_id: str, as_json: bool) -> None:
    """End a token, with every connection that it holds open. Its tasks stay, and what runs goes on."""
    if not name_or_id:
        raise DaemonError("NOT_FOUND", "an empty name is no token's", "`vespera-exec token list` shows the tokens")
    with Daemon(data_directory()) as daemon:
        ended = daemon.request("DELETE", f"/tokens/{segment(name_or_id)}").body
    if as_json:
        output.document(ended)
    else:
        output.line(f"{ended['name']} ({ended['id']}) revoked")


def own_token(data_dir: Path) -> str:
    from vespera_exec.app.tokens import default_token

    return default_token(data_dir)


def _moment(stamp: str | None) -> str:
    """An instant in UTC, to the minute."""
    return f"{stamp[:10]} {stamp[11:16]}" if stamp else "-"
