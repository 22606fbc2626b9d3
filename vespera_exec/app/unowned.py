"""What is done to a data directory while no daemon owns it: the lock is taken, for as long as it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec import paths
from vespera_exec.app import doctor
from vespera_exec.errors import StoreUnavailable
from vespera_exec.store.lock import OwnerLock

if TYPE_CHECKING:
    from pathlib import Path


def examine(data_dir: Path, roles_dir: Path) -> list[doctor.Check]:
    """`doctor.contents` of a directory that nobody owns.

    Raises:
        DataDirectoryInUse: somebody owns it.
        StoreUnavailable: its lock cannot be taken.
    """
    if not data_dir.exists():
        return doctor.contents(data_dir / paths.DATABASE, roles_dir, in_use=False)
    with OwnerLock.acquire(data_dir, purpose="doctor"):
        return doctor.contents(data_dir / paths.DATABASE, roles_dir, in_use=False)


def back_up(data_dir: Path, target: Path, *, overwrite: bool) -> int:
    """Copies the database of a directory that nobody owns to the file `target`; its size in bytes.

    Raises:
        DataDirectoryInUse: somebody owns it.
        StoreError, InvalidInput, Conflict: as `store.backup.back_up`.
    """
    from vespera_exec.store import backup

    database = data_dir / paths.DATABASE
    if not database.exists():
        raise StoreUnavailable(f"there is no database in {data_dir}", hint="--data-dir names another folder")
    with OwnerLock.acquire(data_dir, purpose="backup"):
        return backup.back_up(database, target, overwrite=overwrite).size_bytes
