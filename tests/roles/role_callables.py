"""Callables that a child process imports by name."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from roles.context import Context


def doubled(context: Context) -> dict[str, Any]:
    context.progress(50, "half way")
    context.steps(9, 10)
    context.checkpoint({"at": 1})
    context.log("a line")
    return {"doubled": context.inputs["number"] * 2, "cwd": os.getcwd(), "scratch": context.scratch}


def with_task(task: Any, context: Context, progress: Any) -> str:
    progress(25, "a quarter")
    return f"{task.title}/{task.description}/{context.attempt}/{context.last_checkpoint}"


def nothing() -> None:
    return None


async def asynchronous(context: Context) -> str:
    await anyio.lowlevel.checkpoint()
    context.items(1, 4, unit="files")
    return "async"


class NetworkTimeout(Exception):
    failure_code = "NETWORK_TIMEOUT"


class Hopeless(Exception):
    failure_code = "HOPELESS"
    recoverable = False


def hopeless(context: Context) -> None:
    raise Hopeless("never again")


def failing(context: Context) -> None:
    raise NetworkTimeout("the other side is silent")


def raising_plainly(context: Context) -> None:
    raise KeyError("missing")


def large(context: Context) -> list[str]:
    return ["ä" * 100] * 20_000


def large_checkpoints(context: Context) -> str:
    context.checkpoint("ä" * 131_071)  # 256 KiB with its quotes
    for _ in range(3):
        context.checkpoint("x" * 600_000)
    return "done"


def large_integer(context: Context) -> dict[str, int]:
    return {"number": 2**64}


def not_json(context: Context) -> object:
    return object()


@dataclass
class Outcome:
    output: Any
    success: bool = True
    error: str | None = None
    error_code: str | None = None
    quality_score: float | None = None


def unsuccessful(context: Context) -> Outcome:
    return Outcome({"seen": 3}, success=False, error="two of three are wrong", error_code="WRONG", quality_score=0.3)


def exits(context: Context) -> None:
    sys.exit(3)


def dies(context: Context) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupts_itself(context: Context) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def waits(context: Context) -> None:
    context.progress(1, "waiting")
    time.sleep(60)


async def waits_async(context: Context) -> None:
    context.progress(1, "waiting")
    try:
        await anyio.sleep(60)
    finally:
        context.checkpoint({"stopped": context.cancelled})


def from_threads(context: Context) -> int:
    threads = [threading.Thread(target=_log_often, args=(context, number)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 4


def _log_often(context: Context, number: int) -> None:
    for turn in range(25):
        context.log(f"{number}:{turn}:" + "x" * 5000)


def imported_from(context: Context) -> dict[str, Any]:
    import json

    import roles

    return {"json": json.__file__, "roles": roles.__file__, "path": sys.path}


def infinite(context: Context) -> str:
    context.progress(float("nan"))
    return "still here"
