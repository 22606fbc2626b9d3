"""What `--input` makes of the words on the command line."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest

from vespera_exec.cli.inputs import parse_inputs
from vespera_exec.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA: dict[str, Any] = {
    "properties": {
        "path": {"type": "string"},
        "count": {"type": "integer"},
        "deep": {"type": "boolean"},
        "names": {"type": "array", "items": {"type": "string"}},
        "sizes": {"type": "array", "items": {"type": "integer"}},
        "options": {"type": "object"},
    }
}


def test_text_stays_text_where_the_role_takes_text() -> None:
    assert parse_inputs(["path=42"], SCHEMA) == {"path": "42"}
    assert parse_inputs(["path=a=b"], SCHEMA) == {"path": "a=b"}


def test_other_types_are_read_as_json() -> None:
    given = ["count=42", "deep=true", 'options={"a": [1]}']
    assert parse_inputs(given, SCHEMA) == {"count": 42, "deep": True, "options": {"a": [1]}}


def test_what_is_no_json_is_left_to_the_role_to_refuse() -> None:
    assert parse_inputs(["count=many"], SCHEMA) == {"count": "many"}
    assert parse_inputs(["count=NaN"], SCHEMA) == {"count": "NaN"}


def test_without_a_schema_json_that_is_no_string_is_taken_as_such() -> None:
    assert parse_inputs(["a=1", 'b="x"', "c=x", "d=[1]", "e=null"]) == {
        "a": 1, "b": '"x"', "c": "x", "d": [1], "e": "null",
    }  # fmt: skip


def test_a_list_may_be_given_item_by_item_or_at_once() -> None:
    assert parse_inputs(["names=a", "names=1"], SCHEMA) == {"names": ["a", "1"]}
    assert parse_inputs(["sizes=1", "sizes=2"], SCHEMA) == {"sizes": [1, 2]}
    assert parse_inputs(['names=["a", "b"]'], SCHEMA) == {"names": ["a", "b"]}


def test_explicit_json_is_taken_whatever_the_type() -> None:
    assert parse_inputs(["path:=42", "x:=null"], SCHEMA) == {"path": 42, "x": None}


def test_a_value_may_come_from_a_file_or_from_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "options.json"
    file.write_text('{"a": 1}', encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert parse_inputs([f"options=@{file}", "path=@-"], SCHEMA) == {"options": {"a": 1}, "path": "from a pipe"}
    assert parse_inputs(['path:="@home"'], SCHEMA) == {"path": "@home"}


@pytest.mark.parametrize("given", ["novalue", "=x", "1a=x", "a b=x", ""])
def test_what_is_no_pair_is_refused(given: str) -> None:
    with pytest.raises(InvalidInput, match="not an input") as refused:
        parse_inputs([given])
    assert "name=value" in refused.value.hint


def test_bad_json_a_missing_file_and_a_repeated_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for given, said in (
        (["a:={"], "not JSON"),
        (["a:=Infinity"], "not JSON"),
        ([f"a=@{tmp_path}/none"], "No such file"),
        ([f"a=@{tmp_path}/binary"], "not UTF-8"),
        (["path=a", "path=b"], "given twice"),
        (["names:=[1]", "names:=[2]"], "given twice"),
    ):
        with pytest.raises(InvalidInput, match=said):
            parse_inputs(given, SCHEMA)
