"""Two: every change is an event, and anyone may listen."""

from __future__ import annotations

from vespera_exec import EventType, ExecutionEvent, ExecutionPhase, ExecutionStatus, Task


def test_events_tell_the_whole_story_in_order() -> None:
    session = Task(title="Build").start_execution()
    session.update_status(ExecutionStatus.RUNNING)
    session.update_progress(50, message="half")
    session.complete("built")

    types = [event.event_type for event in session.status_events]
    assert types[:3] == [EventType.STATUS_CHANGE, EventType.EXECUTION_CREATED, EventType.EXECUTION_STARTED]
    assert types[-1] is EventType.EXECUTION_COMPLETED
    assert [event.sequence for event in session.status_events] == list(range(1, len(types) + 1))


async def test_a_loop_follows_an_execution_from_any_event_to_its_end() -> None:
    session = Task(title="Build").start_execution()
    session.phases.enter(ExecutionPhase.EXECUTION)
    follower = session.stream.follow(after=1)  # what is past is replayed first
    session.complete("built")

    told = [event async for event in follower]
    assert [event.sequence for event in told] == list(range(2, len(told) + 2))
    assert told[-1].event_type is EventType.EXECUTION_COMPLETED
    assert follower.dropped == 0  # a slow reader is told what memory no longer held


def test_a_callback_hears_of_the_coming_executions_too() -> None:
    heard: list[ExecutionEvent] = []
    task = Task(title="Build")
    subscription = task.execution.add_status_callback(heard.append)

    session = task.start_execution()
    session.update_progress(10, message="begun")
    task.complete_execution()

    assert subscription.wait_idle(timeout=5)
    messages = [event.to_stream_message() for event in heard]
    assert [message["message"] for message in messages if message["type"] == "progress_update"] == ["begun"]
    assert {"event_id", "timestamp", "type", "status", "message", "phase", "progress", "details"} <= set(messages[0])
