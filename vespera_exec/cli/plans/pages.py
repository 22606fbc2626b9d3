"""What the daemon says of plans and their steps, as text for a person."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from vespera_exec.cli.output import colour
from vespera_exec.cli.plans.drawing import Drawn
from vespera_exec.cli.plans.state import failure, standing, waiting
from vespera_exec.cli.text import duration, percent, shown, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.model.events import Json

_MOST_NAMED: Final = 20
_SHORT_ID: Final = 8


def problem_lines(problems: Sequence[Mapping[str, Json]], *, file: str) -> list[str]:
    """`plan.yaml: step build: there is no role 'mkae'`, a line each. One that names its line begins with the file's."""
    return [_problem(each, file) for each in problems]


def _problem(problem: Mapping[str, Json], file: str) -> str:
    told = shown(problem["problem"], 500)
    if problem.get("step"):
        return f"{shown(file)}: step {shown(problem['step'], 64)}: {told}"
    folder, name = os.path.split(file)
    if told.startswith(f"{shown(name)}:"):
        return os.path.join(shown(folder), told)
    return f"{shown(file)}: {told}"


def outcome(result: Mapping[str, Json]) -> list[str]:
    """What failed and why, and what was skipped and why; nothing where all went well."""
    counts: Mapping[str, int] = result.get("counts") or {}
    failed: Sequence[Mapping[str, Json]] = result.get("failed") or ()
    skipped: Sequence[Mapping[str, Json]] = result.get("skipped") or ()
    lines = [f"failed: {shown(each['step'], 64)}: {failure(each)}" for each in failed[:_MOST_NAMED]]
    lines += _more(counts.get("failed", len(failed)), "failed")
    lines += [f"skipped: {shown(each['step'], 64)}: {shown(each['reason'])}" for each in skipped[:_MOST_NAMED]]
    return lines + _more(counts.get("skipped", len(skipped)), "skipped")


def step_table(page: Mapping[str, Json], width: int | None) -> list[str]:
    """A line per step, and one that says how many are not shown."""
    rows: Sequence[Mapping[str, Json]] = page["steps"]
    cells = [
        (
            shown(row["id"], 64),
            str(row["status"]),
            percent(row["percentage"]),
            shown(row["role"] or "", 24),
            str(row["attempt"] or ""),
            _took(row),
            str(row["task_id"] or "")[:_SHORT_ID],
            step_note(row),
        )
        for row in rows
    ]
    if not rows:
        return ["no such steps"]
    lines = table(("STEP", "STATUS", "DONE", "ROLE", "RUN", "TOOK", "TASK", "NOTE"), cells, width)
    more = [f"{len(rows)} of {page['total']}; all with --all"] if page["total"] > len(rows) else []
    return [colour(lines[0], "bold"), *lines[1:], *more]


def step_note(row: Mapping[str, Json]) -> str:
    """Why it stands where it stands."""
    notes = ["the fallback"] if row["is_fallback"] else []
    notes += ["from the cache"] if row["cached"] else []
    if row["waiting_for"]:
        notes.append(standing(row["waiting_for"], str(row["message"] or "")))
    if row["status"] in ("skipped", "cancelled"):
        notes.append(shown(row["reason"] or ""))
    elif row["error"] and row["status"] != "completed":
        notes.append(failure(row["error"]))
    elif row["status"] == "running":
        notes.append(shown(row["message"] or ""))
    return ", ".join(each for each in notes if each)


def summary(view: Mapping[str, Json]) -> list[tuple[str, str]]:
    """What a status adds for a plan, as `(name, value)`; `view` is the whole status."""
    plan: Mapping[str, Json] | None = view.get("plan")
    if plan is None:
        return []
    counts = ", ".join(f"{count} {shown(status, 20)}" for status, count in plan["counts"].items() if count)
    lines = [("plan", shown(plan["name"] or plan["plan_id"])), ("steps", f"{plan['steps']}: {counts}")]
    for each in plan["current"]:
        said = [str(each["status"]), percent(each["percentage"]), waiting(each["waiting_for"])]
        lines.append(("now", f"{shown(each['step'], 64)}: {' '.join(part for part in said if part)}"))
    if plan["failed"]:
        lines.append(("failed", ", ".join(shown(each, 64) for each in plan["failed"])))
    if plan["last_checkpoint"]:
        lines.append(("kept", f"checkpoint {plan['last_checkpoint']}"))
    return lines


def drawn(row: Mapping[str, Json]) -> Drawn:
    """A step as the daemon lists it, to be drawn with where it stands."""
    status = str(row["status"])
    said = [status, percent(row["percentage"]) if status in ("running", "waiting") else "", waiting(row["waiting_for"])]
    return Drawn(
        id=str(row["id"]),
        role=str(row["role"] or ""),
        needs=tuple(str(each) for each in row["depends_on"]),
        status=status,
        note=" ".join(part for part in said if part),
    )


def _more(count: int, what: str) -> list[str]:
    return [f"{what}: … and {count - _MOST_NAMED} more"] if count > _MOST_NAMED else []


def _took(row: Mapping[str, Json]) -> str:
    if not row["started_at"]:
        return ""
    end = datetime.fromisoformat(row["ended_at"]) if row["ended_at"] else datetime.now(UTC)
    return duration((end - datetime.fromisoformat(row["started_at"])).total_seconds())
