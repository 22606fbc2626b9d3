"""What is shown of a run, folded from its events; and the exit code that its end gives."""

from __future__ import annotations

from typing import Any

import pytest

from vespera_exec.cli.state import Shown, ending, eta_text, exit_code, usage_text


def changed(new: str, session: str | None = "s1", **details: Any) -> dict[str, Any]:
    return {"type": "status_change", "execution_id": session, "status": {"old": None, "new": new}, "details": details}


def progress(percentage: float, message: str, session: str = "s1") -> dict[str, Any]:
    return {
        "type": "progress_update",
        "execution_id": session,
        "message": message,
        "progress": {"percentage": percentage},
    }


def test_events_fold_to_status_phase_percentage_and_message() -> None:
    state = Shown("A title")
    state.take_event(changed("running"))
    state.take_event({"type": "phase_change", "execution_id": "s1", "phase": "execution"})
    state.take_event(progress(42.5, "Reading\x1b files"))
    assert state.line() == "running · execution · 42 % · Reading\\x1b files"
    assert state.sessions == ["s1"]


def test_a_task_that_changes_its_own_status_does_not_change_the_runs() -> None:
    state = Shown("A title", status="running")
    state.take_event(changed("done", session=None))
    assert state.status == "running"


def test_a_retry_starts_from_nothing() -> None:
    state = Shown("A title")
    state.take_event(progress(80, "nearly"))
    state.take_event(changed("failed", outcome={"error": {"message": "broke", "code": "X"}}, clock={"active": 2.0}))
    state.take_event(changed("pending", session="s2"))
    assert (state.sessions, state.percentage, state.outcome) == (["s1", "s2"], None, {})


def test_a_late_status_does_not_undo_what_the_end_said() -> None:
    state = Shown("A title")
    state.take_event(changed("completed", outcome={"returncode": 0}, clock={"active": 3.0}))
    timing = {"elapsed_seconds": 1.0, "eta": {"remaining_seconds": 9.0, "low_seconds": 1.0, "high_seconds": 20.0}}
    state.take_measures({"session": {"time_tracking": timing}})
    assert (state.status, state.percentage, state.elapsed, state.eta) == ("completed", 100.0, 3.0, "")


@pytest.mark.parametrize(
    ("status", "outcome", "code"),
    [
        ("completed", {}, 0),
        ("completed", {"returncode": 0}, 0),
        ("failed", {"returncode": 3}, 3),
        ("failed", {"returncode": -9}, 137),
        ("failed", {"returncode": 125}, 125),
        ("failed", {"returncode": 256}, 1),
        ("failed", {}, 1),
        ("failed", {"error": {"code": "PROGRAM_NOT_FOUND"}}, 127),
        ("failed", {"error": {"code": "NOT_EXECUTABLE"}}, 126),
        ("cancelled", {"returncode": -15}, 130),
        ("timed_out", {"returncode": -9}, 124),
    ],
)
def test_run_exits_as_a_shell_would(status: str, outcome: dict[str, Any], code: int) -> None:
    assert exit_code(status, outcome) == code


def test_the_end_is_told_in_one_line() -> None:
    failed = {"error": {"message": "two\nlines", "code": "EXIT_NONZERO"}}
    assert ending(Shown("t", status="failed", elapsed_at_end=3.1, outcome=failed)) == (
        "failed after 3.1 s: two\\nlines (EXIT_NONZERO)"
    )
    assert ending(Shown("t", status="cancelled", elapsed_at_end=1.0, outcome={"rung": "sigterm"})) == (
        "cancelled after 1.0 s, ended by sigterm"
    )
    assert ending(Shown("t", status="timed_out", elapsed_at_end=1.0)) == "timed out after 1.0 s"


def test_an_eta_is_an_interval_and_says_when_it_is_a_guess() -> None:
    eta = {"remaining_seconds": 12.2, "low_seconds": 5.0, "high_seconds": 90.0, "label": "uncalibrated"}
    assert eta_text(eta) == "12 s (5.0 s to 1 min 30 s)"
    assert eta_text(eta, label=True).endswith(", uncalibrated")
    assert eta_text(None) == ""


def test_usage_shows_what_was_measured_and_nothing_else() -> None:
    assert usage_text({"cpu_usage": {"current": 98.4}, "memory_rss": {"current": 45.2}}) == "cpu 98 %, 45 MB"
    assert usage_text(None) == ""
