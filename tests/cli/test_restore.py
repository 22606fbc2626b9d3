"""`restore`: a backup becomes a directory of its own, and what was unfinished in it goes on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from cli_harness import Cli


def test_a_backup_is_restored_into_an_empty_directory_and_serves(fresh: Cli, tmp_path: Path) -> None:
    ended = json.loads(fresh.run("run", "--detach", "--json", "--", "echo", "kept").stdout)["task_id"]
    fresh.run("logs", "-f", ended)
    backup = tmp_path / "copy.db"
    assert fresh.run("backup", str(backup)).returncode == 0
    assert "DATA_DIRECTORY_IN_USE" in fresh.run("restore", str(backup)).stderr
    fresh.run("daemon", "stop")
    refused = fresh.run("restore", str(backup))
    assert (refused.returncode, "CONFLICT" in refused.stderr) == (125, True)
    elsewhere = str(tmp_path / "elsewhere")
    restored = fresh.run("--data-dir", elsewhere, "restore", str(backup))
    assert restored.returncode == 0, restored.stderr
    try:
        shown = fresh.run("--data-dir", elsewhere, "status", ended, "--json")
        assert json.loads(shown.stdout)["status"] == "completed"
    finally:
        fresh.run("--data-dir", elsewhere, "daemon", "stop", "--now")


def test_what_is_no_backup_is_refused_and_leaves_the_directory_empty(fresh: Cli, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "text.db").write_text("no database at all, but long enough to be looked at" * 40)
    (tmp_path / "empty.db").touch()
    for name, code in (("text.db", "STORE_DAMAGED"), ("empty.db", "INVALID_INPUT"), ("missing.db", "INVALID_INPUT")):
        refused = fresh.run("--data-dir", str(elsewhere), "restore", str(tmp_path / name))
        assert refused.returncode == 125
        assert code in refused.stderr, refused.stderr
        assert not (elsewhere / "vespera.db").exists()
