"""Everything that a data directory keeps, opened and closed together."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from vespera_exec import paths
from vespera_exec.store.feed import Feed, StoredEvent
from vespera_exec.store.journal import Journal
from vespera_exec.store.output import Output, OutputFiles
from vespera_exec.store.queries import Queries

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from vespera_exec.settings import Settings


@dataclass(frozen=True, slots=True)
class Store:
    """Journal, feed, queries and outputs of one data directory. Its owner holds the `OwnerLock` meanwhile."""

    journal: Journal
    feed: Feed
    queries: Queries
    outputs: OutputFiles

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

        def publish(events: Sequence[StoredEvent]) -> None:
            if feed is not None:
                feed.publish(events)

        async with (
            Journal.open(settings.database, linger_ms=settings.linger_ms, publish=publish) as journal,
            Queries.open(settings.database) as queries,
            OutputFiles.open(settings.data_dir, limit_bytes=settings.output_limit_bytes, mask=mask) as outputs,
        ):
            feed = Feed(queries, head=journal.head)
            yield cls(journal, feed, queries, outputs)

    def open_output(self, execution_id: str) -> Output:
        """Where the engine keeps what an execution writes; closed by the engine."""
        return self.outputs.create(execution_id)
