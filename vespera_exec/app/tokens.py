"""The token of the TCP door: one file of the data directory, readable by its owner alone."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from typing import TYPE_CHECKING

from vespera_exec import paths
from vespera_exec.errors import StoreUnavailable

if TYPE_CHECKING:
    from pathlib import Path

_MIN_LENGTH = 32
_LIMIT_BYTES = 4096


def default_token(data_dir: Path) -> str:
    """The token in `data_dir/token`, made (0600) when it is missing.

    Raises:
        StoreUnavailable: the file cannot be read or made, is a link, no regular file or another user's, is open
            to others, or holds no token.
    """
    path = data_dir / paths.TOKEN
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return _read(path)
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be made: {error.strerror}") from error
    token = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
    return token


def _read(path: Path) -> str:
    try:
        # O_NONBLOCK: nobody need write to a fifo for it to be refused.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_ours(path) from error
        raise StoreUnavailable(f"{path} cannot be read: {error.strerror}") from error
    try:
        seen = os.fstat(descriptor)
        if not stat.S_ISREG(seen.st_mode) or seen.st_uid != os.getuid():
            raise _not_ours(path)
        if seen.st_mode & 0o077:
            raise StoreUnavailable(f"{path} is open to others", hint=f"chmod 600 {path}, or remove it for a new one")
        token = os.read(descriptor, _LIMIT_BYTES).decode("ascii", "replace").strip()
    finally:
        os.close(descriptor)
    if len(token) < _MIN_LENGTH:
        raise StoreUnavailable(f"{path} holds no token", hint="remove it; a new one is made")
    return token


def _not_ours(path: Path) -> StoreUnavailable:
    return StoreUnavailable(
        f"{path} is a link, no regular file, or another user's", hint="look at it; remove it, and a new one is made"
    )
