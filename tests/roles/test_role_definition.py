"""Inputs are completed or refused by name; paths stay inside the roots; retries follow the policy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from role_callables import doubled

from roles.definition import RetryPolicy, Role
from vespera_exec.errors import InvalidInput, PermissionDenied
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from pathlib import Path

INPUTS = {
    "path": {"type": "path", "required": True},
    "number": {"type": "integer", "default": 3, "min": 1, "max": 9},
    "ratio": {"type": "number"},
    "deep": "boolean",
    "word": {"type": "string", "max_length": 5, "pattern": "[a-z]+"},
    "size": {"type": "string", "choices": ["s", "m"]},
    "names": {"type": "list", "of": "string", "max_length": 2},
    "extra": "object",
}


@pytest.fixture
def made() -> Role:
    return Role.from_callable(doubled, inputs=INPUTS)


def test_defaults_are_filled_in_and_whole_floats_become_integers(made: Role) -> None:
    assert made.validate_inputs({"path": "a"}) == {"path": "a", "number": 3}
    completed = made.validate_inputs({"path": "a", "number": 4.0, "ratio": 1, "deep": False, "extra": {"a": None}})
    assert completed == {"path": "a", "number": 4, "ratio": 1, "deep": False, "extra": {"a": None}}
    assert isinstance(completed["number"], int)


@pytest.mark.parametrize(
    ("given_inputs", "told"),
    [
        ({}, "path: required"),
        ({"path": ""}, "path: expected a path"),
        ({"path": "a\0b"}, "NUL"),
        ({"path": "\ud800"}, "surrogate"),
        ({"path": 3}, "expected a path, got int 3"),
        ({"path": "a", "number": 0}, "at least 1"),
        ({"path": "a", "number": True}, "expected a integer"),
        ({"path": "a", "number": "5"}, "expected a integer"),
        ({"path": "a", "ratio": float("nan")}, "expected a number"),
        ({"path": "a", "deep": 1}, "expected a boolean"),
        ({"path": "a", "word": "toolong"}, "at most 5"),
        ({"path": "a", "word": "ABC"}, "does not match"),
        ({"path": "a", "word": "abc\n"}, "does not match"),
        ({"path": "a", "size": "l"}, "one of 's', 'm'"),
        ({"path": "a", "names": ["a", 1]}, "item 1"),
        ({"path": "a", "names": ["a", "b", "c"]}, "at most 2"),
        ({"path": "a", "extra": []}, "expected a object"),
        ({"path": "a", "nubmer": 1}, "did you mean 'number'?"),
    ],
)
def test_bad_input_is_named_with_what_is_expected(made: Role, given_inputs: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        made.validate_inputs(given_inputs)
    assert told in caught.value.message


def test_every_bad_input_is_named_at_once(made: Role) -> None:
    with pytest.raises(InvalidInput) as caught:
        made.validate_inputs({"number": 99, "deep": "x"})
    assert all(name in caught.value.message for name in ("path:", "number:", "deep:"))


@given(st.dictionaries(st.text(max_size=8), st.recursive(st.none() | st.floats() | st.text(), st.lists, max_leaves=5)))
def test_whatever_is_given_inputs_are_completed_or_refused(anything: dict[str, Any]) -> None:
    role = Role.from_callable(doubled, inputs=INPUTS)
    try:
        completed = role.validate_inputs(anything)
    except InvalidInput as error:
        completed, told = None, error.message
        assert_short(told)
    assert completed is None or completed["path"] == anything["path"]


def assert_short(told: str) -> None:
    assert 0 < len(told) < 4000


def test_role_shows_its_inputs_as_json_schema(made: Role) -> None:
    shown = json.loads(json.dumps(made.input_schema()))
    assert shown["required"] == ["path"]
    assert shown["properties"]["names"] == {"type": "array", "items": {"type": "string"}, "maxItems": 2}


def test_callable_without_inputs_declared_takes_any() -> None:
    assert Role.from_callable(doubled).validate_inputs({"what": ["ever"]}) == {"what": ["ever"]}


def test_sync_callable_in_the_loop_is_refused() -> None:
    with pytest.raises(InvalidInput, match="would block the loop"):
        Role.from_callable(doubled, in_loop=True)


def test_unknown_policy_of_a_callable_is_refused() -> None:
    with pytest.raises(InvalidInput, match="timeout"):
        Role.from_callable(doubled, timeout=3)


def test_local_paths_start_where_the_caller_stands(made: Role, tmp_path: Path) -> None:
    caller = Caller(cwd=str(tmp_path))
    assert made.resolve_paths({"path": "a/../b"}, caller, ()) == {"path": f"{tmp_path}/b"}
    assert made.resolve_paths({"path": "/etc"}, caller, ()) == {"path": "/etc"}
    assert made.resolve_paths({"path": "~no-such-user/x"}, caller, ()) == {"path": f"{tmp_path}/~no-such-user/x"}


def test_token_paths_stay_inside_the_roots(made: Role, tmp_path: Path) -> None:
    root = tmp_path / "open"
    (root / "sub").mkdir(parents=True)
    (root / "out").symlink_to(tmp_path)
    token = Caller("ci", over_tcp=True, cwd="/")
    assert made.resolve_paths({"path": "sub"}, token, (root,)) == {"path": str(root / "sub")}
    for outside in ("..", "/etc", "sub/../..", "out", "out/secret", str(tmp_path) + "/openly"):
        with pytest.raises(PermissionDenied):
            made.resolve_paths({"path": outside}, token, (root,))
    with pytest.raises(PermissionDenied, match="no folder is open"):
        made.resolve_paths({"path": "sub"}, token, ())


def test_retry_applies_to_named_codes_within_the_bound() -> None:
    policy = RetryPolicy(max_retries=2, retry_on=("NET",), backoff_seconds=1, backoff_factor=3, backoff_max_seconds=5)
    assert [policy.applies("NET", failed) for failed in (1, 2, 3)] == [True, True, False]
    assert not policy.applies("OTHER", 1)
    assert [policy.delay(failed) for failed in (1, 2, 3, 4000)] == [1, 3, 5, 5]
