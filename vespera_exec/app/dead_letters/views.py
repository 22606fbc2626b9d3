"""What is asked and shown of tasks that have failed and that nobody tries again by itself."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field

from vespera_exec.app.shapes import Json, Request, View

MAX_AT_ONCE = 1000
"""Tasks that one call decides about."""


class DeadLetter(View):
    """A task whose last run failed or took too long, with no attempt to come."""

    task_id: str
    title: str
    role: str | None
    is_plan: bool
    run_id: str
    session_id: str
    """Its last attempt."""
    attempts: int
    """Of its last run."""
    retry_count: int
    """Attempts that failed since it last completed, over all its runs."""
    error: dict[str, Json]
    """`code` and `message` of the last one."""
    ended_at: datetime


class DeadLetterPage(View):
    """Those that failed last come first."""

    dead_letters: list[DeadLetter]
    next_page: str | None
    total: int


class DecideDeadLetters(Request):
    """Which ones: `task_ids`, or `all` that are in the list, of this `role`, those that failed last first."""

    task_ids: list[str] = Field(default_factory=list[str], max_length=MAX_AT_ONCE)
    all: bool = False
    role: str | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_AT_ONCE)] = MAX_AT_ONCE


class Refused(View):
    """Nothing became of it."""

    task_id: str
    error_code: str
    reason: str


class RequeuedTask(View):
    task_id: str
    run_id: str
    session_id: str


class Requeued(View):
    requeued: list[RequeuedTask]
    refused: list[Refused]
    left: int | None
    """With `all`: how many are in the list still."""


class Discarded(View):
    discarded: list[str]
    refused: list[Refused]
    left: int | None
