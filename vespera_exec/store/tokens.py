"""Named tokens as rows: jobs for `Journal.perform`, each one transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from vespera_exec.model.tokens import Token
from vespera_exec.store.encoding import micros, moment_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping
    from datetime import datetime

    from vespera_exec.model.principal import Scope

_COLUMNS = "id, name, digest, scopes, created, created_by, expires, last_used, revoked"


def known_in(connection: sqlite3.Connection, directory: str, now: datetime) -> list[Token]:
    """All tokens there have been, oldest first. Those that were not made for `directory` are revoked first."""
    connection.execute(
        "UPDATE tokens SET revoked = ? WHERE revoked IS NULL AND directory <> ?", (micros(now), directory)
    )
    rows = connection.execute(f"SELECT {_COLUMNS} FROM tokens ORDER BY created, id")
    return [_token(row) for row in rows]


def add(connection: sqlite3.Connection, token: Token, directory: str) -> None:
    """`token`, in place of the valid one of its name."""
    connection.execute(
        "UPDATE tokens SET revoked = ? WHERE name = ? AND revoked IS NULL", (micros(token.created_at), token.name)
    )
    connection.execute(
        f"INSERT INTO tokens ({_COLUMNS}, directory) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            token.id,
            token.name,
            token.digest,
            " ".join(sorted(token.scopes)),
            micros(token.created_at),
            token.created_by,
            micros(token.expires_at),
            micros(token.last_used_at),
            micros(token.revoked_at),
            directory,
        ),
    )


def revoke(connection: sqlite3.Connection, token_id: str, at: datetime) -> None:
    connection.execute("UPDATE tokens SET revoked = ? WHERE id = ? AND revoked IS NULL", (micros(at), token_id))


def note_uses(connection: sqlite3.Connection, uses: Mapping[str, datetime]) -> None:
    """When each was last used, by its id."""
    rows = [(micros(at), token_id) for token_id, at in uses.items()]
    connection.executemany("UPDATE tokens SET last_used = ? WHERE id = ?", rows)


def forget_digests(connection: sqlite3.Connection) -> None:
    """In a copy: no token of it can be used any more, whatever database it becomes; the names stay taken."""
    if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'tokens'").fetchone():
        connection.execute("UPDATE tokens SET digest = x'', revoked = coalesce(revoked, created)")


def _token(row: tuple[Any, ...]) -> Token:
    token_id, name, digest, scopes, created, created_by, expires, last_used, revoked = row
    return Token(
        id=token_id,
        name=name,
        digest=digest,
        scopes=frozenset(cast("list[Scope]", scopes.split())),
        created_at=moment_of(created),
        created_by=created_by,
        expires_at=None if expires is None else moment_of(expires),
        last_used_at=None if last_used is None else moment_of(last_used),
        revoked_at=None if revoked is None else moment_of(revoked),
    )
