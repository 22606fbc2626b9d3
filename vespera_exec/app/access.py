"""Named tokens: made, listed and revoked by the local user, and known again at the door."""

from __future__ import annotations

import logging
import secrets
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio

from vespera_exec.app import token_views as views
from vespera_exec.app.callers import require_local
from vespera_exec.errors import Conflict, InvalidInput, NotFound, StoreError, Unauthenticated
from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.principal import Caller
from vespera_exec.model.tokens import FORM, Token, digest_of, granted, is_name, is_whole
from vespera_exec.store import tokens as rows

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator
    from datetime import datetime

    from vespera_exec.store.journal import Journal

_log = logging.getLogger(__name__)

NOTE_SECONDS = 60.0
"""How often at most it is written down when tokens were last used."""
_NOBODYS = bytes(32)
"""The digest of an unknown id, so that it takes as long as a known one."""


@dataclass(slots=True, eq=False)
class _Known:
    token: Token
    open: set[anyio.CancelScope] = field(default_factory=set[anyio.CancelScope])


class Admission:
    """Somebody who has shown a valid token. What is done for him is done inside of `while_valid`."""

    def __init__(self, known: _Known, seconds_left: Callable[[], float]) -> None:
        token = known.token
        self._known = known
        self._seconds_left = seconds_left
        self.caller = Caller(
            principal=token.principal,
            scopes=token.scopes,
            over_tcp=True,
            sees_only=token.principal,
            token=token.id,
        )

    @contextmanager
    def while_valid(self) -> Generator[anyio.CancelScope]:
        """The block is cancelled when the token is revoked, or its time is over."""
        with anyio.CancelScope(deadline=anyio.current_time() + self._seconds_left()) as scope:
            self._known.open.add(scope)
            try:
                yield scope
            finally:
                self._known.open.discard(scope)

    def why_over(self) -> str:
        """What is said of his token once `while_valid` was cancelled; the same as `Access.admit` says after that."""
        return _why_over(self._known.token)


