"""A disk that fails for a moment, also while the writer looks again at what it holds."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

from vespera_exec.errors import Fenced, StoreUnavailable
from vespera_exec.model.enums import EventType
from vespera_exec.model.events import ExecutionEvent
from vespera_exec.model.ledger import Batch
from vespera_exec.store.damage import examine
from vespera_exec.store.decisions import Decision, prepared
from vespera_exec.store.writer import Writer

if TYPE_CHECKING:
    from pathlib import Path

LOOK = "max(cursor)"


class Failing:
    """A connection on which statements with these parts fail, one after another, each once; from `since` on."""

    def __init__(self, connection: sqlite3.Connection, *parts: str, since: str = "") -> None:
        self._connection = connection
        self._parts = list(parts)
        self._since = since

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if self._since in sql:
            self._since = ""
        if not self._since and self._parts and self._parts[0] in sql:
            del self._parts[0]
            fault = sqlite3.OperationalError("disk I/O error")
            fault.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise fault
        return self._connection.execute(sql, *values)


def info(sequence: int) -> Decision:
    event = ExecutionEvent(event_type=EventType.INFO, task_id="t", execution_id="e", sequence=sequence)
    return prepared(Batch((event,)))


@pytest.mark.parametrize("parts", [("COMMIT",), ("COMMIT", LOOK), ("INTO events", LOOK, LOOK)])
def test_a_commit_that_failed_is_repeated_without_a_gap(data_dir: Path, parts: tuple[str, ...]) -> None:
    path = data_dir / "vespera.db"
    writer = Writer(path)
    writer.write([info(1)])
    failing: Any = Failing(writer._db, *parts)  # pyright: ignore[reportPrivateUsage]
    writer._db = failing  # pyright: ignore[reportPrivateUsage]
    for _ in range(max(1, len(parts) - 1)):
        with pytest.raises(StoreUnavailable):
            writer.write([info(2), info(3)])
    assert writer.head == 1
    assert len(writer.write([info(2), info(3)]).facts) == 2
    assert writer.head == 3
    writer.close()
    assert {each.severity for each in examine(path)} == {"ok"}


def test_a_group_with_a_refused_decision_can_be_repeated(data_dir: Path) -> None:
    writer = Writer(data_dir / "vespera.db")
    writer.write([info(1)])
    group = [info(9), info(2)]
    failing: Any = Failing(writer._db, LOOK, since="ROLLBACK TO")  # pyright: ignore[reportPrivateUsage]
    writer._db = failing  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(StoreUnavailable):
        writer.write(group)
    written = writer.write(group)
    assert (len(written.facts), writer.head) == (1, 2)
    assert [(place, type(error)) for place, error in written.refused] == [(0, Fenced)]
    writer.close()
