"""What the acts of a chaotic round do to a `Vespera`, who answers the questions, and who watches the boards."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import anyio
from chaos_work import Begun, Failing

from roles.context import Context, Unanswered
from roles.definition import Role
from vespera_exec.app.plans.views import ExecutePlan
from vespera_exec.app.views import InputAnswer
from vespera_exec.app.workers.views import Claim, Conclude, Report
from vespera_exec.errors import ExecutionError, LeaseLost, VesperaError
from vespera_exec.model.plans.restoring import BoardReplay
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

    from vespera_exec.app.service import Vespera
    from vespera_exec.app.workers.views import Claimed
    from vespera_exec.model.plans.steps import StepState

Json = dict[str, Any]
Tell = Callable[[Json], None]

ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})
ALL = 1 << 40
"""More events than any execution has."""


def settings(place: Path, **given: Any) -> Settings:
    return Settings.load(
        {"HOME": str(place)},
        data_dir=place / "data",
        roles_dir=place / "roles",
        max_concurrent=5,
        sample_seconds=0.0,
        **given,
    )


def call_role(place: Path) -> Role:
    """The work of `chaos_work` in the loop of the owner."""

    async def call(context: Context) -> str:
        job = dict(context.inputs["job"])
        begun = Begun(place, job, context.execution_id, context.attempt)
        try:
            if job["asks"] and not (context.ask("go", "Go on?").accepted):
                begun.say("declined")
                raise ExecutionError("declined", code="DECLINED", recoverable=False)
            await anyio.sleep(300 if job["acts"] == "hangs" else job["seconds"])
            await context.pause_point()
            begun.check()
            begun.say("end")
        except Unanswered:
            begun.say("ask")
            raise
        except Failing:
            raise ExecutionError("it broke", code="BROKEN") from None
        finally:
            begun.release()
        return job["step"]

    return Role.from_callable(call, in_loop=True, grace_seconds=0.05)


@asynccontextmanager
async def workers(vespera: Vespera, place: Path, number: int = 2) -> AsyncGenerator[None]:
    """They do the steps of role `hand` meanwhile."""
    async with anyio.create_task_group() as group:
        for _ in range(number):
            group.start_soon(_work, vespera, place)
        yield
        group.cancel_scope.cancel()


async def _work(vespera: Vespera, place: Path) -> None:
    """It asks nothing."""
    while True:
        claim = await vespera.workers.claim(ME, Claim(roles=["hand"], wait_ms=1000))
        if not claim.claimed or claim.inputs is None:
            continue
        job = dict(claim.inputs["job"])
        begun = Begun(place, job, claim.session_id or "", claim.attempt or 0)
        try:
            await _concluded(vespera, claim, job, begun)
        except LeaseLost:
            pass  # it was cancelled, or timed out
        finally:
            begun.release()


async def _concluded(vespera: Vespera, claim: Claimed, job: Json, begun: Begun) -> None:
    session, lease = claim.session_id or "", claim.lease or ""
    until = anyio.current_time() + (300 if job["acts"] == "hangs" else job["seconds"])
    state: Literal["working", "paused"] = "working"
    while anyio.current_time() < until or state == "paused":
        heard = await vespera.workers.report(ME, Report(session_id=session, lease=lease, state=state))
        state = "paused" if heard.pause else "working"
        if heard.cancel:
            await vespera.workers.conclude(
                ME, Conclude(session_id=session, lease=lease, success=False, error="cancelled")
            )
            return
        await anyio.sleep(0.01)
    try:
        begun.check()
    except Failing:
        failed = Conclude(session_id=session, lease=lease, success=False, error="it broke", error_code="BROKEN")
        await vespera.workers.conclude(ME, failed)
        return
    begun.say("end")
    await vespera.workers.conclude(ME, Conclude(session_id=session, lease=lease, result=job["step"]))


async def started(vespera: Vespera, plans: list[Json]) -> dict[str, str]:
    """Their tasks by name; one that an earlier owner has accepted is not started again."""
    tasks: dict[str, str] = {}
    for plan in plans:
        request = ExecutePlan(plan=plan, idempotency_key=plan["name"])
        tasks[plan["name"]] = (await vespera.plans.execute(ME, request)).task_id
    return tasks


async def perform(vespera: Vespera, task_id: str, act: Mapping[str, Any]) -> Json:
    """What is answered: `ok`, and the session that it is about."""
    step, reason = str(act["step"]), "By chance"
    match act["do"]:
        case "pause":
            told = await vespera.pause(ME, task_id, reason=reason, wait_ms=500)
        case "resume":
            told = await vespera.resume(ME, task_id, reason=reason)
        case "cancel":
            told = await vespera.cancel(ME, task_id, reason=reason)
        case "cancel_step":
            told = await vespera.plans.cancel_step(task_id, step, ME, reason=reason)
        case "pause_step":
            told = await vespera.plans.pause_step(task_id, step, ME, reason=reason, wait_ms=200)
        case "resume_step":
            told = await vespera.plans.resume_step(task_id, step, ME, reason=reason)
        case "checkpoint":
            made = await vespera.checkpoints.create(ME, task_id)
            return {"ok": True, "session": made.execution_id, "checkpoint": made.checkpoint_id}
        case "restore":
            known = (await vespera.checkpoints.list(ME, task_id)).checkpoints
            if not known:
                return {"ok": False}
            chosen = known[int(act["which"] * len(known))]
            restored = await vespera.checkpoints.restore(ME, chosen.checkpoint_id)
            return {"ok": True, "session": restored.session_id, "checkpoint": restored.checkpoint_id}
        case other:
            raise ValueError(other)
    return {"ok": told.success, "session": told.session_id, "status": told.status}


async def perform_all(vespera: Vespera, tasks: Mapping[str, str], acts: list[Json], tell: Tell) -> None:
    """One after the other; `tell` hears of each before and after. What is refused is told by its code."""
    for act in acts:
        await anyio.sleep(act["after"])
        tell({"sent": act})
        try:
            told = await perform(vespera, tasks[act["plan"]], act)
        except VesperaError as error:
            told = {"ok": False, "code": error.code, "message": error.message}
        tell({"did": act, **told})


async def answer_what_is_asked(vespera: Vespera, chance: Random, *, once: bool = False) -> None:
    while True:
        for waiting in (await vespera.list_inputs(ME, limit=50)).inputs:
            action = "accept" if chance.random() < 0.8 else "decline"
            try:
                await vespera.answer_input(ME, waiting.task_id, {waiting.input.key: InputAnswer(action=action)})
            except VesperaError:
                continue  # it was answered, or has ended, meanwhile
        if once:
            return
        await anyio.sleep(0.03)


async def watch_boards(vespera: Vespera, tell: Tell) -> None:
    """Now and then, whether each board is what its log folds to."""
    engine: Any = vespera._engine  # pyright: ignore[reportPrivateUsage]
    while True:
        for session_id in list(engine._plans):
            if (coordinator := engine.coordinator(session_id)) is not None:
                await _watch(vespera, coordinator.board, session_id, tell)
        await anyio.sleep(0.05)


async def _watch(vespera: Vespera, board: Any, session_id: str, tell: Tell) -> None:
    store = vespera._store  # pyright: ignore[reportPrivateUsage]
    with board.session.ledger:
        states, counts = dict(board.states), dict(board.counts)
        reached, variables = board.session.ledger.sequence(session_id), board.state
    await store.journal.sync()
    replay = BoardReplay(board.plan, session_id)
    replay.feed(await store.queries.events_of(session_id, up_to=reached, limit=ALL))
    if (replay.states, replay.state) != (states, variables):
        differing = {
            each: (_brief(states[each]), _brief(replay.states[each]))
            for each in states
            if states[each] != replay.states[each]
        }
        tell({"bug": "the board is not the fold of its log", "differing": differing})
    if {each: number for each, number in counts.items() if number} != Counter(each.status for each in states.values()):
        tell({"bug": "the counts of the board are wrong", "counts": {str(each): counts[each] for each in counts}})


def _brief(state: StepState) -> str:
    return f"{state.status.value} {state.sequence} {state.message}"


def printed(told: Json) -> None:
    """One write, so that the reader sees a whole line or none."""
    os.write(1, f"{json.dumps(told)}\n".encode())
