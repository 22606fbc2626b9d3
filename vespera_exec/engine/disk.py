"""The log, as the engine waits for it: until what was decided is on disk, or will never be."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import anyio

from vespera_exec.errors import StoreUnavailable, VesperaError
from vespera_exec.model.ledger import Sink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vespera_exec.store.writer import Sample as StoredSample

_log = logging.getLogger(__name__)

_ANNOUNCING_SECONDS = 0.5


class Log(Sink, Protocol):
    """The journal, as the engine needs it."""

    async def sync(self) -> int:
        """Returns when everything appended before is on disk."""
        ...

    @property
    def fault(self) -> StoreUnavailable | None:
        """Why it cannot be written now, or None."""
        ...

    def append_samples(self, samples: Sequence[StoredSample]) -> None:
        """Keep measurements, where there is time."""
        ...


class Disk:
    """Waits for a log. Nothing of it raises."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def refuses(self) -> bool:
        """The log cannot be written now."""
        return self._log.fault is not None

    async def has(self, execution_id: str) -> None:
        """Wait until all that was decided about an execution is on disk, however long the disk refuses.

        A decision that the store will never take is logged, and no longer waited for.
        """
        pause = 0.05
        while True:
            try:
                await self._log.sync()
            except StoreUnavailable:
                await anyio.sleep(pause)
                pause = min(pause * 2, 2.0)
            except VesperaError:
                _log.exception("A decision about execution %s was refused by the store", execution_id)
                return
            else:
                return

    async def had_its_moment(self) -> None:
        """Give the log its moment. A cancel does not wait for a disk that refuses: it may be what frees it."""
        with anyio.move_on_after(_ANNOUNCING_SECONDS):
            try:
                await self._log.sync()
            except VesperaError as fault:
                _log.warning("A cancel goes on before it is on disk: %s", fault)
