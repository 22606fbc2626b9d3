"""`vespera-exec report` writes one line to its execution, or says in one line why it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from deadlines import WITHIN

if TYPE_CHECKING:
    from collections.abc import Generator

    from _pytest.capture import CaptureFixture

from vespera_exec import report


@contextmanager
def descriptor(monkeypatch: pytest.MonkeyPatch) -> Generator[int]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    monkeypatch.setenv("VESPERA_PROGRESS_FD", str(writer))
    try:
        yield reader
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--progress", "40", "-m", "half"], {"progress": 40, "message": "half"}),
        (["--done", "3", "--total", "10", "--unit", "files"], {"done": 3, "total": 10, "unit": "files"}),
        (["--progress", "0.5", "--metric", "loss", "--reset"], {"progress": 0.5, "metric": "loss", "reset": True}),
        (["--checkpoint", '{"at": [1]}'], {"checkpoint": {"at": [1]}}),
        (["--checkpoint", "null"], {"checkpoint": None}),
        (["--log", "hm", "--level", "warning"], {"log": "hm", "level": "warning"}),
        (["--result", '"ok"'], {"result": "ok"}),
        (["--error", "NET", "-m", "no answer"], {"error": {"code": "NET", "message": "no answer"}}),
        (["--error", "NET"], {"error": {"code": "NET", "message": "NET"}}),
        (["-m", "line\nbreak"], {"message": "line\nbreak"}),
        (["--ask", "who", "-m", "Who?"], {"ask": {"key": "who", "kind": "form", "message": "Who?"}}),
        (["--approve", "go", "-m", "Go?"], {"ask": {"key": "go", "kind": "approval", "message": "Go?"}}),
        (
            ["--ask", "who", "-m", "Who?", "--schema", '{"type": "object"}'],
            {"ask": {"key": "who", "kind": "form", "message": "Who?", "schema": {"type": "object"}}},
        ),
    ],
)
def test_report_is_one_line(argv: list[str], message: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with descriptor(monkeypatch) as reader:
        assert report.main(argv) == 0
        written = os.read(reader, 65_536)
    assert written.endswith(b"\n")
    assert written.count(b"\n") == 1
    assert json.loads(written) == message


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--progress", "nan"], "finite"),
        (["--progress", "-1"], "finite number from 0"),
        (["--progress", "101"], "at most 100"),
        (["--progress", "x"], "not a number"),
        (["--done", "inf"], "finite"),
        (["--progress", "1", "--done", "2"], "not both"),
        (["--total", "3"], "go with --done"),
        (["--metric", "loss"], "needs a value"),
        (["--checkpoint", "{"], "not JSON"),
        (["--checkpoint", "NaN"], "finite"),
        (["--level", "loud"], "invalid choice"),
        (["--nonsense"], "unrecognized"),
        ([], "nothing to report"),
        (["-m", "x" * 5000], "at most 4096"),
    ],
)
def test_bad_report_is_refused_in_one_line(
    argv: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: CaptureFixture[str]
) -> None:
    with descriptor(monkeypatch) as reader:
        assert report.main(argv) == 125
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
    shown = capsys.readouterr().err
    assert told in shown
    assert shown.count("\n") == 1


def run(named: str | None, pass_fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "VESPERA_PROGRESS_FD"}
    env |= {} if named is None else {"VESPERA_PROGRESS_FD": named}
    argv = [sys.executable, "-m", "vespera_exec.report", "--progress", "3"]
    return subprocess.run(argv, env=env, pass_fds=pass_fds, capture_output=True, text=True, check=False)


def test_child_reports_through_the_descriptor_it_was_passed() -> None:
    reader, writer = os.pipe()
    try:
        done = run(str(writer), (writer,))
        assert (done.returncode, done.stderr) == (0, "")
        assert os.read(reader, 4096) == b'{"progress":3.0}\n'
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc to find the program by")
def test_child_that_was_not_passed_the_descriptor_finds_that_of_its_program() -> None:
    child = f"{sys.executable} -m vespera_exec.report --done 7"
    program = f"import subprocess; subprocess.run(['sh', '-c', {child!r} + ' && true'], check=True)"
    reader, writer = os.pipe()
    environment = os.environ | {"VESPERA_PROGRESS_FD": str(writer), "VESPERA_EXECUTION_ID": "of this test"}
    subprocess.run([sys.executable, "-c", program], check=True, pass_fds=[writer], env=environment, timeout=WITHIN)
    os.close(writer)
    with os.fdopen(reader) as reports:
        assert json.load(reports) == {"done": 7}


@pytest.mark.parametrize("named", [None, "77", "x", "-1", "1", "9999999999999999999999"])
def test_child_outside_an_execution_is_told_so(named: str | None) -> None:
    done = run(named)
    assert done.returncode == 125
    assert done.stderr.count("\n") == 1
    assert "not inside an execution" in done.stderr or "was not passed on" in done.stderr


def test_descriptor_that_is_a_file_of_the_program_is_left_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("own") / "data"
    with path.open("wb") as file:
        assert run(str(file.fileno()), (file.fileno(),)).returncode == 125
    assert path.read_bytes() == b""


def test_closed_reader_is_told_not_raised() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(str(writer), (writer,))
    finally:
        os.close(writer)
    assert done.returncode == 125
    assert "nobody listens" in done.stderr


def test_only_the_standard_library_is_loaded() -> None:
    code = "import sys, vespera_exec.report; print({'mcp', 'anyio', 'orjson', 'pydantic', 'yaml'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
