"""What a session asks and what it is answered: which questions and answers are taken, and what they lead to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_harness import HandClock, KeptLog, running_session

from vespera_exec.errors import InvalidInput, InvalidTransitionError
from vespera_exec.model.enums import EventType, ExecutionPhase, ExecutionStatus
from vespera_exec.model.forms import checked_schema, completed
from vespera_exec.model.inputs import MAX_QUESTIONS, Answer, Question
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.replay import replayed
from vespera_exec.model.task import Task

S = ExecutionStatus
YES = Answer(action="accept")
NO = Answer(action="decline")


def form(**fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": fields}


def test_a_question_parks_what_is_at_work_and_its_answer_lets_it_wait_for_its_turn() -> None:
    hand = HandClock()
    session, log = running_session(hand=hand)
    session.enter_phase(ExecutionPhase.EXECUTION)
    hand.pass_(2)
    assert [each.key for each in session.ask([Question.made("a", "A?")])] == ["a"]
    hand.pass_(50)
    assert (session.status, session.lifecycle.is_parked, session.elapsed_seconds) == (S.PAUSED, True, 2)
    assert session.lifecycle.status_message == "Waiting for an answer: a"

    assert session.answer({"a": YES}, by="ann") == ("a",)
    hand.pass_(3)
    assert (session.status, session.lifecycle.is_parked, session.elapsed_seconds) == (S.RUNNING, True, 2)
    session.enter_phase(ExecutionPhase.EXECUTION)
    hand.pass_(1)
    assert (session.lifecycle.is_parked, session.elapsed_seconds) == (False, 3)
    assert (session.lifecycle.paused_seconds, session.lifecycle.queue_seconds) == (50, 3)
    assert session.lifecycle.inputs[0].answer == Answer(
        action="accept", content={}, by="ann", at=log.of("e1")[-4].timestamp
    )


def test_a_key_that_was_asked_is_not_asked_again() -> None:
    session, log = running_session()
    session.ask([Question.made("a", "A?")])
    session.answer({"a": NO}, by="ann")
    before = len(log.events)
    assert session.ask([Question.made("a", "Something else?")]) == ()
    assert len(log.events) == before
    assert [each.key for each in session.ask([Question.made("a", "A?"), Question.made("b", "B?")])] == ["b"]
    assert log.types("e1").count(EventType.APPROVAL_REQUESTED) == 2


def test_an_approval_that_is_not_given_ends_it_and_a_form_that_is_declined_does_not() -> None:
    session, log = running_session()
    session.ask([Question.made("a", "A?"), Question.made("b", "B?", kind="approval")])
    session.answer({"a": NO}, by="ann")
    assert session.status is S.PAUSED
    session.answer({"b": NO}, by="ann")
    assert (session.status, session.lifecycle.error["code"]) == (S.FAILED, "APPROVAL_REJECTED")
    assert session.lifecycle.error["recoverable"] is False
    assert session.lifecycle.open_inputs == ()
    assert log.types("e1")[-4:-1] == [
        EventType.APPROVAL_REJECTED,
        EventType.STATUS_CHANGE,
        EventType.EXECUTION_FAILED,
    ]


def test_one_answer_that_does_not_fit_refuses_all_of_them() -> None:
    session, log = running_session()
    number = form(n={"type": "integer", "minimum": 1})
    session.ask([Question.made("a", "A?"), Question.made("n", "N?", schema=number)])
    before = len(log.events), session.lifecycle
    with pytest.raises(InvalidInput, match="the answer to n: field 'n' is at least 1"):
        session.answer({"a": YES, "n": Answer(action="accept", content={"n": 0})}, by="ann")
    assert (len(log.events), session.lifecycle) == before


def test_a_run_asks_at_most_32_questions() -> None:
    session, log = running_session()
    many = [Question.made(f"q{each}", "?") for each in range(MAX_QUESTIONS)]
    session.ask(many)
    session.answer({each.key: YES for each in many}, by="ann")
    before = len(log.events)
    with pytest.raises(InvalidInput, match="at most 32"):
        session.ask([Question.made("one-more", "?")])
    assert (len(log.events), session.status) == (before, S.RUNNING)


def test_what_has_ended_or_is_being_cancelled_asks_nothing_and_takes_no_answer() -> None:
    session, _ = running_session()
    session.ask([Question.made("a", "A?")])
    session.request_cancellation("enough")
    assert (session.lifecycle.open_inputs, session.answer({"a": YES}, by="ann")) == ((), ())
    with pytest.raises(InvalidTransitionError):
        session.ask([Question.made("b", "B?")])
    session.end_cancelled()
    assert session.answer({"a": YES}, by="ann") == ()


def test_the_log_and_the_row_say_the_same_of_all_questions() -> None:
    session, log = running_session()
    session.ask([Question.made("a", "A?", schema=form(n={"type": "string", "default": "x"}))])
    session.answer({"a": YES}, by="ann")
    session.enter_phase(ExecutionPhase.EXECUTION)
    session.ask([Question.made("b", "B?", kind="approval")])
    assert replayed(log.of("e1"), "e1")[0] == session.lifecycle
    assert Lifecycle.from_dict(session.lifecycle.to_dict()) == session.lifecycle


def test_of_two_answers_in_a_log_the_first_counts_and_one_to_nothing_counts_for_nothing() -> None:
    session, log = running_session()
    session.ask([Question.made("a", "A?")])
    session.answer({"a": YES}, by="ann")
    life = session.lifecycle
    answered = next(each for each in log.of("e1") if each.event_type is EventType.APPROVAL_APPROVED)
    assert life.evolve(replace(answered, event_type=EventType.APPROVAL_REJECTED)) is life
    assert life.evolve(replace(answered, details={"key": "b", "action": "accept"})) is life
    assert life.evolve(replace(answered, event_type=EventType.APPROVAL_REQUESTED)) is life
    assert life.evolve(replace(answered, event_type=EventType.APPROVAL_REQUESTED, details={})) is life


def test_a_row_of_an_older_version_has_no_questions() -> None:
    session, _ = running_session()
    old = session.lifecycle.to_dict()
    del old["inputs"]
    assert Lifecycle.from_dict(old).inputs == ()


def test_the_next_attempt_has_the_answers_and_not_what_was_open() -> None:
    task = Task(sink=KeptLog())
    session = task.start_execution("role")
    session.update_status(S.RUNNING)
    session.ask([Question.made("a", "A?")])
    session.answer({"a": YES}, by="ann")
    session.enter_phase(ExecutionPhase.EXECUTION)
    session.ask([Question.made("b", "B?")])
    following = task.execution.fail_for_retry("flaky", retry_at=HandClock().now())
    assert following is not None
    assert [(each.key, each.answer is not None) for each in following.lifecycle.inputs] == [("a", True)]


def test_questions_are_recorded_by_their_own_methods_only() -> None:
    session, _ = running_session()
    for name in ("approval_requested", "approval_approved", "approval_rejected"):
        with pytest.raises(InvalidInput, match="its own method"):
            session.emit_status_event(name, "sneaked in", {"key": "a", "action": "accept"})
    assert session.lifecycle.inputs == ()


@pytest.mark.parametrize("key", ["", "a b", "ü", "x" * 65, "a/b", 7, None])
def test_a_key_is_a_short_plain_word(key: object) -> None:
    with pytest.raises(InvalidInput, match="no name of a question"):
        Question.made(key, "?")


@pytest.mark.parametrize("message", ["", "x" * 2001, None, 3])
def test_a_message_is_a_text_of_bounded_length(message: object) -> None:
    with pytest.raises(InvalidInput, match="its message"):
        Question.made("a", message)


def test_a_kind_is_approval_or_form() -> None:
    with pytest.raises(InvalidInput, match="approval or form"):
        Question.made("a", "?", kind="poll")


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        ({"type": "object", "properties": {}}, "not of type"),
        ({"type": ["string", "null"]}, "not of type"),
        ({"$ref": "#/x"}, "not of type"),
        ("string", "not of type"),
        ({"type": "string", "pattern": "a+"}, "'pattern', which forms do not know"),
        ({"type": "string", "format": "ipv4"}, "format is one of"),
        ({"type": "string", "enum": []}, "nothing to choose"),
        ({"type": "string", "enum": [1]}, "enum is a list of texts"),
        ({"type": "string", "oneOf": [{"const": "a"}]}, "const"),
        ({"type": "string", "minLength": -1}, "minLength is an integer from 0"),
        ({"type": "string", "title": 3}, "title is a text"),
        ({"type": "number", "maximum": "9"}, "maximum is a number"),
        ({"type": "integer", "default": "9"}, "the default"),
        ({"type": "boolean", "default": 1}, "the default"),
        ({"type": "array"}, "needs `items`"),
        ({"type": "array", "items": {"type": "string"}}, "nothing to choose"),
        ({"type": "array", "items": {"type": "integer", "enum": ["a"]}}, "items of an array are strings"),
        ({"type": "array", "items": {"type": "string", "enum": ["a"]}, "default": ["b"]}, "the default"),
    ],
)
def test_what_is_no_field_of_a_form_is_refused_by_name(field: object, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem) as refused:
        Question.made("a", "?", schema={"type": "object", "properties": {"it": field}})
    assert "question a" in refused.value.message


@pytest.mark.parametrize(
    "schema",
    [
        [],
        {},
        {"type": "string"},
        {"type": "object", "properties": []},
        {"type": "object", "properties": {}, "allOf": []},
        {"type": "object", "properties": {}, "required": ["missing"]},
        {"type": "object", "properties": {}, "required": "all"},
        {"type": "object", "properties": {"": {"type": "string"}}},
        {"type": "object", "properties": {"a": {"type": "string", "description": "x" * 17_000}}},
        {"type": "object", "properties": {"a": {"type": "string", "default": object()}}},
    ],
)
def test_what_is_no_form_is_refused(schema: object) -> None:
    with pytest.raises(InvalidInput, match="schema"):
        checked_schema(schema)


_FIELDS: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "text": ({"type": "string", "minLength": 2, "maxLength": 4}, ["ab", "äöüß"], ["a", "abcde", 7, None, ["ab"]]),
    "choice": ({"type": "string", "enum": ["a", "b"], "enumNames": ["A", "B"]}, ["a"], ["c", "", 1]),
    "titled": ({"type": "string", "oneOf": [{"const": "a", "title": "A"}]}, ["a"], ["A", 1]),
    "email": ({"type": "string", "format": "email"}, ["ann@example.org"], ["ann", "a b@c", "@"]),
    "uri": ({"type": "string", "format": "uri"}, ["https://example.org/x"], ["example", "://", "a b:c"]),
    "date": ({"type": "string", "format": "date"}, ["2026-02-28"], ["2026-02-30", "28.2.2026", "20260228"]),
    "stamp": ({"type": "string", "format": "date-time"}, ["2026-02-28T10:00:00Z"], ["2026-02-28", "10:00", "T"]),
    "number": ({"type": "number", "minimum": 0, "maximum": 1}, [0, 0.5, 1.0], [-0.1, 2, True, "1", float("nan")]),
    "integer": ({"type": "integer"}, [3, -1, 2.0], [1.5, True, "1", 2**70, 1e300]),
    "boolean": ({"type": "boolean"}, [True, False], [0, "true", None]),
    "several": (
        {"type": "array", "items": {"type": "string", "enum": ["a", "b", "c"]}, "minItems": 1, "maxItems": 2},
        [["a"], ["c", "b"]],
        [[], ["a", "b", "c"], ["a", "a"], ["d"], "a", [1]],
    ),
    "several titled": (
        {"type": "array", "items": {"anyOf": [{"const": "a", "title": "A"}]}},
        [[], ["a"]],
        [["A"], [None]],
    ),
}


@pytest.mark.parametrize("name", _FIELDS)
def test_a_field_takes_what_fits_and_names_itself_where_something_does_not(name: str) -> None:
    field, fitting, others = _FIELDS[name]
    schema = checked_schema({"type": "object", "properties": {name: field}, "required": [name]})
    for value in fitting:
        assert completed(schema, {name: value}) == {name: value}
    for value in others:
        with pytest.raises(InvalidInput, match=f"{name}|the content"):
            completed(schema, {name: value})
    with pytest.raises(InvalidInput, match=f"field '{name}' is missing"):
        completed(schema, {})


def test_a_default_fills_what_is_left_out_and_an_unknown_field_is_refused() -> None:
    schema = checked_schema(form(a={"type": "string", "default": "x"}, b={"type": "integer"}))
    assert completed(schema, None) == {"a": "x"}
    assert isinstance(completed(schema, {"b": 2.0})["b"], int)
    with pytest.raises(InvalidInput, match=r"no field 'c'; there are: a, b"):
        completed(schema, {"c": 1})


def test_a_content_is_bounded() -> None:
    schema = checked_schema(form(a={"type": "string"}))
    with pytest.raises(InvalidInput, match="at most 16,384"):
        completed(schema, {"a": "x" * 17_000})


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_contents = st.dictionaries(st.text(max_size=8), _json, max_size=3)
_near = st.fixed_dictionaries(
    {"type": st.sampled_from(["string", "number", "integer", "boolean", "array", "object"])},
    optional=dict.fromkeys(
        ["enum", "oneOf", "items", "default", "format", "minLength", "maxItems", "minimum", "title", "enumNames"], _json
    ),
)


@given(fields=st.dictionaries(st.text(max_size=8), _json | _near, max_size=3), content=_contents, more=_json)
def test_whatever_is_given_as_a_form_or_an_answer_is_taken_whole_or_refused(
    fields: Any, content: dict[str, Any], more: Any
) -> None:
    try:
        question = Question.made("a", "?", schema={"type": "object", "properties": fields, "required": more or []})
        answer = question.checked(Answer(action="accept", content=content))
    except InvalidInput:
        return
    assert Question.from_dict(question.to_dict()) == question
    assert question.checked(answer) == answer
