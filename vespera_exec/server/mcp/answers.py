"""What a tool sends back: compact JSON, the same as text and as structured content, within what a model can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import orjson
from mcp_types import CallToolResult, TextContent

from vespera_exec.errors import InvalidPlan
from vespera_exec.model.enums import ExecutionStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vespera_exec.app.plans.views import StepPage
    from vespera_exec.app.views import InputView, Json, Result, Run, Status, View
    from vespera_exec.errors import VesperaError

PAGE_CHARACTERS = 40_000
"""About 10,000 tokens: clients cut a tool's output at 25,000."""

_INPUT_CHARACTERS = 20_000
_MOST_BRIEF_INPUTS = 3
_MOST_BRIEF_STEPS = 2
_TITLE_CHARACTERS = 80
_MESSAGE_CHARACTERS = 120
_ERROR_KEYS = ("code", "type", "message", "phase")


def success(answer: Mapping[str, Json], *, is_error: bool = False) -> CallToolResult:
    """`is_error`: the tool did its part, and the work that it was about failed."""
    return CallToolResult(content=[_text(dumped(answer).decode())], structured_content=dict(answer), is_error=is_error)


def failure(error: VesperaError, promised: Mapping[str, Json] | None = None) -> CallToolResult:
    """`{error, error_code, hint}`, over the keys that the tool promises also then; of a plan `problems`, too."""
    structured = {"error": error.message, "error_code": error.error_code, "hint": error.hint, **(promised or {})}
    if isinstance(error, InvalidPlan):
        problems = error.to_dict()["problems"]
        structured["problems"] = fitting(problems, _INPUT_CHARACTERS)
    text = f"{error.message} — {error.hint}" if error.hint else error.message
    return CallToolResult(content=[_text(_storable(text))], structured_content=_sendable(structured), is_error=True)


def dumped(answer: Mapping[str, Json]) -> bytes:
    return orjson.dumps(answer)


def of(view: View, *, keep: tuple[str, ...] = ()) -> dict[str, Json]:
    """The view without what is null, but for the keys to `keep`."""
    answer = view.model_dump(mode="json", exclude_none=True)
    for name in keep:
        answer.setdefault(name, None)
    return answer


def status(view: Status, *, detail: bool) -> dict[str, Json]:
    """A status for a model. Without `detail` it is small whatever the work says: long texts are cut."""
    answer = of(view, keep=("session_id", "session"))
    answer["legacy_compatibility"] = view.legacy_compatibility.model_dump(mode="json")
    if view.inputs:
        answer |= brief_questions(view.inputs) if not detail else questions(view.inputs)
    session = cast("dict[str, Json] | None", answer["session"])
    if session is not None and view.session is not None:
        # Promised keys stay when they are null; what the level above says already goes.
        session.setdefault("current_phase", None)
        session["overall_progress"].setdefault("percentage", None)
        times = cast("dict[str, Json]", session["time_tracking"])
        for name in ("estimated_completion", "eta_confidence"):
            times.setdefault(name, None)
        session.pop("lifecycle")
    if not detail:
        _cut(answer, "title", _TITLE_CHARACTERS)
        _cut(answer["legacy_compatibility"], "last_error", _MESSAGE_CHARACTERS)
        if view.plan is not None:
            answer["plan"] = _brief_plan(answer["plan"])
        if session is not None:
            _cut(session["overall_progress"], "message", _MESSAGE_CHARACTERS)
            if "error_context" in session:
                session["error_context"] = _brief(session["error_context"])
    return answer


def questions(inputs: Sequence[InputView]) -> dict[str, Json]:
    """`{inputs, more_inputs}`: those that an answer has room for, and how many it leaves out, if any."""
    shown = fitting([each.model_dump(mode="json") for each in inputs], _INPUT_CHARACTERS)
    return _with_rest(shown, len(inputs))


def brief_questions(inputs: Sequence[InputView]) -> dict[str, Json]:
    """As `questions`, of the first few, without their forms."""
    shown: list[dict[str, Json]] = [
        {"key": each.key, "kind": each.kind, "message": each.message} for each in inputs[:_MOST_BRIEF_INPUTS]
    ]
    for each in shown:
        _cut(each, "message", _TITLE_CHARACTERS)
    return _with_rest(shown, len(inputs))


