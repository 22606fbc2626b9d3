"""The command line: each command parses, asks the daemon, shows the answer."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vespera_exec import __version__, paths
from vespera_exec.cli import output, pages
from vespera_exec.cli.client import LONG_WAIT_MS, Daemon, DaemonError, segment, start_daemon
from vespera_exec.errors import InvalidInput, VesperaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vespera_exec.cli.state import Shown
    from vespera_exec.model.events import Json

OURS = 125
"""The exit code of our own errors; `run` exits with the work's own code otherwise."""
INTERRUPTED = 130
READER_GONE = 141

_WATCH_SECONDS = 0.2
_CANCEL_WAIT_MS = 10_000

app = typer.Typer(
    name="vespera-exec",
    help="Runs long work for AI agents and never loses sight of it.\n\n"
    "Without arguments and with a pipe on stdin, this is the MCP server (stdio).",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
daemon_app = typer.Typer(help="The background process that owns a data directory.", no_args_is_help=True)
app.add_typer(daemon_app, name="daemon")

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document (a line each where it follows).")]
AnyId = Annotated[str, typer.Argument(metavar="ID", help="A task, a session, or the first six characters of either.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, the work's own (`run`), 2 for usage, 125 for our own errors."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    output.prepare()
    try:
        code = _invoke(arguments)
    except VesperaError as error:
        output.failure(error)
        code = OURS
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        output.forget_stdout()
        code = READER_GONE
    except Exception as fault:
        # The program's boundary: whatever else went wrong is our fault, and a traceback helps no user.
        if os.environ.get("VESPERA_DEBUG"):
            raise
        output.failure(
            DaemonError(
                "INTERNAL_ERROR", f"{type(fault).__name__}: {fault}", "VESPERA_DEBUG=1 shows where; please report it"
            )
        )
        code = OURS
    return code if output.flush() else code or READER_GONE


def _invoke(arguments: list[str]) -> int:
    # typer drops a "--", and with it the difference between a title and a command.
    command: list[str] | None = None
    if "--" in arguments:
        at = arguments.index("--")
        if "run" in arguments[:at]:
            arguments, command = arguments[:at], arguments[at + 1 :]
    try:
        typer.main.get_command(app).main(args=arguments, prog_name="vespera-exec", obj=command)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir", help="Where everything is kept; else VESPERA_DATA_DIR, else .vespera in the project."
        ),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        output.line(f"vespera-exec {__version__}")
    elif context.invoked_subcommand is None:
        output.line(context.get_help())
    else:
        if data_dir is not None:
            os.environ["VESPERA_DATA_DIR"] = str(data_dir)
        return
    raise typer.Exit


@app.command()
def run(
    context: typer.Context,
    title: Annotated[list[str] | None, typer.Argument(metavar="[TITLE]... | -- COMMAND...", show_default=False)] = None,
    role: Annotated[str | None, typer.Option(help="Who does it; see `roles`.")] = None,
    given: Annotated[
        list[str] | None, typer.Option("--input", metavar="NAME=VALUE", help="NAME=@FILE, NAME:=JSON.")
    ] = None,
    title_option: Annotated[str | None, typer.Option("--title", help="The title; else the words given.")] = None,
    description: Annotated[str, typer.Option(help="The task in full; data, never executed.")] = "",
    priority: Annotated[int | None, typer.Option(help="0 to 10, higher first.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds of work until it is ended.")] = None,
    key: Annotated[str | None, typer.Option(help="Idempotency key: the same key starts nothing twice.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Print the ids and return.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the work's own output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Execute a role or a command, and watch it.

    run --role survey --input path=src "Survey the sources"

    run -- pytest -q

    Shows progress and the work's output, and exits with the work's own status; 124 timed out, 125 our own
    error, 130 cancelled. Ctrl-C cancels, a second one leaves. The work gets no stdin.
    """
    from vespera_exec.cli import starting

    command: list[str] | None = context.obj
    wanted = starting.Wanted(
        role=role,
        command=command,
        given=given or [],
        title=title_option or " ".join(title or []),
        description=description,
        priority=priority,
        timeout=timeout,
        key=key,
    )
    with _daemon() as daemon:
        if detach:
            handle = starting.execute(daemon, wanted)
            if as_json:
                output.document(handle)
            else:
                output.line(f"task {handle['task_id']}")
                output.line(f"session {handle['session_id']}")
            return
        code = starting.execute_and_follow(daemon, wanted, quiet=quiet, as_json=as_json)
    raise typer.Exit(code)


@app.command("list")
def list_tasks(
    status: Annotated[str | None, typer.Option(help="Of a task or an execution: running, failed, done, …")] = None,
    role: Annotated[str | None, typer.Option()] = None,
    text: Annotated[str | None, typer.Option(help="Part of the title.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20,
    page: Annotated[str | None, typer.Option(help="As the last list named it.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All pages.")] = False,
    as_json: AsJson = False,
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


@app.command()
def status(
    any_id: AnyId,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Until it has ended.")] = False,
    detail: Annotated[bool, typer.Option("--detail", help="Usage, phases and the last events, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Where a task stands."""
    flag = "true" if detail else None
    with _daemon() as daemon:
        path = f"/tasks/{segment(any_id)}"
        if watch and as_json:
            for view in _changes(daemon, path, flag):
                output.json_line(view)
            return
        view = daemon.get(path, detail=flag)
        if watch and not view["done"] and view["session"] is not None:
            _watch(daemon, view)
            view = daemon.get(path, detail=flag)
    if as_json:
        output.document(view)
    else:
        output.lines(pages.status(view))


@app.command()
def events(
    any_id: AnyId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the run has ended.")] = False,
    cursor: Annotated[int, typer.Option(min=0, help="Only what came after this one.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many; of a page, with --follow.")] = 100,
    as_json: AsJson = False,
) -> None:
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
            sys.stdout.flush()
            page = daemon.get(path, cursor=page["next_cursor"], max_events=limit, wait_ms=LONG_WAIT_MS)
    if len(page["events"]) == limit and not page["done"] and not follow:
        output.remark(f"vespera-exec: there may be more; --cursor {page['next_cursor']}")


@app.command()
def result(any_id: AnyId, as_json: AsJson = False) -> None:
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


@app.command()
def logs(
    any_id: AnyId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the run has ended.")] = False,
    stream: Annotated[Literal["combined", "stdout", "stderr"], typer.Option()] = "combined",
    as_json: AsJson = False,
) -> None:
    """What the work wrote, as it is."""
    with _daemon() as daemon:
        pieces = _output(daemon, any_id, stream, follow=follow)
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


@app.command()
def cancel(
    any_id: AnyId,
    reason: Annotated[str, typer.Option()] = "User requested",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until it is gone.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop a run, with everything it started."""
    body = {"reason": reason, "wait_ms": 0 if no_wait else _CANCEL_WAIT_MS}
    with _daemon() as daemon:
        answer = daemon.post(f"/tasks/{segment(any_id)}/cancel", body).body
    if as_json:
        output.document(answer)
        if not answer["success"]:
            raise typer.Exit(OURS)
    elif answer["success"]:
        output.line(pages.cancelled(answer))
    else:
        raise DaemonError("NOT_CANCELLED", f"{answer['message']}: {answer['reason']}")


@app.command()
def roles(as_json: AsJson = False) -> None:
    """Who may do the work."""
    with _daemon() as daemon:
        found = daemon.get("/roles")
    if as_json:
        output.document(found)
        return
    output.lines(pages.roles(found, output.width()))
    for problem in found["problems"]:
        output.remark(f"vespera-exec: {_said(problem)}")


@app.command("mcp-config")
def mcp_config(
    client: Annotated[Literal["claude-code", "cursor", "vscode", "generic"], typer.Option()] = "claude-code",
    http: Annotated[bool, typer.Option("--http", help="By URL and token instead of as a child process.")] = False,
    as_json: AsJson = False,
) -> None:
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
            made = config.http_config(client, url=view["url"], token=_token(daemon.data_dir))
    if as_json:
        output.json_line(made)
        return
    import json

    output.line(json.dumps(made, indent=2))
    output.remark(f"vespera-exec: this belongs into {config.where(client)}")
    if http and not os.environ.get("VESPERA_TCP_PORT"):
        output.remark("vespera-exec: the port changes with each daemon; set VESPERA_TCP_PORT to keep it")


@app.command()
def token(
    show: Annotated[bool, typer.Option("--show", help="The token itself.")] = False, as_json: AsJson = False
) -> None:
    """Where the token of the TCP door is kept."""
    data_dir = _data_dir()
    paths.create_data_dir(data_dir)
    value = _token(data_dir)
    path = str(data_dir / paths.TOKEN)
    if as_json:
        output.document({"path": path} | ({"token": value} if show else {}))
    else:
        output.line(value if show else path)


@app.command()
def demo(path: Annotated[Path | None, typer.Argument(metavar="[PATH]", help="The folder to survey.")] = None) -> None:
    """See it work, with a real MCP client."""
    from vespera_exec.cli.demo import show

    raise typer.Exit(show(path or Path.cwd()))


@daemon_app.command("start")
def daemon_start(as_json: AsJson = False) -> None:
    """Start the daemon, where none runs."""
    with _daemon() as daemon:
        start_daemon(daemon.data_dir, os.environ)
        view = daemon.get("/daemon")
    _show_daemon(view, as_json=as_json)


@daemon_app.command("status")
def daemon_status(as_json: AsJson = False) -> None:
    """Ask the daemon how it is; starts none. Exit code 3 when none runs."""
    from vespera_exec.cli import owner

    data_dir = _data_dir()
    view = owner.running(data_dir)
    if view is not None:
        _show_daemon(view, as_json=as_json)
        return
    if as_json:
        output.document({"daemon": None, "data_dir": str(data_dir)})
    else:
        output.line(f"not running: {_said(data_dir)}")
    raise typer.Exit(3)


@daemon_app.command("stop")
def daemon_stop(
    force: Annotated[bool, typer.Option("--force", help="Also when executions are running.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop the daemon. What waits is kept; what runs would be interrupted, so that needs --force."""
    from vespera_exec.cli import owner

    data_dir = _data_dir()
    view = owner.stop(data_dir, force=force)
    if as_json:
        output.document({"stopped": view is not None, "daemon": view, "data_dir": str(data_dir)})
    else:
        output.line(f"stopped: process {view['pid']}" if view else f"not running: {_said(data_dir)}")


def _data_dir() -> Path:
    try:
        cwd = Path.cwd()
    except OSError as fault:
        raise InvalidInput("the current folder is gone", hint="change to one that exists") from fault
    return paths.find_data_dir(cwd, os.environ)


def _daemon() -> Daemon:
    return Daemon(_data_dir())


def _token(data_dir: Path) -> str:
    from vespera_exec.app.tokens import default_token

    return default_token(data_dir)


def _show_daemon(view: Json, *, as_json: bool) -> None:
    if as_json:
        output.document({"daemon": view, "data_dir": view["data_dir"]})
    else:
        output.lines(pages.daemon(view))


def _changes(daemon: Daemon, path: str, detail: str | None) -> Iterator[Json]:
    """The status whenever something has happened, a few times a second at most, until the run has ended."""
    while True:
        view = daemon.get(path, detail=detail)
        yield view
        if view["done"] or view["session"] is None:
            return
        time.sleep(_WATCH_SECONDS)
        daemon.get(f"{path}/events", cursor=view["cursor"], wait_ms=LONG_WAIT_MS, max_events=1)


def _watch(daemon: Daemon, view: Json) -> None:
    """Progress on stderr until the run has ended. Ctrl-C leaves it alone."""
    from vespera_exec.cli.running import Follower, Interrupts, display
    from vespera_exec.cli.state import Shown

    state: Shown = Shown(str(view["title"]), sessions=[str(view["session_id"])])
    state.take_status(view)
    shown = display()
    with Interrupts() as interrupts:
        try:
            Follower(daemon, str(view["task_id"]), state, shown, cursor=view["cursor"], cancels=False).follow(
                interrupts
            )
        finally:
            shown.close()


def _output(daemon: Daemon, any_id: str, stream: str, *, follow: bool) -> Iterator[Json]:
    """The pages of a session's output; with `follow` also those to come, and of the attempts that come after it."""
    path = f"/tasks/{segment(any_id)}"
    session = daemon.get(path)["session_id"]
    if session is None:
        raise DaemonError("CONFLICT", "the task was never executed", "start it first")
    offset = 0
    while True:
        wait_ms = LONG_WAIT_MS if follow else 0
        page = daemon.get(f"/executions/{session}/output", stream=stream, offset=offset, limit=65_536, wait_ms=wait_ms)
        yield page
        offset = page["next_offset"]
        if page["eof"] and follow:
            view = daemon.get(path)
            if not view["done"] and view["session_id"] == session:
                with suppress(KeyError):
                    daemon.get(f"{path}/events", cursor=view["cursor"], wait_ms=1000, max_events=1)
                continue
            if view["session_id"] == session:
                return
            session, offset = view["session_id"], 0
        elif page["eof"] or not (page["text"] or follow):
            return


def _said(value: object) -> str:
    from vespera_exec.cli.text import shown

    return shown(value, 500)
