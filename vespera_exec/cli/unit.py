"""A systemd user unit for the daemon of one data directory."""

from __future__ import annotations

import hashlib
import os
import sys
from typing import TYPE_CHECKING

from vespera_exec.cli.client import DaemonError
from vespera_exec.server.launch import daemon_command

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# mixed: SIGTERM goes to the daemon alone, whose own ladder ends the work; what is left after it is killed.
# The daemon must not go when it is idle: a client would start another, outside of the unit.
_UNIT = """\
[Unit]
Description=vespera-exec daemon of {described}
StartLimitIntervalSec=60
StartLimitBurst=5

[Service]
Type=exec
ExecStart={command}
{environment}
Restart=on-failure
RestartSec=2
KillMode=mixed
TimeoutStopSec=20
UMask=0077

[Install]
WantedBy=default.target
"""


def systemd_unit(data_dir: Path, environ: Mapping[str, str]) -> str:
    """The text of the unit: absolute paths, and the `VESPERA_*` settings of `environ`.

    Raises:
        DaemonError: this system has no systemd.
    """
    if sys.platform != "linux":
        raise DaemonError("NOT_OFFERED", f"there is no unit for {sys.platform} yet", "any client starts the daemon")
    settings = {name: value for name, value in environ.items() if name.startswith("VESPERA_")}
    settings = dict(sorted(settings.items())) | {"VESPERA_IDLE_EXIT_SECONDS": "0"}
    settings.pop("VESPERA_DATA_DIR", None)
    return _UNIT.format(
        described=_escaped(str(data_dir)),
        command=" ".join(_quoted(part).replace("$", "$$") for part in daemon_command(data_dir)),
        environment="\n".join(f"Environment={_quoted(f'{name}={value}')}" for name, value in settings.items()),
    )


def how_to_enable(data_dir: Path) -> list[str]:
    name = f"vespera-exec-{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:8]}.service"
    return [
        f"vespera-exec: save this as ~/.config/systemd/user/{name}, then:",
        "  vespera-exec daemon stop",
        f"  systemctl --user daemon-reload && systemctl --user enable --now {name}",
        "  loginctl enable-linger    # so that it also runs while you are not logged in",
    ]


def _quoted(text: str) -> str:
    return '"' + _escaped(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _escaped(text: str) -> str:
    """Without specifiers and line ends."""
    return text.replace("%", "%%").replace("\n", "\\n")
