"""Who has owned a data directory, and when: a row per owner, and how it ended."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import anyio

from vespera_exec.errors import StoreError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncGenerator

    from vespera_exec.store.journal import Journal
    from vespera_exec.store.lock import Owner

_COLUMNS = "generation, owner, pid, purpose, version, since, until, ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenure:
    """One owner's time. `generation` counts the owners of the directory, from 1.

    `since` and `until` are ISO 8601, UTC. `ended` is "clean"; "dead" where the next owner found it gone without
    a word, and `until` is then when it was found; None for the present owner.
    """

    generation: int
    owner: str
    pid: int
    purpose: str
    version: str
    since: str
    until: str | None = None
    ended: str | None = None


@asynccontextmanager
async def recorded(journal: Journal, owner: Owner) -> AsyncGenerator[list[Tenure]]:
    """Records that `owner` begins, and that it ended when the block is left. Yields the last ten, its own first.

    In between the journal writes for this owner, and no more once another has taken the database over.
    """
    await journal.perform(lambda connection: _begin(connection, owner))
    try:
        tenures = await journal.perform(history)
        journal.write_for(tenures[0].generation)
        yield tenures
    finally:
        with anyio.CancelScope(shield=True):  # an end without its row would be told as a death
            with suppress(StoreError):  # a disk that takes nothing: the next owner can only find it gone
                await journal.perform(lambda connection: _end(connection, owner))


def history(connection: sqlite3.Connection, limit: int = 10) -> list[Tenure]:
    """The last owners, the latest first."""
    rows = connection.execute(f"SELECT {_COLUMNS} FROM owners ORDER BY generation DESC LIMIT ?", (limit,))
    names = _COLUMNS.split(", ")
    return [Tenure(**dict(zip(names, row, strict=True))) for row in rows]


def _begin(connection: sqlite3.Connection, owner: Owner) -> None:
    connection.execute("UPDATE owners SET until = ?, ended = 'dead' WHERE ended IS NULL", (_now(),))
    connection.execute(
        "INSERT INTO owners (owner, pid, start_ticks, boot_id, purpose, version, since) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (owner.id, owner.pid, owner.start_ticks, owner.boot_id, owner.purpose, owner.version, owner.since),
    )


def _end(connection: sqlite3.Connection, owner: Owner) -> None:
    connection.execute("UPDATE owners SET until = ?, ended = 'clean' WHERE owner = ?", (_now(), owner.id))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
