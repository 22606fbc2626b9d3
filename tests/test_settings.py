"""Settings: from the environment, each refused with its name when it makes no sense."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from vespera_exec import InvalidInput, Settings, paths


def test_every_setting_can_be_set_by_its_variable_and_is_documented() -> None:
    documented = set(re.findall(r"VESPERA_[A-Z_]+", Path("docs/settings.md").read_text()))
    before_settings = {"VESPERA_RUNTIME_DIR", "VESPERA_DEBUG"}  # read where no Settings are loaded
    assert documented == {f"VESPERA_{field.name.upper()}" for field in fields(Settings)} | before_settings


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_concurrent", "9", 9),
        ("sample_seconds", "0.5", 0.5),
        ("tcp", "no", False),
        ("tcp_host", "::1", "::1"),
        ("allowed_roots", "/tmp:/usr", (Path("/tmp").resolve(), Path("/usr").resolve())),
    ],
)
def test_a_variable_is_read_as_its_kind(name: str, text: str, value: object) -> None:
    assert getattr(Settings.load({f"VESPERA_{name.upper()}": text}, cwd=Path("/")), name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("max_concurrent", "many"),
        ("max_concurrent", "0"),
        ("tcp", "perhaps"),
        ("tcp_port", "70000"),
        ("cancelled_task_status", "gone"),
        ("sample_seconds", "-1"),
        ("idle_exit_seconds", "nan"),
        ("log_level", "loud"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(InvalidInput, match=f"VESPERA_{name.upper()}"):
        Settings.load({f"VESPERA_{name.upper()}": text}, cwd=Path("/"))


def test_the_data_directory_is_named_beside_git_or_the_users_own(tmp_path: Path) -> None:
    assert paths.find_data_dir(tmp_path, {"VESPERA_DATA_DIR": "here"}) == tmp_path / "here"
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    deep = tmp_path / "repo" / "a" / "b"
    deep.mkdir(parents=True)
    assert paths.find_data_dir(deep, {}) == tmp_path / "repo" / ".vespera"
    away = paths.find_data_dir(tmp_path, {"HOME": "/home/someone"})
    assert away == Path("/home/someone/.local/state/vespera-exec")
