"""Plans made by chance, and what is done to them by chance: data alone, so that a seed tells a round."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chaos_work import POOLS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

Json = dict[str, Any]

CAPACITY = ",".join(f"{name}={amount}" for name, amount in POOLS.items())
STRATEGIES = ("retry_once", "skip", "fallback", "abort", "restore_last_checkpoint")
ACTS = (
    "pause", "pause", "resume", "resume", "cancel", "cancel_step", "cancel_step", "pause_step", "resume_step",
    "checkpoint", "checkpoint", "restore", "restore",
)  # fmt: skip
_WORK = Path(__file__).with_name("chaos_work.py")


def write_roles(place: Path) -> None:
    """`toil`, `pure` with the same program, whose results may be kept, `hand`, done by workers; what they write to."""
    for folder in ("roles", "locks", "failed"):
        (place / folder).mkdir()
    argv = json.dumps([sys.executable, "-S", str(_WORK), str(place)])
    inputs = "inputs: {job: {type: object, required: true}, got: {type: string}}"
    for name in ("toil", "pure"):
        pure = "pure: true\n" if name == "pure" else ""
        (place / "roles" / f"{name}.yaml").write_text(f"name: {name}\nrunner: process\nargv: {argv}\n{inputs}\n{pure}")
    (place / "roles" / "hand.yaml").write_text(f"name: hand\nrunner: external\nlease_seconds: 0.5\n{inputs}\n")


def plan(chance: Random, name: str, *, roles: Sequence[str] = ("toil", "call", "call", "hand")) -> Json:
    """One of 1 to 12 steps, each of which needs up to three that stand before it."""
    given: Json = {
        "name": name,
        "steps": [step(chance, name, number, roles) for number in range(chance.randint(1, 12))],
        "max_parallel": chance.randint(1, 6),
        "timeout_seconds": chance.choices((0, 1.5), (9, 1))[0],
        "on_failure": chance.choices(("continue", "abort"), (6, 1))[0],
        "step_checkpoints": chance.random() < 0.6,
        "checkpoint_interval_seconds": chance.choice((0, 0.2)),
    }
    chance.shuffle(given["steps"])
    return given


def step(chance: Random, plan: str, number: int, roles: Sequence[str]) -> Json:
    needs = [f"s{each}" for each in chance.sample(range(number), min(number, chance.choice((0, 1, 1, 2, 3))))]
    job: Json = {
        "plan": plan,
        "step": f"s{number}",
        "needs": needs,
        "seconds": chance.choice((0.0, 0.02, 0.1, 0.3)),
        "acts": chance.choices(("works", "fails", "fails_once", "hangs"), (14, 2, 3, 1))[0],
        "asks": chance.random() < 0.1,
        "holds": chance.choices(({}, {"gpu": 1}, {"gpu": 2}, {"cpu": 1, "gpu": 1}, {"cpu": 2}), (6, 1, 1, 1, 1))[0],
        "child": chance.random() < 0.3,
    }
    made: Json = {"id": job["step"], "role": chance.choice(roles), "inputs": {"job": job}}
    if chance.random() < 0.15 and not needs:
        kept: Json = {
            "plan": "any",
            "step": f"pure{chance.randrange(3)}",
            "needs": [],
            "seconds": 0.02,
            "acts": "works",
        }
        return made | {"role": "pure", "inputs": {"job": kept | {"asks": False, "holds": {}, "child": False}}}
    for each in needs[: 1 + (chance.random() < 0.5)]:
        made["inputs"]["got"] = made["inputs"].get("got", "") + f"${{steps.{each}.output?}} "
    made["depends_on"] = needs
    made["capacity"] = job["holds"]
    made["timeout_seconds"] = 0.4 if job["acts"] == "hangs" else 0
    made["wait_timeout_seconds"] = chance.choices((0, 0.6), (9, 1))[0]
    made["on_interrupt"] = chance.choice(("resume", "fail"))
    made["continue_on_failure"] = chance.random() < 0.2
    made["approval"] = chance.random() < 0.08 and made["role"] != "hand"
    if chance.random() < 0.25:
        made["retries"] = {"max_retries": chance.randint(1, 2), "backoff_seconds": chance.choice((0.02, 0.2))}
    if chance.random() < 0.2:
        by = made["role"] if made["approval"] else chance.choice(roles)
        made["fallback"] = {"role": by, "inputs": {"job": job | {"acts": "works"}}}
    if chance.random() < 0.25:
        made["recovery"] = [chance.choice(STRATEGIES)]
    return made


def acts(chance: Random, plans: Sequence[Json], number: int) -> list[Json]:
    """What is done, one after the other; each `after` so many seconds."""
    made: list[Json] = []
    for _ in range(number):
        meant = chance.choice(plans)
        act: Json = {"do": chance.choice(ACTS), "plan": meant["name"], "after": chance.choice((0.0, 0.01, 0.05, 0.2))}
        act["step"] = chance.choice(meant["steps"])["id"]
        act["which"] = chance.random()
        made.append(act)
    return made


def death(chance: Random) -> Json:
    """At `append` decisions it kills itself, before they are handed on or after; else, or where it has not, it is
    killed after `seconds`, which begin with its `opening` or after that. One that `leaves` goes in order."""
    how = chance.choice(("before", "after", "written", "killed", "killed", "opening", "leaves"))
    seconds = {
        "killed": chance.uniform(0.0, 1.2),
        "leaves": chance.uniform(0.0, 1.2),
        "opening": chance.uniform(0.3, 0.9),
    }
    return {"how": how, "append": chance.randint(1, 150), "seconds": seconds.get(how, 1.5)}
