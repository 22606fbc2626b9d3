"""How a process that serves collects its garbage."""

from __future__ import annotations

import gc
from typing import Final

YOUNG_OBJECTS: Final = 20_000
"""How many new objects there are before they are looked at. With Python's 700, a busy loop looked for a sixth of its
time, and mostly at events and states that were in use."""


def settle() -> None:
    """Keep for good what there is now, which the imports left, and look seldom at what comes."""
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
