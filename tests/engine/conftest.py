from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest
from process_harness import Register

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def execution_id() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def register(tmp_path: Path) -> Register:
    return Register(tmp_path / "register")
