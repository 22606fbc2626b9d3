"""Three: how work is asked to stop, in memory."""

from __future__ import annotations

import pytest

from vespera_exec import CancellationException, CancellationToken, ExecutionStatus, Task, TaskStatus


def test_work_looks_at_its_token_and_the_session_ends_cancelled_not_failed() -> None:
    task = Task(title="Crawl")
    session = task.start_execution()
    token = session.cancellation_token
    assert token is not None

    assert task.execution.request_cancellation("enough")
    assert session.status is ExecutionStatus.CANCELLING
    with pytest.raises(CancellationException, match="enough"):
        token.throw_if_cancelled()

    session.end_cancelled()
    assert (session.status, task.status) == (ExecutionStatus.CANCELLED, TaskStatus.CANCELLED)
    assert task.execution.retry_count == 0


def test_a_token_with_a_deadline_needs_no_thread() -> None:
    token = CancellationToken()
    assert token.with_timeout(0).is_cancelled
    assert token.is_cancelled
    assert token.timed_out
