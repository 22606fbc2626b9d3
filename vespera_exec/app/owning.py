"""Whether a data directory is free, asked without opening what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.store.lock import OwnerLock

if TYPE_CHECKING:
    from pathlib import Path


def check_unowned(data_dir: Path) -> None:
    """Returns at once when nobody owns it now.

    Raises:
        DataDirectoryInUse: names the owner, and what to do.
        StoreUnavailable: it cannot be created or written.
    """
    OwnerLock.acquire(data_dir, purpose="daemon").release()
