"""Fixtures that every test may use: one backend, a data directory of its own, an environment without ours."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator


# Where the environment forbids compiled files, as in many containers, each of a thousand processes that the tests start
# would compile our code anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A slow machine is no fault of what is tested. Each run draws other examples than the last.
settings.register_profile("any machine", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    """Each worker begins to read the files at another place, and finds those compiled that the others have read before.

    All of them at once would each compile everything, in a clone that is new.
    """
    worker = getattr(config, "workerinput", None)
    if worker is None or config.args != config.getini("testpaths") or config.option.ignore or config.option.ignore_glob:
        return
    files = sorted(str(file) for file in Path(__file__).parent.rglob("test_*.py"))
    first = len(files) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
    config.args = files[first:] + files[:first]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order is that of the files, wherever a worker began to read."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: str(item.path))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A developer's own `VESPERA_*` variables do not reach the tests, nor do the tests reach his state folder."""
    for name in [name for name in os.environ if name.startswith("VESPERA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """An empty data directory, 0700."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder for sockets (their paths are limited to 107 bytes), named in `VESPERA_RUNTIME_DIR`."""
    folder = Path(tempfile.mkdtemp(prefix="vx-", dir="/tmp"))
    monkeypatch.setenv("VESPERA_RUNTIME_DIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
