"""Where a plan as a whole goes, which all parts of its coordinator go by."""

from __future__ import annotations

import pytest

from vespera_exec.engine.plans.course import Course


@pytest.fixture
def course() -> Course:
    made = Course()
    made.open()
    return made


def test_of_the_reasons_to_end_the_first_counts(course: Course) -> None:
    course.abort("step a failed")
    course.abort("cancelled")
    assert course.aborted == "step a failed"


def test_no_step_begins_while_the_plan_is_paused_or_goes_back(course: Course) -> None:
    held = [course.is_held]
    for change in (course.pause, course.set_out, course.resume, course.arrive):
        change()
        held.append(course.is_held)
    assert held == [False, True, True, True, False]


def test_no_step_begins_once_the_plan_is_to_end(course: Course) -> None:
    course.abort("step a failed")
    assert course.is_held


def test_what_was_begun_before_the_plan_set_out_does_not_count_afterwards(course: Course) -> None:
    before = course.epoch
    assert course.set_out() == course.epoch != before
    course.arrive()
    assert course.epoch != before


def test_what_was_begun_on_the_way_back_does_not_count_once_it_is_there(course: Course) -> None:
    on_the_way = course.set_out()
    course.arrive()
    assert course.epoch != on_the_way


def test_whoever_waits_for_a_plan_that_ends_on_its_way_waits_no_more() -> None:
    course = Course()
    course.set_out()
    assert [course.opened.is_set(), course.arrived.is_set()] == [False, False]
    course.end()
    assert [course.opened.is_set(), course.arrived.is_set()] == [True, True]
    assert not course.is_open
