"""The collector of a process that serves."""

from __future__ import annotations

import subprocess
import sys


def test_what_the_imports_left_is_kept_for_good_and_young_objects_are_looked_at_seldom() -> None:
    program = (
        "import gc; from vespera_exec import garbage; garbage.settle();"
        "print(gc.isenabled(), gc.get_freeze_count() > 1000, *gc.get_threshold())"
    )
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["True", "True", "20000", "10", "10"]
