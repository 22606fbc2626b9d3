from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from vespera_exec.app.service import Vespera
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from roles.definition import Role

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]
Defining = Callable[..., None]


@pytest.fixture
def opening(tmp_path: Path) -> Opening:
    """`opening(max_concurrent=1)`: a `Vespera` over this test's data directory; may be opened again.

    `roles=` adds some.
    """

    @asynccontextmanager
    async def make(roles: Sequence[Role] = (), **given: Any) -> AsyncGenerator[Vespera]:
        chosen = {"data_dir": tmp_path / "data", "roles_dir": tmp_path / "roles", **given}
        settings = Settings.load({"HOME": str(tmp_path)}, **chosen)
        async with Vespera.open(settings=settings, roles=roles) as vespera:
            yield vespera

    return make


@pytest.fixture
async def vespera(opening: Opening) -> AsyncIterator[Vespera]:
    async with opening() as made:
        yield made


@pytest.fixture
def define(tmp_path: Path) -> Defining:
    """`define("review", "lease_seconds: 1")`: the role, done by workers."""

    def make(name: str = "review", *lines: str) -> None:
        folder = tmp_path / "roles"
        folder.mkdir(exist_ok=True)
        text = "\n".join((f"name: {name}", "runner: external", "inputs: {file: {type: string, default: a}}", *lines))
        (folder / f"{name}.yaml").write_text(text + "\n")

    make()
    return make
