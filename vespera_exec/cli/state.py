"""What is shown of an execution: folded from its events and its status, as both come from the daemon."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vespera_exec.cli.text import duration, percent, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.model.events import Json

ENDED = frozenset({"completed", "failed", "cancelled", "timed_out"})
# As shells say it; what ended because of us is ours.
_EXIT_OF = {"PROGRAM_NOT_FOUND": 127, "NOT_EXECUTABLE": 126, "INTERRUPTED": 125}


@dataclass(slots=True)
class Shown:
    """One run, as far as it is known. `outcome` is filled by its end: returncode, rung, error, peaks."""

    title: str
    status: str = "pending"
    phase: str | None = None
    percentage: float | None = None
    message: str = ""
    eta: str = ""
    usage: str = ""
    sessions: list[str] = field(default_factory=list[str])
    outcome: dict[str, Json] = field(default_factory=dict[str, "Json"])
    began: float = field(default_factory=time.monotonic)
    elapsed_at_pause: float | None = None
    """Its clock stands while this is set."""
    elapsed_at_end: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds at work since it was first seen, or that its last execution took."""
        stands = self.elapsed_at_pause if self.elapsed_at_end is None else self.elapsed_at_end
        return time.monotonic() - self.began if stands is None else stands

    @property
    def error(self) -> dict[str, Json]:
        return self.outcome.get("error") or {}

    def take_event(self, event: Mapping[str, Json]) -> None:
        session = event.get("execution_id")
        if session and session not in self.sessions:
            self.sessions.append(session)
            self.percentage, self.message, self.phase, self.outcome = None, "", None, {}
        match event.get("type"):
            case "status_change" if session:
                self._changed(event)
            case "approval_requested":
                details: Mapping[str, Json] = event.get("details") or {}
                self.message = f"asks: {details.get('message')}"
            case "phase_change":
                self.phase = event.get("phase")
            case "progress_update":
                progress: Mapping[str, Json] = event.get("progress") or {}
                self.percentage = progress.get("percentage", self.percentage)
                self.message = str(event.get("message") or progress.get("message") or self.message)
            case _:
                pass

    def take_status(self, view: Mapping[str, Json]) -> None:
        """All that a status says; for a start, since events that are read later may be older than it."""
        session: Mapping[str, Json] | None = view.get("session")
        if session is None:
            return
        self.status = str(view["status"])
        self.phase = session["current_phase"]
        progress = session["overall_progress"]
        self.percentage, self.message = progress["percentage"], progress["message"]
        self.take_measures(view)

    def take_measures(self, view: Mapping[str, Json]) -> None:
        """Of a status, what no event says: ETA, usage, and time at work."""
        session: Mapping[str, Json] | None = view.get("session")
        if session is None or self.status in ENDED:
            return
        timing = session["time_tracking"]
        self.eta = eta_text(timing.get("eta"))
        self.usage = usage_text(session.get("resource_usage")) or self.usage
        self.began = time.monotonic() - timing["elapsed_seconds"]
        self.elapsed_at_pause = timing["elapsed_seconds"] if self.status == "paused" else None

    def line(self) -> str:
        """One line for a log: status, phase, percent, message."""
        parts = [self.status, self.phase if self.status == "running" else "", percent(self.percentage), self.message]
        return " · ".join(shown(part, 120) for part in parts if part)

    def _changed(self, event: Mapping[str, Json]) -> None:
        change: Mapping[str, Json] = event.get("status") or {}
        self.status = str(change.get("new") or self.status)
        details: Mapping[str, Json] = event.get("details") or {}
        clock: Mapping[str, Json] = details.get("clock") or {}
        if self.elapsed_at_pause is not None:
            self.began, self.elapsed_at_pause = time.monotonic() - self.elapsed_at_pause, None
        if self.status == "paused":
            self.elapsed_at_pause, self.eta = float(clock.get("active", self.elapsed)), ""
        if self.status == "completed":
            self.percentage = 100.0
        if self.status in ENDED:
            self.outcome = dict(details.get("outcome") or {})
            self.eta = ""
            if "active" in clock:
                self.elapsed_at_end = float(clock["active"])


def exit_code(status: str, outcome: Mapping[str, Json]) -> int:
    """What `run` exits with: the work's own status as a shell would give it; 124 timed out, 130 cancelled."""
    returncode = outcome.get("returncode")
    match status:
        case "completed":
            return int(returncode or 0) & 0xFF
        case "cancelled":
            return 130
        case "timed_out":
            return 124
        case _:
            if isinstance(returncode, int) and returncode:
                return 128 - returncode if returncode < 0 else returncode & 0xFF or 1
            error: Mapping[str, Json] = outcome.get("error") or {}
            return _EXIT_OF.get(str(error.get("code")), 1)


def ending(state: Shown) -> str:
    """How it ended, as one line: `failed after 3.1 s: pytest exited with code 1 (EXIT_NONZERO)`."""
    took = duration(state.elapsed)
    match state.status:
        case "completed":
            return f"completed in {took}"
        case "cancelled":
            rung = state.outcome.get("rung")
            return f"cancelled after {took}" + (f", ended by {shown(rung, 40)}" if rung else "")
        case "timed_out" | "failed":
            what = "timed out" if state.status == "timed_out" else "failed"
            error = state.error
            why = f": {shown(error['message'], 500)} ({shown(error.get('code'), 60)})" if error.get("message") else ""
            return f"{what} after {took}{why}"
        case other:
            return other


def eta_text(eta: Mapping[str, Json] | None, *, label: bool = False) -> str:
    """`12 s (5.0 s to 30 s)`; empty where there is none."""
    if not eta:
        return ""
    text = f"{duration(eta['remaining_seconds'])} ({duration(eta['low_seconds'])} to {duration(eta['high_seconds'])})"
    return f"{text}, {shown(eta['label'], 40)}" if label else text


def usage_text(usage: Mapping[str, Mapping[str, Json]] | None) -> str:
    """`cpu 98 %, 45 MB`: current use; empty where nothing was measured."""
    if not usage:
        return ""
    parts: list[str] = []
    if cpu := usage.get("cpu_usage"):
        parts.append(f"cpu {cpu['current']:.0f} %")
    if memory := usage.get("memory_rss"):
        parts.append(f"{memory['current']:.0f} MB")
    return ", ".join(parts)
