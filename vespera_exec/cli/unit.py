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
# The daemon must not go when it is idle: a client would start another, outside of the unit. While one of a client
# serves, ours ends at once, and is tried again for as long as it takes.
_UNIT = """\
[Unit]
Description=vespera-exec daemon of {described}
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={command}
{environment}
Restart=always
RestartSec=10
KillMode=mixed
TimeoutStopSec=20
UMask=0077

[Install]
WantedBy=default.target
"""


def systemd_unit(data_dir: Path, environ: Mapping[str, str]) -> str:
    """The text of the unit: the `VESPERA_*` settings of `environ`, with all paths absolute, seen from here.

    Raises:
        DaemonError: this system has no systemd.
    """
    if sys.platform != "linux":
        raise DaemonError("NOT_OFFERED", f"there is no unit for {sys.platform} yet", "any client starts the daemon")
    settings = {name: _absolute(name, value) for name, value in environ.items() if name.startswith("VESPERA_")}
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
        "vespera-exec: while a daemon that a client started serves, the unit waits, and takes over when that one ends;",
        f"  systemctl --user stop {name}    # ends it for good: after `daemon stop` systemd starts it again",
    ]


def _absolute(name: str, value: str) -> str:
    match name:
        case "VESPERA_ROLES_DIR" if value:
            return os.path.abspath(os.path.expanduser(value))
        case "VESPERA_RUNTIME_DIR" if value:
            return os.path.abspath(value)
        case "VESPERA_ALLOWED_ROOTS":
            roots = [os.path.expanduser(root) for root in value.split(os.pathsep) if root]
            return os.pathsep.join(os.path.abspath(root) for root in roots)
        case _:
            return value


def _quoted(text: str) -> str:
    return '"' + _escaped(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _escaped(text: str) -> str:
    """Without specifiers and line ends."""
    return text.replace("%", "%%").replace("\n", "\\n")
