"""Named tokens behind the door: what is kept of their use, and their end on a disk that takes nothing."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import anyio
import pytest
from deadlines import WITHIN

from vespera_exec.app.access import Access
from vespera_exec.app.token_views import NewToken
from vespera_exec.errors import PermissionDenied, StoreUnavailable, Unauthenticated
from vespera_exec.model.clock import Clock
from vespera_exec.model.principal import Caller
from vespera_exec.model.task import Task
from vespera_exec.store.journal import Journal

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

LOCAL = Caller()
LONG = 3600.0


@dataclass
class Wall:
    """A clock that stands until it is moved."""

    at: datetime = datetime(2030, 1, 1, tzinfo=UTC)
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(now=lambda: self.at)


@asynccontextmanager
async def opened(
    folder: Path, *, wall: Wall | None = None, directory: str = "here", note_seconds: float = LONG
) -> AsyncGenerator[tuple[Access, Journal]]:
    async with Journal.open(folder / "vespera.db") as journal:
        access = Access(journal, directory=directory, clock=(wall or Wall()).clock)
        async with access.running(note_seconds=note_seconds):
            yield access, journal


async def made(access: Access, name: str = "ci", *, seconds: int | None = None) -> bytes:
    return (await access.create(LOCAL, NewToken(name=name, expires_seconds=seconds))).token.encode()


async def last_used(journal: Journal) -> list[int | None]:
    return await journal.perform(lambda db: [row[0] for row in db.execute("SELECT last_used FROM tokens")])


async def test_the_last_use_is_written_once_in_a_while_and_at_the_end(tmp_path: Path) -> None:
    wall = Wall()
    async with opened(tmp_path, wall=wall) as (access, journal):
        token = await made(access)
        assert await last_used(journal) == [None]
        access.admit(token)
        with anyio.fail_after(WITHIN):
            while await last_used(journal) == [None]:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        first = await last_used(journal)
        for _ in range(20):
            wall.at += timedelta(seconds=1)
            access.admit(token)
            assert await last_used(journal) == first
        assert access.listed(LOCAL).tokens[0].last_used_at == wall.at
    async with opened(tmp_path) as (access, _):
        assert access.listed(LOCAL).tokens[0].last_used_at == wall.at


async def test_a_token_expires_to_the_moment(tmp_path: Path) -> None:
    wall = Wall()
    async with opened(tmp_path, wall=wall) as (access, _):
        token = await made(access, seconds=60)
        wall.at += timedelta(seconds=59.999)
        access.admit(token)
        wall.at += timedelta(seconds=0.001)
        with pytest.raises(Unauthenticated, match="expired"):
            access.admit(token)


async def test_what_is_done_for_a_token_ends_with_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as (access, _):
        admitted = access.admit(await made(access))
        other = access.admit(await made(access, "other"))
        with admitted.while_valid() as scope:
            await access.revoke(LOCAL, "ci")
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        with admitted.while_valid() as late:
            await anyio.sleep_forever()
        assert late.cancelled_caught
        with other.while_valid() as untouched:
            await anyio.lowlevel.checkpoint()
        assert not untouched.cancelled_caught


@pytest.mark.promise("revoked")
async def test_a_revoked_token_is_refused_though_the_disk_takes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as (access, journal):
        token = await made(access)
        journal.limit_pages(1)
        Task(description="x" * 100_000, sink=journal)
        with pytest.raises(StoreUnavailable, match="disk is full"):
            await journal.sync()
        with pytest.raises(StoreUnavailable, match="revoked only until the server ends"):
            await access.revoke(LOCAL, "ci")
        with pytest.raises(Unauthenticated, match="revoked"):
            access.admit(token)
        with pytest.raises(StoreUnavailable):
            await access.create(LOCAL, NewToken(name="more"))
        assert len(access.listed(LOCAL).tokens) == 1
        journal.limit_pages(100_000)
        with anyio.fail_after(WITHIN):
            while journal.refusal is not None:  # noqa: ASYNC110
                await anyio.sleep(0.05)
        await access.revoke(LOCAL, "ci")
    async with opened(tmp_path) as (access, _):
        with pytest.raises(Unauthenticated, match="revoked"):
            access.admit(token)


async def test_tokens_of_another_directory_are_worth_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, directory="theirs") as (access, _):
        token = await made(access)
    for _ in range(2):
        async with opened(tmp_path, directory="ours") as (access, _):
            with pytest.raises(Unauthenticated):
                access.admit(token)
            assert [each.state for each in access.listed(LOCAL).tokens] == ["revoked"]
    async with opened(tmp_path, directory="theirs") as (access, _):
        with pytest.raises(Unauthenticated):
            access.admit(token)


@pytest.mark.parametrize("caller", [Caller(over_tcp=True), Caller(principal="token:default", over_tcp=True)])
async def test_nobody_but_the_local_user_has_a_say(tmp_path: Path, caller: Caller) -> None:
    async with opened(tmp_path) as (access, _):
        token = await made(access)
        with pytest.raises(PermissionDenied):
            await access.create(caller, NewToken(name="more"))
        with pytest.raises(PermissionDenied):
            await access.revoke(caller, "ci")
        with pytest.raises(PermissionDenied):
            access.listed(caller)
        assert access.admit(token).caller.principal == "token:ci"
