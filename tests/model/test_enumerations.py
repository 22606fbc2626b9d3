"""The closed sets: the members, values and aliases that the documents promise."""

from __future__ import annotations

import pytest

from vespera_exec.model.enums import (
    RESOURCE_UNITS,
    EventType,
    ExecutionPhase,
    ExecutionStatus,
    MessageLevel,
    ProgressType,
    ResourceType,
    TaskStatus,
)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (
            ExecutionStatus,
            "idle pending preparing validating running paused cancelling cancelled completing completed failed "
            "recovering timed_out",
        ),
        (
            ExecutionPhase,
            "initialization validation setup execution cleanup finalization error_handling recovery",
        ),
        (ProgressType, "percentage steps bytes items time_based custom"),
        (ResourceType, "cpu_usage memory_rss memory_vms disk_read disk_write network_in network_out custom"),
        (TaskStatus, "todo doing done failed cancelled"),
        (MessageLevel, "debug info warning error"),
    ],
)
def test_a_set_has_exactly_the_promised_values(kind: type[ExecutionStatus], values: str) -> None:
    assert [each.value for each in kind] == values.split()
    assert [each.name.lower() for each in kind] == values.split()


def test_queued_and_timeout_are_second_names() -> None:
    assert ExecutionStatus["QUEUED"] is ExecutionStatus.PENDING
    assert ExecutionStatus["TIMEOUT"] is ExecutionStatus.TIMED_OUT


def test_the_task_events_of_document_003_are_the_step_events() -> None:
    assert EventType["TASK_STARTED"] is EventType.STEP_STARTED
    assert EventType["TASK_COMPLETED"] is EventType.STEP_COMPLETED
    assert EventType["TASK_FAILED"] is EventType.STEP_FAILED


def test_every_promised_event_type_is_there() -> None:
    promised = """
        execution_created execution_queued execution_started execution_paused execution_resumed
        execution_completed execution_failed execution_cancelled execution_timeout
        step_started step_completed step_failed step_progress
        approval_requested approval_approved approval_rejected
        system_health system_alert resource_allocated resource_released checkpoint_created recovery_initiated
        status_change progress_update phase_change error warning info
    """
    assert set(promised.split()) <= {each.value for each in EventType}


def test_every_measurement_has_a_unit() -> None:
    assert set(RESOURCE_UNITS) == set(ResourceType)
