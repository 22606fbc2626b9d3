"""Whether a data directory is this user's own work, or came with something, such as a cloned repository."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from typing import TYPE_CHECKING

from vespera_exec import paths
from vespera_exec.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_log = logging.getLogger(__name__)


def made_here(data_dir: Path, environ: Mapping[str, str]) -> bool:
    """True for a directory that is new, or whose secret is in the user's register for this path or this inode.

    So one that was renamed, or moved within its file system, stays this user's own, and a copy does not. Any other
    is taken in hand: its token is thrown away, links in it are removed, it becomes 0700, and it is noted, so that it
    is this user's from now on. What is unfinished in it must not be run this time. Call it as the owner.

    Raises:
        StoreUnavailable: the directory cannot be written.
    """
    register, instance = paths.register_dir(environ), data_dir / paths.INSTANCE
    try:
        data_dir.chmod(0o700)
        secret = _read(instance)
        mine = [f"path {hashlib.sha256(os.fsencode(data_dir)).hexdigest()}", f"inode {data_dir.stat().st_ino}"]
        noted = _read(register / _name(secret)).splitlines() if secret else []
        if any(line in noted for line in mine):
            if noted != mine:
                _note(register, secret, mine)
            return True
        foreign = (data_dir / paths.DATABASE).exists()
        for name in (paths.TOKEN, paths.INSTANCE, paths.SCRATCH, paths.OUTPUTS, paths.CANCELS, paths.DAEMON_LOG):
            if (data_dir / name).is_symlink() or (foreign and name in (paths.TOKEN, paths.INSTANCE)):
                (data_dir / name).unlink(missing_ok=True)
        secret = secrets.token_hex(16)
        _write(instance, secret)
    except OSError as fault:
        raise StoreUnavailable(
            f"cannot write to the data directory {data_dir}: {fault.strerror}",
            hint="give yourself write permission, or name another folder in VESPERA_DATA_DIR",
        ) from fault
    _note(register, secret, mine)
    if foreign:
        _log.warning("%s was not made here by you: what was queued in it is not run", data_dir)
    return not foreign


def derived_key(data_dir: Path, purpose: str) -> bytes:
    """32 bytes that stay the same for this directory and `purpose`, over restarts, and that nobody else can tell.

    They come from its secret, so those of a directory that was not made here are gone once it was taken in hand.
    Where it has no secret, they are new each time.
    """
    secret = _read(data_dir / paths.INSTANCE) or secrets.token_hex(32)
    return hmac.digest(secret.encode(), purpose.encode(), "sha256")


def _name(secret: str) -> str:
    """What the note of a directory is called, which does not give its secret away."""
    return hashlib.sha256(secret.encode()).hexdigest()[:32]


def _note(register: Path, secret: str, mine: list[str]) -> None:
    try:
        register.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(register / _name(secret), "\n".join(mine))
    except OSError as fault:
        _log.warning("A data directory cannot be noted as yours (%s): after a restart its queue will not be run", fault)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(text + "\n")
