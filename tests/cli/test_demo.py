"""The demo, as the README's first command runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cli_harness import PROGRAM, Cli, marked
from deadlines import WITHIN

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def temporary(fresh: Cli) -> Iterator[Path]:
    """Where the demo makes its data directory; empty again after it."""
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as folder:
        fresh.environ["TMPDIR"] = folder
        yield Path(folder)


@pytest.fixture
def project(fresh: Cli) -> Path:
    for name in ("a.py", "b.py", "read.md"):
        (fresh.cwd / name).write_text("the same\n", encoding="utf-8")
    return fresh.cwd


@pytest.mark.usefixtures("project")
def test_the_demo_shows_everything_and_leaves_nothing_behind(fresh: Cli, temporary: Path) -> None:
    done = fresh.run("demo")
    assert done.returncode == 0, done.stdout + done.stderr
    for promised in (
        "get_task_execution_status", "stream_task_execution_events", "cancel_task_execution",
        "get_task_performance_metrics",
    ):  # fmt: skip
        assert f"→ {promised}" in done.stdout
    assert "3 files in 1 folders" in done.stdout
    assert re.search(r"ETA .+ to .+", done.stdout)
    assert re.search(r"cpu \d+ %, \d+ MB", done.stdout)
    assert "execution" in done.stdout
    alive = re.findall(r"alive: +(\d+)", done.stdout)
    gone = re.findall(r"gone: +(\d+)", done.stdout)
    assert len(alive) >= 2
    assert gone == alive
    assert not any(Path(f"/proc/{pid}").exists() for pid in gone)
    assert done.stdout.count("  ok  ") == 5
    assert "FAILED" not in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    assert list(temporary.iterdir()) == []
    assert marked(str(temporary)) == []
    assert not fresh.data_dir.exists()


@pytest.mark.full
@pytest.mark.usefixtures("temporary")
def test_the_demo_draws_its_bar_on_an_empty_folder_and_needs_no_path(fresh: Cli) -> None:
    with fresh.terminal("demo", columns=120, PATH="/usr/bin:/bin") as terminal:
        assert terminal.finish() == 0
        shown = terminal.screen.text()
        assert PROGRAM in "\n".join(shown)
        assert "  0 files in 1 folders, 0 lines, 0 B" in shown
        assert any("100 %" in line and "━" in line for line in shown)
        assert sum(line.startswith("  ok ") for line in shown) == 5


@pytest.mark.usefixtures("project", "temporary")
def test_a_server_that_does_not_start_is_reported_with_exit_code_1(fresh: Cli) -> None:
    done = fresh.run("demo", VESPERA_MAX_CONCURRENT="many")
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "VESPERA_MAX_CONCURRENT" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_importing_the_command_line_does_not_import_the_demo() -> None:
    script = "import sys; import vespera_exec.cli.app; sys.exit('vespera_exec.cli.demo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=dict(os.environ), timeout=WITHIN).returncode == 0
