"""What a worker says in one call, as the reports that a child process would have written line by line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from roles.reports import MESSAGE_CHARACTERS, Held, Report, clean
from vespera_exec.app.workers import views
from vespera_exec.model.enums import MessageLevel, ProgressType
from vespera_exec.model.progress import ProgressReport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import ValidationError

    from vespera_exec.model.events import Json

_NOTHING: Mapping[str, Json] = {}


def checked(given: dict[str, Json]) -> views.WorkReport:
    """One of the `reports` of a call.

    Raises:
        ValidationError: it is none.
    """
    return views.WorkReport.model_validate(given)


def reports_of(said: views.WorkReport) -> list[ProgressReport | Report]:
    """Its progress, its metrics, its line of the log and its checkpoint, in this order; empty of what says nothing."""
    reports: list[ProgressReport | Report] = []
    if (progress := _progress(said)) is not None:
        reports.append(progress)
    for name, value in said.metrics.items():
        metric = clean(name)[:64]  # an empty one is refused, as one of its own
        reports.append(ProgressReport(progress_type=ProgressType.CUSTOM, current=value, unit="custom", metric=metric))
    if said.log is not None:
        reports.append(Report(log=(MessageLevel(said.level), clean(said.log)[:MESSAGE_CHARACTERS], {})))
    if "checkpoint" in said.model_fields_set:
        reports.append(Report(checkpoint=Held(said.checkpoint)))
    return reports


def complaint(error: ValidationError) -> str:
    """What is wrong with what was said, in one line."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, each['loc']))[:100]}: {each['msg']}" for each in faults[:5])


def _progress(said: views.WorkReport) -> ProgressReport | None:
    phase, message = said.phase, said.message
    text = clean(f"{phase}: {message}" if phase and message else phase or message)[:MESSAGE_CHARACTERS]
    details = {"phase": phase} if phase else _NOTHING
    if said.percentage is not None:
        return ProgressReport(current=said.percentage, message=text, details=details, reset=said.reset)
    if said.done is not None:
        unit = clean(said.unit)
        kind = ProgressType.STEPS if unit in ("", "steps") else ProgressType.ITEMS
        return ProgressReport(
            progress_type=kind,
            current=said.done,
            total=said.total,
            unit=unit or kind.value,
            message=text,
            details=details,
            reset=said.reset,
        )
    return ProgressReport(message=text, details=details, reset=said.reset) if text else None
