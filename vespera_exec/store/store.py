"""Everything that a data directory keeps, opened and closed together."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import anyio
from anyio.from_thread import check_cancelled

from vespera_exec import paths
from vespera_exec.store.backup import BackupReport, back_up
from vespera_exec.store.cancels import UnwrittenCancels
from vespera_exec.store.feed import Feed
from vespera_exec.store.journal import Journal
from vespera_exec.store.output import Output, OutputFiles
from vespera_exec.store.queries import Queries
from vespera_exec.store.retention import RetentionReport, remove_ended
from vespera_exec.store.upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from datetime import datetime
    from pathlib import Path

    from vespera_exec.settings import Settings
    from vespera_exec.store.decisions import Fact


@dataclass(frozen=True, slots=True)
class Store:
    """Journal, feed, queries, outputs and upkeep of one data directory. Its owner holds the `OwnerLock` meanwhile."""

    database: Path
    journal: Journal
    feed: Feed
    queries: Queries
    outputs: OutputFiles
    upkeep: Upkeep
    cancels: UnwrittenCancels

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, *, mask: Sequence[bytes] = ()) -> AsyncGenerator[Self]:
        """The store of `settings.data_dir`, made when it is missing. `mask` are secrets to keep out of the outputs.

        Leaving the context writes what is queued.

        Raises:
            StoreUnavailable, StoreDamaged, StoreTooNew: it cannot be opened; the hint says what to do.
        """
        paths.create_data_dir(settings.data_dir)
        feed: Feed | None = None

        def publish(facts: Sequence[Fact], head: int) -> None:
            if feed is not None:
                feed.publish(facts, head)

        async with (
            Journal.open(settings.database, linger_ms=settings.linger_ms, publish=publish) as journal,
            Queries.open(settings.database) as queries,
            OutputFiles.open(settings.data_dir, limit_bytes=settings.output_limit_bytes, mask=mask) as outputs,
        ):
            feed = Feed(queries, head=journal.head)
            upkeep = Upkeep(settings.database, journal, outputs, retention_days=settings.retention_days)
            cancels = UnwrittenCancels(settings.data_dir)
            yield cls(settings.database, journal, feed, queries, outputs, upkeep, cancels)

    async def backup(self, path: Path, *, overwrite: bool = False) -> BackupReport:
        """Copy the database to the file `path` while it is written; outputs are files and are not in it.

        Every event that was acknowledged before the call is in the copy. A cancelled call leaves nothing.

        Raises:
            InvalidInput, Conflict, StoreUnavailable, StoreDamaged: as `backup.back_up`; `path` is as it was.
        """
        return await anyio.to_thread.run_sync(
            lambda: back_up(self.database, path, overwrite=overwrite, ask=check_cancelled)
        )

    async def remove_ended(self, *, before: datetime) -> RetentionReport:
        """Remove the runs, and the tasks with them, that ended before `before`; see `retention`.

        Raises:
            StoreError: the database cannot be read or written; what is left is removed by a later call.
        """
        return await remove_ended(self.database, self.journal, self.outputs, before=before)

    def open_output(self, execution_id: str) -> Output:
        """Where the engine keeps what an execution writes; closed by the engine."""
        return self.outputs.create(execution_id)
