"""The board of a plan: where its steps stand, decided and recorded through the session that executes it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, ValuesView
from typing import TYPE_CHECKING, Final

from vespera_exec.errors import ExecutionError, InvalidProgress, InvalidTransitionError, NotFound
from vespera_exec.model.enums import EventType, MessageLevel, StepStatus
from vespera_exec.model.jsonable import clean_text, exact_json
from vespera_exec.model.ledger import Cell, CheckpointRecord, Part
from vespera_exec.model.plans.steps import PlanState, StepState
from vespera_exec.model.rows import iso
from vespera_exec.model.values import copier

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from vespera_exec.model.events import Json
    from vespera_exec.model.plans.plan import ExecutionPlan
    from vespera_exec.model.session import ExecutionSession

MAX_MESSAGE: Final = 2000
"""Characters of an error's message or a reason that are kept."""

_WHOLE: Final = 2**52
_NOT_ALL: Final = 99.999999
_PENDING: Final = (StepStatus.PENDING,)
_AT_WORK: Final = (StepStatus.RUNNING, StepStatus.WAITING)
_OPEN: Final = (*_PENDING, *_AT_WORK)


class PlanBoard:
    """What is decided about the steps of one execution of a plan, and where they stand.

    Every change is an event of the execution, whole or not at all, and costs the same however many steps there are.
    Thread-safe. Each method that changes something

    Raises:
        NotFound: the plan has no such step.
        InvalidTransitionError: the step cannot go there from where it stands, or the execution has ended. Nothing has
            changed.
    """

    def __init__(self, session: ExecutionSession, plan: ExecutionPlan) -> None:
        self.plan = plan
        self.session = session
        self._ledger = session.ledger
        execution = session.execution_id
        self._state = Part(PlanState(execution_id=execution))
        first = StepState(execution_id=execution, step_id="", position=0)
        self._steps = {
            step.id: Part(_copy(first, step_id=step.id, position=position)) for position, step in enumerate(plan.steps)
        }
        self.states: Mapping[str, StepState] = _States(self._steps)
        """Of every step, in the order of the plan, as they stand when they are looked at."""
        self._shares = _shares(plan)
        self._whole = sum(self._shares.values())
        self._done = Cell(0)
        self._last_checkpoint: Cell[str | None] = Cell(None)
        self._counts = {status: Cell(0) for status in StepStatus}
        self._counts[StepStatus.PENDING].value = len(self._steps)

    @classmethod
    def restored(
        cls, session: ExecutionSession, plan: ExecutionPlan, states: Iterable[StepState], state: PlanState
    ) -> PlanBoard:
        """The board that these stored values describe; a step without one is PENDING. Records nothing."""
        board = cls(session, plan)
        board._state.value = state
        for each in states:
            if (part := board._steps.get(each.step_id)) is not None:
                part.value = each
        for cell in board._counts.values():
            cell.value = 0
        for step, part in board._steps.items():
            board._counts[part.value.status].value += 1
            board._done.value += board._share(step, part.value)
        return board

    # what there is

    @property
    def state(self) -> PlanState:
        return self._state.value

    @property
    def last_checkpoint(self) -> str | None:
        """The newest; None where none has been made since the board was opened, or restored."""
        return self._last_checkpoint.value

    def step(self, step_id: str) -> StepState:
        return self._part(step_id).value

    @property
    def counts(self) -> Mapping[StepStatus, int]:
        """How many steps have each status, those with none included."""
        with self._ledger:
            return {status: cell.value for status, cell in self._counts.items()}

    @property
    def percentage(self) -> float:
        """The mean over the steps by their weight, 0 to 100; a step that has ended counts in full, however it ended.

        Steps of weight 0 are left out; where all are, each counts the same. It goes back where a step begins again.
        """
        done = self._done.value
        return 100.0 if done >= self._whole else min(round(100 * done / self._whole, 6), _NOT_ALL)

    # the whole

    def open(
        self,
        *,
        states: Mapping[str, StepState] | None = None,
        variables: Mapping[str, Json] | None = None,
        restored_from: str | None = None,
    ) -> None:
        """Begin: with the variables of the plan, or these; with its steps PENDING, or where `states` says.

        Every step leaves a row. `restored_from` is the checkpoint that the states are of.

        Raises:
            InvalidInput: the variables are not JSON.
        """
        plan = self.plan
        details: dict[str, Json] = {"plan_id": plan.id, "name": plan.name, "steps": len(plan.steps)}
        with self._ledger:
            self._change_variables(plan.variables if variables is None else variables, restored_from, details)
            for step_id, part in self._steps.items():
                if states is None or step_id not in states or not self._put(step_id, states[step_id]):
                    self._ledger.keep(part.value)

    def set_variables(self, variables: Mapping[str, Json]) -> None:
        """Replace them all; without an event where they are the same.

        Raises:
            InvalidInput: they are not JSON.
        """
        with self._ledger:
            if variables != self._state.value.variables:
                self._change_variables(variables, None, {})

    def going_back(self, checkpoint_id: str, *, variables: Mapping[str, Json], keeps_recoveries: bool) -> None:
        """Announce a `reset`, before anything is ended for it: where the owner dies first, the next one does it.

        Raises:
            InvalidInput: the variables are not JSON.
        """
        back: dict[str, Json] = {"checkpoint_id": checkpoint_id, "keeps_recoveries": keeps_recoveries}
        back["variables"] = exact_json(variables, "the variables")
        self._change_variables(self._state.value.variables, None, {"restoring": back})

    def go_back(self, states: Mapping[str, StepState]) -> None:
        """A part of a `reset` that was announced: these steps stand where `states` say, the others where they stood."""
        with self._ledger:
            for step_id, state in states.items():
                self._put(step_id, state)

    def reset(self, states: Mapping[str, StepState], variables: Mapping[str, Json], *, checkpoint_id: str) -> None:
        """Go back to what a checkpoint holds; steps that are not in `states` become PENDING, as if never begun."""
        with self._ledger:
            self._change_variables(variables, checkpoint_id, {})
            for step_id, part in self._steps.items():
                now = part.value
                fresh = StepState(execution_id=now.execution_id, step_id=step_id, position=now.position)
                self._put(step_id, states.get(step_id, fresh))

    def checkpoint(
        self, kind: str, *, metadata: Mapping[str, Json] | None = None, step: str | None = None
    ) -> CheckpointRecord:
        """Mark this place in the log as one to go back to: all that was recorded before it, and nothing after.

        `kind` is "call", "interval" or "step".
        """
        with self._ledger:
            completed = self._counts[StepStatus.COMPLETED].value
            made = self.session.mark_checkpoint(kind, metadata=metadata, step=step, completed_steps=completed)
            self._ledger.put(self._last_checkpoint, made.checkpoint_id)
            return made

    # one step

    def started(
        self,
        step_id: str,
        *,
        role: str,
        attempt: int,
        task_id: str | None = None,
        run_id: str | None = None,
        is_fallback: bool = False,
        message: str = "",
    ) -> None:
        """PENDING to RUNNING, as the run `attempt` of the step."""
        told: dict[str, Json] = {"role": role, "attempt": attempt, "task_id": task_id, "run_id": run_id}
        if is_fallback:
            told["is_fallback"] = True
        self._change(step_id, EventType.STEP_STARTED, _PENDING, "running", told, message)

    def progress(self, step_id: str, percentage: float, message: str = "") -> None:
        """How far its run is; without an event where nothing is new.

        Raises:
            InvalidProgress: not a number from 0 to 100.
        """
        if not math.isfinite(percentage) or not 0 <= percentage <= 100:
            raise InvalidProgress(f"the percentage of step {step_id} is a number from 0 to 100, not {percentage}")
        with self._ledger:
            now = self.step(step_id)
            if (now.percentage, now.message) != (percentage, message) or now.status not in _AT_WORK:
                told = {"percentage": percentage}
                self._change(step_id, EventType.STEP_PROGRESS, _AT_WORK, "progress", told, message)

    def waiting(self, step_id: str, what: str | None, message: str = "") -> None:
        """To WAITING for "answer", "capacity", "slot" or "worker"; None: back to RUNNING.

        The same again, with the same message, is no event; nor is None where it does not wait.
        """
        with self._ledger:
            now = self.step(step_id)
            same = now.waiting_for == what and (what is None or now.message == message)
            if not same or now.status not in _AT_WORK:
                new = "waiting" if what else "running"
                self._change(step_id, EventType.STEP_WAITING, _AT_WORK, new, {"for": what}, message)

    def completed(
        self,
        step_id: str,
        *,
        session_id: str | None = None,
        result_of: str | None = None,
        cached: bool = False,
        message: str = "",
    ) -> None:
        """To COMPLETED; `cached`: from PENDING, with the result of an earlier execution."""
        told: dict[str, Json] = {"session_id": session_id, "result_of": result_of}
        if cached:
            told["cached"] = True
        with self._ledger:
            allowed = _OPEN if cached else _AT_WORK
            self._change(step_id, EventType.STEP_COMPLETED, allowed, "completed", told, message)
            self._step_checkpoint(step_id)

    def failed(
        self,
        step_id: str,
        error: Mapping[str, Json],
        *,
        session_id: str | None = None,
        final: bool = True,
        continues: bool = False,
        ends_plan: bool = False,
        not_before: datetime | None = None,
        is_fallback: bool | None = None,
        recoveries: int | None = None,
    ) -> None:
        """A run of it has failed, or could not begin. Of `error` the "code" and the "message" are kept.

        `final`: to FAILED; `continues` lets on what depends on it, `ends_plan` keeps the rest of the plan from going
        on. Else back to PENDING, to be tried again from `not_before` on, by the fallback where `is_fallback`;
        `recoveries` counts those that a strategy asked for.
        """
        message = _cut(str(error.get("message") or ""))
        kept: dict[str, Json] = {"code": str(error.get("code") or ExecutionError.code), "message": message}
        told: dict[str, Json] = {"error": kept, "session_id": session_id, "final": final}
        if continues:
            told["continues"] = True
        if ends_plan:
            told["ends_plan"] = True
        if not_before is not None:
            told["not_before"] = iso(not_before)
        if is_fallback is not None:
            told["is_fallback"] = is_fallback
        if recoveries is not None:
            told["recoveries"] = recoveries
        with self._ledger:
            level = MessageLevel.ERROR if final else MessageLevel.WARNING
            new = "failed" if final else "pending"
            self._change(step_id, EventType.STEP_FAILED, _OPEN, new, told, message, level=level)
            if final:
                self._step_checkpoint(step_id)

    def skipped(self, step_id: str, reason: str, *, continues: bool = False) -> None:
        """To SKIPPED: it is not done, or what it did does not count. `continues` lets on what depends on it."""
        told: dict[str, Json] = {"reason": _cut(reason)}
        if continues:
            told["continues"] = True
        with self._ledger:
            self._change(step_id, EventType.STEP_SKIPPED, _OPEN, "skipped", told, told["reason"])

    def cancelled(self, step_id: str, reason: str) -> None:
        """To CANCELLED, once nothing of it runs any more."""
        text = _cut(reason)
        self._change(step_id, EventType.STEP_CANCELLED, _OPEN, "cancelled", {"reason": text}, text)

    # inside

    def _part(self, step_id: str) -> Part[StepState]:
        part = self._steps.get(step_id)
        if part is None:
            raise NotFound(f"The plan has no step {step_id[:80]!r}", hint="its steps are listed with its status")
        return part

    def _change(
        self,
        step_id: str,
        kind: EventType,
        allowed: tuple[StepStatus, ...],
        new: str,
        told: dict[str, Json],
        message: str,
        *,
        level: MessageLevel | None = None,
    ) -> None:
        with self._ledger:
            status = self._part(step_id).value.status
            if status not in allowed:
                after = () if status.is_terminal else tuple(each.value for each in _AFTER[status])
                raise InvalidTransitionError(f"{status.value} (step {step_id})", new, after)
            self._record(step_id, kind, told, message, level=level)

    def _record(
        self, step_id: str, kind: EventType, told: dict[str, Json], message: str, *, level: MessageLevel | None = None
    ) -> None:
        part = self._steps[step_id]
        before = part.value
        self.session.record_fact(kind, (part,), step_id=step_id, message=message, details=told, level=level)
        after = part.value
        if after.status is not before.status:
            for status, change in ((before.status, -1), (after.status, 1)):
                self._ledger.put(self._counts[status], self._counts[status].value + change)
        if moved := self._share(step_id, after) - self._share(step_id, before):
            self._ledger.put(self._done, self._done.value + moved)

    def _put(self, step_id: str, wanted: StepState) -> bool:
        """Make the step stand where `wanted` says; whether that needed an event."""
        now = self._steps[step_id].value
        ids: dict[str, Json] = {"execution_id": now.execution_id, "step_id": step_id, "position": now.position}
        if _copy(wanted, **ids, sequence=now.sequence) == now:
            return False
        self._record(step_id, EventType.STEP_RESET, {"state": wanted.to_dict() | ids}, "")
        return True

    def _change_variables(
        self, variables: Mapping[str, Json], restored_from: str | None, details: dict[str, Json]
    ) -> None:
        told = details | {"variables": exact_json(variables, "the variables")}
        if restored_from is not None:
            told["restored_from"] = restored_from
        self.session.record_fact(EventType.VARIABLES_CHANGED, (self._state,), details=told)

    def _step_checkpoint(self, step_id: str) -> None:
        if self.plan.step_checkpoints:
            self.checkpoint("step", step=step_id)

    def _share(self, step_id: str, state: StepState) -> int:
        share = self._shares[step_id]
        if state.status.is_terminal:
            return share
        return round(share * state.percentage / 100) if state.percentage else 0


