"""The child process of a python role: reads one request, calls the callable, reports over one descriptor.

Started by file path with `-P`, so that nothing of the working directory is imported by accident.
Standard library only, apart from what the callable itself imports.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from types import FrameType

PART_CHARACTERS: Final = 65_536
RESULT_CHARACTERS: Final = 16 * 1024 * 1024
TRACEBACK_CHARACTERS: Final = 16_384


class ResultNotJson(Exception):
    """The callable returned something that JSON cannot hold."""

    failure_code = "RESULT_NOT_JSON"


class Reports:
    """Writes whole lines to the progress descriptor, from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def emit(self, message: dict[str, Any]) -> None:
        self._write(json.dumps(message, allow_nan=False, ensure_ascii=False, default=_plain, separators=(",", ":")))

    def result(self, value: Any, about: Mapping[str, Any]) -> None:
        """A result of any size, in lines that the reader takes.

        Raises:
            ResultNotJson: it is no JSON, or larger than 16 MiB.
        """
        try:
            text = json.dumps(value, allow_nan=False, default=_plain, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise ResultNotJson(f"the result is no JSON: {error}") from None
        if len(text) > RESULT_CHARACTERS:
            raise ResultNotJson(f"the result has {len(text)} characters; write it to a file and return its path")
        for start in range(0, len(text), PART_CHARACTERS):
            self.emit({"result_part": text[start : start + PART_CHARACTERS]})
        self.emit({"result_end": dict(about)})

    def _write(self, line: str) -> None:
        data = memoryview(line.encode(errors="replace") + b"\n")
        with self._lock:  # a line longer than the pipe holds is written in several pieces
            while data:
                data = data[os.write(self._descriptor, data) :]


def main() -> int:
    """0 when the callable returned, 1 when it failed, 130 when it was asked to stop."""
    cancelled = threading.Event()

    def interrupted(signum: int, frame: FrameType | None) -> None:
        cancelled.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)
    reports = Reports(int(os.environ["VESPERA_PROGRESS_FD"]))
    try:
        request: dict[str, Any] = json.load(sys.stdin.buffer)
        _reconfigure_output()
        value = _call(request, reports, cancelled)
        result, about = _outcome(value)
        reports.result(result, about)
    except KeyboardInterrupt:
        reports.emit({"cancelled": True})
        return 130
    except BrokenPipeError:  # nobody is left to tell
        return 1
    except SystemExit as error:
        if error.code in (None, 0):
            reports.result(None, {})
            return 0
        reports.emit({"error": _failure(error)})
        return 1
    # The boundary of the callable: whatever it raised is its outcome, and is reported.
    except Exception as error:  # noqa: BLE001
        reports.emit({"error": _failure(error)})
        return 1
    return 0


def _call(request: dict[str, Any], reports: Reports, cancelled: threading.Event) -> Any:
    _find_packages(request.get("python_path"))
    from roles.context import Cancelled, Context, TaskInfo, Unanswered, is_unanswered
    from roles.runners import call

    told = request["task"]
    task = TaskInfo(told["task_id"], told["title"], told["description"], request["inputs"])
    context = Context(
        task,
        emit=reports.emit,
        is_cancelled=cancelled.is_set,
        scratch=Path(request["scratch"]),
        execution_id=request["execution_id"],
        attempt=request["attempt"],
        last_checkpoint=request["checkpoint"],
        answers=request["answers"],
    )
    fn = call.resolve(request["target"], request.get("python_path"))
    try:
        value = fn(*call.arguments(fn, task, context, context.progress))
        return _run_async(value, cancelled) if hasattr(value, "__await__") else value
    except Cancelled:
        raise KeyboardInterrupt from None
    except (Unanswered, BaseExceptionGroup) as ended:
        if is_unanswered(ended):
            return None  # what it asked has been reported
        raise


def _run_async(awaitable: Any, cancelled: threading.Event) -> Any:
    import asyncio

    async def work() -> Any:
        current = asyncio.current_task()
        assert current is not None

        def interrupted() -> None:
            cancelled.set()
            current.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted)
        return await awaitable

    try:
        return asyncio.run(work())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _find_packages(python_path: str | None) -> None:
    """Let `roles` be the package of this file, whatever else bears the name, and the callable's module be found."""
    root = str(Path(__file__).resolve().parents[2])
    if root not in sys.path:
        sys.path.insert(0, root)
    if python_path is not None:
        folder = python_path if os.path.isdir(python_path) else os.path.dirname(python_path)
        if folder not in sys.path:
            sys.path.append(folder)


def _outcome(value: Any) -> tuple[Any, dict[str, Any]]:
    """`(result, what is said about it)`: a returned object with `success` and `output` says more than a value."""
    if isinstance(value, dict) or not (hasattr(value, "success") and hasattr(value, "output")):
        return cast("Any", value), {}
    names = ("success", "error", "error_code", "recoverable", "quality_score", "warnings")
    about = {name: getattr(value, name, None) for name in names}
    return value.output, {name: each for name, each in about.items() if each is not None}


def _failure(error: BaseException) -> dict[str, Any]:
    code, context = _called(error)
    message = f"exit with {error.code}" if isinstance(error, SystemExit) else str(error) or type(error).__name__
    lines = traceback.format_exception(type(error), error, _own_frames_left_out(error))
    text = "".join(lines)
    return {
        "code": code,
        "message": message[:4096],
        "traceback": text[-TRACEBACK_CHARACTERS:],
        "recoverable": getattr(error, "recoverable", True) is not False,
        **({"context": context} if context else {}),
    }


def _called(error: BaseException) -> tuple[str, dict[str, Any]]:
    """Its code, and what is kept with it, where that is JSON."""
    try:
        from vespera_exec.errors import failure_code_of, failure_context_of
    except (ImportError, OSError):  # no file can be opened any more, for one, which is what it tells of
        return str(getattr(error, "failure_code", None) or type(error).__name__), {}
    code = failure_code_of(error)
    try:
        return code, json.loads(json.dumps(failure_context_of(error)))
    except (TypeError, ValueError, RecursionError):
        return code, {}


def _own_frames_left_out(error: BaseException) -> Any:
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


def _plain(value: Any) -> Any:
    """What JSON takes for the values that callables like to return."""
    import dataclasses
    import datetime

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, Any]", value))
    raise TypeError(f"{type(value).__name__} is not serialisable")


def _reconfigure_output() -> None:
    """What the callable prints is seen when it is printed, and never fails for its characters."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)


if __name__ == "__main__":
    sys.exit(main())
