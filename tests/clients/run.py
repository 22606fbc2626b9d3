"""`python -m tests.clients.run NODE FOLDER`: every client in FOLDER's node_modules; 0 when every check passed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.clients.product import COMMAND, Product, running

_SCRIPTS = ("sdk1.mjs", "sdk2.mjs")
_INSPECTOR = "node_modules/@modelcontextprotocol/inspector/clients/launcher/build/index.js"
_SECONDS = 170
_RUN: dict[str, Any] = {"title": "inspected", "role": "steps", "wait_ms": 15_000}
_INSPECTIONS: dict[str, tuple[list[str], str]] = {
    "lists the tools": (["--method", "tools/list"], '"name":"execute_task"'),
    "runs a task to its end": (
        ["--method", "tools/call", "--tool-name", "execute_task", "--tool-args-json", json.dumps(_RUN)],
        '"steps":4',
    ),
}


def main() -> int:
    node, folder = sys.argv[1], Path(sys.argv[2])
    here = Path(__file__).parent
    for script in here.glob("*.mjs"):
        shutil.copy(script, folder)
    failed = 0
    with running() as product:
        environ = product.environ | {
            "CLIENTS_URL": product.url,
            "CLIENTS_TOKEN": product.token,
            "CLIENTS_BRIDGE": json.dumps([COMMAND]),
        }
        for script in _SCRIPTS:
            ran = subprocess.run([node, script], cwd=folder, env=environ, timeout=_SECONDS, check=False)
            failed += ran.returncode != 0
        failed += not _inspected(node, folder, product)
    return 1 if failed else 0


def _inspected(node: str, folder: Path, product: Product) -> bool:
    """The MCP Inspector's command line: each transport in each era lists the tools and runs a task to its end."""
    bearer = f"Authorization: Bearer {product.token}"
    # It hands on no variable that it is not told to.
    own = [
        part
        for name, value in product.environ.items()
        if name.startswith("VESPERA_")
        for part in ("-e", f"{name}={value}")
    ]
    targets = {
        "stdio": ["--transport", "stdio", *own, COMMAND],
        "http": ["--transport", "http", "--server-url", f"{product.url}/mcp", "--header", bearer],
    }
    passed = True
    for name, target in targets.items():
        for era in ("legacy", "modern"):
            argv = [node, str(folder / _INSPECTOR), "--cli", *target, "--protocol-era", era, "--format", "json", "-q"]
            for told, (options, sign) in _INSPECTIONS.items():
                ran = subprocess.run(
                    [*argv, *options],
                    cwd=folder,
                    env=product.environ,
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                )
                good = ran.returncode == 0 and sign in ran.stdout.replace(" ", "")
                detail = "" if good else f": {ran.returncode} {ran.stdout[-500:]} {ran.stderr[-500:]}"
                sys.stdout.write(f"{'ok  ' if good else 'FAIL'}  inspector {name} {era}: {told}{detail}\n")
                sys.stdout.flush()
                passed = passed and good
    return passed


if __name__ == "__main__":
    sys.exit(main())
