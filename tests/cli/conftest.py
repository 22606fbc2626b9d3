from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cli_harness import Cli

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A short path: sockets live in it."""
    with tempfile.TemporaryDirectory(prefix="vc-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def cli(place: Path) -> Iterator[Cli]:
    """The installed program over a data directory of this module, whose daemon ends with it."""
    made = Cli.over(place)
    yield made
    made.stop()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Cli]:
    """The same over a data directory of this test, in which nothing runs yet."""
    with tempfile.TemporaryDirectory(prefix="vc-", dir="/tmp") as folder:
        made = Cli.over(Path(folder))
        yield made
        made.stop()
