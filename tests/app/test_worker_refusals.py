"""What a worker says that cannot be taken: it is told so, briefly, and keeps its task."""

from __future__ import annotations

import pytest
from worker_calls import Defining, Opening, claimed, conclude, report, started

from vespera_exec.errors import InvalidInput


@pytest.mark.parametrize("result", [{"n": 2**70}, [float("inf")]], ids=["a large integer", "infinity"])
async def test_a_result_that_would_not_come_back_is_refused_and_the_work_is_not_lost(
    opening: Opening, define: Defining, result: object
) -> None:
    async with opening() as vespera:
        await started(vespera)
        claim = await claimed(vespera)
        with pytest.raises(InvalidInput, match="the result"):
            await conclude(vespera, claim, result=result)
        concluded = await conclude(vespera, claim, result={"n": str(result)})
        assert (concluded.status, concluded.repeated) == ("completed", False)


async def test_a_batch_of_nonsense_is_answered_in_short(opening: Opening, define: Defining) -> None:
    async with opening() as vespera:
        await started(vespera)
        claim = await claimed(vespera)
        same = {"metrics": {f"m{number}": -1 for number in range(64)}}
        answer = await report(vespera, claim, reports=[same] * 500)
        assert not answer.ok
        assert len(answer.refused) == 51
        assert [each.index for each in answer.refused[:2]] == [0, 1]
        assert (answer.refused[-1].index, answer.refused[-1].reason) == (-1, "and 450 more were refused")
