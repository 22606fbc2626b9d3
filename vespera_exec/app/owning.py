"""Who owns a data directory, asked without opening what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.store.lock import OwnerLock, last_owner, read_owner

if TYPE_CHECKING:
    from pathlib import Path

    from vespera_exec.store.lock import Owner


def check_unowned(data_dir: Path) -> None:
    """Returns at once when nobody owns it now.

    Raises:
        DataDirectoryInUse: names the owner, and what to do.
        StoreUnavailable: it cannot be created or written.
    """
    OwnerLock.acquire(data_dir, purpose="daemon").release()


def present_owner(data_dir: Path) -> Owner | None:
    """Who holds it now; None also while the holder is still writing down who it is."""
    return read_owner(data_dir)


def latest_owner(data_dir: Path) -> Owner | None:
    """Who took it last, whether it still holds it or not."""
    return last_owner(data_dir)
