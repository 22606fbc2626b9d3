"""What other installed packages add, found by entry point: `vespera_exec.progress_metrics`, `.recovery_strategies`."""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, cast

from vespera_exec.engine.plans.strategies import Strategies
from vespera_exec.errors import VesperaError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vespera_exec.engine.plans.strategies import RecoveryStrategy
    from vespera_exec.model.progress import CustomMetric

METRICS = "vespera_exec.progress_metrics"
STRATEGIES = "vespera_exec.recovery_strategies"
_log = logging.getLogger(__name__)


@cache
def progress_metrics() -> dict[str, CustomMetric]:
    """Each entry point is a callable `(progress, elapsed_seconds) -> ProgressState | float | None`.

    It is asked at every progress report; its value stands under the entry point's name in
    `custom_progress`, in the status and in the event. One that cannot be loaded is left out and logged.
    """
    found: dict[str, CustomMetric] = {}
    for name, metric in _loaded(METRICS):
        if callable(metric):
            found[name] = cast("CustomMetric", metric)
        else:
            _log.error("The progress metric %s is not callable", name)
    return found


def strategies() -> Strategies:
    """The built-in recovery strategies, and after them those of other packages."""
    made = Strategies.built_in()
    for each in recovery_strategies():
        try:
            made.add(each)
        except VesperaError as error:
            _log.error("The recovery strategy %r is left out: %s", each.id, error)
    return made


def recovery_strategies() -> list[RecoveryStrategy]:
    """Each entry point is a recovery strategy, or a class or function that makes one without being told anything.

    One that cannot be loaded or made, or lacks something of `RecoveryStrategy`, is left out and logged.
    """
    found: list[RecoveryStrategy] = []
    for name, strategy in _loaded(STRATEGIES):
        try:
            made = strategy() if callable(strategy) else strategy
        except Exception:  # noqa: BLE001 - the boundary to a plugin: a broken one must not stop the server
            _log.exception("The recovery strategy %s cannot be made", name)
            continue
        if missing := [each for each in _STRATEGY if getattr(made, each, None) is None]:
            _log.error("The recovery strategy %s has no %s", name, ", ".join(missing))
        else:
            found.append(cast("RecoveryStrategy", made))
    return found


_STRATEGY = ("id", "name", "description", "applicable_errors", "execute")


def _loaded(group: str) -> Iterator[tuple[str, object]]:
    for entry in entry_points(group=group):
        try:
            yield entry.name, entry.load()
        except Exception:  # noqa: BLE001 - the boundary to a plugin: a broken one must not stop the server
            _log.exception("%s of %s cannot be loaded", entry.name, group)
