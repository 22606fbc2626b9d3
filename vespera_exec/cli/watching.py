"""Follows what a command only looks at: the status of a run, its progress, its output."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vespera_exec.cli.client import LONG_WAIT_MS, DaemonError, segment
from vespera_exec.cli.state import Shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vespera_exec.cli.client import Daemon
    from vespera_exec.cli.display import Display
    from vespera_exec.model.events import Json

_WATCH_SECONDS = 0.2


def changes(daemon: Daemon, path: str, detail: str | None) -> Iterator[Json]:
    """The status whenever something has happened, a few times a second at most, until the run has ended."""
    while True:
        view = daemon.get(path, detail=detail)
        yield view
        if view["done"] or view["session"] is None:
            return
        time.sleep(_WATCH_SECONDS)
        daemon.get(f"{path}/events", cursor=view["cursor"], wait_ms=LONG_WAIT_MS, max_events=1)


def watch(daemon: Daemon, view: Json) -> None:
    """Progress on stderr until the run has ended. Ctrl-C leaves it alone."""
    from vespera_exec.cli.running import Follower, Interrupts

    state, shown = _seen(daemon, view)
    with Interrupts() as interrupts:
        try:
            Follower(daemon, str(view["task_id"]), state, shown, cursor=view["cursor"], cancels=False).follow(
                interrupts
            )
        finally:
            shown.close()


def _seen(daemon: Daemon, view: Json) -> tuple[Shown, Display]:
    """What is known of it, and where it is shown."""
    sessions = [str(view["session_id"])]
    if view["plan"] is None:
        from vespera_exec.cli.display import display

        state: Shown = Shown(str(view["title"]), sessions=sessions)
        state.take_status(view)
        return state, display()
    from vespera_exec.cli.plans.commands import all_steps
    from vespera_exec.cli.plans.display import plan_display
    from vespera_exec.cli.plans.state import PlanShown

    plan = PlanShown(str(view["title"]), sessions=sessions, total=view["plan"]["steps"])
    plan.take_status(view)
    plan.take_steps(all_steps(daemon, str(view["task_id"]))["steps"])
    return plan, plan_display()


def work_output(daemon: Daemon, any_id: str, stream: str, *, follow: bool) -> Iterator[Json]:
    """The pages of a session's output; with `follow` also those to come, and of the attempts that come after it."""
    path = f"/tasks/{segment(any_id)}"
    session = daemon.get(path)["session_id"]
    if session is None:
        raise DaemonError("CONFLICT", "the task was never executed", "start it first")
    offset = 0
    while True:
        wait_ms = LONG_WAIT_MS if follow else 0
        page = daemon.get(f"/executions/{session}/output", stream=stream, offset=offset, limit=65_536, wait_ms=wait_ms)
        yield page
        offset = page["next_offset"]
        if page["eof"] and follow:
            view = daemon.get(path)
            if not view["done"] and view["session_id"] == session:
                # Between two attempts: the next one shows itself as an event.
                daemon.get(f"{path}/events", cursor=view["cursor"], wait_ms=1000, max_events=1)
                continue
            if view["session_id"] == session:
                return
            session, offset = view["session_id"], 0
        elif page["eof"] or not (page["text"] or follow):
            return
