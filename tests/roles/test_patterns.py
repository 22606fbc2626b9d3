"""Progress is read from the output of common tools, in any chunks, never backwards, whatever the output is."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roles.patterns import PatternReader
from roles.regex import compile_bounded
from roles.rolefile import PatternSpec
from vespera_exec.model.enums import ProgressType

if TYPE_CHECKING:
    from vespera_exec.model.progress import ProgressReport

PYTEST = b"""============ test session starts ============
collected 8 items

tests/test_a.py ..F.                                  [ 50%]
tests/test_b.py ...x                                  [100%]
=========== 1 failed, 6 passed in 0.12s 3/4 ===========
"""
PYTEST_QUIET = b"........................................................................ [ 36%]\n...... [100%]\n"
PYTEST_VERBOSE = (
    b"t.py::test_a PASSED            [ 33%]\nt.py::test_b FAILED   [ 66%]\nt.py::test_c[x] SKIPPED (why) [100%]\n"
)
CARGO = b"   Compiling serde v1.0\n    Building [=====>       ] 12/80: syn\r    Building [=========>   ] 60/80: tokio\n"
NINJA = b"[1/80] CXX a.o\n[40/80] CXX b.o\n[80/80] LINK\n"
MAKE = b"[  5%] Building\n[ 42%] Building 100% of it\n[ 40%] late\n[100%] Built\n"
TQDM = (
    b"\r  0%|          | 0/100 [00:00<?, ?it/s]\r 37%|###7      | 37/100 [00:01<00:02, 30it/s]"
    b"\r100%|####| 100/100 [00:03]\n"
)
PIP = (
    "   \u2501\u2501\u2501\u2501\u2501\u2501\u2501\u257a\u2501\u2501 1.2/3.6 MB 2.1 MB/s eta 0:00:02\r".encode()
    + b"Progress 4096 of 4096\n"
)
BARE = b"starting\n10%\ndone 3/10 of it\n42.5 % there\nfinished\n"
OUTPUTS = {
    "pytest": (PYTEST, [50, 100]),
    "pytest -q": (PYTEST_QUIET, [36, 100]),
    "pytest -v": (PYTEST_VERBOSE, [33, 66, 100]),
    "cargo": (CARGO, [15, 75]),
    "ninja": (NINJA, [1.25, 50, 100]),
    "make": (MAKE, [5, 42, 100]),
    "tqdm": (TQDM, [0, 37, 100]),
    "pip": (PIP, [100 / 3, 100]),
    "bare": (BARE, [10, 30, 42.5]),
}


def percentages(reports: list[ProgressReport]) -> list[float]:
    return [
        (report.current or 0.0) if report.total is None else 100.0 * (report.current or 0.0) / report.total
        for report in reports
    ]


def read(data: bytes, cuts: list[int] | None = None, reader: PatternReader | None = None) -> list[float]:
    reader = reader or PatternReader()
    reports: list[ProgressReport] = []
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or [])})
    for start, end in itertools.pairwise(edges):
        reports += reader.feed(data[start:end])
    return percentages(reports + reader.finish())


@pytest.mark.parametrize("tool", OUTPUTS)
def test_progress_of_a_tool_is_read(tool: str) -> None:
    data, expected = OUTPUTS[tool]
    assert read(data) == pytest.approx(expected)


@pytest.mark.parametrize("tool", OUTPUTS)
@given(cuts=st.lists(st.integers(0, 10_000), max_size=40))
def test_chunk_boundaries_do_not_matter(tool: str, cuts: list[int]) -> None:
    data, expected = OUTPUTS[tool]
    seen = read(data, cuts)
    assert set(map(round, expected)) <= set(map(round, seen))
    assert seen == sorted(set(seen))
    if tool != "pytest":  # where an unfinished line of dots says more
        assert seen == pytest.approx(expected)


def test_dots_are_counted_before_their_line_ends() -> None:
    reader = PatternReader()
    assert percentages(reader.feed(b"collected 4 items\n\ntest_a.py .")) == [25]
    assert percentages(reader.feed(b".")) == [50]
    assert percentages(reader.feed(b". [ 75%]\n")) == [75]


def test_units_are_kept() -> None:
    (report,) = PatternReader().feed(b"[3/10] CC a.o\n")
    assert (report.progress_type, report.current, report.total) == (ProgressType.STEPS, 3, 10)
    (report,) = PatternReader().feed(b"Progress 512 of 2048\n")
    assert (report.progress_type, report.current, report.total) == (ProgressType.BYTES, 512, 2048)


@pytest.mark.parametrize(
    "line",
    [
        b"2026/01/12 the date", b"HTTP/1.1 200", b"src/1/2", b"150%", b"7/3", b"a10%b", b"0/0", b"1/1 done", b"5/2/7",
        b"99999999999999999999%", b"tcp 10/100/1000", b"-5%", b"v3/4",
    ],
)  # fmt: skip
def test_what_only_looks_like_progress_is_passed_over(line: bytes) -> None:
    assert read(line + b"\n") == []


def test_once_a_tool_is_recognised_its_other_output_is_no_progress() -> None:
    assert read(b"[1/10] CC a.o\nwarning: 95% full, 9/10 used\n[2/10] CC b.o\n") == [10, 20]


@given(st.binary(max_size=3000), st.lists(st.integers(0, 3000), max_size=10))
def test_garbage_yields_only_rising_percentages(data: bytes, cuts: list[int]) -> None:
    seen = read(data, cuts)
    assert seen == sorted(set(seen))
    assert all(0 <= each <= 100 for each in seen)


@pytest.mark.parametrize(
    "line",
    [b"9" * 2_000_000, b" " * 2_000_000, b"[" * 2_000_000, b"1/" * 1_000_000, b"." * 2_000_000, b"\x1b[" * 1_000_000,
     b"%|" * 1_000_000, "\u2501".encode() * 600_000, b"Compiling " * 200_000, b"1%\r" * 50_000],
)  # fmt: skip
def test_lines_of_two_megabytes_are_quick_and_kept_short(line: bytes) -> None:
    reader = PatternReader(own=(PatternSpec(regex="at (?P<percent>[0-9]+) of", kind="percent"),))
    started = time.thread_time()
    for start in range(0, len(line), 65_536):
        reader.feed(line[start : start + 65_536])
    reader.finish()
    assert time.thread_time() - started < 10  # it is also run with its lines traced
    assert reader.pending <= 4096


def test_own_expression_is_read_before_the_builtin_ones() -> None:
    own = (
        PatternSpec(regex=r"epoch (?P<done>[0-9]+) of (?P<total>[0-9]+)", kind="steps"),
        PatternSpec(regex=r"at (?P<percent>[0-9.]+) percent", kind="percent"),
    )
    data = b"epoch 1 of 4\nepoch 2 of 4 (99%)\nat 60.5 percent\nat . percent\n70%\n"
    assert read(data, reader=PatternReader(own=own)) == [25, 50, 60.5, 70]
    assert read(data, reader=PatternReader(builtin=False, own=own)) == [25, 50, 60.5]


def test_slow_expression_is_dropped_after_its_first_offence() -> None:
    slow = PatternSpec(regex="(?P<percent>" + "[0-9]*" * 6 + ")x", kind="percent")
    compile_bounded(slow.regex)
    reader = PatternReader(builtin=False, own=(slow,))
    line = b"1" * 34 + b"\n"
    reader.feed(line)
    started = time.thread_time()
    for _ in range(100):
        reader.feed(line)
    assert time.thread_time() - started < 10  # it is also run with its lines traced


@pytest.mark.parametrize(
    "regex", ["(a+)+", "(a*)*b", "(a|b+)*c", ".*x.*y", r"(x)\1", "a+" * 7, "a" * 201, "(", "(?P<a>", "(a{0,16}b){0,40}"]
)
def test_runaway_expression_is_refused(regex: str) -> None:
    with pytest.raises(ValueError, match=r"expression|repetition"):
        compile_bounded(regex) if regex != "(a{0,16}b){0,40}" else compile_bounded("(a{0,90}b){0,40}")