class _States(Mapping[str, StepState]):
    __slots__ = ("_parts",)

    def __init__(self, parts: Mapping[str, Part[StepState]]) -> None:
        self._parts = parts

    def __getitem__(self, step_id: str) -> StepState:
        return self._parts[step_id].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def values(self) -> ValuesView[StepState]:
        return _Values(self, self._parts)


class _Values(ValuesView[StepState]):
    """Those of a large plan are gone through at every look at it: without a look-up for each."""

    __slots__ = ("_parts",)

    def __init__(self, states: _States, parts: Mapping[str, Part[StepState]]) -> None:
        super().__init__(states)
        self._parts = parts

    def __iter__(self) -> Iterator[StepState]:
        return (part.value for part in self._parts.values())


_AFTER: Final[Mapping[StepStatus, tuple[StepStatus, ...]]] = {
    StepStatus.PENDING: (StepStatus.RUNNING, StepStatus.FAILED, StepStatus.SKIPPED, StepStatus.CANCELLED),
    StepStatus.RUNNING: (StepStatus.WAITING, *(each for each in StepStatus if each.is_terminal)),
    StepStatus.WAITING: (StepStatus.RUNNING, *(each for each in StepStatus if each.is_terminal)),
}


_copy = copier(StepState)


def _shares(plan: ExecutionPlan) -> dict[str, int]:
    """What each step is of the whole, in whole numbers: sums of these are exact, in any order and both ways."""
    weights = {step.id: step.weight for step in plan.steps}
    total = math.fsum(weights.values())
    if not total:
        return dict.fromkeys(weights, _WHOLE // len(weights))
    return {step: max(1, round(weight / total * _WHOLE)) if weight else 0 for step, weight in weights.items()}


def _cut(text: str) -> str:
    return clean_text(text) if len(text) <= MAX_MESSAGE else clean_text(text[: MAX_MESSAGE - 1]) + "…"