class Access:
    """The named tokens of one data directory, held in memory: nobody but its owner changes them.

    `directory` stands for the data directory: a token that was made for another is revoked when it is read.
    """

    def __init__(self, journal: Journal, *, directory: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self._journal = journal
        self._directory = directory
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._changing = anyio.Lock()
        self._used = anyio.Event()
        self._uses: dict[str, datetime] = {}

    @asynccontextmanager
    async def running(self, *, note_seconds: float = NOTE_SECONDS) -> AsyncGenerator[None]:
        """Reads the tokens, and writes down when they are used while the context is open.

        Raises:
            StoreError: they cannot be read.
        """
        now = self._clock.now()
        found = await self._journal.perform(lambda db: rows.known_in(db, self._directory, now))
        self._known = {token.id: _Known(token) for token in found}
        async with anyio.create_task_group() as group:
            group.start_soon(self._note_each, note_seconds)
            try:
                yield
            finally:
                group.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):  # one short write, or the last uses are forgotten
                    await self._note_uses()

    def admit(self, given: bytes) -> Admission:
        """Who shows `given`.

        Raises:
            Unauthenticated: it is no token, or not a valid one; why is told only to who has the whole of it.
        """
        form = FORM.fullmatch(given)
        known = self._known.get(form[1].decode()) if form else None
        if not is_whole(given, known.token.digest if known else _NOBODYS) or known is None:
            raise Unauthenticated("Every request over TCP needs a valid token")
        now = self._clock.now()
        if known.token.state(now) != "valid":
            raise Unauthenticated(_why_over(known.token))
        known.token = replace(known.token, last_used_at=now)
        self._uses[known.token.id] = now
        self._used.set()
        return Admission(known, lambda: self._seconds_left(known.token))

    async def create(self, caller: Caller, new: views.NewToken) -> views.MadeToken:
        """A token, shown this once; on disk when this returns. With `replace` the present one of its name ends.

        Raises:
            PermissionDenied: the caller is not the user who started us.
            InvalidInput: the name cannot be one.
            Conflict: the name is, or was, somebody's.
            StoreError: it cannot be written now.
        """
        require_local(caller)
        if not is_name(new.name):
            raise InvalidInput(
                f"{new.name[:80]!r} is no name of a token",
                hint="1 to 64 of a-z, 0-9, `.`, `_`, `-`, the first a letter or a digit; not `default`, nor like an id",
            )
        async with self._changing:
            now = self._clock.now()
            before = [known for known in self._known.values() if known.token.name == new.name]
            if before and not new.replace:
                raise Conflict(
                    f"the name {new.name} has been used ({before[-1].token.state(now)})",
                    hint="who has the name sees its tasks: take another one, or `--replace` it for the same holder",
                )
            token_id = secrets.token_hex(6)
            whole = f"vsp_{token_id}_{secrets.token_hex(20)}"
            token = Token(
                id=token_id,
                name=new.name,
                digest=digest_of(whole.encode()),
                scopes=granted(new.scopes),
                created_at=now,
                created_by=caller.principal,
                expires_at=now + timedelta(seconds=new.expires_seconds) if new.expires_seconds else None,
            )
            with anyio.CancelScope(shield=True):  # on disk and unknown here it could be neither used nor revoked
                await self._journal.perform(lambda db: rows.add(db, token, self._directory))
                for known in before:
                    self._end(known, now)
                self._known[token_id] = _Known(token)
        return views.MadeToken(**self._view(token).model_dump(), token=whole)

    def listed(self, caller: Caller) -> views.TokenList:
        """All tokens there have been, oldest first.

        Raises:
            PermissionDenied: the caller is not the user who started us.
        """
        require_local(caller)
        return views.TokenList(tokens=[self._view(known.token) for known in self._known.values()])

    async def revoke(self, caller: Caller, name_or_id: str) -> views.TokenView:
        """End a token, and everything that is open for it, at once; on disk when this returns.

        One that was revoked before stays as it is.

        Raises:
            PermissionDenied: the caller is not the user who started us.
            NotFound: there is no such token.
            StoreError: it is over here and now, but that could not be written.
        """
        require_local(caller)
        known = self._last_of(name_or_id)
        self._end(known, self._clock.now())
        token = known.token
        assert token.revoked_at is not None
        revoked_at = token.revoked_at
        try:
            with anyio.CancelScope(shield=True):  # nobody expects it to work again after a restart
                await self._journal.perform(lambda db: rows.revoke(db, token.id, revoked_at))
        except StoreError as fault:
            raise type(fault)(
                f"{token.name} is revoked only until the server ends: {fault.message}",
                hint="repeat it when there is room",
            ) from fault
        return self._view(token)

    def _last_of(self, name_or_id: str) -> _Known:
        found = [known for known in self._known.values() if name_or_id in (known.token.id, known.token.name)]
        if not found:
            raise NotFound(f"Token not found: {name_or_id[:100]}", hint="`vespera-exec token list` shows the tokens")
        return found[-1]

    def _end(self, known: _Known, now: datetime) -> None:
        if known.token.revoked_at is None:
            known.token = replace(known.token, revoked_at=now)
        for scope in tuple(known.open):
            scope.cancel()

    def _seconds_left(self, token: Token) -> float:
        now = self._clock.now()
        if token.state(now) != "valid":
            return 0.0
        return float("inf") if token.expires_at is None else (token.expires_at - now).total_seconds()

    def _view(self, token: Token) -> views.TokenView:
        return views.TokenView(
            id=token.id,
            name=token.name,
            principal=token.principal,
            scopes=sorted(token.scopes),
            state=token.state(self._clock.now()),
            created_at=token.created_at,
            created_by=token.created_by,
            expires_at=token.expires_at,
            last_used_at=token.last_used_at,
            revoked_at=token.revoked_at,
        )

    async def _note_each(self, seconds: float) -> None:
        while True:
            await self._used.wait()
            await self._note_uses()
            await anyio.sleep(seconds)

    async def _note_uses(self) -> None:
        uses, self._uses, self._used = self._uses, {}, anyio.Event()
        if not uses:
            return
        try:
            await self._journal.perform(lambda db: rows.note_uses(db, uses))
        except StoreError as fault:
            _log.warning("When tokens were last used could not be written: %s", fault)


def _why_over(token: Token) -> str:
    """Of one that is not valid any more. Asks no clock: the end of its time may have been told by another one."""
    return f"The token {token.name} {'has expired' if token.revoked_at is None else 'was revoked'}"
