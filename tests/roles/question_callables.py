"""Callables that ask: a child process imports them by name, and some are run in the loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roles.context import Context

NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def asks_one(context: Context) -> Any:
    context.checkpoint("before")
    answer = context.ask("number", "Which number?", schema=NUMBER)
    return {"accepted": answer.accepted, "content": answer.content}


def asks_together(context: Context) -> Any:
    answers = context.ask_all({"a": ("A?", None), "b": ("B?", NUMBER)})
    return {name: each.action for name, each in answers.items()}


def wants_approval(context: Context) -> str:
    context.approve("deploy", "Deploy it?")
    return "deployed"


def catches_all_exceptions(context: Context) -> str:
    try:
        context.ask("number", "Which number?")
    except Exception:  # noqa: BLE001 - as careless callables do
        context.log("it went on without an answer")
    return "swallowed"


def asks_in_a_thread(context: Context) -> str:
    def ask() -> None:
        with contextlib.suppress(BaseException):
            context.ask("number", "Which number?")

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return "the thread asked"


def asks_what_is_no_question(context: Context) -> None:
    context.ask("a b", "?")


def asks_with_a_form_that_is_none(context: Context) -> None:
    context.ask("a", "?", schema={"type": "object", "properties": {"x": {"type": "object"}}})


def asks_and_fails(context: Context) -> None:
    try:
        context.ask("number", "Which number?")
    finally:
        raise ValueError("while it was leaving")


async def asks_async(context: Context) -> Any:
    return context.ask("number", "Which number?").content


async def asks_in_a_group(context: Context) -> Any:
    async def one(name: str) -> None:
        await asyncio.sleep(0)
        context.ask(name, f"{name}?")

    async with asyncio.TaskGroup() as group:
        group.create_task(one("a"))
        group.create_task(one("b"))
    return "both"
