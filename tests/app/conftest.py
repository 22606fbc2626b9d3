from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from vespera_exec.app.service import Vespera
from vespera_exec.settings import Settings

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]


@pytest.fixture
def opening(tmp_path: Path) -> Opening:
    """`opening(max_concurrent=1)`: a `Vespera` over this test's data directory; may be opened again."""

    @asynccontextmanager
    async def make(**given: Any) -> AsyncIterator[Vespera]:
        settings = Settings.load(
            {"HOME": str(tmp_path)}, data_dir=tmp_path / "data", roles_dir=tmp_path / "roles", **given
        )
        async with Vespera.open(settings=settings) as vespera:
            yield vespera

    return make


@pytest.fixture
async def vespera(opening: Opening) -> AsyncIterator[Vespera]:
    async with opening() as made:
        yield made
