"""What an open store does for itself in the background: looks for damage once a day, removes what ended long ago."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import anyio
from anyio.from_thread import check_cancelled

from vespera_exec.errors import StoreError
from vespera_exec.store.damage import Finding, examine_in_use
from vespera_exec.store.encoding import micros
from vespera_exec.store.retention import remove_ended

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vespera_exec.store.journal import Journal
    from vespera_exec.store.output import OutputFiles

_AFTER_START_SECONDS = 5.0
_ROUND_SECONDS = 3600.0
_CHECK_EVERY = timedelta(days=1)
_log = logging.getLogger(__name__)


class Upkeep:
    """`findings` is what the full check has found, None until it has ended in this process.

    A check that found damage is made again in each round, and after each start.
    """

    def __init__(self, path: Path, journal: Journal, outputs: OutputFiles, *, retention_days: float) -> None:
        self._path = path
        self._journal = journal
        self._outputs = outputs
        self._retention = timedelta(days=retention_days)
        self.findings: list[Finding] | None = None

    @asynccontextmanager
    async def running(self, *, after_seconds: float = _AFTER_START_SECONDS) -> AsyncGenerator[None]:
        """While the context is open: a first round after `after_seconds`, then one an hour."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._rounds, after_seconds)
            yield
            group.cancel_scope.cancel()

    async def _rounds(self, after_seconds: float) -> None:
        await anyio.sleep(after_seconds)
        while True:
            try:
                await self.once()
            except StoreError as fault:
                _log.warning("Upkeep was put off: %s", fault)
            except Exception:  # noqa: BLE001 - the supervisor of upkeep: a damaged row, say, must not end who serves beside
                _log.exception("Upkeep failed and will be repeated")
            await anyio.sleep(_ROUND_SECONDS)

    async def once(self) -> None:
        """One round: the full check where the last is a day old, then retention.

        Raises:
            StoreError: the file cannot be read or written.
        """
        now = datetime.now(UTC)
        if now - await self._journal.perform(_last_check) >= _CHECK_EVERY:
            found = await self.check()
            if all(each.severity == "ok" for each in found):
                await self._journal.perform(lambda db: _note_check(db, now))
        if self._retention:
            removed = await remove_ended(self._path, self._journal, self._outputs, before=now - self._retention)
            if removed.executions:
                _log.info("Removed %d executions that ended long ago", removed.executions)

    async def check(self) -> list[Finding]:
        """SQLite's full check and the checksum of every event, beside the work; the result is logged and kept.

        Raises:
            StoreUnavailable: the file cannot be read.
        """
        self.findings = await anyio.to_thread.run_sync(lambda: examine_in_use(self._path, ask=check_cancelled))
        for finding in self.findings:
            if finding.severity == "error":
                _log.error("The database is damaged: %s; %s", finding.what, finding.hint)
        return self.findings


def _last_check(db: sqlite3.Connection) -> datetime:
    found = db.execute("SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'checked'").fetchone()
    return datetime.fromtimestamp(found[0] / 1e6 if found else 0, UTC)


def _note_check(db: sqlite3.Connection, at: datetime) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES ('checked', ?)", (str(micros(at)),))
