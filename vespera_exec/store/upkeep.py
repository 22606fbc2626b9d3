"""What an open store does for itself in the background: looks for damage once a day, removes what ended long ago."""

from __future__ import annotations

import logging
import sqlite3
import time
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import anyio
from anyio.from_thread import check_cancelled

from vespera_exec.errors import StoreError
from vespera_exec.store import database
from vespera_exec.store.damage import Finding, checksum_faults, finding_of, integrity_faults
from vespera_exec.store.encoding import micros
from vespera_exec.store.retention import remove_ended

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vespera_exec.store.journal import Journal
    from vespera_exec.store.output import OutputFiles

_AFTER_START_SECONDS = 5.0
_ROUND_SECONDS = 3600.0
_CHECK_EVERY = timedelta(days=1)
_EVENTS = 256
_PAUSE_SECONDS = 0.02
_STEPS = 50_000
"""Of SQLite's machine, a few milliseconds: so often it is asked whether the check should end."""
_log = logging.getLogger(__name__)


class Upkeep:
    """`findings` is what the full check has found, None until it has ended in this process."""

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
            await anyio.sleep(_ROUND_SECONDS)

    async def once(self) -> None:
        """One round: the full check where the last is a day old, then retention.

        Raises:
            StoreError: the file cannot be read or written.
        """
        now = datetime.now(UTC)
        if now - await self._journal.perform(_last_check) >= _CHECK_EVERY:
            await self.check()
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
        self.findings = await anyio.to_thread.run_sync(self._look)
        for finding in self.findings:
            if finding.severity == "error":
                _log.error("The database is damaged: %s; %s", finding.what, finding.hint)
        return self.findings

    def _look(self) -> list[Finding]:
        try:
            with closing(database.open_for_reading(self._path)) as reader:
                reader.set_progress_handler(check_cancelled, _STEPS)
                return [self._integrity(reader), self._checksums(reader)]
        except sqlite3.Error as fault:
            check_cancelled()  # it is what interrupted SQLite
            raise database.named(fault, self._path.name) from fault

    def _integrity(self, reader: sqlite3.Connection) -> Finding:
        faults = list(integrity_faults(reader))
        return finding_of(faults, "SQLite's integrity check found nothing", "SQLite's integrity check found")

    def _checksums(self, reader: sqlite3.Connection) -> Finding:
        """In small pieces, so that neither the interpreter nor the WAL is held for long."""
        faults: list[str] = []
        after, more = 0, True
        while more:
            more = False
            for cursor, fault in checksum_faults(reader, after=after, limit=_EVENTS):
                after, more = cursor, True
                if fault:
                    faults.append(f"event {cursor} {fault}")
            check_cancelled()
            time.sleep(_PAUSE_SECONDS)
        return finding_of(faults, "all events match their checksums", "events")


def _last_check(db: sqlite3.Connection) -> datetime:
    found = db.execute("SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'checked'").fetchone()
    return datetime.fromtimestamp(found[0] / 1e6 if found else 0, UTC)


def _note_check(db: sqlite3.Connection, at: datetime) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES ('checked', ?)", (str(micros(at)),))
