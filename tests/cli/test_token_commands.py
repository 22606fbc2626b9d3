"""`token`: the user's own, and those that he makes for others, as he types it."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from deadlines import WITHIN

if TYPE_CHECKING:
    from pathlib import Path

    from cli_harness import Cli


def tasks_of(url: str, token: str) -> httpx.Response:
    return httpx.get(f"{url}/tasks", headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=WITHIN)


def test_a_token_is_made_used_listed_and_revoked(cli: Cli) -> None:
    made = cli.run("token", "create", "ci", "--scope", "read", "--expires", "30d")
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    assert token.startswith("vsp_")
    assert "ci may read until" in made.stderr
    assert token not in made.stderr

    url = _url(cli)
    assert tasks_of(url, token).status_code == 200
    listed = cli.run("token", "list")
    row = next(line.split() for line in listed.stdout.splitlines() if line.startswith("ci "))
    assert row[1:4] == [token.split("_")[1], "valid", "read"]
    assert token not in listed.stdout

    ended = cli.run("token", "revoke", "ci")
    assert ended.stdout == f"ci ({row[1]}) revoked\n"
    assert tasks_of(url, token).status_code == 401
    assert cli.run("token", "revoke", row[1]).returncode == 0


def test_each_command_has_one_json_document(cli: Cli) -> None:
    made = cli.json("token", "create", "robot", "--scope", "worker", "--scope", "operate", "--expires", "90s")
    assert made["scopes"] == ["operate", "read", "worker"]
    assert made["state"] == "valid"
    listed = {each["id"]: each for each in cli.json("token", "list")["tokens"]}
    assert listed[made["id"]]["expires_at"] == made["expires_at"]
    assert "token" not in listed[made["id"]]
    assert cli.json("token", "revoke", made["id"])["state"] == "revoked"
    again = cli.json("token", "create", "robot", "--replace")
    assert again["token"] != made["token"]
    assert again["scopes"] == ["operate", "read"]


def test_the_users_own_token_stays_where_it_was(cli: Cli, place: Path) -> None:
    path = cli.run("token").stdout.strip()
    assert path == str(place / "data" / "token")
    assert stat.S_IMODE((place / "data" / "token").stat().st_mode) == 0o600
    shown = cli.run("token", "--show").stdout
    assert shown == (place / "data" / "token").read_text()
    assert cli.json("token") == {"path": path}
    assert cli.json("token", "--show") == {"path": path, "token": shown.strip()}


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["create"], 2, "NAME"),
        (["create", "Bad Name"], 125, "INVALID_INPUT"),
        (["create", "default"], 125, "INVALID_INPUT"),
        (["create", "a/../b"], 125, "INVALID_INPUT"),
        (["create", "x\x1b[31m"], 125, "INVALID_INPUT"),
        (["create", "x", "--scope", "admin"], 2, "read"),
        (["create", "x", "--expires", "3y"], 2, "no duration"),
        (["create", "x", "--expires", "0d"], 2, "no duration"),
        (["create", "x", "--expires", "-1d"], 2, "no duration"),
        (["create", "x", "--expires", "999999999w"], 125, "INVALID_INPUT"),
        (["revoke"], 2, "NAME"),
        (["revoke", ""], 125, "NOT_FOUND"),
        (["revoke", "nobody"], 125, "NOT_FOUND"),
        (["revoke", "a/b"], 125, "INVALID_INPUT"),
        (["revoke", ".."], 125, "INVALID_INPUT"),
        (["destroy"], 2, "destroy"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(cli: Cli, arguments: list[str], code: int, why: str) -> None:
    done = cli.run("token", *arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert why in done.stderr
    assert "\x1b" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_name_that_has_been_used_is_not_given_away(fresh: Cli) -> None:
    assert fresh.run("token", "create", "ci").returncode == 0
    again = fresh.run("token", "create", "ci", "--json")
    assert again.returncode == 125
    assert again.stdout == ""
    assert "--replace" in again.stderr
    assert [each["name"] for each in fresh.json("token", "list")["tokens"]] == ["ci"]


def test_tokens_outlive_the_daemon_and_do_not_come_with_a_backup(fresh: Cli, place: Path) -> None:
    token = fresh.json("token", "create", "ci")["token"]
    copy = place / "copy.db"
    assert fresh.run("backup", str(copy)).returncode == 0
    fresh.run("daemon", "stop", "--now")
    url = _url(fresh)
    assert tasks_of(url, token).status_code == 200
    fresh.run("daemon", "stop", "--now")
    for left in fresh.data_dir.glob("vespera.db*"):
        left.unlink()
    assert fresh.run("restore", str(copy)).returncode == 0
    url = _url(fresh)
    assert tasks_of(url, token).status_code == 401
    assert [each["state"] for each in fresh.json("token", "list")["tokens"]] == ["revoked"]


def _url(cli: Cli) -> str:
    """Of the TCP door of its daemon, which is started where none runs."""
    started: dict[str, Any] = cli.json("daemon", "start")
    return str(started["daemon"]["url"])
