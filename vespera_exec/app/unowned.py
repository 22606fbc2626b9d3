"""What is done to a data directory while no daemon owns it: the lock is taken, for as long as it takes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vespera_exec import paths
from vespera_exec.app import doctor
from vespera_exec.errors import Conflict, StoreUnavailable
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
        return doctor.contents(data_dir / paths.DATABASE, roles_dir)
    with OwnerLock.acquire(data_dir, purpose="doctor"):
        return doctor.contents(data_dir / paths.DATABASE, roles_dir)


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


def restore(data_dir: Path, source: Path) -> int:
    """Puts the backup `source` into a directory that has no database; its size in bytes.

    Whoever calls this says that the backup is his own: what is queued in it will run, and what was at work when it
    was made goes on or ends as after the death of a server.

    Raises:
        Conflict: there is a database already.
        DataDirectoryInUse: somebody owns the directory.
        StoreError, InvalidInput: `source` is damaged, or no database of ours; the directory cannot be written.
    """
    from vespera_exec.app.trust import made_here
    from vespera_exec.store import backup

    database = data_dir / paths.DATABASE
    with OwnerLock.acquire(data_dir, purpose="restore"):
        if database.exists():
            hint = "move it away, or name another folder with --data-dir"
            raise Conflict(f"there is a database in {data_dir} already", hint=hint)
        made_here(data_dir, os.environ)  # while it is empty: it is this user's own
        return backup.put_back(source, database).size_bytes
