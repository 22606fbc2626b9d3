"""What a message holds is told from its bytes, as a parser would tell it, and in milliseconds."""

from __future__ import annotations

import json
import time
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vespera_exec.server.incoming import has_too_many_values, request_id

VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet='a,[{"\\\\é'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='b,]}"\\\\'), inner),
    max_leaves=30,
)
LARGE = 4 * 1024 * 1024


def separators(value: Any) -> int:
    """The brackets that open and the commas, outside of strings."""
    match value:
        case dict():
            inner = list(cast("dict[str, Any]", value).values())
        case list():
            inner = cast("list[Any]", value)
        case _:
            return 0
    return max(len(inner), 1) + sum(separators(each) for each in inner)


@given(VALUES)
def test_it_counts_what_a_parser_finds_whatever_the_strings_hold(value: Any) -> None:
    message = json.dumps(value).encode()
    count = separators(value)
    assert not has_too_many_values(message, most=max(count, 8))
    if count > 8:
        assert has_too_many_values(message, most=count - 1)


@pytest.mark.parametrize("text", [b",[{", b'\\"', b"\\\\"])
def test_a_long_text_is_one_value(text: bytes) -> None:
    assert not has_too_many_values(b'{"text":"' + text * (LARGE // len(text)) + b'"}')


@pytest.mark.parametrize(
    "item",
    [b"0,", b"[],", b'"",', b'"\\"",', b"{},", b'"', b"["],
    ids=["zeros", "lists", "texts", "escapes", "objects", "quotes", "open"],
)
def test_megabytes_of_small_values_are_too_many_and_found_at_once(item: bytes) -> None:
    message = b"[" + item * (LARGE // len(item))
    began = time.thread_time()
    assert has_too_many_values(message) is (item != b'"')
    assert time.thread_time() - began < 0.3  # parsing them takes a second


def test_the_id_of_an_unreadable_request_is_found_where_clients_write_it() -> None:
    assert request_id(b'{"jsonrpc":"2.0","id":5,"method":"x","params":[') == 5
    assert request_id(b'{"method":"x","params":[,"jsonrpc":"2.0","id":"7a"}') == "7a"
    assert request_id(b'{"jsonrpc":"2.0","id":5,"result":{') is None
    assert request_id(b"nonsense") is None
