"""Each example is a program that runs as it stands, and prints what it says it does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLES = Path(__file__).parents[1] / "examples"
OTHERS = {"worker.py"}  # tests/server/test_worker_tools.py runs that one


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], list[str]]:
    def ran(name: str) -> list[str]:
        """The lines that the example prints."""
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name)],
            env={
                **os.environ,
                "VESPERA_DATA_DIR": str(tmp_path / "data"),
                "VESPERA_ROLES_DIR": str(tmp_path / "roles"),
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    return ran


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    programs = {file.name for file in EXAMPLES.glob("*.py")} - OTHERS
    assert programs == {name for name in programs if f'run("{name}")' in here}


def test_basic_execution(run: Callable[[str], list[str]]) -> None:
    lines = run("basic_execution.py")
    assert lines[:2] == ["Execution completed successfully", "Result: {'words': 6, 'letters': 13}"]
    assert re.fullmatch(r"Duration: [\d.]+ ms", lines[2])
    assert lines[3] == "Cost: None"


def test_realtime_monitoring(run: Callable[[str], list[str]]) -> None:
    lines = run("realtime_monitoring.py")
    shown = [int(line[10:-1]) for line in lines if line.startswith("Progress: ")]
    assert shown == sorted(shown)
    assert (shown[-1], shown.count(100)) == (100, 1)
    assert len(shown) >= 4
    tasks = [line for line in lines if line.startswith("Current task: ")]
    assert [each for each in dict.fromkeys(tasks) if each.endswith(("compile", "link"))] == [
        "Current task: compile",
        "Current task: link",
    ]
    assert [line for line in lines if line.startswith("[")] == ["[info] 4 parts made", "[info] 2 parts made"]
    assert [line for line in lines if line.startswith("Status: ")][-1] == "Status: completed"
    events = [line for line in lines if line.startswith("Event: ")]
    assert events[-1] == "Event: execution_completed - Execution completed successfully"


def test_event_subscription(run: Callable[[str], list[str]]) -> None:
    lines = run("event_subscription.py")
    assert lines[-1] == "Execution failed: nobody opens the door"
    paused = lines.index("Execution paused")
    for part in (lines[:paused], lines[paused:]):
        assert any(re.fullmatch(r"Execution running: \d+% complete", line) for line in part)


def test_checkpointing(run: Callable[[str], list[str]]) -> None:
    lines = run("checkpointing.py")
    made = [line for line in lines if line.startswith("Checkpoint created: ")]
    assert len(made) == len(set(made)) >= 2
    (back,) = (number for number, line in enumerate(lines) if line.startswith("Back to where these were done: one"))
    chapters = [f"Chapter {number} is written" for number in (1, 2, 3)]
    assert [line for line in lines[:back] if line.startswith("Chapter")] == chapters
    done = len(lines[back].split(": ")[1].split())
    assert lines[back + 1 :] == [*chapters[done:], "Written again, from there on: completed"]


def test_recovery_strategy(run: Callable[[str], list[str]]) -> None:
    assert run("recovery_strategy.py") == [
        "Retrying after 0.1 s (attempt 1/3)",
        "Retrying after 0.2 s (attempt 2/3)",
        "completed {'download': 'there at try 3'} None",
    ]


def test_resource_management(run: Callable[[str], list[str]]) -> None:
    assert run("resource_management.py") == [
        "Allocated: 4 computational (4 of 8 are left)",
        "Allocated: 16384 memory (16384 of 32768 are left)",
        "Resource allocation failed: the capacity is not free: computational: 6 wanted, 4 of 8 free",
        "Resources released",
    ]


def test_execution_control(run: Callable[[str], list[str]]) -> None:
    assert run("execution_control.py") == [
        "Execution paused: paused",
        "Execution resumed: running",
        "Execution cancelled: cancelled",
        "Counted to 3",
        "Too late: Cannot go from completed to paused; allowed: nothing, it has ended",
    ]


def test_metrics_analysis(run: Callable[[str], list[str]]) -> None:
    lines = run("metrics_analysis.py")
    told = dict(line.split(": ", 1) for line in lines if ": " in line)
    duration, effective = (float(told[key].split()[0]) for key in ("Duration", "Effective Duration"))
    assert effective >= 300
    assert duration > 0
    assert told["Quality Score"] == "85.0%"
    assert told["Success Rate"] == "66.7%"
    assert told["Error Rate"] == "33.3%"
    held = [line for line in lines if " units for " in line]
    assert held == ["computational: 2 units for draft", "computational: 1 units for review"]
    costs = [float(line.split("$")[1]) for line in lines if line.startswith(("Cost: $", "  Cost: $"))]
    assert costs[0] == pytest.approx(sum(costs[1:]), abs=1e-6)
    assert lines[-1].endswith("execution_completed - Execution completed successfully")


def test_the_program_in_the_docs_prints_what_is_said_there(tmp_path: Path) -> None:
    text = (EXAMPLES.parent / "docs" / "library.md").read_text()
    program = text.split("```python\n", 1)[1].split("```", 1)[0]
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=50, check=True
    )
    assert f"This prints `{done.stdout.strip()}`." in text
