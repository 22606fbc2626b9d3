"""`python -m tests.conformance.suite -- NODE SUITE.js`: every leg of the official suite; 0 when nothing failed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Generator

LEGS: Final = (
    ("--suite", "all"),
    ("--spec-version", "2025-06-18"),
    ("--spec-version", "2025-11-25"),
    ("--spec-version", "2026-07-28"),
    ("--requirements", "2026-07-28"),
)
TASKS_CHECKS: Final = 44
"""Of the tasks scenarios, in the leg that has them all."""
_LEG_SECONDS: Final = 150
_AT_ONCE: Final = 2


@dataclass(slots=True)
class Leg:
    """What came of one leg. `faults` says in a line each why it did not pass."""

    name: str
    counts: Counter[str] = field(default_factory=Counter[str])
    tasks_passed: int = 0
    faults: list[str] = field(default_factory=list[str])
    seconds: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {status.lower()}" for status, count in sorted(self.counts.items()))
        return f"{self.name}: {counts}; {self.tasks_passed} of the tasks; {self.seconds:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.suite", description=__doc__)
    parser.add_argument("suite", nargs="+", help="the command of the suite")
    command: list[str] = parser.parse_args().suite
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        legs = list(pool.map(partial(run_leg, command), LEGS))
    for leg in legs:
        sys.stdout.write(f"{leg}\n" + "".join(f"    {fault}\n" for fault in leg.faults))
    return 1 if any(leg.faults for leg in legs) else 0


def run_leg(command: list[str], options: tuple[str, str]) -> Leg:
    """One run of the suite, against a server of its own."""
    leg = Leg(" ".join(options))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder, _server() as url:
        argv = [*command, "server", "--url", url, *options, "--output-dir", folder]
        try:
            code = subprocess.run(argv, capture_output=True, timeout=_LEG_SECONDS, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 0
            leg.faults.append(f"not done after {_LEG_SECONDS} s")
        for file in sorted(Path(folder).glob("*/checks.json")):
            _count(leg, file.parent.name, json.loads(file.read_bytes()))
    if code and not leg.faults:
        leg.faults.append(f"the suite ended with {code}")
    if not leg.counts["SUCCESS"]:
        leg.faults.append("nothing was checked")
    if options == LEGS[0] and leg.tasks_passed < TASKS_CHECKS:
        leg.faults.append(f"{leg.tasks_passed} checks of the tasks passed, not {TASKS_CHECKS}")
    leg.seconds = time.monotonic() - began
    return leg


def _count(leg: Leg, scenario: str, checks: list[dict[str, Any]]) -> None:
    of_tasks = scenario.startswith("server-tasks-")
    for check in checks:
        status: str = check["status"]
        leg.counts[status] += 1
        leg.tasks_passed += of_tasks and status == "SUCCESS"
        if status not in ("SUCCESS", "INFO", "SKIPPED", "WARNING"):
            leg.faults.append(f"{check['id']}: {check.get('errorMessage')}")


@contextmanager
def _server() -> Generator[str]:
    argv = [sys.executable, "-m", "tests.conformance", "--port", "0"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            ready, _, url = process.stdout.readline().decode().strip().partition(" ")
            if ready != "ready":
                raise SystemExit("the conformance server did not start")
            yield url
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
