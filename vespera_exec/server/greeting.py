"""The first line in each direction on `mcp.sock`: who connects from where, and who answers. Standard library only."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from vespera_exec import __version__, paths

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping
    from typing import Any

PREAMBLE_VERSION = 1
UNAVAILABLE = "DAEMON_UNAVAILABLE"
SILENT = "DAEMON_SILENT"


class Failure(Exception):
    """Why there is no daemon, with the code that the client is told. `retriable`: waiting may help."""

    def __init__(self, error_code: str, message: str, hint: str, *, retriable: bool) -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.error_code = error_code
        self.retriable = retriable


def failure_of(fault: OSError) -> Failure:
    """Of a socket or a folder that cannot be had. No permission stays so, whoever waits."""
    if isinstance(fault, TimeoutError):
        return Failure(SILENT, "it does not answer", "`vespera-exec daemon stop --now` ends it", retriable=True)
    return Failure(UNAVAILABLE, str(fault), "", retriable=not isinstance(fault, PermissionError))


def preamble(cwd: str, environ: Mapping[str, str], *, client: str) -> bytes:
    """The first line on `mcp.sock`: protocol, where the client stands, its allow-listed environment."""
    line = {
        "vespera": PREAMBLE_VERSION,
        "cwd": cwd,
        "env": {name: environ[name] for name in paths.CALLER_ENV if name in environ},
        "client": client,
        "version": __version__,
    }
    return json.dumps(line).encode() + b"\n"


def check_answer(answer: dict[str, Any]) -> None:
    """
    Raises:
        Failure: it refuses us, speaks another protocol, or is no daemon of ours.
    """
    refused = answer.get("error")
    if isinstance(refused, dict):
        said = cast("dict[str, Any]", refused)
        code = str(said.get("error_code", UNAVAILABLE))
        raise Failure(code, str(said.get("error", said)), str(said.get("hint", "")), retriable=code == UNAVAILABLE)
    spoken, version = answer.get("vespera"), answer.get("daemon")
    if not isinstance(spoken, int):
        raise Failure(UNAVAILABLE, "what answers on its socket is no vespera-exec daemon", "", retriable=True)
    if spoken != PREAMBLE_VERSION:
        raise Failure(
            "VERSION_MISMATCH",
            f"the daemon is version {version} and speaks protocol {spoken}; "
            f"this is version {__version__} and speaks {PREAMBLE_VERSION}",
            "end it with `vespera-exec daemon stop`; the next client starts the installed version",
            retriable=False,
        )
    if version != __version__:
        say(
            f"the daemon (process {answer.get('pid')}) is version {version}, this is {__version__}; it is in use and "
            "goes on. `vespera-exec daemon stop` ends it; the next client starts the installed version"
        )


def read_line(daemon: socket.socket, rest: bytearray) -> bytes:
    """The next line, without its end; what came after it stays in `rest`."""
    while b"\n" not in rest:
        chunk = daemon.recv(65536)
        if not chunk:
            raise ConnectionResetError("the daemon closed the connection")
        rest += chunk
    line, _, after = bytes(rest).partition(b"\n")
    rest[:] = after
    return line


def say(text: str) -> None:
    """One line on stderr; stdout belongs to the protocol."""
    with suppress(OSError):  # nobody may be listening there
        os.write(2, f"vespera-exec: {text}\n".encode("utf-8", "backslashreplace"))
