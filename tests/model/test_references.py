"""What a plan may refer to, and what its references become. Nothing is evaluated, nothing but a clear error escapes."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vespera_exec.errors import ExecutionError, InvalidReference, MissingReference
from vespera_exec.model.enums import StepStatus
from vespera_exec.model.plans.references import (
    MAX_PATH,
    MAX_REFERENCES,
    NULL,
    Reference,
    lookup_in,
    references,
    resolve,
)
from vespera_exec.model.plans.steps import StepState

if TYPE_CHECKING:
    from vespera_exec.model.plans.references import Lookup

OUTPUT = {"files": ["a.py", "b.py"], "size": 3, "note": None, "deep": {"x": [{"y": "found"}]}, "7": "seven"}


def state(step: str, status: StepStatus = StepStatus.COMPLETED, **more: Any) -> StepState:
    return StepState(execution_id="e", step_id=step, position=0, status=status, **more)


def look() -> Lookup:
    states = {
        "survey": state("survey"),
        "lint": state("lint", StepStatus.FAILED, continues=True, error={"code": "E_LINT", "message": "3 faults"}),
        "broken": state("broken", StepStatus.FAILED, error={"code": "E", "message": "no"}),
    }
    return lookup_in(states, {"repo": "vespera", "targets": [1, 2]}, {"survey": OUTPUT})


def resolved(value: Any) -> Any:
    return resolve(value, look())


def missing(text: str) -> str:
    with pytest.raises(MissingReference) as caught:
        resolved(text)
    assert isinstance(caught.value, ExecutionError)
    assert (caught.value.error_code, caught.value.recoverable) == ("REFERENCE_MISSING", False)
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${steps.survey.output}", OUTPUT),
        ("${steps.survey.output.files}", ["a.py", "b.py"]),
        ("${steps.survey.output.files[1]}", "b.py"),
        ("${steps.survey.output.deep.x[0].y}", "found"),
        ("${steps.survey.output.size}", 3),
        ("${steps.survey.output.note}", None),
        ("${steps.survey.output.7}", "seven"),
        ("${steps.survey.status}", "completed"),
        ("${steps.lint.error.code}", "E_LINT"),
        ("${steps.lint.error.message}", "3 faults"),
        ("${variables.repo}", "vespera"),
        ("${variables.targets[0]}", 1),
    ],
)
def test_a_text_that_is_one_reference_becomes_the_value_itself(text: str, value: Any) -> None:
    assert resolved(text) == value


def test_inside_longer_text_a_text_stays_as_it_is_and_the_rest_is_compact_json() -> None:
    assert resolved("repo ${variables.repo}, ${steps.survey.output.size} in ${steps.survey.output.files}") == (
        'repo vespera, 3 in ["a.py","b.py"]'
    )
    assert resolved(" ${steps.survey.output.note}") == " null"
    assert resolved("${variables.repo}${variables.repo}") == "vesperavespera"


def test_references_are_replaced_in_objects_and_lists_but_not_in_keys() -> None:
    value = {"all": ["${variables.repo}", {"n": "${steps.survey.output.size}"}], "${variables.repo}": 1, "plain": 2.5}
    assert resolved(value) == {"all": ["vespera", {"n": 3}], "${variables.repo}": 1, "plain": 2.5}
    assert [each.name for each in references(value)] == ["repo", "survey"]


def test_what_was_put_in_is_not_looked_through_again() -> None:
    look = lookup_in({}, {"sly": "${variables.secret}", "secret": "hidden"}, {})
    assert resolve("${variables.sly}", look) == "${variables.secret}"
    assert resolve("say ${variables.sly}", look) == "say ${variables.secret}"


def test_doubled_dollar_is_a_literal_brace() -> None:
    assert resolved("echo $${HOME} $5 $ {x} ${variables.repo}") == "echo ${HOME} $5 $ {x} vespera"
    assert resolved("$${variables.repo}") == "${variables.repo}"
    assert references("$${HOME} $5 {x} $") == ()


def test_what_is_missing_is_named_with_what_there_is() -> None:
    assert "'nope' is not there" in missing("${steps.survey.output.nope}")
    assert "${steps.survey.output} is an object; there is 7, deep, files" in missing("${steps.survey.output.nope}")
    assert "${steps.survey.output.files} is a list of 2" in missing("${steps.survey.output.files[2]}")
    assert "is a number" in missing("x ${steps.survey.output.size.more}")
    assert "there is repo, targets" in missing("${variables.other}")
    assert "step broken is failed and has no output" in missing("${steps.broken.output}")
    assert "there is no step 'ghost'" in missing("${steps.ghost.status}")


def test_with_a_question_mark_what_is_missing_is_null() -> None:
    assert (
        resolved(["${steps.survey.output.nope.more?}", "${variables.other?}", "${steps.broken.output?}"]) == [None] * 3
    )
    assert resolved("${steps.survey.output.size?}") == 3


def test_step_that_failed_and_lets_on_has_null_for_output_whatever_the_path() -> None:
    assert resolved(["${steps.lint.output}", "${steps.lint.output.files[0]}"]) == [None, None]
    assert resolved(["${steps.survey.error.code}", "${steps.lint.status}"]) == [None, "failed"]
    assert resolve("${steps.any.output.x.y}", lambda _: NULL) is None


@pytest.mark.parametrize(
    "text",
    [
        "${HOME}",
        "${}",
        "${steps.a}",
        "${steps.a.outputs}",
        "${steps.a.status.x}",
        "${steps.a.error}",
        "${steps.a.error.code.x}",
        "${steps..output}",
        "${steps.a.output.}",
        "${steps.a.output[-1]}",
        "${steps.a.output[x]}",
        "${steps.a.output[1}",
        "${steps.a.output[1234567890]}",
        "${ steps.a.output }",
        "${steps.a.output??}",
        "${steps.a.output.x\n}",
        "${variables.1}",
        "${variables}",
        "${steps.a.output",
        "a ${b ${variables.c}",
        "${steps.a.output.__class__()}",
        "${steps.a.output + 1}",
        "${variables." + "x" * 65 + "}",
        "${steps.a.output" + ".x" * 400 + "}",
        "${steps.a.output" + "[0]" * (MAX_PATH + 1) + "}",
    ],
)
def test_anything_else_after_the_brace_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        references({"x": [text]})
    assert "is no reference" in caught.value.message
    assert "$${" in caught.value.hint


def _nested(levels: int) -> Any:
    value: Any = "${variables.x}"
    for _ in range(levels):
        value = [value]
    return value


def test_hostile_values_are_refused_at_once() -> None:
    began = time.thread_time()
    nested = _nested(500)
    with pytest.raises(InvalidReference, match="deeper"):
        references(nested)
    assert resolve(nested, look()) == nested
    with pytest.raises(InvalidReference, match=f"more than {MAX_REFERENCES}"):
        references("${variables.x}" * (MAX_REFERENCES + 1))
    for text in ("${" * 200_000, "${variables.x" + ".a" * 200_000, "${steps.a.output" + "[1" * 100_000):
        with pytest.raises(InvalidReference):
            references(text)
        assert resolve(text, look()) == text
    with pytest.raises(MissingReference, match="cannot be written as text"):
        resolve("x ${variables.nested}", lookup_in({}, {"nested": _nested(100_000)}, {}))
    with pytest.raises(MissingReference, match="more than"):
        resolve("x ${variables.big}" * 3, lookup_in({}, {"big": "y" * 600_000}, {}))
    assert time.thread_time() - began < 10


@pytest.mark.parametrize("text", ["${variables.big}", "${variables.big.list}", "x ${variables.big.text}"])
def test_what_the_references_of_one_value_stand_for_is_bounded_together(text: str) -> None:
    big = {"text": "y" * 900_000, "list": ["z" * 90_000] * 10}
    look = lookup_in({}, {"big": big}, {})
    tracemalloc.start()
    with pytest.raises(MissingReference, match="together more than 8,388,608 characters"):
        resolve({"all": [text] * MAX_REFERENCES}, look)
    assert tracemalloc.get_traced_memory()[1] < 40_000_000
    tracemalloc.stop()
    assert len(json.dumps(resolve({"few": [text] * 4}, look))) > 3_500_000


_names = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,9}", fullmatch=True)
_paths = st.lists(st.from_regex(r"[\w-]{1,6}", fullmatch=True) | st.integers(0, 999_999_999), max_size=5).map(tuple)
_references = (
    st.builds(Reference, kind=st.sampled_from(("output", "variable")), name=_names, path=_paths, optional=st.booleans())
    | st.builds(Reference, kind=st.just("status"), name=_names, optional=st.booleans())
    | st.builds(
        Reference,
        kind=st.just("error"),
        name=_names,
        path=st.sampled_from([("code",), ("message",)]),
        optional=st.booleans(),
    )
)


@given(_references)
def test_what_is_written_out_is_read_as_itself(reference: Reference) -> None:
    assert references(str(reference)) == (reference,)
    assert references([f"x {reference} $${{ {reference}"]) == (reference,)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_pieces = st.lists(
    st.sampled_from(("${", "$${", "}", "steps.", "survey", ".output", ".x", "[0]", "?", "variables.", "repo", "$", "{"))
    | st.text(max_size=4),
    max_size=10,
).map("".join)


@given(_pieces | st.text(), _json)
def test_nothing_but_the_two_errors_escapes(text: str, output: Any) -> None:
    def look(reference: Reference) -> Any:
        if reference.name != "survey":
            raise MissingReference("not there")
        return output

    try:
        references(text)
    except InvalidReference:
        assert "${" in text
    try:
        made = resolve({"x": [text]}, look)
    except MissingReference:
        assert "}" in text
        return
    if "${" not in text:
        assert made == {"x": [text]}


@given(_json)
def test_a_value_put_into_text_is_its_json(value: Any) -> None:
    text = resolve("<${variables.v}>", lookup_in({}, {"v": value}, {}))
    inner = text[1:-1]
    if isinstance(value, str):
        assert inner == value
    else:
        assert json.dumps(json.loads(inner)) == json.dumps(value)
