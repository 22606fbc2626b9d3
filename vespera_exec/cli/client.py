"""The daemon of a data directory as the command line sees it: its REST paths, over its unix socket."""

from __future__ import annotations

import base64
import http.client
import json
import os
import select
import socket
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from vespera_exec import paths
from vespera_exec.errors import DaemonUnavailable, InvalidInput, VesperaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vespera_exec.model.events import Json

LONG_WAIT_MS = 20_000
_ANSWER_SECONDS = 30.0  # beyond the wait that was asked for
_SILENT_SECONDS = 5.0  # without an answer, until it is asked whether it lives
_PROBE_SECONDS = 3.0
_REPEATS = 2  # of a request that was cut off
_DYING_SECONDS = 0.05  # a daemon that was killed may still be connected to for an instant
_PROBLEM = "application/problem+json"

_COMMAND_OF_TOOL = {
    "list_tasks": "`vespera-exec list`",
    "list_roles": "`vespera-exec roles`",
    "execute_task": "`vespera-exec run`",
    "execute_plan": "`vespera-exec run plan.yaml`",
    "get_plan_steps": "`vespera-exec steps ID`",
    "list_checkpoints": "`vespera-exec checkpoint list ID`",
    "list_dead_letters": "`vespera-exec dead list`",
    "get_capacity": "`vespera-exec capacity`",
    "answer_task_input": "`vespera-exec answer`",
}


class DaemonError(VesperaError):
    """What the daemon answered instead of what was asked for, with its own code.

    `problems` of a plan that it refused: `{"step", "problem"}` each.
    """

    def __init__(self, code: str, message: str, hint: str = "", *, problems: Sequence[Mapping[str, Json]] = ()) -> None:
        super().__init__(message, hint=hint)
        self._code = code
        self.problems = problems

    @property
    def error_code(self) -> str:
        return self._code


class DaemonSilent(DaemonUnavailable):
    """One is there and does not answer: it is stopped, or stuck. `pid` None: not known."""

    code = "DAEMON_SILENT"

    def __init__(self, data_dir: Path, pid: int | None) -> None:
        who = f"process {pid} is the daemon of {data_dir} and" if pid else f"the daemon of {data_dir}"
        hint = f"see {data_dir / paths.DAEMON_LOG}; `vespera-exec daemon stop --now` ends it"
        super().__init__(f"{who} does not answer", hint=hint)
        self.pid = pid or 0


