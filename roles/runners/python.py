"""Runs a role's callable: in a child process, or, where an embedding program says so, in this loop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from roles.context import Cancelled, Context, TaskInfo, Unanswered, is_unanswered
from roles.reports import Intake, check_answered, told_answers
from roles.runners import call
from roles.runners.process import environment, exit_warnings, how_it_ended, stop_if_cancelled, working_directory
from vespera_exec.engine.work import ProcessSpec, Work, WorkResult
from vespera_exec.errors import CancellationException, ExecutionError, failure_code_of, failure_context_of
from vespera_exec.model.events import mapping
from vespera_exec.model.jsonable import parsed_json

if TYPE_CHECKING:
    from roles.definition import Role
    from vespera_exec.model.events import Json

HOST: Final = Path(__file__).with_name("host.py")


async def run(role: Role, work: Work) -> WorkResult:
    """What the callable returned, or the error that it raised, by the code that `failure_code_of` gives it.

    Raises:
        CancellationException: it was asked to stop, and did.
        ExecutionError: NOT_IMPORTABLE, a child process could not find the callable; WORKER_DIED, somebody
            else ended or interrupted the child.
    """
    if role.in_loop:
        return await _run_in_loop(role, work)
    return await _run_in_child(role, work)


async def _run_in_child(role: Role, work: Work) -> WorkResult:
    if role.target is None:
        raise ExecutionError(
            f"The callable of role {role.name} cannot be imported by a child process",
            code="NOT_IMPORTABLE",
            recoverable=False,
            hint="define it at the top of a module",
        )
    intake = Intake(work.tracking)
    with intake.flushing():
        process = await work.launcher.launch(
            ProcessSpec(
                argv=(sys.executable, "-P", str(HOST)),
                cwd=working_directory(work),
                env=environment(role, work),
                stdin=_request(role, work),
                on_report=intake.line,
                on_report_dropped=intake.dropped,
                grace_seconds=role.grace_seconds,
            )
        )
        ended = await process.wait()
    stop_if_cancelled(work, ended)
    check_answered(work, intake)
    if intake.cancelled:  # SIGINT from elsewhere: somebody's Ctrl-C, or the callable's own
        raise ExecutionError("The worker process was interrupted, though nobody cancelled it", code="WORKER_DIED")
    warnings = exit_warnings(ended, intake)
    if intake.error is not None:
        return _failed(intake.error, ended.returncode, warnings)
    if intake.result is None:
        code = "NO_RESULT" if ended.returncode == 0 else "WORKER_DIED"
        message = f"the worker process {how_it_ended(ended.returncode)} and left no result"
        return _failed({"code": code, "message": message}, ended.returncode, warnings)
    return _returned(intake.result.value, intake.about, warnings, ended.returncode)


async def _run_in_loop(role: Role, work: Work) -> WorkResult:
    """Whoever cancels the token also cancels the scope that we run in, after the grace."""
    assert role.fn is not None
    intake = Intake(work.tracking)
    context = Context(
        TaskInfo(work.task_id, work.title, work.description, work.inputs),
        emit=lambda message: intake.message(_copied(message)),
        is_cancelled=work.token.is_cancellation_requested,
        scratch=work.scratch,
        scratch_is_made=False,
        execution_id=work.execution_id,
        attempt=work.attempt,
        last_checkpoint=work.checkpoint,
        answers=told_answers(work),
        passed=work.gate.passed,
    )
    try:
        with intake.flushing():
            value = await role.fn(*call.arguments(role.fn, context.task, context, context.progress))
    except Cancelled:
        raise CancellationException(work.token.cancellation_reason) from None
    except (Unanswered, BaseExceptionGroup) as ended:
        if not is_unanswered(ended):
            work.token.throw_if_cancelled()
            if isinstance(ended, ExceptionGroup):
                return _failed_with(cast("ExceptionGroup[Exception]", ended))
            raise
        value = None  # what it asked has been reported
    # The boundary of the callable: whatever it raised is its outcome, and is recorded.
    except Exception as error:
        work.token.throw_if_cancelled()
        if isinstance(error, CancellationException):
            raise
        check_answered(work, intake)
        return _failed_with(error)
    finally:
        context.leave_scratch()
    work.token.throw_if_cancelled()
    check_answered(work, intake)
    if isinstance(value, WorkResult):
        return value
    try:
        return WorkResult(output=_copied(value))
    except (TypeError, ValueError, RecursionError) as error:
        return _failed({"code": "RESULT_NOT_JSON", "message": f"the result is no JSON: {error}"}, None, ())


def _failed_with(error: Exception) -> WorkResult:
    recoverable = getattr(error, "recoverable", True) is not False
    message = str(error) or type(error).__name__
    told: dict[str, Json] = {"code": failure_code_of(error), "message": message, "recoverable": recoverable}
    return _failed(told | {"context": failure_context_of(error)}, None, ())


def _request(role: Role, work: Work) -> bytes:
    request = {
        "target": role.target,
        "python_path": role.python_path,
        "task": {"task_id": work.task_id, "title": work.title, "description": work.description},
        "inputs": dict(work.inputs),
        "checkpoint": work.checkpoint,
        "answers": told_answers(work),
        "scratch": str(work.scratch),
        "execution_id": work.execution_id,
        "attempt": work.attempt,
    }
    return json.dumps(request).encode()


def _failed(error: dict[str, Json], returncode: int | None, warnings: tuple[str, ...]) -> WorkResult:
    output = {"traceback": error["traceback"]} if error.get("traceback") else None
    return WorkResult(
        output=output,
        success=False,
        error=str(error["message"]),
        error_code=str(error["code"]),
        recoverable=error.get("recoverable") is not False,
        error_context=mapping(error.get("context")),
        returncode=returncode,
        warnings=warnings,
    )


def _returned(value: Json, about: dict[str, Json], warnings: tuple[str, ...], returncode: int) -> WorkResult:
    success = about.get("success", True) is not False
    said = about.get("warnings")
    quality = about.get("quality_score")
    return WorkResult(
        output=value,
        success=success,
        error=None if success else str(about.get("error") or "the role reports a failure"),
        error_code=str(about.get("error_code") or "EXECUTION_FAILED"),
        recoverable=about.get("recoverable") is not False,
        returncode=returncode,
        quality_score=float(quality) if isinstance(quality, int | float) else None,
        warnings=(*warnings, *(str(each) for each in said or ())),
    )


def _copied(value: Json) -> Json:
    """The value as the log will have it, apart from what the callable goes on to change."""
    return parsed_json(json.dumps(value, allow_nan=False))