def steps(page: StepPage) -> dict[str, Json]:
    """A page of steps for a model: of each only what says something, and as many as an answer may hold."""
    whole = [_telling(each) for each in of(page)["steps"]]
    shown = fitting(whole, PAGE_CHARACTERS)
    answer = of(page) | {"steps": shown}
    if len(shown) < len(whole):
        answer["next_after"] = shown[-1]["position"]
    return answer


def _telling(step: dict[str, Json]) -> dict[str, Json]:
    return {name: value for name, value in step.items() if name == "position" or value not in ("", 0, False, [])}


def fitting(items: Iterable[dict[str, Json]], characters: int) -> list[dict[str, Json]]:
    """The first of these, and of those behind it as many as have room in `characters` of JSON."""
    shown: list[dict[str, Json]] = []
    for each in items:
        characters -= len(dumped(each))
        if characters < 0 and shown:
            break
        shown.append(each)
    return shown


def result(view: Result) -> dict[str, Json]:
    """A result for a model: one that is too large is cut, as the beginning of its JSON text."""
    # Not by the view's own dump: `result` is the work's, its nulls mean something.
    answer = of(view, keep=("result",))
    _put_result(answer, view.result)
    return answer


def run_result(run: Run) -> CallToolResult:
    """What `execute_task` answers about a run that it has waited for; an error where the run failed or timed out."""
    answer = of_run(run)
    return success(answer, is_error=has_failed(answer))


def has_failed(answer: Mapping[str, Json]) -> bool:
    """Of what `of_run` gives: the run is over, and failed or timed out."""
    return bool(answer.get("done")) and answer.get("status") in (ExecutionStatus.FAILED, ExecutionStatus.TIMED_OUT)


def of_run(run: Run) -> dict[str, Json]:
    """A run for a model: with its result once it is done, or the questions that it waits for."""
    answer: dict[str, Json] = {
        "task_id": run.task_id,
        "run_id": run.run_id,
        "session_id": run.session_id,
        "status": run.status,
        "cursor": run.cursor,
        "done": run.done,
    }
    if run.inputs:
        answer |= questions(run.inputs)
    if run.done and run.error is not None:
        answer["error"] = str(run.error.get("message"))
        answer["error_code"] = str(run.error.get("code"))
    if run.done and (run.result is not None or run.status == ExecutionStatus.COMPLETED):
        if run.result_truncated:
            answer["result_truncated"] = True
        _put_result(answer, run.result)
    return answer


def _with_rest(shown: list[dict[str, Json]], total: int) -> dict[str, Json]:
    return {"inputs": shown, **({"more_inputs": total - len(shown)} if total > len(shown) else {})}


def _put_result(answer: dict[str, Json], result: Json) -> None:
    body = orjson.dumps(result)
    answer["result"] = result
    if len(body) > PAGE_CHARACTERS:
        answer["result"] = body[:PAGE_CHARACTERS].decode(errors="ignore")
        answer["result_truncated"] = True
        answer["result_bytes"] = len(body)


def _text(text: str) -> TextContent:
    return TextContent(type="text", text=text)


def _storable(text: str) -> str:
    """Halves of surrogate pairs, which a refusal may quote, cannot be sent."""
    return text.encode("utf-8", "replace").decode()


def _sendable(structured: Mapping[str, Json]) -> dict[str, Json]:
    return {name: _storable(value) if isinstance(value, str) else value for name, value in structured.items()}


def _cut(holder: dict[str, Json], name: str, limit: int) -> None:
    value = holder.get(name)
    if isinstance(value, str) and len(value) > limit:
        holder[name] = value[: limit - 1] + "…"


def _brief_plan(plan: dict[str, Json]) -> dict[str, Json]:
    """Its numbers, and the first few steps by their ids; what it is called stands in the title."""
    brief: dict[str, Json] = {name: plan[name] for name in ("steps", "counts", "last_checkpoint") if name in plan}
    brief["current"] = [each["step"] for each in plan["current"][:_MOST_BRIEF_STEPS]]
    brief["failed"] = plan["failed"][:_MOST_BRIEF_STEPS]
    return brief


def _brief(context: dict[str, Any]) -> dict[str, Json]:
    brief = {name: context[name] for name in _ERROR_KEYS if context.get(name) is not None}
    for name in brief:
        _cut(brief, name, _MESSAGE_CHARACTERS)
    return brief
