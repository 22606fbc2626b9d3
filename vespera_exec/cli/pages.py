"""The daemon's answers as text for a person."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING

from vespera_exec.cli.output import colour
from vespera_exec.cli.plans import pages as plan_pages
from vespera_exec.cli.plans.state import waiting
from vespera_exec.cli.questions import asked
from vespera_exec.cli.state import eta_text
from vespera_exec.cli.text import age, duration, percent, shown, size, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.model.events import Json

SHORT_ID = 8
_COLOUR = {
    "completed": "green",
    "done": "green",
    "failed": "red",
    "timed_out": "red",
    "cancelled": "yellow",
    "cancelling": "yellow",
    "paused": "yellow",
}


def task_list(page: Mapping[str, Json], width: int | None) -> list[str]:
    """A line per task, and one that says how many are not shown."""
    rows: list[Mapping[str, Json]] = page["tasks"]
    if not rows:
        return ["no tasks"]
    cells = [
        (
            str(row["task_id"])[:SHORT_ID],
            str(row["execution_status"] or row["status"]),
            percent(row["percentage"]),
            shown(row["role"] or "", 24),
            age(str(row["updated_at"])),
            shown(row["title"]),
        )
        for row in rows
    ]
    lines = table(("TASK", "STATUS", "DONE", "ROLE", "UPDATED", "TITLE"), cells, width)
    lines = [
        colour(lines[0], "bold"),
        *(_in_colour(line, cell[1]) for line, cell in zip(lines[1:], cells, strict=True)),
    ]
    if page["next_page"]:
        lines.append(f"{len(rows)} of {page['total']}; more with --page {page['next_page']}, or --all")
    return lines


def status(view: Mapping[str, Json]) -> list[str]:
    """A block of `name  value` lines."""
    session: Mapping[str, Json] | None = view["session"]
    lines = [colour(shown(view["title"], 500), "bold"), _field("task", f"{view['task_id']} ({view['task_status']})")]
    if session is None:
        return [*lines, _field("status", "never executed")]
    attempt = f", attempt {session['attempt']}" if session["attempt"] > 1 else ""
    lines += [
        _field("session", str(session["session_id"])),
        _field("role", shown(session["role"] or "none", 64)),
        _field("status", _in_colour(str(view["status"]), str(view["status"])) + attempt),
    ]
    if session["current_phase"]:
        lines.append(_field("phase", str(session["current_phase"])))
    progress = session["overall_progress"]
    said = "  ".join(part for part in (percent(progress["percentage"]), shown(progress["message"])) if part)
    if said:
        lines.append(_field("progress", said))
    lines += [_field(name, value) for name, value in plan_pages.summary(view)]
    timing = session["time_tracking"]
    queued = f", queued {duration(timing['queue_seconds'])}" if timing["queue_seconds"] >= 0.1 else ""
    lines.append(_field("elapsed", duration(timing["elapsed_seconds"]) + queued))
    if timing["eta"]:
        lines.append(_field("ETA", eta_text(timing["eta"], label=True)))
    lines += [_field("asks", asked(str(view["task_id"]), each).removeprefix("asks: ")) for each in view["inputs"] or ()]
    if error := session["error_context"]:
        lines.append(_field("error", f"{shown(error.get('message'), 1000)} ({shown(error.get('code'), 60)})"))
    return [*lines, *_details(view, session)]


def questions(found: Mapping[str, Json], width: int | None) -> list[str]:
    """A line per question that waits for an answer, oldest first."""
    rows: Sequence[Mapping[str, Json]] = found["inputs"]
    if not rows:
        return ["nothing waits for an answer"]
    cells = [
        (
            str(row["task_id"])[:SHORT_ID],
            shown(row["input"]["key"], 64),
            str(row["input"]["kind"]),
            age(str(row["input"]["asked_at"])),
            shown(row["title"], 40),
            shown(row["input"]["message"]),
        )
        for row in rows
    ]
    lines = table(("TASK", "KEY", "KIND", "ASKED", "TITLE", "QUESTION"), cells, width)
    more = [f"{len(rows)} of {found['total']}"] if found["total"] > len(rows) else []
    return [colour(lines[0], "bold"), *lines[1:], *more]


def event(message: Mapping[str, Json]) -> str:
    """`  1234  12:03:04.123  progress_update  42 %  Reading files`."""
    change: Mapping[str, Json] = message["status"] or {}
    progress: Mapping[str, Json] = message["progress"] or {}
    said = str(message["message"] or progress.get("message") or "")
    match message["type"]:
        case "status_change" if change.get("new"):
            parts = [f"{change.get('old')} → {change['new']}", said]
        case "phase_change":
            parts = [str(message["phase"] or ""), said]
        case _:
            parts = [percent(progress.get("percentage")), said]
    if step := message.get("step_id"):
        details: Mapping[str, Json] = message.get("details") or {}
        parts = [f"{shown(step, 64)}:", waiting(details.get("for")), percent(details.get("percentage")), said]
    text = "  ".join(shown(part) for part in parts if part)
    return f"{message['cursor']:>6}  {_clock(str(message['timestamp']))}  {message['type']!s:<20}  {text}".rstrip()


def roles(view: Mapping[str, Json], width: int | None) -> list[str]:
    """A line per role, with its inputs; required ones bear a star."""
    cells = [
        (
            shown(role["name"], 64),
            str(role["runner"]),
            str(role["origin"]),
            "yes" if role["allowed"] else "no",
            _inputs(role["inputs"]),
            shown(role["description"]),
        )
        for role in view["roles"]
    ]
    return table(("ROLE", "RUNNER", "ORIGIN", "ALLOWED", "INPUTS", "DESCRIPTION"), cells, width)


def result(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)


def cancelled(answer: Mapping[str, Json]) -> str:
    """What became of a cancel that was accepted."""
    if answer["status"] == "cancelled":
        rung = f", ended by {shown(answer['rung'], 40)}" if answer["rung"] else ""
        return f"cancelled{rung} (session {answer['session_id']})"
    again = " (it was requested before)" if answer["already_requested"] else ""
    return f"{answer['status']}: {shown(answer['message'])}{again} (session {answer['session_id']})"


def accepted(answer: Mapping[str, Json]) -> str:
    """What became of a pause or a resume that was accepted."""
    return f"{answer['status']}: {shown(answer['message'])} (session {answer['session_id']})"


def _details(view: Mapping[str, Json], session: Mapping[str, Json]) -> list[str]:
    """What `--detail` adds: usage, phases, the last events."""
    lines: list[str] = []
    usage: Mapping[str, Mapping[str, Json]] = session["resource_usage"] or {}
    for name, measured in usage.items():
        lines.append(_field(shown(name, 20), _measure(measured)))
    phases: Sequence[Mapping[str, Json]] = session["phases"] or []
    for phase in phases:
        took = phase.get("duration_seconds")
        lines.append(_field(str(phase.get("phase")), duration(took) if took is not None else "now"))
    recent: Sequence[Mapping[str, Json]] = view["recent_events"] or []
    return [*lines, *(event(each) for each in recent)]


def _measure(measured: Mapping[str, Json]) -> str:
    unit = str(measured["unit"])
    if unit.startswith("bytes"):
        return f"{size(measured['current'])} {unit.removeprefix('bytes').strip()}"
    return f"{measured['current']:g} now, {measured['peak']:g} at most, {unit}"


def _inputs(schema: Mapping[str, Json]) -> str:
    required: Sequence[str] = schema.get("required") or ()
    properties: Mapping[str, Json] = schema.get("properties") or {}
    return " ".join(f"{name}*" if name in required else name for name in properties)


def _field(name: str, value: str) -> str:
    return f"  {name:<10}{value}"


def _clock(stamp: str) -> str:
    try:
        return datetime.fromisoformat(stamp).astimezone().strftime("%H:%M:%S.%f")[:-3]
    except ValueError:
        return shown(stamp, 40)


def _in_colour(text: str, of_status: str) -> str:
    name = _COLOUR.get(of_status)
    return text.replace(of_status, colour(of_status, name), 1) if name else text
