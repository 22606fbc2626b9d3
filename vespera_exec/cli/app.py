"""The command line: each command parses, asks the daemon, shows the answer.

click and not typer, because typer's parameters are validated by pydantic, which costs more than all the rest
of a command that merely asks.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vespera_exec import __version__
from vespera_exec.cli import answering, capacity, checkpoints, dead, metrics, output, pages, tokens, upkeep, watching
from vespera_exec.cli import daemon as daemon_commands
from vespera_exec.cli.client import LONG_WAIT_MS, Daemon, DaemonError, data_directory, segment
from vespera_exec.cli.plans import commands as plans
from vespera_exec.errors import InvalidInput, VesperaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vespera_exec.cli.config import ClientName
    from vespera_exec.model.events import Json

OURS = 125
"""The exit code of our own errors; `run` exits with the work's own code otherwise."""
USAGE = 2
INTERRUPTED = 130
READER_GONE = 141

_CANCEL_WAIT_MS = 10_000

_json = click.option("--json", "as_json", is_flag=True, help="One JSON document (a line each where it follows).")
_id = click.argument("any_id", metavar="ID")
_step = click.option("--step", metavar="STEP", help="Only this step of a plan.")
_follow = click.option("--follow", "-f", is_flag=True, help="Until the run has ended.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, the work's own (`run`), 2 for usage, 125 for our own errors."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    output.prepare()
    try:
        code = _invoke(arguments)
    except VesperaError as error:
        output.failure(error)
        code = OURS
    except click.exceptions.NoArgsIsHelpError as error:
        output.remark(error.format_message())
        code = USAGE
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "vespera-exec"
        output.failure(DaemonError("USAGE", error.format_message().rstrip("."), f"see {where} --help"))
        code = USAGE
    except click.exceptions.Exit as end:
        code = end.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        output.forget_stdout()
        code = READER_GONE
    except Exception as fault:
        # The program's boundary: whatever else went wrong is our fault, and a traceback helps no user.
        if os.environ.get("VESPERA_DEBUG"):
            raise
        what = f"{type(fault).__name__}: {fault}"
        output.failure(DaemonError("INTERNAL_ERROR", what, "VESPERA_DEBUG=1 shows where; please report it"))
        code = OURS
    code = _finished(code)
    output.leave()
    return code


def _finished(code: int) -> int:
    """The exit code, once the output has left."""
    try:
        output.flush()
    except BrokenPipeError:
        output.forget_stdout()
        return code or READER_GONE
    except output.CannotWrite as error:
        output.failure(error)
        return code or OURS
    return code


def _invoke(arguments: list[str]) -> int:
    # click drops a "--", and with it the difference between a title and a command.
    command: list[str] | None = None
    if "--" in arguments:
        at = arguments.index("--")
        if "run" in arguments[:at]:
            arguments, command = arguments[:at], arguments[at + 1 :]
    with cli.make_context("vespera-exec", arguments, obj=command) as context:
        code: int | None = cli.invoke(context)
    return code or 0


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data-dir", metavar="FOLDER", help="Where everything is kept; else VESPERA_DATA_DIR, else by project.")
@click.version_option(__version__, prog_name="vespera-exec", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, data_dir: str | None) -> None:
    """Runs long work for AI agents and never loses sight of it.

    Without arguments and with a pipe on stdin, this is the MCP server (stdio).
    """
    if data_dir is not None:
        os.environ["VESPERA_DATA_DIR"] = data_dir
    if context.invoked_subcommand is None:
        output.line(context.get_help())


@cli.command()
@click.argument("title_words", metavar="[TITLE]... | PLAN.YAML | -- COMMAND...", nargs=-1)
@click.option("--role", help="Who does it; see `roles`.")
@click.option("--input", "given", metavar="NAME=VALUE", multiple=True, help="Also NAME=@FILE and NAME:=JSON.")
@click.option("--plan", "plan_file", metavar="FILE", help="A plan; or name it first, ending in .yaml, .yml or .json.")
@click.option("--set", "variables", metavar="NAME=VALUE", multiple=True, help="A variable of the plan, as --input.")
@click.option("--title", help="The title; else the words given.")
@click.option("--description", default="", help="The task in full; data, never executed.")
@click.option("--priority", type=click.IntRange(0, 10), help="0 to 10, higher first.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Time of work until it is ended.")
@click.option("--key", help="Idempotency key: the same key starts nothing twice.")
@click.option("--detach", "-d", is_flag=True, help="Print the ids and return.")
@click.option("--quiet", "-q", is_flag=True, help="Only the work's own output.")
@_json
@click.pass_obj
def run(
    command: list[str] | None,
    *,
    title_words: tuple[str, ...],
    role: str | None,
    given: tuple[str, ...],
    plan_file: str | None,
    variables: tuple[str, ...],
    title: str | None,
    description: str,
    priority: int | None,
    timeout: float | None,
    key: str | None,
    detach: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Execute a role, a command or a plan, and watch it.

    \b
    vespera-exec run --role survey --input path=src "Survey the sources"
    vespera-exec run -- pytest -q
    vespera-exec run plan.yaml --set release=1.4

    Shows progress and the work's output, and exits with the work's own status; 124 timed out, 125 our own
    error, 130 cancelled; 1 for a plan that failed. Ctrl-C cancels, a second one leaves. SIGTERM cancels, too
    (143). When the terminal goes (SIGHUP) the work goes on without us (129). The work gets no stdin.
    """
    from vespera_exec.cli import starting

    words = list(title_words)
    if plan_file is None and role is None and command is None and not given and plans.is_plan_file(words):
        plan_file = words.pop(0)
    common = starting.Common(
        title=" ".join(words) if title is None and words else title,
        description=description,
        priority=priority,
        timeout=timeout,
        key=key,
    )
    if plan_file is not None:
        from vespera_exec.cli.plans import running as plan_running

        if role is not None or command is not None or given:
            raise click.UsageError("a plan takes variables (--set), and neither a role, nor inputs, nor a command")
        with _daemon() as daemon:
            wanted_plan = plan_running.WantedPlan(path=plan_file, variables=variables, common=common)
            return plan_running.run(daemon, wanted_plan, detach=detach, quiet=quiet, as_json=as_json)
    if variables:
        raise click.UsageError("--set is for the variables of a plan; give an input with --input")
    wanted = starting.Wanted(role=role, command=command, given=list(given), common=common)
    with _daemon() as daemon:
        if not detach:
            return starting.execute_and_follow(daemon, wanted, quiet=quiet, as_json=as_json)
        handle = starting.execute(daemon, wanted)
    if as_json:
        output.document(handle)
    else:
        output.lines([f"task {handle['task_id']}", f"session {handle['session_id']}"])
    return 0


@cli.command("list")
@click.option("--status", help="Of a task or an execution: running, failed, done, ...")
@click.option("--role")
@click.option("--text", help="Part of the title.")
@click.option("--limit", type=click.IntRange(1, 200), default=20, show_default=True)
@click.option("--page", help="As the last list named it.")
@click.option("--all", "every", is_flag=True, help="All pages.")
@_json
def list_tasks(
    *, status: str | None, role: str | None, text: str | None, limit: int, page: str | None, every: bool, as_json: bool
) -> None:
    """The tasks, newest change first."""
    with _daemon() as daemon:
        size = 200 if every else limit
        found = daemon.get("/tasks", status=status, role=role, text=text, limit=size, page=page)
        while every and found["next_page"]:
            more = daemon.get("/tasks", status=status, role=role, text=text, limit=size, page=found["next_page"])
            found = more | {"tasks": found["tasks"] + more["tasks"]}
    if as_json:
        output.document(found)
    else:
        output.lines(pages.task_list(found, output.width()))


@cli.command()
@_id
@click.option("--watch", "-w", is_flag=True, help="Until it has ended.")
@click.option("--detail", is_flag=True, help="Usage, phases and the last events, too.")
@_json
def status(*, any_id: str, watch: bool, detail: bool, as_json: bool) -> None:
    """Where a task stands."""
    flag = "true" if detail else None
    with _daemon() as daemon:
        path = f"/tasks/{segment(any_id)}"
        if watch and as_json:
            for view in watching.changes(daemon, path, flag):
                output.json_line(view)
            return
        view = daemon.get(path, detail=flag)
        if watch and not view["done"] and view["session"] is not None:
            watching.watch(daemon, view)
            view = daemon.get(path, detail=flag)
    if as_json:
        output.document(view)
    else:
        output.lines(pages.status(view))


@cli.command()
@_id
@_follow
@click.option("--cursor", type=click.IntRange(0), default=0, help="Only what came after this one.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@_json
def events(*, any_id: str, follow: bool, cursor: int, limit: int, as_json: bool) -> None:
    """What happened, event by event."""
    with _daemon() as daemon:
        path = f"/tasks/{segment(any_id)}/events"
        page = daemon.get(path, cursor=cursor, max_events=limit)
        if as_json and not follow:
            output.document(page)
            return
        while True:
            for each in page["events"]:
                if as_json:
                    output.json_line(each)
                else:
                    output.line(pages.event(each))
            if not follow or page["done"]:
                break
            output.flush()
            page = daemon.get(path, cursor=page["next_cursor"], max_events=limit, wait_ms=LONG_WAIT_MS)
    if len(page["events"]) == limit and not page["done"] and not follow:
        output.remark(f"vespera-exec: there may be more; --cursor {page['next_cursor']}")


@cli.command()
@_id
@_json
def result(*, any_id: str, as_json: bool) -> None:
    """What a run returned."""
    with _daemon() as daemon:
        found = daemon.get(f"/tasks/{segment(any_id)}/result")
    if as_json:
        output.document(found)
        return
    if not found["done"]:
        raise DaemonError(
            "NOT_DONE", f"it has not ended yet ({found['status']})", f"wait with `vespera-exec status {any_id} --watch`"
        )
    if error := found["error"]:
        output.remark(f"vespera-exec: {found['status']}: {_said(error.get('message'))} ({_said(error.get('code'))})")
    if found["result"] is not None:
        output.line(pages.result(found["result"]))


@cli.command()
@_id
@_follow
@click.option("--stream", type=click.Choice(["combined", "stdout", "stderr"]), default="combined", show_default=True)
@_json
def logs(*, any_id: str, follow: bool, stream: str, as_json: bool) -> None:
    """What the work wrote, as text: bytes that are no UTF-8 are shown as U+FFFD."""
    with _daemon() as daemon:
        pieces = watching.work_output(daemon, any_id, stream, follow=follow)
        if as_json and not follow:
            whole: dict[str, Any] = {}
            text: list[str] = []
            for page in pieces:
                text.append(page["text"])
                whole = whole or dict(page)
                whole |= {name: page[name] for name in page if name != "offset"}
            output.document(whole | {"text": "".join(text)})
            return
        for page in pieces:
            if as_json:
                output.json_line(page)
            else:
                output.raw(sys.stdout, page["text"])


@cli.command()
@_id
@click.option("--reason", default="User requested", show_default=True)
@click.option("--no-wait", is_flag=True, help="Do not wait until it is gone.")
@_step
@_json
def cancel(*, any_id: str, reason: str, step: str | None, no_wait: bool, as_json: bool) -> int:
    """Stop a run, with everything it started."""
    # Whoever cancels one step is not made to wait.
    waits: dict[str, Json] = {} if step is not None else {"wait_ms": 0 if no_wait else _CANCEL_WAIT_MS}
    body = {"reason": reason} | waits
    with _daemon() as daemon:
        answer = daemon.post(f"{_path(any_id, step)}/cancel", body).body
    if as_json:
        output.document(answer)
        return 0 if answer["success"] else OURS
    if not answer["success"]:
        raise DaemonError("NOT_CANCELLED", f"{answer['message']}: {answer['reason']}")
    output.line(pages.cancelled(answer))
    return 0


@cli.command()
@_id
@click.option("--reason", default="User requested", show_default=True)
@click.option("--no-wait", is_flag=True, help="Do not wait until it stands still.")
@_step
@_json
def pause(*, any_id: str, reason: str, step: str | None, no_wait: bool, as_json: bool) -> int:
    """Stop a run where it stands, until `resume`. Its clock and its timeout stop, too."""
    body = {"reason": reason} | ({"wait_ms": 0} if no_wait and step is None else {})
    with _daemon() as daemon:
        answer = daemon.post(f"{_path(any_id, step)}/pause", body).body
    return _accepted(answer, "NOT_PAUSED", as_json=as_json)


@cli.command()
@_id
@click.option("--reason", default="User requested", show_default=True)
@_step
@_json
def resume(*, any_id: str, reason: str, step: str | None, as_json: bool) -> int:
    """Let a paused run go on."""
    with _daemon() as daemon:
        answer = daemon.post(f"{_path(any_id, step)}/resume", {"reason": reason}).body
    return _accepted(answer, "NOT_RESUMED", as_json=as_json)


@cli.command()
@_json
def roles(*, as_json: bool) -> None:
    """Who may do the work."""
    with _daemon() as daemon:
        found = daemon.get("/roles")
    if as_json:
        output.document(found)
        return
    output.lines(pages.roles(found, output.width()))
    for problem in found["problems"]:
        output.remark(f"vespera-exec: {_said(problem)}")


@cli.command("mcp-config")
@click.option(
    "--client",
    type=click.Choice(["claude-code", "cursor", "vscode", "generic"]),
    default="claude-code",
    show_default=True,
)
@click.option("--http", is_flag=True, help="By URL and token instead of as a child process.")
@_json
def mcp_config(*, client: ClientName, http: bool, as_json: bool) -> None:
    """A ready configuration for an MCP client, with absolute paths."""
    from vespera_exec.cli import config

    named = Path(os.environ["VESPERA_DATA_DIR"]).expanduser().absolute() if os.environ.get("VESPERA_DATA_DIR") else None
    if not http:
        made = config.stdio_config(client, data_dir=named)
    else:
        with _daemon() as daemon:
            view = daemon.get("/daemon")
            if view["url"] is None:
                raise DaemonError(
                    "NO_URL", f"the daemon has no TCP door: {view['tcp_problem'] or 'it is switched off'}"
                )
            made = config.http_config(client, url=view["url"], token=tokens.own_token(daemon.data_dir))
    if as_json:
        output.json_line(made)
        return
    output.line(json.dumps(made, indent=2))
    output.remark(f"vespera-exec: this belongs into {config.where(client)}")
    if http and not os.environ.get("VESPERA_TCP_PORT"):
        output.remark("vespera-exec: the port changes with each daemon; set VESPERA_TCP_PORT to keep it")


@cli.command()
@click.argument("path", metavar="[PATH]", default=".")
def demo(*, path: str) -> int:
    """See it work, with a real MCP client."""
    folder = _folder(Path(path))  # refused without the price of an MCP client
    from vespera_exec.cli.demo import show

    return show(folder)


cli.add_command(daemon_commands.group)
cli.add_command(tokens.group)
cli.add_command(answering.answer)
cli.add_command(plans.group)
cli.add_command(plans.steps)
cli.add_command(checkpoints.group)
cli.add_command(dead.group)
cli.add_command(capacity.capacity)
cli.add_command(metrics.metrics)
cli.add_command(upkeep.doctor)
cli.add_command(upkeep.backup)
cli.add_command(upkeep.restore)


def _daemon() -> Daemon:
    return Daemon(data_directory())


def _folder(path: Path) -> Path:
    """
    Raises:
        InvalidInput: it is none.
    """
    try:
        folder = path.expanduser().resolve(strict=True)
    except (OSError, RuntimeError) as fault:
        raise InvalidInput(f"cannot survey {path}: no such folder", hint="name a folder that exists") from fault
    if not folder.is_dir():
        raise InvalidInput(f"cannot survey {path}: it is not a folder", hint="name the folder that holds it")
    return folder


def _path(any_id: str, step: str | None) -> str:
    """Of a task, or of one step of its plan."""
    return f"/tasks/{segment(any_id)}" + (f"/steps/{segment(step)}" if step is not None else "")


def _accepted(answer: Json, refusal: str, *, as_json: bool) -> int:
    """Show what became of a pause or a resume."""
    if as_json:
        output.document(answer)
        return 0 if answer["success"] else OURS
    if not answer["success"]:
        raise DaemonError(refusal, f"{answer['message']}: {answer['reason']}")
    output.line(pages.accepted(answer))
    return 0


def _said(value: object) -> str:
    from vespera_exec.cli.text import shown

    return shown(value, 500)
