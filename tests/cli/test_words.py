"""How durations, sizes, tables and the work's own words are shown."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from vespera_exec.cli.text import age, cells, duration, fit, shown, size, table


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert shown("a\x1b[31mb") == "a\\x1b[31mb"
    assert shown("one\ntwo\r\tthree\x00") == "one\\ntwo\\r three\\x00"
    assert shown("right\u202eleft") == "right\\u202eleft"
    assert shown("größe 漢字") == "größe 漢字"


def test_text_that_is_too_long_ends_in_an_ellipsis() -> None:
    assert shown("abcdef", 6) == "abcdef"
    assert shown("abcdefg", 6) == "abcde…"
    assert len(shown("\x1b" * 6, 6)) == 6


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0.0 s"),
        (-1, "0.0 s"),
        (0.44, "0.4 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (3599.7, "1 h"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
        (86400 * 400, "400 d"),
    ],
)
def test_durations_read_as_a_person_says_them(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_sizes_read_as_a_person_says_them() -> None:
    assert [size(each) for each in (0, 1023, 1536, 20 * 1024**2, 3 * 1024**4)] == [
        "0 B", "1023 B", "1.5 KB", "20 MB", "3.0 TB",
    ]  # fmt: skip


def test_an_age_is_the_time_since_a_stamp_and_no_stamp_is_shown_as_it_is() -> None:
    now = datetime(2026, 1, 1, 12, 0, 5, tzinfo=UTC)
    assert age("2026-01-01T12:00:05Z", now) == "now"
    assert age("2026-01-01T12:00:02+00:00", now) == "3 s ago"
    assert age("2026-01-01T11:56:45Z", now) == "3 min 20 s ago"
    assert age("yesterday\n") == "yesterday\\n"


def test_columns_line_up_also_with_wide_characters() -> None:
    lines = table(("A", "B"), [("漢字", "x"), ("abc", "y")])
    assert lines == ["A     B", "漢字  x", "abc   y"]


def test_the_last_column_is_cut_to_the_width() -> None:
    lines = table(("A", "B"), [("abc", "0123456789abcdef")], width=18)
    assert lines[1] == "abc  0123456789ab…"
    assert all(cells(line) <= 18 for line in lines)


def test_wide_text_is_cut_by_columns_and_not_by_characters() -> None:
    assert fit("漢字漢字", 5) == "漢字…"
