"""From a report of progress to the event that records it: the rules of what is accepted."""

from __future__ import annotations

import logging
from types import MappingProxyType
from typing import TYPE_CHECKING

from vespera_exec.errors import InvalidProgress
from vespera_exec.model.enums import ExecutionPhase, ProgressType
from vespera_exec.model.jsonable import clean_text, details_of
from vespera_exec.model.progress import SHOWN_BEFORE_THE_END, ProgressState, measure, measured, measurement

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from vespera_exec.model.events import Json
    from vespera_exec.model.progress import CustomMetric, Progress, ProgressReport

_log = logging.getLogger(__name__)

PHASE_WINDOWS: Mapping[ExecutionPhase, tuple[float, float]] = MappingProxyType(
    {
        ExecutionPhase.VALIDATION: (0.0, 10.0),
        ExecutionPhase.SETUP: (10.0, 25.0),
        ExecutionPhase.EXECUTION: (30.0, 90.0),
        ExecutionPhase.CLEANUP: (90.0, 95.0),
        ExecutionPhase.FINALIZATION: (95.0, 99.0),
    }
)
"""Where the progress of a phase stands in the overall percentage."""


MAX_METRICS = 64
"""Custom metrics of one execution, the computed ones included."""
MAX_METRIC_NAME = 100


def check_metric(name: object, known: Collection[str]) -> None:
    """
    Raises:
        InvalidProgress: `name` is no text, empty or too long, or one more than the `known` metrics may be.
    """
    if not isinstance(name, str) or not name:
        raise InvalidProgress("a metric's name must be text that is not empty")
    if len(name) > MAX_METRIC_NAME:
        raise InvalidProgress(f"a metric's name has at most {MAX_METRIC_NAME} characters, not {len(name):,}")
    if len(known) >= MAX_METRICS and clean_text(name) not in known:
        raise InvalidProgress(f"an execution has at most {MAX_METRICS} custom metrics")


def accepted(
    report: ProgressReport, before: Progress, phase: ExecutionPhase | None
) -> tuple[str, dict[str, Json], dict[str, Json]]:
    """What `report` changes: of the custom metric it names, else of `phase`, else of the whole execution.

    Message, `progress_data` and details of its event: the second is the overall measure after it; the details have
    the scope that was reported, "phase_progress" or "custom", and "reset" where it may go back.

    Raises:
        InvalidProgress: the numbers are refused, or the value would run backwards.
    """
    details: dict[str, Json] = {"reset": True} if report.reset else {}
    if report.metric is not None:
        data = _scope(report, before.custom.get(report.metric), may_fall=True)
        details["custom"] = {clean_text(report.metric): data}
        return report.message or f"{report.metric}: {data['current']:g}", _kept(before), details
    if phase is not None:
        data = _scope(report, before.phases.get(phase), may_fall=report.reset)
        details["phase_progress"] = data
        return report.message or _told(data), _rolled_up(before, phase, data, reset=report.reset), details
    data = _scope(report, before.overall, may_fall=report.reset)
    if data["percentage"] is not None and data["percentage"] > SHOWN_BEFORE_THE_END:
        data["percentage"] = SHOWN_BEFORE_THE_END
        if "type" not in data:
            data["current"] = SHOWN_BEFORE_THE_END
    shown = data["percentage"]
    if shown is not None and shown < before.reached and not report.reset:
        raise InvalidProgress(f"the overall percentage went back from {before.reached:g} to {shown:g}")
    return report.message or _told(data), data, details


def computed(metrics: Mapping[str, CustomMetric], progress: Progress, elapsed_seconds: float) -> dict[str, Json]:
    """The computed metrics that have a value now, as an event keeps them. One that fails is logged and left out."""
    values: dict[str, Json] = {}
    for name, metric in metrics.items():
        try:
            value = metric(progress, elapsed_seconds)
            if value is not None:
                state = value if isinstance(value, ProgressState) else ProgressState(ProgressType.CUSTOM, value)
                values[clean_text(name)] = measured(state) | (
                    {"details": details_of(state.details)} if state.details else {}
                )
        except Exception:  # noqa: BLE001 - the boundary to a plugin: its fault is not the work's
            _log.exception("The progress metric %s failed", name)
    return values


def _scope(report: ProgressReport, before: ProgressState | None, *, may_fall: bool) -> dict[str, Json]:
    """The measure of one scope after `report`."""
    message = report.message
    if not isinstance(message, str):  # pyright: ignore[reportUnnecessaryIsInstance] - reports come from strangers
        raise InvalidProgress(f"the message must be text, not {type(message).__name__}")
    if not message:
        message = before.message if before is not None else ""
    elif not message.isascii():
        message = clean_text(message)
    if report.current is None:
        if before is None:
            return measurement(report.progress_type, 0.0, None, report.unit, message, {})
        return measurement(before.progress_type, before.current, before.total, before.unit, message, before.details)
    kind = report.progress_type
    current, total = measure(kind, report.current, report.total)
    same_scale = before is not None and before.progress_type is kind and before.total == total
    if before is not None and same_scale and current < before.current and not may_fall:
        raise InvalidProgress(f"progress went back from {before.current:g} to {current:g}")
    details = report.details
    return measurement(kind, current, total, report.unit, message, details_of(details) if details else details)


def _rolled_up(before: Progress, phase: ExecutionPhase, data: dict[str, Json], *, reset: bool) -> dict[str, Json]:
    """The overall measure after a phase reported: never lower, unless the report was a reset."""
    window, percentage = PHASE_WINDOWS.get(phase), data["percentage"]
    message = data["message"] or before.overall.message
    if window is None or percentage is None:
        return {**_kept(before), "message": message}
    start, end = window
    reached = start + percentage / 100.0 * (end - start)
    if not reset and reached < before.reached:
        reached = before.reached
    return {"current": reached, "total": None, "percentage": reached, "message": message}


def _kept(before: Progress) -> dict[str, Json]:
    state = before.overall
    data = measurement(state.progress_type, state.current, state.total, state.unit, state.message, state.details)
    if data["percentage"] is not None:
        data["percentage"] = min(data["percentage"], SHOWN_BEFORE_THE_END)
    return data


def _told(data: dict[str, Json]) -> str:
    """The text of an event whose report had none."""
    current, total = data["current"], data["total"]
    if "type" not in data:
        return f"Progress: {current:g}%"
    if data["percentage"] is None or total is None:
        return f"Progress: {current:g} {data.get('unit', '')}".rstrip()
    return f"Progress: {current:g}/{total:g}"
