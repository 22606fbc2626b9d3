"""Runs a role's program: argv from the operator, values from the inputs, progress from a descriptor or its output."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread

from roles.patterns import PatternReader
from roles.reports import Intake, check_answered, told_answers
from roles.rolefile import PIECES
from vespera_exec.engine.work import ProcessExit, ProcessSpec, Work, WorkResult
from vespera_exec.errors import ExecutionError
from vespera_exec.model.principal import allowed_env

if TYPE_CHECKING:
    from collections.abc import Mapping

    from roles.definition import Role
    from vespera_exec.model.events import Json
    from vespera_exec.model.progress import ProgressReport

TAIL_BYTES: Final = 2000
TASK_FILE: Final = "task.json"
_DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


async def run(role: Role, work: Work) -> WorkResult:
    """The program's outcome: `{"returncode", "output_tail"}`, and `"result"` where it reported one.

    `work.inputs` are validated. A non-zero exit is a failure with code EXIT_NONZERO; `output_tail` is the
    last 2000 bytes of what it wrote.

    Raises:
        ExecutionError: BAD_ARGUMENT, WORKER_DIED, or what the launcher says of a program that cannot be started.
        CancellationException: it was asked to stop, and is gone.
        InputNeeded: it asked what nobody has answered yet.
    """
    task = await anyio.to_thread.run_sync(write_task, work)
    intake = Intake(work.tracking)
    output = _Output(role, intake)
    env = environment(role, work)
    env["VESPERA_TASK_FILE"] = str(work.scratch / TASK_FILE)
    with intake.flushing():
        process = await work.launcher.launch(
            ProcessSpec(
                argv=arguments(role, work.inputs, work.scratch),
                cwd=working_directory(work),
                env=env,
                stdin=task if role.stdin == "task" else b"",
                on_output=output.chunk,
                on_report=intake.line,
                on_report_dropped=intake.dropped,
                grace_seconds=role.grace_seconds,
            )
        )
        ended = await process.wait()
        output.finish()
    stop_if_cancelled(work, ended)
    check_answered(work, intake)
    shown: dict[str, Json] = {"returncode": ended.returncode, "output_tail": output.tail()}
    if intake.result is not None:
        shown["result"] = intake.result.value
    warnings = exit_warnings(ended, intake)
    if ended.returncode == 0:
        return WorkResult(output=shown, returncode=0, warnings=warnings)
    message = f"{Path(_program(role, work)).name} {how_it_ended(ended.returncode)}"
    if intake.error is not None:
        message = f"{message}: {intake.error['message']}"
    elif last := output.last_line():
        message = f"{message}: {last}"
    return WorkResult(
        output=shown,
        success=False,
        error=message,
        error_code=intake.error["code"] if intake.error is not None else "EXIT_NONZERO",
        recoverable=intake.error is None or intake.error["recoverable"],
        returncode=ended.returncode,
        warnings=warnings,
    )


def arguments(role: Role, inputs: Mapping[str, Json], scratch: Path) -> tuple[str, ...]:
    """The argument vector. A value fills its place and nothing else: it never splits, nor becomes an option.

    An argument whose placeholder names an input that was not given is left out.

    Raises:
        ExecutionError: BAD_ARGUMENT, a value starts with "-" where an argument starts, or holds a NUL.
    """
    if role.argv_input is not None:
        return tuple(inputs[role.argv_input])
    filled = (_filled(argument, inputs, scratch) for argument in role.argv)
    return tuple(each for each in filled if each is not None)


def environment(role: Role, work: Work) -> dict[str, str]:
    """The child's whole environment: the allow-listed part of the caller's, and what the role sets."""
    caller = work.caller
    base = dict(caller.env) if caller.is_local and caller.env else allowed_env(os.environ)
    return {"PATH": _DEFAULT_PATH, "LANG": "C.UTF-8"} | base | dict(role.env)


def working_directory(work: Work) -> Path:
    """The input `cwd`, else where a local caller stands, else the scratch folder."""
    given = work.inputs.get("cwd")
    if isinstance(given, str) and given:
        return work.scratch / given
    return Path(work.caller.cwd) if work.caller.is_local and work.caller.cwd else work.scratch


def write_task(work: Work) -> bytes:
    """The task as JSON, also written to the file that `VESPERA_TASK_FILE` names."""
    task = {
        "task_id": work.task_id,
        "execution_id": work.execution_id,
        "step": work.step,
        "attempt": work.attempt,
        "title": work.title,
        "description": work.description,
        "inputs": dict(work.inputs),
        "checkpoint": work.checkpoint,
        "answers": told_answers(work),
    }
    data = json.dumps(task).encode()
    descriptor = os.open(work.scratch / TASK_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return data


def stop_if_cancelled(work: Work, ended: ProcessExit) -> None:
    """
    Raises:
        CancellationException: the work was asked to stop.
        ExecutionError: WORKER_DIED, nobody asked, and yet it did not end by itself (its shim was killed, say).
    """
    work.token.throw_if_cancelled()
    if ended.rung is not None:
        how = how_it_ended(ended.returncode)
        raise ExecutionError(
            f"The process {how}, ended from outside ({ended.rung})",
            code="WORKER_DIED",
            context={"rung": ended.rung, "returncode": ended.returncode},
            hint="look for a shortage of memory, or for who killed it",
        )


def how_it_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was ended by {name}"


def exit_warnings(ended: ProcessExit, intake: Intake) -> tuple[str, ...]:
    warnings: list[str] = []
    if ended.leftover:
        warnings.append(f"{ended.leftover} processes that it left behind were ended")
    if intake.problems > 1:
        warnings.append(f"{intake.problems} progress reports were not understood")
    return tuple(warnings)


class _Output:
    """Reads progress from the output as it comes, and keeps its end."""

    def __init__(self, role: Role, intake: Intake) -> None:
        self._intake = intake
        self._tail = bytearray()
        reads = role.patterns or bool(role.own_patterns)
        self._readers = {
            stream: PatternReader(builtin=role.patterns, own=role.own_patterns)
            for stream in (("stdout", "stderr") if reads else ())
        }
        self._best = -1.0

    def chunk(self, stream: str, data: bytes) -> None:
        self._tail += data[-TAIL_BYTES:]
        if len(self._tail) > 4 * TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]
        if stream in self._readers:
            self._report(self._readers[stream].feed(data))

    def finish(self) -> None:
        for reader in self._readers.values():
            self._report(reader.finish())

    def tail(self) -> str:
        return bytes(self._tail[-TAIL_BYTES:]).decode("utf-8", "replace")

    def last_line(self) -> str:
        lines = [line.strip() for line in self.tail().splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""

    def _report(self, reports: list[ProgressReport]) -> None:
        """Only the last of a chunk: the others are past already, and both streams share one bar."""
        if not reports:
            return
        report = reports[-1]
        percentage = (report.current or 0.0) if report.total is None else 100.0 * (report.current or 0.0) / report.total
        if percentage <= self._best:
            return
        self._best = percentage
        self._intake.guess(report)


def _filled(argument: str, inputs: Mapping[str, Json], scratch: Path) -> str | None:
    filled = ""
    position = 0
    for found in PIECES.finditer(argument):
        filled += argument[position : found.start()]
        position = found.end()
        if found[1] is None:
            filled += found[0][0]
            continue
        name = found[1].removeprefix("inputs.")
        value = str(scratch) if found[1] == "scratch" else _text(inputs.get(name))
        if value is None:
            return None
        if "\0" in value:
            raise ExecutionError(f"input {name} contains a NUL character", code="BAD_ARGUMENT", recoverable=False)
        if not filled and value.startswith("-"):
            raise ExecutionError(
                f"input {name} starts with '-' and would be read as an option: {value[:40]!r}",
                code="BAD_ARGUMENT",
                recoverable=False,
                hint="write ./-name for a file of that name",
            )
        filled += value
    return filled + argument[position:]


def _text(value: Json) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    return None if value is None else str(value)


def _program(role: Role, work: Work) -> str:
    return str(work.inputs[role.argv_input][0]) if role.argv_input is not None else role.argv[0]
