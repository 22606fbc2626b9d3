"""Where things live: the data directory, its files, and the sockets of its daemon.

Standard library only and cheap to import: the stdio bridge starts with it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

DATABASE = "vespera.db"
LOCK = "owner.lock"
TOKEN = "token"
DAEMON_LOG = "daemon.log"
OUTPUTS = "outputs"
SCRATCH = "scratch"


def find_data_dir(cwd: Path, environ: Mapping[str, str]) -> Path:
    """`VESPERA_DATA_DIR`; else `.vespera` beside the nearest `.git` above `cwd`; else the user's state folder."""
    named = environ.get("VESPERA_DATA_DIR")
    if named:
        return (cwd / Path(named).expanduser()).resolve()
    home = Path(environ.get("HOME") or Path.home())
    for folder in (cwd, *cwd.parents):
        if (folder / ".git").exists():
            return (folder / ".vespera").resolve()
    state = environ.get("XDG_STATE_HOME")
    return (Path(state) if state else home / ".local" / "state").resolve() / "vespera-exec"


def roles_dir(environ: Mapping[str, str]) -> Path:
    """The operator's own role files: `VESPERA_ROLES_DIR`, else `vespera-exec/roles` in the user's config folder."""
    named = environ.get("VESPERA_ROLES_DIR")
    if named:
        return Path(named).expanduser()
    config = environ.get("XDG_CONFIG_HOME")
    home = Path(environ.get("HOME") or Path.home())
    return (Path(config) if config else home / ".config") / "vespera-exec" / "roles"


def runtime_dir(environ: Mapping[str, str]) -> Path:
    """A 0700 folder of this user for sockets, created when missing.

    Raises:
        PermissionError: the folder exists and is not ours alone.
    """
    base = environ.get("XDG_RUNTIME_DIR")
    folder = (
        Path(base) / "vespera-exec"
        if base and Path(base).is_dir()
        else Path(tempfile.gettempdir()) / f"vespera-exec-{os.getuid()}"
    )
    folder.mkdir(mode=0o700, exist_ok=True)
    seen = folder.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid():
        raise PermissionError(f"{folder} is not a folder of this user; remove it")
    if stat.S_IMODE(seen.st_mode) & 0o077:
        folder.chmod(0o700)
    return folder


def socket_paths(data_dir: Path, environ: Mapping[str, str]) -> tuple[Path, Path]:
    """`(mcp.sock, http.sock)` of the daemon that owns `data_dir`, under a hashed name (107-byte limit)."""
    name = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    folder = runtime_dir(environ)
    return folder / f"{name}.mcp.sock", folder / f"{name}.http.sock"
