"""A command that asks a running daemon, against what importing a command line library alone costs, in one run.

    python benchmarks/cli.py [repeats]

Budget: `vespera-exec status ID`, the whole process, <= 3x `python -c "import typer"` (skipped where typer is not
installed; click, which we use, is shown beside it), without mcp, pydantic, uvicorn, starlette, structlog or rich.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

BUDGET = 3.0
PROGRAM = [str(Path(sys.executable).parent / "vespera-exec")]
BANNED = ("mcp", "pydantic", "uvicorn", "starlette", "structlog", "rich", "asyncio")
PROBE = (
    "import sys; sys.argv = ['vespera-exec', *sys.argv[1:]]; from vespera_exec.cli.entry import main; main(); "
    f"sys.stderr.write(' '.join(name for name in {BANNED!r} if name in sys.modules))"
)


def main(repeats: int) -> int:
    with tempfile.TemporaryDirectory(prefix="vb-") as folder:
        environ = dict(os.environ) | {"VESPERA_DATA_DIR": f"{folder}/data", "VESPERA_RUNTIME_DIR": folder}
        started = run([*PROGRAM, "run", "--detach", "--role", "survey", "--input", f"path={folder}"], environ)
        task_id = started.split()[1]
        try:
            loaded = subprocess.run(
                [sys.executable, "-c", PROBE, "status", task_id],
                env=environ,
                capture_output=True,
                text=True,
                check=True,
            ).stderr
            compared = {
                "status ID": [*PROGRAM, "status", task_id],
                "import click": [sys.executable, "-c", "import click"],
            }
            if find_spec("typer"):
                compared["import typer"] = [sys.executable, "-c", "import typer"]
            times = medians(compared, environ, repeats)
        finally:
            run([*PROGRAM, "daemon", "stop", "--now"], environ)
    for name, seconds in times.items():
        print(f"{name:<14}{seconds * 1000:8.1f} ms")
    print(f"imported that should not be: {loaded or 'nothing'}")
    if "import typer" not in times:
        return int(bool(loaded))
    ratio = times["status ID"] / times["import typer"]
    print(f"ratio {ratio:.2f} (budget {BUDGET:g})")
    return int(ratio > BUDGET or bool(loaded))


def medians(commands: dict[str, list[str]], environ: dict[str, str], repeats: int) -> dict[str, float]:
    """Seconds of each, its runs among those of the others."""
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            began = time.perf_counter()
            run(command, environ)
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def run(command: list[str], environ: dict[str, str]) -> str:
    return subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 15))
