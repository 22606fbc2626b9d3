"""What is asked and shown of checkpoints."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field

from vespera_exec.app.shapes import Json, Request, View


class NewCheckpoint(Request):
    """A checkpoint to be made of what runs now. `metadata` is kept with it, up to 16 KiB."""

    metadata: dict[str, Json] = Field(default_factory=dict[str, Json])


class CheckpointView(View):
    """A place in the log of an execution that it can go back to."""

    checkpoint_id: str
    task_id: str
    execution_id: str
    kind: str
    """"call": somebody asked for it; "step": at the end of `step`; "interval": at the plan's interval."""
    step: str | None
    sequence: int
    """Of the event in the execution's log after which it lies."""
    created_at: datetime
    completed_steps: int | None
    """Of a plan; null for a task without steps."""
    metadata: dict[str, Json]


class CheckpointList(View):
    """The newest first. `next_before` is the `before` of the next call, null where there are no more."""

    task_id: str
    execution_id: str | None
    checkpoints: list[CheckpointView]
    next_before: str | None = None


class CheckpointState(CheckpointView):
    """A checkpoint with the state that the execution had there: `ExecutionState` as JSON."""

    state: dict[str, Json]


class Restore(Request):
    """`wait_ms`: how long the answer may wait for the end of the run."""

    wait_ms: Annotated[int, Field(ge=0, le=25_000)] = 0


class Restored(View):
    """What went back, or began again. Follow it from `cursor`."""

    task_id: str
    run_id: str
    session_id: str
    """The execution that goes on: the same where `in_place`, else a new one."""
    status: str
    checkpoint_id: str
    in_place: bool
    cursor: int
    done: bool = False
    message: str
