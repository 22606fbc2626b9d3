"""The log is one JSON object a line, whatever is said in it."""

from __future__ import annotations

import json
import logging
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from vespera_exec.errors import DaemonUnavailable
from vespera_exec.server import logs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def root() -> Iterator[None]:
    """The root logger, as it was, when the test is over."""
    logger = logging.getLogger()
    handlers, level = logger.handlers, logger.level
    yield
    for handler in logger.handlers:
        if handler not in handlers:
            handler.close()
    logger.handlers = handlers
    logger.setLevel(level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    out, said = capsys.readouterr()
    assert out == ""
    return [json.loads(line) for line in said.splitlines()]


def test_a_record_carries_its_level_logger_time_and_extras(root: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    logging.getLogger("vespera_exec.here").info("%d of %d", 1, 2, extra={"pid": 7, "event": "not this"})
    logging.getLogger("vespera_exec.here").debug("too fine")
    (line,) = lines(capsys)
    assert (line["event"], line["level"], line["logger"], line["pid"]) == ("1 of 2", "info", "vespera_exec.here", 7)
    assert line["timestamp"].endswith("Z")


def test_an_exception_stays_on_its_line(root: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    try:
        int("no number")
    except ValueError:
        logging.getLogger("vespera_exec.here").exception("it failed")
    (line,) = lines(capsys)
    assert line["event"] == "it failed"
    assert line["exception"].splitlines()[-1].startswith("ValueError: ")


def test_what_cannot_be_encoded_costs_no_line(root: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    logging.getLogger("vespera_exec.here").warning("half a pair: \ud800", extra={"thing": object()})
    (line,) = lines(capsys)
    assert "half a pair" in line["event"]
    assert "object" in line["thing"]


def test_the_file_is_private_and_replaced_before_it_grows_beyond_its_limit(
    root: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "daemon.log"
    logs.configure("info", file=log, limit_bytes=2000)
    for number in range(100):
        logging.getLogger("vespera_exec.here").info("line %d", number)
    assert {each.name for each in tmp_path.iterdir()} == {"daemon.log", "daemon.log.1"}
    assert all(each.stat().st_size <= 2000 for each in tmp_path.iterdir())
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    kept = [json.loads(line)["event"] for line in log.with_suffix(".log.1").read_text().splitlines()]
    kept += [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert kept == [f"line {number}" for number in range(100 - len(kept), 100)]
    assert [line["event"] for line in lines(capsys)] == [f"line {number}" for number in range(100)]


def test_where_stderr_is_the_file_each_line_is_written_once_and_stderr_moves_on_with_it(tmp_path: Path) -> None:
    script = (
        "import logging, sys, pathlib; from vespera_exec.server import logs\n"
        "logs.configure('info', file=pathlib.Path(sys.argv[1]), limit_bytes=500)\n"
        "for number in range(9): logging.getLogger('x').info('line %d', number)\n"
        "sys.stderr.write('last words')"
    )
    log = tmp_path / "daemon.log"
    with log.open("ab") as file:
        subprocess.run([sys.executable, "-P", "-c", script, str(log)], stderr=file, check=True)
    *records, last = log.read_text().splitlines()
    assert last == "last words"
    before = log.with_suffix(".log.1").read_text().splitlines()
    assert [json.loads(line)["event"] for line in before + records] == [f"line {number}" for number in range(9)]


@pytest.mark.promise("masked")
def test_a_masked_secret_is_in_no_line(root: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    logs.mask("canary-4711")
    logging.getLogger("vespera_exec.here").warning("with canary-4711 in it", extra={"url": "http://x/?t=canary-4711"})
    (line,) = lines(capsys)
    assert (line["event"], line["url"]) == ("with *** in it", "http://x/?t=***")


def test_a_link_in_place_of_the_log_is_refused(root: None, tmp_path: Path) -> None:
    (tmp_path / "daemon.log").symlink_to(tmp_path / "other")
    with pytest.raises(DaemonUnavailable, match="is a link"):
        logs.configure("info", file=tmp_path / "daemon.log")
    assert not (tmp_path / "other").exists()