class DaemonGone(DaemonUnavailable):
    """It went away before it had answered; what was asked for may have been done."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(f"the daemon of {data_dir} went away", hint=f"see {data_dir / paths.DAEMON_LOG}")


class DaemonStopped(DaemonUnavailable):
    """It served us, and was stopped in order: whoever only watches does not start it again."""

    code = "DAEMON_STOPPED"

    def __init__(self, data_dir: Path) -> None:
        hint = "`vespera-exec status ID` starts it again and shows what became of the task"
        super().__init__(f"the daemon of {data_dir} was stopped", hint=hint)


@dataclass(frozen=True, slots=True)
class Answer:
    """A 2xx, or a refusal that has a body of its own (a cancel that comes too late: 409). No content is None."""

    status: int
    body: Json


class Daemon:
    """Asks one daemon, starting it when nobody listens (unless `start` is False), and again when it restarts.

    One that has answered us and then was stopped in order, which leaves no socket behind, is not started again.
    An answer may take `patience` seconds beyond the wait that was asked for.
    Every request says where the caller stands. All requests but those that are sent `once` may be sent again: they
    read, or repeat harmlessly (executions by their idempotency key).
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        environ: Mapping[str, str] | None = None,
        cwd: str | None = None,
        start: bool = True,
        patience: float = _ANSWER_SECONDS,
    ) -> None:
        self.data_dir = data_dir
        self._patience = patience
        self._environ = os.environ if environ is None else environ
        self._start = start
        self._served = False
        self._headers = _place(os.getcwd() if cwd is None else cwd, self._environ)
        self._connection: UnixConnection | None = None

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def get(self, path: str, **query: str | int | None) -> Json:
        """The body of a GET; None where there is no content.

        Raises:
            DaemonError: it refused, with the code that it gave.
            DaemonUnavailable: it cannot be reached or started; `DaemonStopped`, `DaemonSilent` among them.
        """
        return self.request("GET", path, query=query).body

    def post(self, path: str, body: Mapping[str, Json], *, once: bool = False) -> Answer:
        """As `get`; `wait_ms` in the body is waited for. `once`: it is not sent again where no answer comes.

        Raises:
            DaemonGone: no answer came.
        """
        return self.request("POST", path, body=body, once=once)

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int | None] | None = None,
        body: Mapping[str, Json] | None = None,
        once: bool = False,
    ) -> Answer:
        wait_ms = (query or {}).get("wait_ms") or (body or {}).get("wait_ms") or 0
        for left in range(0 if once else _REPEATS, -1, -1):
            if self._connection is None or not self._connection.usable:
                self._connection = self._connect()
            connection = self._connection
            try:
                self.send(connection, method, path, query=query, body=body, wait_ms=int(wait_ms))
                self._await(connection, self._patience + int(wait_ms) / 1000)
                return received(connection)
            except TimeoutError:
                self.close()
                raise self._silent() from None
            except (ConnectionError, http.client.HTTPException) as fault:
                self.close()
                if not left:
                    raise DaemonGone(self.data_dir) from fault
                time.sleep(_DYING_SECONDS)
        raise AssertionError("the last failure raises")

    def connect(self) -> UnixConnection:
        """A connection of one's own, for a poll. The daemon is started when nobody listens."""
        return self._connect()

    def send(
        self,
        connection: UnixConnection,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int | None] | None = None,
        body: Mapping[str, Json] | None = None,
        wait_ms: int = 0,
    ) -> None:
        """Puts a request on its way; `received` takes the answer."""
        given = {name: str(value) for name, value in (query or {}).items() if value is not None}
        headers = dict(self._headers)
        data = None
        if body is not None:
            data = _encoded(body)
            headers["Content-Type"] = "application/json"
        connection.patience(self._patience + wait_ms / 1000)
        connection.request(method, f"{path}?{urlencode(given)}" if given else path, body=data, headers=headers)

    def _await(self, connection: UnixConnection, seconds: float) -> None:
        """Until an answer begins. In between the daemon is asked whether it lives, so that a stuck one is soon told.

        Raises:
            TimeoutError: it does not, or its time is over.
        """
        deadline = time.monotonic() + seconds
        while not select.select([connection], [], [], max(0.0, min(_SILENT_SECONDS, deadline - time.monotonic())))[0]:
            if time.monotonic() >= deadline:
                raise TimeoutError
            with closing(UnixConnection(self._sockets()[1])) as probe:
                probe.connect()
                probe.patience(_PROBE_SECONDS)
                probe.request("GET", "/healthz")
                received(probe)

    def _silent(self) -> DaemonSilent:
        from vespera_exec.app.owning import listener

        return DaemonSilent(self.data_dir, listener(self._sockets()[1]))

    def _sockets(self) -> tuple[Path, Path]:
        try:
            return paths.socket_paths(self.data_dir, self._environ)
        except OSError as fault:
            raise DaemonUnavailable(
                f"no folder for sockets: {fault.strerror or fault}", hint="name one of yours in VESPERA_RUNTIME_DIR"
            ) from fault

    def _connect(self) -> UnixConnection:
        connection = UnixConnection(self._sockets()[1])
        try:
            connection.connect()
        except OSError as fault:
            # mcp.sock is the first to go in an orderly end, and stays behind after a crash.
            if self._served and not os.path.lexists(self._sockets()[0]):
                raise DaemonStopped(self.data_dir) from fault
            if not self._start:
                raise DaemonUnavailable(
                    f"no daemon runs for {self.data_dir}", hint="any command starts one, or `vespera-exec daemon start`"
                ) from fault
            start_daemon(self.data_dir, self._environ)
            try:
                connection.connect()
            except OSError as second:
                raise DaemonGone(self.data_dir) from second
        self._served = True
        return connection


@dataclass(slots=True)
class _Asked:
    connection: UnixConnection
    path: str
    query: dict[str, str | int | None]
    repeats: int = 0


