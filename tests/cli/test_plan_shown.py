"""What is shown of a plan: folded from events, drawn as text, moving in a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from cli_harness import Screen

from vespera_exec.cli.plans import drawing as plan_drawing
from vespera_exec.cli.plans.block import MOST_LINES, Block
from vespera_exec.cli.plans.drawing import Drawn
from vespera_exec.cli.plans.pages import step_note
from vespera_exec.cli.plans.state import PlanShown

HOSTILE = 'x\x1b[31m\ny"]; click'


def event(kind: str, step: str | None = None, message: str = "", **details: Any) -> dict[str, Any]:
    return {"type": kind, "execution_id": "s", "step_id": step, "message": message, "details": details}


def plan(total: int = 5) -> PlanShown:
    return PlanShown("t", status="running", total=total, sessions=["s"])


def step(name: str, *needs: str, status: str = "", role: str = "command") -> Drawn:
    return Drawn(id=name, role=role, needs=needs, status=status)


def started(shown: PlanShown, *names: str) -> None:
    for name in names:
        shown.take_event(event("step_started", name, role="command", attempt=1))


def test_each_event_of_a_step_is_one_line_of_news() -> None:
    shown = plan()
    started(shown, "build")
    shown.take_event(event("step_progress", "build", "half way", percentage=50.0))
    shown.take_event(event("step_waiting", "build", "Release it?", **{"for": "answer"}))
    shown.take_event(event("step_waiting", "build"))
    error = {"code": "EXIT_NONZERO", "message": "make exited with code 2"}
    shown.take_event(event("step_failed", "build", error=error, final=False, not_before="2026-01-01T00:00:00Z"))
    shown.take_event(event("step_started", "build", role="spare", attempt=2, is_fallback=True))
    shown.take_event(event("step_failed", "build", error=error))
    shown.take_event(event("step_skipped", "test", reason="needs build, which failed"))
    shown.take_event(event("step_completed", "docs", cached=True))
    shown.take_event(event("step_cancelled", "lint", reason="User requested"))
    assert shown.news == [
        "0/5 build started (command)",
        "0/5 build waits for an answer",
        "0/5 build goes on",
        "0/5 build failed and is tried again: make exited with code 2 (EXIT_NONZERO)",
        "0/5 build started (spare, attempt 2, the fallback)",
        "1/5 build failed: make exited with code 2 (EXIT_NONZERO)",
        "2/5 test skipped: needs build, which failed",
        "3/5 docs completed (from the cache)",
        "4/5 lint cancelled: User requested",
    ]
    assert shown.summary() == "4/5 steps · 1 failed · 1 skipped · 1 cancelled"


@pytest.mark.parametrize(
    ("waits", "message", "said"),
    [
        ("capacity", "Waiting for gpu: 1 of 1 held by train", "waits for gpu: 1 of 1 held by train"),
        ("worker", "Waiting for a worker", "waits for a worker"),
        ("slot", "Queued", "waits for a slot"),
        ("answer", "Waiting for an answer: approval", "waits for an answer"),
        ("pause", "Its plan is paused", "is paused"),
        ("pause", "Lunch", "is paused: Lunch"),
        ("backoff", "Tried again in 5 s", "is tried again: Tried again in 5 s"),
    ],
)
def test_what_a_step_waits_for_is_said_once(waits: str, message: str, said: str) -> None:
    shown = plan()
    started(shown, "a")
    shown.news.clear()
    shown.take_event(event("step_waiting", "a", message, **{"for": waits}))
    assert shown.news == [f"0/5 a {said}"]
    row = {"is_fallback": False, "cached": False, "status": "waiting", "error": None, "reason": None}
    assert step_note(row | {"waiting_for": waits, "message": message}) == said


def test_a_restore_takes_steps_back_and_a_new_execution_begins_with_none() -> None:
    shown = plan()
    started(shown, "a", "b")
    shown.take_event(event("step_completed", "a"))
    shown.take_event(event("step_reset", "a", state={"status": "pending"}))
    assert shown.done == 0
    assert [each.id for each in shown.notable] == ["b"]
    shown.take_event(event("step_started", "a", role="command") | {"execution_id": "s2"})
    assert (shown.counts["running"], shown.sessions) == (1, ["s", "s2"])


def test_what_the_work_says_cannot_reach_the_terminal_as_a_sequence() -> None:
    shown = plan()
    shown.take_event(event("step_started", HOSTILE, HOSTILE, role=HOSTILE))
    shown.take_event(event("step_waiting", HOSTILE, HOSTILE, **{"for": HOSTILE}))
    shown.take_event(event("step_failed", HOSTILE, error={"code": HOSTILE, "message": HOSTILE}))
    shown.take_event(event("step_skipped", HOSTILE, reason=HOSTILE))
    started(shown, HOSTILE)
    drawn = "\n".join([*shown.news, *plan_drawing.as_text([step(HOSTILE, role=HOSTILE)])])
    assert "\x1b" not in drawn
    assert len(drawn.splitlines()) == len(shown.news) + 1
    assert "\x1b[31m" not in "".join(Block(io.StringIO()).render(shown))


def test_the_steps_that_wait_for_an_answer_come_first_and_the_rest_is_counted() -> None:
    shown = plan(60)
    started(shown, *(f"s{number}" for number in range(40)))
    shown.take_event(event("step_failed", "s3", error={"code": "E", "message": "broken"}))
    shown.take_event(event("step_waiting", "s1", "gpu: 1 wanted", **{"for": "capacity"}))
    shown.take_event(event("step_waiting", "s7", "Yes?", **{"for": "answer"}))
    lines = Block(io.StringIO()).render(shown)
    assert len(lines) == MOST_LINES + 2
    assert "s7" in lines[0]
    assert "Yes?" in lines[0]
    assert "gpu: 1 wanted" in lines[1]
    assert "… and 30 more" in lines[MOST_LINES]
    assert "1/60 steps · 1 failed" in lines[-1]


def test_the_block_moves_shrinks_and_leaves_nothing_behind() -> None:
    stream, screen, shown = io.StringIO(), Screen(80), plan()
    block = Block(stream)
    started(shown, "a", "b", "c")
    block.update(shown)
    block.update(shown)
    screen.feed(stream.getvalue())
    assert [line.split()[0] for line in screen.text()[:3]] == ["a", "b", "c"]
    shown.take_event(event("step_completed", "a"))
    shown.take_event(event("step_completed", "b"))
    block.update(shown)
    screen = Screen(80)
    screen.feed(stream.getvalue())
    assert [bool(line) for line in screen.text()] == [True, True, False, False]
    block.close()
    screen = Screen(80)
    screen.feed(stream.getvalue())
    assert "".join(screen.text()) == ""
    assert (screen.row, screen.column) == (0, 0)


def test_levels_follow_what_needs_what_and_not_the_order_of_the_file() -> None:
    steps = [step("last", "left", "right"), step("right", "first"), step("left", "first"), step("first")]
    assert [[each.id for each in level] for level in plan_drawing.levels(steps)] == [
        ["first"], ["right", "left"], ["last"],
    ]  # fmt: skip
    text = plan_drawing.as_text(steps)
    assert text[0].split() == ["1", "first", "command"]
    assert text[-1].endswith("← left, right")
    assert [line.strip() for line in text].count("↓") == 2


def test_a_drawing_that_is_too_large_is_cut_with_a_note() -> None:
    wide = plan_drawing.as_text([step(f"s{number}") for number in range(1000)])
    assert (len(wide), wide[-1].strip()) == (21, "… and 980 more beside them")
    chain = [step("s0"), *(step(f"s{number}", f"s{number - 1}") for number in range(1, 1000))]
    assert plan_drawing.as_text(chain)[-1].strip() == "… and 960 more levels, 960 steps"
    many = [step("root"), *(step(f"s{number}", "root") for number in range(1000))]
    assert plan_drawing.as_mermaid(many)[-1] == "  %% 601 more steps are not drawn"
    assert plan_drawing.as_dot(many)[-2] == "  // 601 more steps are not drawn"
    assert all(len(line) <= 60 for line in plan_drawing.as_text([step("long", role="r" * 200)], width=60))


def test_other_tools_get_labels_that_end_nothing() -> None:
    steps = [step("end", role=HOSTILE), step("graph", "end", status="running")]
    assert plan_drawing.as_mermaid(steps) == [
        "flowchart LR",
        '  s0["end<br/>x#92;x1b#91;31m#92;ny#34;#93;#59; click"]',
        '  s1["graph<br/>command<br/>running"]',
        "  s0 --> s1",
    ]
    assert plan_drawing.as_dot(steps)[3] == '  s0 [label="end\\nx\\\\x1b[31m\\\\ny\\"]; click"];'
