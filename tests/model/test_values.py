"""Copies of frozen values: what was asked for is changed, all else is as it was, and the copy is frozen too."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.lifecycle import Lifecycle
from vespera_exec.model.values import copier

copy = copier(Lifecycle)


def test_a_copy_equals_what_replace_would_have_made() -> None:
    life = Lifecycle(execution_id="e1", task_id="t1", attempt=2, outcome={"a": 1})
    changed = copy(life, status=ExecutionStatus.RUNNING, sequence=7)
    assert changed == replace(life, status=ExecutionStatus.RUNNING, sequence=7)
    assert type(changed) is Lifecycle
    assert all(getattr(copy(life), each.name) is getattr(life, each.name) for each in fields(Lifecycle))


def test_the_original_is_left_as_it_was() -> None:
    life = Lifecycle(execution_id="e1")
    copy(life, attempt=9)
    assert life == Lifecycle(execution_id="e1")


def test_a_copy_is_frozen() -> None:
    changed = copy(Lifecycle(execution_id="e1"), attempt=9)
    with pytest.raises(FrozenInstanceError):
        changed.attempt = 10  # pyright: ignore[reportAttributeAccessIssue]


def test_a_field_that_does_not_exist_is_refused() -> None:
    with pytest.raises(AttributeError):
        copy(Lifecycle(execution_id="e1"), no_such_field=1)
