"""Real work for a runner: a real session, a real launcher, a scratch folder."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from deadlines import WITHIN

from vespera_exec.engine.pausing import Gate
from vespera_exec.engine.processes import ProcessLauncher
from vespera_exec.engine.tracking import SessionTracking
from vespera_exec.engine.work import Work
from vespera_exec.model.cancellation import CancellationToken
from vespera_exec.model.enums import EventType, ExecutionPhase
from vespera_exec.model.principal import Caller, allowed_env
from vespera_exec.model.task import Task

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vespera_exec.model.events import ExecutionEvent
    from vespera_exec.model.session import ExecutionSession


def _env() -> dict[str, str]:
    """What a local caller hands over, and what lets a child's lines be counted."""
    counting = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    return allowed_env(os.environ) | counting


@dataclass
class Bench:
    work: Work
    session: ExecutionSession
    launcher: ProcessLauncher

    @property
    def percentages(self) -> list[float]:
        """The work's own progress, as the log has it."""
        return [
            event.details["phase_progress"]["percentage"]
            for event in self.session.status_events
            if event.event_type is EventType.PROGRESS_UPDATE and "phase_progress" in event.details
        ]

    async def first_progress(self) -> None:
        """When the work has reported for the first time."""
        heard = anyio.Event()

        async def tell(event: ExecutionEvent) -> None:
            if "phase_progress" in event.details:
                heard.set()

        subscription = self.session.add_event_callback(tell)
        try:
            with anyio.fail_after(WITHIN):
                if not self.percentages:
                    await heard.wait()
        finally:
            subscription.unsubscribe()

    @property
    def phases(self) -> list[ExecutionPhase | None]:
        return [event.phase for event in self.session.status_events if event.event_type is EventType.PHASE_CHANGE]

    def messages(self, kind: EventType) -> list[str]:
        return [event.message for event in self.session.status_events if event.event_type is kind]


@asynccontextmanager
async def bench(
    tmp_path: Path, inputs: dict[str, Any] | None = None, *, caller: Caller | None = None, **fields: Any
) -> AsyncGenerator[Bench]:
    """`scratch` exists already, as setup leaves it."""
    task = Task(title="a title", description="a description", inputs=inputs or {})
    session = task.start_execution("bench")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    async with ProcessLauncher(execution_id=session.session_id) as launcher:
        work = Work(
            task_id=task.id,
            execution_id=session.session_id,
            title=task.title,
            description=task.description,
            inputs=task.inputs,
            token=session.cancellation_token or CancellationToken(),
            tracking=SessionTracking(session),
            gate=Gate(lambda: None),
            launcher=launcher,
            scratch=scratch,
            caller=caller or Caller(cwd=str(tmp_path), env=_env()),
            **fields,
        )
        yield Bench(work, session, launcher)
