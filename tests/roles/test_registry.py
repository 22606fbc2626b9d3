"""The registry shows built-in and operator roles; a broken file hides no other."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest
from role_callables import doubled

from roles.definition import Role
from roles.registry import RoleRegistry
from vespera_exec.errors import InvalidInput, InvalidRoleFile, RoleNotFound

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, name: str, text: str | None = None) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text if text is not None else f"name: {name}\nrunner: process\nargv: [echo, {name}]\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "roles"
    made.mkdir(mode=0o755)
    return made


def test_builtin_roles_are_there_without_a_folder(tmp_path: Path) -> None:
    registry = RoleRegistry.load(tmp_path / "none")
    assert registry.names() == ("command", "survey")
    assert registry.problems == ()
    assert registry.get("survey").runner == "python"
    assert registry.get("command").permissions.scopes == ()
    assert registry.get("command").retry.max_retries == 0


def test_operator_roles_join_the_builtin_ones(folder: Path) -> None:
    write(folder, "lint")
    registry = RoleRegistry.load(folder)
    assert registry.names() == ("command", "lint", "survey")
    assert registry.get("lint").argv == ("echo", "lint")
    with pytest.raises(RoleNotFound):
        registry.get("../lint")


def test_broken_file_hides_no_other_and_tells_its_line_when_asked_for(folder: Path) -> None:
    write(folder, "good")
    write(folder, "bad", "name: bad\nrunner: process\nargv: nope\n")
    registry = RoleRegistry.load(folder)
    assert "good" in registry.names()
    assert len(registry.problems) == 1
    with pytest.raises(InvalidRoleFile, match=r"^bad\.yaml:3: "):
        registry.get("bad")


def test_both_endings_of_yaml_files_are_read(folder: Path) -> None:
    write(folder, "lint").rename(folder / "lint.yml")
    registry = RoleRegistry.load(folder)
    assert registry.get("lint").argv == ("echo", "lint")
    assert registry.problems == ()
    (folder / "bad.yml").write_text("name: other\nrunner: process\nargv: [true]\n")
    with pytest.raises(InvalidRoleFile, match=r"^bad\.yml:1: .*'bad'"):
        registry.get("bad")


def test_a_role_with_two_files_is_the_first_and_the_other_is_a_problem(folder: Path) -> None:
    write(folder, "lint")
    (folder / "lint.yml").write_text("name: lint\nrunner: process\nargv: [other]\n")
    registry = RoleRegistry.load(folder)
    assert registry.get("lint").argv == ("echo", "lint")
    (problem,) = registry.problems
    assert problem.startswith("lint.yml:1: ")
    assert "lint.yaml" in problem
    (folder / "lint.yaml").unlink()
    assert registry.get("lint").argv == ("other",)
    assert registry.problems == ()


def test_file_may_not_replace_a_builtin_role(folder: Path) -> None:
    write(folder, "command")
    registry = RoleRegistry.load(folder)
    assert registry.get("command").source == "builtin"
    assert "built in" in registry.problems[0]


def test_changes_in_the_folder_are_seen(folder: Path) -> None:
    registry = RoleRegistry.load(folder)
    path = write(folder, "late")
    assert "late" in registry.names()
    path.write_text("name: late\nrunner: process\nargv: [other]\n")
    assert registry.get("late").argv == ("other",)
    path.write_text("broken")
    with pytest.raises(InvalidRoleFile):
        registry.get("late")
    path.unlink()
    with pytest.raises(RoleNotFound):
        registry.get("late")


def test_link_that_leaves_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = write(tmp_path, "outside")
    (folder / "outside.yaml").symlink_to(outside)
    inside = write(folder, "inside")
    (folder / "again.yaml").symlink_to(inside)
    (folder / "dangling.yaml").symlink_to(tmp_path / "nothing")
    registry = RoleRegistry.load(folder)
    assert "inside" in registry.names()
    with pytest.raises(InvalidRoleFile, match="leaves the folder"):
        registry.get("outside")
    with pytest.raises(InvalidRoleFile, match="its file 'again'"):
        registry.get("again")
    with pytest.raises(InvalidRoleFile, match="cannot be read"):
        registry.get("dangling")


def test_file_that_everybody_may_write_is_refused(folder: Path) -> None:
    write(folder, "open").chmod(0o666)
    with pytest.raises(InvalidRoleFile, match="everybody may write"):
        RoleRegistry.load(folder).get("open")


def test_folder_that_everybody_may_write_is_not_read(folder: Path) -> None:
    write(folder, "lint")
    folder.chmod(0o777)
    registry = RoleRegistry.load(folder)
    assert registry.names() == ("command", "survey")
    assert "everybody may write" in registry.problems[0]


def test_fifo_in_the_folder_does_not_hold_anybody_up(folder: Path) -> None:
    os.mkfifo(folder / "pipe.yaml", stat.S_IRUSR | stat.S_IWUSR)
    with pytest.raises(InvalidRoleFile, match="not a regular file"):
        RoleRegistry.load(folder).get("pipe")


def test_program_adds_its_own_roles_once(folder: Path) -> None:
    registry = RoleRegistry.load(folder)
    registry.add(Role.from_callable(doubled))
    assert registry.get("doubled").fn is doubled
    with pytest.raises(InvalidInput, match="exists already"):
        registry.add(Role.from_callable(doubled))
    with pytest.raises(InvalidInput, match="exists already"):
        registry.add(Role.from_callable(doubled, name="survey"))
    with pytest.raises(InvalidInput, match="cannot be imported"):
        registry.add(Role.from_callable(lambda: 1, name="closure"))


def test_a_folder_that_looks_like_a_role_file_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / "trap.yaml").mkdir()
    registry = RoleRegistry.load(tmp_path)
    assert "survey" in registry.names()
    assert any("trap.yaml:1: not a regular file" in problem for problem in registry.problems)
