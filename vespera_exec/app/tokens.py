"""The token of the TCP door: one file of the data directory, readable by its owner alone."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

from vespera_exec import paths
from vespera_exec.errors import StoreUnavailable

if TYPE_CHECKING:
    from pathlib import Path

_MIN_LENGTH = 32


def default_token(data_dir: Path) -> str:
    """The token in `data_dir/token`, made (0600) when it is missing.

    Raises:
        StoreUnavailable: the file cannot be read or made, is open to others, or holds no token.
    """
    path = data_dir / paths.TOKEN
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
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
        if path.stat().st_mode & 0o077:
            raise StoreUnavailable(f"{path} is open to others", hint=f"chmod 600 {path}, or remove it for a new one")
        token = path.read_text().strip()
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be read: {error.strerror}") from error
    if len(token) < _MIN_LENGTH:
        raise StoreUnavailable(f"{path} holds no token", hint="remove it; a new one is made")
    return token
