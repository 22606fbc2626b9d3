"""Where things live: the data directory, its files, and the sockets of its daemon.

Standard library only and cheap to import: the stdio bridge starts with it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

DATABASE = "vespera.db"
LOCK = "owner.lock"
START_LOCK = "start.lock"
TOKEN = "token"
INSTANCE = "instance"
DAEMON_LOG = "daemon.log"
OUTPUTS = "outputs"
CANCELS = "cancels"
SCRATCH = "scratch"

# What a caller's environment may hand to the work it starts; everything else stays behind.
# Here and not beside `Caller`, because the bridge needs it and must not pay for `dataclasses`.
CALLER_ENV = (
    "PATH",
    "VIRTUAL_ENV",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TERM",
    "SHELL",
    "TMPDIR",
)


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


def register_dir(environ: Mapping[str, str]) -> Path:
    """Where it is noted which data directories this user made: `known` in the user's state folder."""
    state = environ.get("XDG_STATE_HOME")
    home = Path(environ.get("HOME") or Path.home())
    return (Path(state) if state else home / ".local" / "state") / "vespera-exec" / "known"


def roles_dir(environ: Mapping[str, str]) -> Path:
    """The operator's own role files: `VESPERA_ROLES_DIR`, else `vespera-exec/roles` in the user's config folder."""
    named = environ.get("VESPERA_ROLES_DIR")
    if named:
        return Path(named).expanduser()
    config = environ.get("XDG_CONFIG_HOME")
    home = Path(environ.get("HOME") or Path.home())
    return (Path(config) if config else home / ".config") / "vespera-exec" / "roles"


def create_data_dir(data_dir: Path) -> None:
    """Makes the folder when it is missing: 0700, and ignored by git, since it may stand in a repository.

    Raises:
        StoreUnavailable: it cannot be made, is no folder, or belongs to another user.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass
    except OSError as fault:
        raise _unusable(f"cannot create the data directory {data_dir}: {fault.strerror}") from fault
    else:
        (data_dir / ".gitignore").write_text("*\n", encoding="ascii")
    try:
        seen = data_dir.stat()
    except OSError as fault:
        raise _unusable(f"cannot open the data directory {data_dir}: {fault.strerror}") from fault
    if not stat.S_ISDIR(seen.st_mode):
        raise _unusable(f"the data directory {data_dir} is not a folder")
    if seen.st_uid != os.getuid():
        raise _unusable(f"the data directory {data_dir} belongs to another user (uid {seen.st_uid})")


def runtime_dir(environ: Mapping[str, str]) -> Path:
    """A 0700 folder of this user for sockets, created when missing.

    `VESPERA_RUNTIME_DIR`, else `/run/user/UID/vespera-exec`, else `/tmp/vespera-exec-UID`. Neither
    `XDG_RUNTIME_DIR` nor `TMPDIR` is asked: MCP clients start servers with half an environment, and a
    bridge that looked elsewhere than the terminal would never find the daemon.

    Raises:
        PermissionError: the folder exists and is not ours alone.
    """
    named = environ.get("VESPERA_RUNTIME_DIR")
    uid = os.getuid()
    session = Path(f"/run/user/{uid}")
    if named:
        folder = Path(named)
    elif session.is_dir() and os.access(session, os.W_OK | os.X_OK):
        folder = session / "vespera-exec"
    else:
        folder = Path(f"/tmp/vespera-exec-{uid}")
    folder.mkdir(mode=0o700, exist_ok=True)
    seen = folder.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != uid:
        raise PermissionError(f"{folder} is not a folder of this user; remove it")
    if stat.S_IMODE(seen.st_mode) & 0o077:
        folder.chmod(0o700)
    return folder


def socket_paths(data_dir: Path, environ: Mapping[str, str]) -> tuple[Path, Path]:
    """`(mcp.sock, http.sock)` of the daemon that owns `data_dir`, under a hashed name (107-byte limit)."""
    name = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    folder = runtime_dir(environ)
    return folder / f"{name}.mcp.sock", folder / f"{name}.http.sock"


def _unusable(message: str) -> Exception:
    from vespera_exec.errors import StoreUnavailable  # only a failure pays for the import

    return StoreUnavailable(message, hint="name another folder in VESPERA_DATA_DIR")
