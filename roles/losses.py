"""Says in the log of an execution what of its work's reports was lost, each or, in a flood, their number."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Final

from vespera_exec.errors import CancellationException, VesperaError
from vespera_exec.model.enums import MessageLevel

if TYPE_CHECKING:
    from collections.abc import Callable

    from vespera_exec.engine.work import Tracking

TELL_SECONDS: Final = 5.0
_log = logging.getLogger(__name__)


class Losses:
    """The first loss is told at once; those of the `TELL_SECONDS` after it together, with the last of them."""

    def __init__(self, tracking: Tracking, clock: Callable[[], float] = time.monotonic) -> None:
        self._tracking = tracking
        self._clock = clock
        self._told_at = -math.inf
        self._waiting = 0
        self._last = ""

    def add(self, what: str) -> None:
        """Never raises."""
        self._waiting += 1
        self._last = what
        if self._clock() - self._told_at >= TELL_SECONDS:
            self.tell()

    def tell(self) -> None:
        """Log what has not been told yet. Never raises."""
        if not self._waiting:
            return
        others = f" (and {self._waiting - 1:,} more since the last warning)" if self._waiting > 1 else ""
        self._waiting, self._told_at = 0, self._clock()
        try:
            self._tracking.log(MessageLevel.WARNING, f"{self._last}{others}")
        except (VesperaError, CancellationException) as error:
            _log.debug("A loss could not be logged: %s", error)
