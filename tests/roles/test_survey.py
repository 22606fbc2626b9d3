"""The survey tells what a folder holds, the same each time, and never leaves it."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from role_harness import bench

from roles.builtin.survey import CAPS, NotAFolder, survey
from roles.context import Cancelled, Context, TaskInfo
from roles.execution import RoleExecutor
from roles.registry import RoleRegistry

if TYPE_CHECKING:
    from pathlib import Path


def surveyed(path: Path, cancelled: threading.Event | None = None, **inputs: Any) -> tuple[dict[str, Any], list[Any]]:
    said: list[Any] = []
    stop = cancelled or threading.Event()
    context = Context(
        TaskInfo("t", inputs={"path": str(path), **inputs}), emit=said.append, is_cancelled=stop.is_set, scratch=path
    )
    return survey(context), said


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "src").mkdir(parents=True)
    (root / "node_modules" / "dep").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "src" / "a.py").write_text("one\ntwo\n")
    (root / "src" / "b.py").write_text("one\ntwo\nthree")
    (root / "copy.py").write_text("one\ntwo\n")
    (root / "Makefile").write_text("all:\n")
    (root / "blob.bin").write_bytes(b"\0" * 1000)
    (root / "same.dat").write_bytes(b"\0" * 1000)
    (root / "empty.txt").write_text("")
    (root / "node_modules" / "dep" / "index.js").write_text("x")
    (root / "link").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")
    return root


def test_languages_sizes_and_duplicates_are_counted(tree: Path) -> None:
    result, _ = surveyed(tree)
    assert (result["files"], result["folders"], result["lines"], result["bytes"]) == (7, 2, 8, 2034)
    assert result["languages"] == [
        {"language": "Binary", "files": 2, "lines": 0, "bytes": 2000},
        {"language": "Python", "files": 3, "lines": 7, "bytes": 29},
        {"language": "Makefile", "files": 1, "lines": 1, "bytes": 5},
        {"language": "Text", "files": 1, "lines": 0, "bytes": 0},
    ]
    assert result["largest"][0] == {"path": "blob.bin", "bytes": 1000}
    assert result["duplicates"] == {
        "groups": 2,
        "wasted_bytes": 1008,
        "listed": [
            {"bytes": 1000, "count": 2, "paths": ["blob.bin", "same.dat"]},
            {"bytes": 8, "count": 2, "paths": ["copy.py", "src/a.py"]},
        ],
    }
    assert result["skipped"] == {".git": 1, "node_modules": 1, "special files": 1, "symbolic links": 1}
    assert result["truncated"] is False


def test_same_tree_gives_the_same_result(tree: Path) -> None:
    assert json.dumps(surveyed(tree)[0]) == json.dumps(surveyed(tree)[0])


def test_exclusions_and_the_cap_on_files_are_stated(tree: Path) -> None:
    result, _ = surveyed(tree, exclude=["*.bin", "src"])
    assert (result["files"], result["skipped"]["excluded"]) == (4, 2)
    result, _ = surveyed(tree, max_files=2)
    assert (result["files"], result["truncated"]) == (2, True)


def test_unreadable_file_is_listed_not_fatal(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked, folder = tree / "locked.py", tree / "locked"
    locked.write_text("secret")
    folder.mkdir()
    if os.getuid() == 0:  # whom no mode stops: a file that goes away in between is as unreadable
        real = os.open

        def gone(path: str, *rest: Any) -> int:
            if str(path).endswith("locked.py"):
                raise PermissionError(13, "Permission denied")
            return real(path, *rest)

        monkeypatch.setattr(os, "open", gone)
    else:
        locked.chmod(0)
    result, _ = surveyed(tree)
    assert result["unreadable"] == {"count": 1, "listed": [{"path": "locked.py", "reason": "Permission denied"}]}
    assert result["files"] == 8


def test_progress_counts_first_and_reads_then(tree: Path) -> None:
    _, said = surveyed(tree)
    assert said[0] == {"done": 1, "unit": "files", "type": "items", "message": "Counting files"}
    assert said[-1] == {"done": 7, "total": 7, "unit": "files", "type": "items", "message": "Reading files"}


def test_cancel_is_seen_between_files(tree: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        surveyed(tree, stop)


def test_what_is_no_folder_is_refused(tree: Path) -> None:
    with pytest.raises(NotAFolder):
        surveyed(tree / "Makefile")


def test_result_of_a_hostile_tree_stays_small(tmp_path: Path) -> None:
    wide = b"\xff" * 120
    for number in range(120):
        folder = os.path.join(os.fsencode(tmp_path), b"%03d" % (number % 7) + wide)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, b"\x01%03d" % number + wide), "wb") as file:
            file.write(b"x" * (number // 4 + 1))
    result, _ = surveyed(tmp_path)
    assert result["files"] == 120
    assert len(orjson.dumps(result)) < 100 * 1024
    assert len(result["duplicates"]["listed"]) == CAPS["duplicate_groups"]
    assert max(len(each["path"]) for each in result["largest"]) <= CAPS["path_characters"]


async def test_survey_runs_as_a_role_in_a_child(tree: Path, tmp_path: Path) -> None:
    async with bench(tmp_path, {"path": "tree"}) as made:
        result = await RoleExecutor().execute_task_with_tracking(made.work, RoleRegistry().get("survey"), made.work)
    assert result.success, result.error
    assert result.output["files"] == 7
    assert result.output["path"] == str(tree)
    assert made.percentages[-1] == 100.0
