"""What a worker says in one call, as it stands in the log afterwards."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from deadlines import WITHIN
from worker_calls import Defining, Opening, claimed, conclude, events, report, started

from vespera_exec.app import checks
from vespera_exec.errors import InvalidInput


async def test_each_thing_that_a_report_says_is_in_the_log_cleaned(opening: Opening, define: Defining) -> None:
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera)
        said: dict[str, Any] = {
            "done": 3,
            "total": 12,
            "unit": "fi\x1bles",
            "phase": "read",
            "message": "a\x07b",
            "metrics": {"errors": 2},
            "log": "one\x1bline",
            "level": "warning",
            "checkpoint": {"at": 3},
        }
        assert (await report(vespera, claim, **said)).ok
        told = {event["type"]: event for event in await events(vespera, handle)}
        (work,) = [
            event
            for event in await events(vespera, handle)
            if event["type"] == "progress_update" and event["message"] == "read: a\ufffdb"
        ]
        measured = work["details"]["phase_progress"]
        assert (measured["current"], measured["total"], measured["unit"]) == (3, 12, "fi\ufffdles")
        assert (measured["type"], measured["details"]) == ("items", {"phase": "read"})
        assert told["warning"]["message"] == "one\ufffdline"
        assert told["checkpoint_created"]["details"]["state"] == {"at": 3}
        of_errors = [event["details"]["custom"]["errors"] for event in await events(vespera, handle) if _custom(event)]
        assert [(each["current"], each["type"], each["unit"]) for each in of_errors] == [(2, "custom", "custom")]


async def test_a_bad_report_among_many_is_named_and_the_others_are_taken(opening: Opening, define: Defining) -> None:
    async with opening() as vespera:
        handle = await started(vespera)
        claim = await claimed(vespera)
        answer = await report(
            vespera, claim, reports=[{"done": 1}, {"done": "x"}, {"done": 3}, {"done": 2}], message="four were said"
        )
        assert [each.index for each in answer.refused] == [1, 3]
        assert "went back" in answer.refused[1].reason
        last = [event for event in await events(vespera, handle) if event["type"] == "progress_update"][-1]
        assert (last["message"], last["details"]["phase_progress"]["current"]) == ("four were said", 3)
        await conclude(vespera, claim)


async def test_a_worker_that_says_nothing_without_end_lets_others_have_their_turn(
    opening: Opening, define: Defining
) -> None:
    async with opening() as vespera, anyio.create_task_group() as group:
        await started(vespera)
        claim = await claimed(vespera)

        async def says_nothing() -> None:
            while True:
                await report(vespera, claim)

        group.start_soon(says_nothing)
        with anyio.fail_after(WITHIN):
            await anyio.sleep(0.01)
        group.cancel_scope.cancel()


@pytest.mark.parametrize("text", ["a\0b", "half \ud800"], ids=["NUL", "half a pair"])
def test_a_text_that_no_log_can_hold_is_refused_wherever_it_stands(text: str) -> None:
    for given in ([text], {"reports": [{"message": text}]}, {"metrics": {text: 1}}):
        with pytest.raises(InvalidInput, match="the arguments: a string has"):
            checks.plain(given, "the arguments")
    checks.plain({"reports": [{"message": "ä\U0001f600"}], "done": 1.5}, "the arguments")


def _custom(event: dict[str, Any]) -> bool:
    return "custom" in (event.get("details") or {})
