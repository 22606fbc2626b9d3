"""Where a plan that is followed is shown: a block of moving lines of a terminal, or a line per event of a step."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

from vespera_exec.cli import output
from vespera_exec.cli.display import Lines
from vespera_exec.cli.state import ENDED

if TYPE_CHECKING:
    from vespera_exec.cli.display import Display
    from vespera_exec.cli.plans.state import PlanShown
    from vespera_exec.cli.state import Shown


class PlanLines(Lines):
    """Lines on stderr: one per status of the plan and per event of a step; none when `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self._status = ""

    def update(self, state: Shown) -> None:
        plan = cast("PlanShown", state)
        for each in plan.news:
            self.say(f"vespera-exec: {each}")
        plan.news.clear()
        if plan.status != self._status and plan.status not in ENDED:
            self._status = plan.status
            self.say(f"vespera-exec: {plan.line()}")


def plan_display(*, quiet: bool = False) -> Display:
    """A block of moving lines where stderr is a terminal, else lines."""
    if quiet or not output.is_display(sys.stderr):
        return PlanLines(quiet=quiet)
    from vespera_exec.cli.plans.block import Block

    return Block()
