"""The log is one JSON object a line, whatever is said in it."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

from vespera_exec.server import logs

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def root() -> Iterator[None]:
    """The root logger, as it was, when the test is over."""
    logger = logging.getLogger()
    handlers, level = logger.handlers, logger.level
    yield
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
