"""`run plan.yaml`: from a plan file to an execution that is followed, and from its end to our exit code."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vespera_exec.cli import output, pages
from vespera_exec.cli.answering import Prompter
from vespera_exec.cli.client import DaemonError
from vespera_exec.cli.inputs import parse_inputs
from vespera_exec.cli.plans.display import plan_display
from vespera_exec.cli.plans.pages import outcome, problem_lines
from vespera_exec.cli.plans.state import PlanShown
from vespera_exec.cli.running import Follower, Interrupts
from vespera_exec.cli.starting import Common
from vespera_exec.cli.state import ending, exit_code
from vespera_exec.cli.text import shown
from vespera_exec.errors import InvalidPlan, VesperaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.cli.client import Daemon
    from vespera_exec.cli.display import Display
    from vespera_exec.model.events import Json

REFUSED: Final = 125


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedPlan:
    """A plan file that is to be executed. `variables` are `name=value`, in the place of the plan's own."""

    path: str
    variables: Sequence[str] = ()
    common: Common = field(default_factory=Common)


def run(daemon: Daemon, wanted: WantedPlan, *, detach: bool, quiet: bool, as_json: bool) -> int:
    """Our exit code, after the plan has ended and what became of it is shown; with `detach` once it is on disk.

    Raises:
        InvalidInput: the file cannot be read; a variable that is none; an empty title or key.
        DaemonError: the daemon refuses it for another reason than its form.
    """
    body = wanted.common.body() | {"plan": plan_of(wanted.path), "variables": parse_inputs(wanted.variables)}
    try:
        if not detach:
            return _execute_and_follow(daemon, body, quiet=quiet, as_json=as_json)
        handle = daemon.post("/plans", body).body
    except DaemonError as error:
        if not error.problems:
            raise
        refuse(wanted.path, error.problems)
        return REFUSED
    if as_json:
        output.document(handle)
    else:
        output.lines([f"task {handle['task_id']}", f"session {handle['session_id']}"])
    return 0


def plan_of(path: str) -> Json:
    """What the file at `path` holds, as JSON; not yet checked to be a plan.

    Raises:
        InvalidInput: it cannot be read, or is no YAML that a plan may be written in.
    """
    from vespera_exec.app.plans.source import read_plan_file

    return read_plan_file(Path(path))


def refuse(path: str, problems: Sequence[Mapping[str, Json]]) -> None:
    """Says what is wrong with a plan, and with which of its steps."""
    for each in problem_lines(problems, file=path):
        output.remark(f"vespera-exec: {each}")
    output.failure(InvalidPlan([], hint="`vespera-exec plan schema` has the format"))


def _execute_and_follow(daemon: Daemon, body: Mapping[str, Json], *, quiet: bool, as_json: bool) -> int:
    with Interrupts(signal.SIGTERM, signal.SIGHUP) as interrupts:
        handle = daemon.post("/plans", body).body
        state, left = _follow(daemon, handle, plan_display(quiet=quiet or as_json), interrupts)
        if left is not None:
            return left
    ended = daemon.get(f"/tasks/{handle['task_id']}/result")
    code = interrupts.exit_code if signal.SIGTERM in interrupts.told else exit_code(state.status, state.outcome)
    if as_json:
        output.document(ended | {"exit_code": code})
        return code
    result: Mapping[str, Json] = ended["result"] or {}
    if result.get("output") is not None:
        output.line(pages.result(result["output"]))
        output.flush()
    if not quiet or code:
        for each in outcome(result):
            output.remark(f"vespera-exec: {each}")
        output.remark(f"vespera-exec: {_ending(state, result)} · task {str(handle['task_id'])[: pages.SHORT_ID]}")
    return code


def _follow(daemon: Daemon, handle: Json, display: Display, interrupts: Interrupts) -> tuple[PlanShown, int | None]:
    """Where it stands at the end, and the exit code where we left before."""
    task_id = str(handle["task_id"])
    sessions = [] if handle["repeated"] else [str(handle["session_id"])]
    state = PlanShown(task_id, sessions=sessions)
    state.total = int(daemon.get(f"/tasks/{task_id}/steps", limit=1)["total"])
    follower = Follower(daemon, task_id, state, display, cursor=0 if handle["repeated"] else handle["cursor"])
    follower.prompter = Prompter(daemon, task_id, display)
    try:
        follower.follow(interrupts)
    except KeyboardInterrupt:
        what = "the cancel" if follower.cancelling else "the plan"
        display.say(f"vespera-exec: left; {what} goes on without us: vespera-exec status {task_id}")
        return state, interrupts.exit_code
    except VesperaError:
        if signal.SIGHUP in interrupts.told:
            return state, interrupts.exit_code
        output.remark(f"vespera-exec: lost sight of task {task_id}; it may go on: vespera-exec status {task_id}")
        raise
    finally:
        display.close()
    return state, None


def _ending(state: PlanShown, result: Mapping[str, Json]) -> str:
    """How it ended, and in how many steps."""
    counts: Mapping[str, int] = result.get("counts") or {}
    said = ", ".join(f"{count} {shown(status, 20)}" for status, count in counts.items() if count)
    return ending(state) + (f" · steps: {said}" if said else "")
