"""Custom progress metrics of other packages, found by entry point (`vespera_exec.progress_metrics`)."""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from vespera_exec.model.progress import CustomMetric

GROUP = "vespera_exec.progress_metrics"
_log = logging.getLogger(__name__)


@cache
def progress_metrics() -> dict[str, CustomMetric]:
    """Each entry point is a callable `(progress, elapsed_seconds) -> ProgressState | float | None`.

    It is asked at every progress report; its value stands under the entry point's name in
    `custom_progress`, in the status and in the event. One that cannot be loaded is left out and logged.
    """
    found: dict[str, CustomMetric] = {}
    for entry in entry_points(group=GROUP):
        try:
            metric = entry.load()
        except Exception:  # noqa: BLE001 - the boundary to a plugin: a broken one must not stop the server
            _log.exception("The progress metric %s cannot be loaded", entry.name)
            continue
        if callable(metric):
            found[entry.name] = cast("CustomMetric", metric)
        else:
            _log.error("The progress metric %s is not callable", entry.name)
    return found
