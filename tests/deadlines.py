"""How long tests wait for what must come, and for what is promised to come in time."""

from __future__ import annotations

WITHIN = 60.0
"""Seconds. No promise: whoever misses this hangs, on however slow a machine."""
CANCEL_SECONDS = 10.0
"""Promised are five, on a machine that has time for it."""
KILL_SECONDS = 10.0
"""Until nobody is left of a killed daemon. Promised is one."""
