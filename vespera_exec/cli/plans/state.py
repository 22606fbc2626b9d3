"""What is shown of a plan that is followed: folded from the events of its execution and of its steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from vespera_exec.cli.state import ENDED, Shown
from vespera_exec.cli.text import percent, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.model.events import Json

STEP_ENDED: Final = frozenset({"completed", "failed", "skipped", "cancelled"})
_WAITS: Final = {
    "answer": "waits for an answer",
    "capacity": "waits for capacity",
    "slot": "waits for a slot",
    "worker": "waits for a worker",
    "backoff": "is tried again",
    "pause": "is paused",
}
_WAITING: Final = "Waiting for "
_SAYS_NO_MORE: Final = ("Queued", "Its plan is paused")
_ORDER: Final = {"waiting": 1, "running": 2, "pending": 3, "failed": 4}
_ANSWER_FIRST: Final = 0


@dataclass(slots=True)
class StepShown:
    """One step, as far as it is known."""

    id: str
    status: str = "pending"
    percentage: float | None = None
    message: str = ""
    waiting_for: str | None = None

    @property
    def says(self) -> str:
        """What is worth saying beside its bar."""
        return self.message or waiting(self.waiting_for)


@dataclass(slots=True)
class PlanShown(Shown):
    """A run of a plan with `total` steps. `steps` holds those that have begun or ended, by id.

    `news` are lines for a log, one per event of a step: how many have ended by then, which one, what of it. Whoever
    shows them clears them.
    """

    total: int = 0
    steps: dict[str, StepShown] = field(default_factory=dict[str, StepShown])
    counts: Counter[str] = field(default_factory=Counter[str])
    news: list[str] = field(default_factory=list[str])
    _live: dict[str, StepShown] = field(default_factory=dict[str, StepShown])

    @property
    def done(self) -> int:
        return sum(self.counts[each] for each in STEP_ENDED)

    @property
    def notable(self) -> list[StepShown]:
        """The steps that wait, run, are to be tried again or have failed; first those that wait for an answer."""
        return sorted(self._live.values(), key=_rank)

    def take_event(self, event: Mapping[str, Json]) -> None:
        if event.get("execution_id") not in (None, *self.sessions):
            self.steps, self._live, self.counts = {}, {}, Counter()
        Shown.take_event(self, event)
        details: Mapping[str, Json] = event.get("details") or {}
        if event.get("type") == "variables_changed":
            self.total = int(details.get("steps") or self.total)
        elif str(event.get("type")).startswith("step_") and event.get("step_id"):
            self._take_step(str(event["type"]), str(event["step_id"]), str(event.get("message") or ""), details)

    def take_steps(self, steps: Sequence[Mapping[str, Json]]) -> None:
        """Where steps stand, as the daemon lists them; for a start."""
        for each in steps:
            step = self.steps.setdefault(str(each["id"]), StepShown(str(each["id"]), status=""))
            step.percentage, step.message = each["percentage"], str(each["message"] or "")
            step.waiting_for = each["waiting_for"]
            self._moved(step, str(each["status"]))

    def take_measures(self, view: Mapping[str, Json]) -> None:
        Shown.take_measures(self, view)
        session: Mapping[str, Json] | None = view.get("session")
        if session is not None and self.status not in ENDED:
            self.percentage = session["overall_progress"]["percentage"]

    def summary(self) -> str:
        """`3/10 steps · 1 failed · 2 skipped`."""
        parts = [f"{self.done}/{self.total} steps"]
        parts += [f"{self.counts[each]} {each}" for each in ("failed", "skipped", "cancelled") if self.counts[each]]
        return " · ".join(parts)

    def line(self) -> str:
        return " · ".join(part for part in (self.status, self.summary(), percent(self.percentage)) if part)

    def _take_step(self, event: str, step_id: str, message: str, details: Mapping[str, Json]) -> None:
        step = self.steps.setdefault(step_id, StepShown(step_id, status=""))
        if not step.status:
            self._moved(step, "pending")
        said = ""
        match event:
            case "step_started":
                step.percentage, step.message, step.waiting_for = 0.0, message, None
                self._moved(step, "running")
                said = _started(details)
            case "step_progress":
                step.percentage, step.message = details.get("percentage"), message
            case "step_waiting":
                step.waiting_for, step.message = details.get("for"), message
                self._moved(step, "waiting" if step.waiting_for else "running")
                said = standing(step.waiting_for, step.message) or "goes on"
            case "step_completed":
                self._moved(step, "completed")
                said = "completed (from the cache)" if details.get("cached") else "completed"
            case "step_failed":
                self._failed(step, details)
                again = " and is tried again" if step.status == "pending" else ""
                said = _joined(f"failed{again}", failure(details.get("error")))
            case "step_skipped" | "step_cancelled":
                self._moved(step, event.removeprefix("step_"))
                said = _joined(step.status, str(details.get("reason") or message))
            case "step_reset":
                state: Mapping[str, Json] = details.get("state") or {}
                step.percentage, step.waiting_for = state.get("percentage"), state.get("waiting_for")
                self._moved(step, str(state.get("status") or "pending"))
                said = f"put back: {step.status}"
            case _:
                pass
        if said:
            self.news.append(f"{self.done}/{self.total} {shown(step_id, 64)} {said}")

    def _failed(self, step: StepShown, details: Mapping[str, Json]) -> None:
        step.message = failure(details.get("error"))
        step.waiting_for = "backoff" if details.get("not_before") else None
        if details.get("final", True):
            self._moved(step, "failed")
        else:
            step.percentage = None
            self._moved(step, "pending")

    def _moved(self, step: StepShown, status: str) -> None:
        if step.status:
            self.counts[step.status] -= 1
        step.status = status
        self.counts[status] += 1
        # A step that is pending is of interest only once it has failed.
        if status in ("running", "waiting", "failed") or (status == "pending" and step.message):
            self._live[step.id] = step
        else:
            self._live.pop(step.id, None)


def waiting(what: str | None) -> str:
    """What a step waits for, in words; empty where it does not wait."""
    return "" if what is None else _WAITS.get(what, f"waits for {shown(what, 60)}")


def standing(what: str | None, message: str) -> str:
    """What a step waits for with all that its message adds; what is asked is said by whoever shows the question."""
    if what in (None, "answer") or message in _SAYS_NO_MORE:
        return waiting(what)
    if message.startswith(_WAITING):
        return f"waits for {shown(message.removeprefix(_WAITING), 300)}"
    return _joined(waiting(what), message)


def failure(error: Mapping[str, Json] | None) -> str:
    """`pytest exited with code 1 (EXIT_NONZERO)`."""
    if not error:
        return ""
    return f"{shown(error.get('message'), 300)} ({shown(error.get('code'), 60)})"


def _started(details: Mapping[str, Json]) -> str:
    role = shown(details.get("role") or "", 64)
    attempt = f", attempt {details['attempt']}" if int(details.get("attempt") or 1) > 1 else ""
    fallback = ", the fallback" if details.get("is_fallback") else ""
    return f"started ({role}{attempt}{fallback})"


def _joined(what: str, why: str) -> str:
    return f"{what}: {shown(why, 300)}" if why else what


def _rank(step: StepShown) -> int:
    return _ANSWER_FIRST if step.waiting_for == "answer" else _ORDER.get(step.status, 9)
