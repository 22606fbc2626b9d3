"""`run`: from what was typed to an execution, and from its end to our exit code."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vespera_exec.cli import output, pages
from vespera_exec.cli.answering import Prompter
from vespera_exec.cli.display import display
from vespera_exec.cli.inputs import parse_inputs
from vespera_exec.cli.running import Follower, Interrupts, ReaderGone
from vespera_exec.cli.state import Shown, ending, exit_code
from vespera_exec.errors import InvalidInput, VesperaError

if TYPE_CHECKING:
    from vespera_exec.cli.client import Daemon
    from vespera_exec.model.events import Json

_TITLE_CHARACTERS = 200
_COMMAND = "command"
_READER_GONE = 141  # 128 + SIGPIPE, as a shell says it


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What the caller typed of whatever is started, None where nothing was."""

    title: str | None = None
    description: str = ""
    priority: int | None = None
    timeout: float | None = None
    key: str | None = None

    def body(self) -> dict[str, Json]:
        """Of it, what a request holds. It always has a key, so that it may be sent again.

        Raises:
            InvalidInput: the title or the key is empty.
        """
        if self.title is not None and not self.title.strip():
            raise InvalidInput("the title is empty", hint="say in one line what the task is, or leave it out")
        if self.key == "":
            raise InvalidInput("the key is empty", hint="name one, or leave it out")
        body: dict[str, Json] = {
            "title": self.title,
            "description": self.description,
            "idempotency_key": self.key or f"cli-{uuid.uuid4().hex}",
            "priority": self.priority,
            "timeout_seconds": self.timeout,
        }
        return {name: value for name, value in body.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A role or a command that is to be executed. `command` is what stood behind `--`."""

    role: str | None
    command: list[str] | None
    given: list[str] = field(default_factory=list[str])
    common: Common = field(default_factory=Common)


def execute(daemon: Daemon, wanted: Wanted) -> Json:
    """The handle of a run that is accepted and on disk.

    Raises:
        InvalidInput: neither a role nor a command, or both; an input that is none.
        DaemonError: the daemon refuses it.
    """
    body = request(wanted, _schema(daemon, wanted))
    return daemon.post("/executions", body).body


def request(wanted: Wanted, schema: Json = None) -> dict[str, Json]:
    """The body of `POST /executions`."""
    body = wanted.common.body()
    role, title = wanted.role, wanted.common.title
    if wanted.command is not None:
        if role not in (None, _COMMAND):
            raise InvalidInput(f"role {role!r} takes no command", hint="give its inputs with --input name=value")
        if not wanted.command or not wanted.command[0]:
            raise InvalidInput("there is no command after --", hint="vespera-exec run -- PROGRAM ARGUMENTS")
        role = _COMMAND
        title = title or shlex.join(wanted.command)[:_TITLE_CHARACTERS]
    elif role is None:
        hint = f"vespera-exec run -- {title}" if title else "run --role ROLE ..., or run -- COMMAND ..."
        raise InvalidInput("give a role (--role), or a command after --", hint=hint)
    inputs = parse_inputs(wanted.given, schema)
    if wanted.command is not None:
        inputs = {"cwd": os.getcwd()} | inputs | {"argv": wanted.command}
    return body | {"title": title or role, "role": role, "inputs": inputs}


def execute_and_follow(daemon: Daemon, wanted: Wanted, *, quiet: bool, as_json: bool) -> int:
    """The exit code of the run, after all of its output is written."""
    body = request(wanted, _schema(daemon, wanted))
    shown = display(quiet=quiet or as_json)
    with Interrupts(signal.SIGTERM, signal.SIGHUP) as interrupts:
        handle = daemon.post("/executions", body).body
        task_id = str(handle["task_id"])
        state = Shown(str(body["title"]), sessions=[] if handle["repeated"] else [str(handle["session_id"])])
        follower = Follower(daemon, task_id, state, shown, cursor=0 if handle["repeated"] else handle["cursor"])
        follower.prompter = Prompter(daemon, task_id, shown)
        # With --json stdout carries one document and nothing else.
        follower.pass_output(sys.stderr if as_json else sys.stdout, sys.stderr)
        try:
            follower.follow(interrupts)
        except KeyboardInterrupt:
            what = "the cancel" if follower.cancelling else "the work"
            shown.say(f"vespera-exec: left; {what} goes on without us: vespera-exec status {task_id}")
            return interrupts.exit_code
        except ReaderGone:
            output.forget_stdout()
            daemon.post(f"/tasks/{task_id}/cancel", {"reason": "the reader of its output has gone"})
            return _READER_GONE
        except VesperaError:
            if signal.SIGHUP in interrupts.told:
                return interrupts.exit_code
            output.remark(f"vespera-exec: lost sight of task {task_id}; it may go on: vespera-exec status {task_id}")
            raise
        finally:
            shown.close()
    ended = daemon.get(f"/tasks/{task_id}/result")
    code = interrupts.exit_code if signal.SIGTERM in interrupts.told else exit_code(state.status, state.outcome)
    if as_json:
        output.document(ended | {"returncode": state.outcome.get("returncode"), "exit_code": code})
        return code
    result = ended["result"]
    if _is_of_a_process(result):
        result = result.get("result")
    if result is not None and state.status == "completed":
        output.line(pages.result(result))
        output.flush()
    if not quiet or (code and state.outcome.get("returncode") is None):
        output.remark(f"vespera-exec: {ending(state)} · task {task_id[: pages.SHORT_ID]}")
    return code


def _schema(daemon: Daemon, wanted: Wanted) -> Json:
    """What the role says of its inputs; None where it is not needed or not known."""
    name = wanted.role or (_COMMAND if wanted.command else None)
    if not wanted.given or name is None:
        return None
    return next((role["inputs"] for role in daemon.get("/roles")["roles"] if role["name"] == name), None)


def _is_of_a_process(result: Json) -> bool:
    """It only repeats the exit code and the end of an output that was shown already."""
    return isinstance(result, dict) and {"returncode", "output_tail"} <= result.keys()
