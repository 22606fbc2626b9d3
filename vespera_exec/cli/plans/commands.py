"""`plan` and `steps`: what a plan file says, and where the steps of a plan stand."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final

import click

from vespera_exec.cli import output
from vespera_exec.cli.client import Daemon, DaemonError, data_directory, segment
from vespera_exec.cli.plans import drawing as plan_drawing
from vespera_exec.cli.plans import pages as plan_pages
from vespera_exec.cli.plans.drawing import Drawn
from vespera_exec.cli.text import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.errors import InvalidPlan
    from vespera_exec.model.events import Json

SUFFIXES: Final = (".yaml", ".yml", ".json")
_PAGE = 500
_SHOWN = 100
_SOME_PROBLEM = 1
_REFUSED = 125

_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
_set = click.option("--set", "given", metavar="NAME=VALUE", multiple=True, help="A variable of the plan.")
_file = click.argument("path", metavar="FILE")


@click.group("plan")
def group() -> None:
    """Plan files: their format, a check, a drawing. `run plan.yaml` executes one."""


@group.command()
def schema() -> None:
    """The format of a plan file, as a JSON schema."""
    from vespera_exec.app.plans.files import plan_schema

    output.line(json.dumps(plan_schema(), ensure_ascii=False, indent=2))


@group.command()
@_file
@_set
@click.option("--offline", is_flag=True, help="Only the form; roles are not looked up.")
@_json
def check(*, path: str, given: tuple[str, ...], offline: bool, as_json: bool) -> int:
    """Whether a plan file can be run.

    Says all that is wrong with it (exit code 1), or how large it is.
    """
    from vespera_exec.cli.inputs import parse_inputs

    checked = _checked(path, parse_inputs(given), offline=offline)
    code = 0 if checked["valid"] else _SOME_PROBLEM
    if as_json:
        output.document(checked)
    elif code:
        output.lines(plan_pages.problem_lines(checked["problems"], file=path))
    else:
        form = " (roles were not looked up)" if offline else ""
        size = f"{_counted(checked['steps'], 'step')} in {_counted(checked['levels'], 'level')}"
        output.line(f"{shown(path)}: {size}, at most {checked['widest']} beside each other{form}")
    return code


@group.command()
@click.argument("source", metavar="FILE|ID")
@click.option("--mermaid", "form", flag_value="mermaid", help="As a Mermaid flowchart.")
@click.option("--dot", "form", flag_value="dot", help="As a digraph for Graphviz.")
def show(*, source: str, form: str | None) -> int:
    """Draw a plan, level by level.

    Its steps with their role and what they need; of a task also where they stand.
    """
    if os.path.exists(source) or source.endswith(SUFFIXES):
        steps = _steps_of_file(source)
        if steps is None:
            return _REFUSED
    else:
        with Daemon(data_directory()) as daemon:
            steps = [plan_pages.drawn(each) for each in all_steps(daemon, source)["steps"]]
    match form:
        case "mermaid":
            output.lines(plan_drawing.as_mermaid(steps))
        case "dot":
            output.lines(plan_drawing.as_dot(steps))
        case _:
            output.lines(plan_drawing.as_text(steps, output.width()))
    return 0


@click.command("steps")
@click.argument("any_id", metavar="ID")
@click.option("--status", help="Only those that stand there: running, waiting, failed, ...")
@click.option("--all", "every", is_flag=True, help=f"Not only the first {_SHOWN}.")
@_json
def steps(*, any_id: str, status: str | None, every: bool, as_json: bool) -> None:
    """Where the steps of a plan stand."""
    with Daemon(data_directory()) as daemon:
        if every:
            page = all_steps(daemon, any_id, status)
        else:
            page = daemon.get(f"/tasks/{segment(any_id)}/steps", status=status, limit=_SHOWN)
    if as_json:
        output.document(page)
    else:
        output.lines(plan_pages.step_table(page, output.width()))


def is_plan_file(words: Sequence[str]) -> bool:
    """What was typed begins with the name of a plan file, whether it is there or not."""
    return bool(words) and words[0].endswith(SUFFIXES)


def all_steps(daemon: Daemon, any_id: str, status: str | None = None) -> Json:
    """The page with all steps on it."""
    path = f"/tasks/{segment(any_id)}/steps"
    page = daemon.get(path, status=status, limit=_PAGE)
    while page["next_after"] is not None:
        more = daemon.get(path, status=status, limit=_PAGE, after=page["next_after"])
        page = more | {"steps": page["steps"] + more["steps"]}
    return page


def _checked(path: str, variables: dict[str, Json], *, offline: bool) -> Json:
    """What `POST /plans/check` answers, from the daemon, or from the form alone."""
    from vespera_exec.cli.plans.running import plan_of
    from vespera_exec.errors import InvalidPlan

    try:
        plan = plan_of(path)
        if not offline:
            with Daemon(data_directory()) as daemon:
                return daemon.post("/plans/check", {"plan": plan, "variables": variables}).body
        drawn = _parsed(plan, variables)
    except InvalidPlan as error:
        return _invalid(_problems(error))
    except DaemonError as error:
        if not error.problems:
            raise
        return _invalid(error.problems)
    order = [[each.id for each in level] for level in plan_drawing.levels(drawn)]
    return {
        "valid": True,
        "problems": [],
        "steps": len(drawn),
        "levels": len(order),
        "widest": max(map(len, order)),
        "order": order,
    }


def _invalid(problems: Sequence[Mapping[str, Json]]) -> Json:
    return {"valid": False, "problems": list(problems), "steps": 0, "levels": 0, "widest": 0, "order": []}


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _parsed(plan: Json, variables: dict[str, Json] | None = None) -> list[Drawn]:
    from vespera_exec.app.plans.files import parse_plan

    return [
        Drawn(id=each.id, role=each.role, needs=each.depends_on) for each in parse_plan(plan, variables=variables).steps
    ]


def _steps_of_file(path: str) -> list[Drawn] | None:
    """None where it is no plan, and what is wrong with it is said."""
    from vespera_exec.cli.plans.running import plan_of, refuse
    from vespera_exec.errors import InvalidPlan

    try:
        return _parsed(plan_of(path))
    except InvalidPlan as error:
        refuse(path, _problems(error))
        return None


def _problems(error: InvalidPlan) -> list[dict[str, Json]]:
    return [{"step": step, "problem": problem} for step, problem in error.problems]
