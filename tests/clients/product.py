"""A daemon of the real product on a folder of its own, with three roles that its clients may use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

COMMAND = str(Path(sys.executable).with_name("vespera-exec"))

_STEPS = """
import json, os, time
out = open(int(os.environ["VESPERA_PROGRESS_FD"]), "w", buffering=1)
for step in range(1, 5):
    print(json.dumps({"progress": step * 20, "message": f"step {step}"}), file=out)
    time.sleep(0.1)
print(json.dumps({"result": {"steps": 4}}), file=out)
"""
_WITHIN = 30


@dataclass(frozen=True, slots=True)
class Product:
    """Where it is, and the environment in which its command reaches it."""

    url: str
    token: str
    environ: dict[str, str]


@contextmanager
def running() -> Generator[Product]:
    with tempfile.TemporaryDirectory(prefix="clients-", dir="/tmp") as name:
        folder = Path(name)
        roles = folder / "roles"
        roles.mkdir()
        script = folder / "steps.py"
        script.write_text(_STEPS)
        steps = [sys.executable, str(script)]
        for role, given in {
            "steps": {"argv": steps},
            "forever": {"argv": ["sleep", "60"]},
            "asks": {"argv": steps, "approval": "May it go on?"},
        }.items():
            what = {"name": role, "runner": "process", "permissions": {"principals": ["local"], "scopes": ["operate"]}}
            (roles / f"{role}.yaml").write_text(json.dumps(what | given))  # JSON is YAML, too
        environ = {name: value for name, value in os.environ.items() if not name.startswith("VESPERA_")} | {
            "HOME": name,
            "VESPERA_DATA_DIR": str(folder / "data"),
            "VESPERA_RUNTIME_DIR": name,
            "VESPERA_ROLES_DIR": str(roles),
        }
        _command("daemon", "start", environ=environ)
        try:
            url: str = json.loads(_command("daemon", "status", "--json", environ=environ))["daemon"]["url"]
            yield Product(url, (folder / "data" / "token").read_text().strip(), environ)
        finally:
            _command("daemon", "stop", environ=environ)


def _command(*arguments: str, environ: dict[str, str]) -> str:
    ran = subprocess.run(
        [COMMAND, *arguments], env=environ, capture_output=True, text=True, timeout=_WITHIN, check=False
    )
    if ran.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {ran.stdout}{ran.stderr}")
    return ran.stdout