@dataclass(slots=True)
class Polls:
    """Several long-polls at once, in one thread. Each has a name, and a connection that it keeps."""

    daemon: Daemon
    _open: dict[str, _Asked] = field(default_factory=dict[str, _Asked])
    _idle: dict[str, UnixConnection] = field(default_factory=dict[str, "UnixConnection"])

    def __enter__(self) -> Polls:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (*self._idle.values(), *(asked.connection for asked in self._open.values())):
            connection.close()
        self._idle.clear()
        self._open.clear()

    def asked(self, name: str) -> bool:
        """An answer of that name is still to come."""
        return name in self._open

    def ask(self, name: str, path: str, **query: str | int | None) -> None:
        asked = _Asked(self._idle.pop(name, None) or self.daemon.connect(), path, query)
        self._send(name, asked)

    def wait(self, timeout: float, *also: int) -> dict[str, Json]:
        """The bodies that arrived within `timeout` seconds, by name; empty also when a descriptor in `also` woke it.

        Raises:
            DaemonError, DaemonUnavailable: as `Daemon.get`.
        """
        by_descriptor = {asked.connection.fileno(): name for name, asked in self._open.items()}
        readable, _, _ = select.select([*by_descriptor, *also], [], [], max(timeout, 0))
        arrived: dict[str, Json] = {}
        for descriptor in readable:
            name = by_descriptor.get(descriptor)
            if name is None:
                continue
            asked = self._open.pop(name)
            try:
                arrived[name] = received(asked.connection).body
                if asked.connection.usable:
                    self._idle[name] = asked.connection
            except (ConnectionError, http.client.HTTPException) as fault:
                self._again(name, asked, fault)
        return arrived

    def _send(self, name: str, asked: _Asked) -> None:
        try:
            wait_ms = int(asked.query.get("wait_ms") or 0)
            self.daemon.send(asked.connection, "GET", asked.path, query=asked.query, wait_ms=wait_ms)
        except (ConnectionError, http.client.HTTPException) as fault:
            self._again(name, asked, fault)
        else:
            self._open[name] = asked

    def _again(self, name: str, asked: _Asked, fault: Exception) -> None:
        asked.connection.close()
        if asked.repeats >= _REPEATS:
            raise DaemonGone(self.daemon.data_dir) from fault
        asked.repeats += 1
        time.sleep(_DYING_SECONDS)
        asked.connection = self.daemon.connect()
        self._send(name, asked)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over the socket at `path`."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_ANSWER_SECONDS)
        self._path = os.fspath(path)

    def connect(self) -> None:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(_ANSWER_SECONDS)
            made.connect(self._path)
        except BaseException:
            made.close()
            raise
        self.sock = made

    @property
    def usable(self) -> bool:
        """It was not closed by the other side after its last answer."""
        return getattr(self, "sock", None) is not None

    def patience(self, seconds: float) -> None:
        self.sock.settimeout(seconds)

    def fileno(self) -> int:
        return self.sock.fileno()


def received(connection: http.client.HTTPConnection) -> Answer:
    """The answer to the request that was sent last.

    Raises:
        DaemonError: it is a refusal.
        ConnectionError, http.client.HTTPException: it was cut off.
    """
    response = connection.getresponse()
    data = response.read()
    if not data and response.status != 204:
        raise http.client.IncompleteRead(data)  # a head that was cut off reads as one without a body
    kind = response.headers.get_content_type()
    if kind == _PROBLEM or (response.status >= 400 and kind != "application/json"):
        raise _problem(response.status, data)
    try:
        return Answer(response.status, json.loads(data) if data else None)
    except ValueError:
        raise DaemonError("BAD_ANSWER", f"the daemon's answer is no JSON ({len(data)} bytes)") from None


def start_daemon(data_dir: Path, environ: Mapping[str, str]) -> None:
    """Returns when a daemon of `data_dir` listens.

    Raises:
        DaemonUnavailable, StoreUnavailable: as `server.launch.ensure_daemon`.
    """
    from vespera_exec.server.launch import ensure_daemon  # only who starts a daemon pays for it

    ensure_daemon(data_dir, environ)


def data_directory() -> Path:
    """The one that is meant by the current folder and the environment.

    Raises:
        InvalidInput: the current folder is gone.
    """
    try:
        cwd = Path.cwd()
    except OSError as fault:
        raise InvalidInput("the current folder is gone", hint="change to one that exists") from fault
    return paths.find_data_dir(cwd, os.environ)


def segment(any_id: str) -> str:
    """An id as a part of a path.

    Raises:
        InvalidInput: it can be none.
    """
    if not any_id or len(any_id) > 200 or not any_id.isprintable() or "/" in any_id or any_id in (".", ".."):
        raise InvalidInput("that is no id", hint="`vespera-exec list` shows the ids")
    return quote(any_id, safe="")


def _place(cwd: str, environ: Mapping[str, str]) -> dict[str, str]:
    allowed = {name: environ[name] for name in paths.CALLER_ENV if name in environ}
    try:
        env = json.dumps(allowed).encode()
        place = quote(cwd.encode(), safe="/")
    except UnicodeEncodeError:
        raise InvalidInput(f"the folder {cwd!r} is not named in UTF-8", hint="start from another folder") from None
    return {"X-Vespera-Cwd": place, "X-Vespera-Env": base64.b64encode(env).decode("ascii")}


def _encoded(body: Mapping[str, Json]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise InvalidInput("the request holds bytes that are not UTF-8", hint="give text in UTF-8") from None
    except ValueError as error:
        raise InvalidInput(f"the request cannot be sent: {error}", hint="JSON has no NaN and no Infinity") from None


def _problem(status: int, data: bytes) -> DaemonError:
    try:
        said = json.loads(data)
        problems = said.get("problems") or ()
        hint = _our_words(str(said.get("hint") or ""))
        return DaemonError(str(said["error_code"]), str(said["detail"]), hint, problems=problems)
    except (ValueError, KeyError, TypeError, AttributeError):
        return DaemonError("HTTP_ERROR", f"the daemon answered {status}", "is another program on its socket?")


def _our_words(hint: str) -> str:
    """A hint that names MCP tools, with the commands that do the same."""
    for tool, command in _COMMAND_OF_TOOL.items():
        hint = hint.replace(tool, command)
    return hint
