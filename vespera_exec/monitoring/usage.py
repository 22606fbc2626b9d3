"""Which reader of process trees this system has: /proc, or psutil elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vespera_exec.monitoring.trees import ProcessTrees


def system_process_trees() -> ProcessTrees:
    """The cheapest reader this system has."""
    if sys.platform == "linux":
        from vespera_exec.monitoring.proc_trees import ProcTrees

        return ProcTrees()
    from vespera_exec.monitoring.psutil_trees import PsutilTrees

    return PsutilTrees()
