"""A daemon of a few lines for the bridge and the launcher: preamble, then one answer per request.

What a request makes it do is its method: `hang` is never answered, `slow` only if the client does not close
meanwhile, `crash` kills the process, `half` kills it after half an answer, `stop` ends it in order, `big`
answers with `params.size` bytes, anything else with what this process and this connection have seen. In the
data directory every process appends its pid to `spawned` first of all, and to `starts` when it owns it.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socketserver
import time
from pathlib import Path
from typing import Any

from vespera_exec import __version__, paths
from vespera_exec.store.lock import OwnerLock


class Door(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        preamble = json.loads(self.rfile.readline() or b"null")
        if preamble is None:
            return
        refusal = data_dir / "refuse"
        if refusal.exists():
            self.say({"vespera": 1, "error": {"error_code": "X", "error": refusal.read_text(), "hint": "go away"}})
            return
        self.say({"vespera": 1, "daemon": __version__, "pid": os.getpid()})
        seen: list[str] = []
        for line in self.rfile:
            message = json.loads(line)
            seen.append(message["method"])
            if "id" in message:
                self.answer(message, preamble, seen)

    def answer(self, message: dict[str, Any], preamble: dict[str, Any], seen: list[str]) -> None:
        crash_once = data_dir / "crash-on-initialize"
        if message["method"] == "initialize" and crash_once.exists():
            crash_once.unlink()
            os._exit(9)
        while message["method"] in ("initialize", "first") and (data_dir / "busy").exists():
            time.sleep(0.01)
        match message["method"]:
            case "hang":
                return
            case "crash":
                os._exit(9)
            case "half":
                self.wfile.write(b'{"jsonrpc":"2.0","id":')
                os._exit(9)
            case "slow" if select.select([self.connection], [], [], 0.1)[0]:
                return
            case "stop":
                socket_path.unlink()
                os._exit(0)
            case "big":
                result: dict[str, Any] = {"text": "x" * message["params"]["size"]}
            case _:
                result = {
                    "pid": os.getpid(),
                    "session": os.getsid(0),
                    "cwd": os.getcwd(),
                    "environ": dict(os.environ),
                    "preamble": preamble,
                    "seen": seen,
                    "received": len(json.dumps(message)),
                }
        self.say({"jsonrpc": "2.0", "id": message["id"], "result": result})

    def say(self, message: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")


def note(name: str) -> None:
    data_dir.mkdir(exist_ok=True)
    with (data_dir / name).open("a") as file:
        file.write(f"{os.getpid()}\n")


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 32


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True)
    data_dir: Path = parser.parse_args().data_dir
    note("spawned")
    socket_path, _ = paths.socket_paths(data_dir, os.environ)
    with OwnerLock.acquire(data_dir, purpose="daemon", wait_seconds=5):
        note("starts")
        socket_path.unlink(missing_ok=True)
        with Server(str(socket_path), Door) as server:
            server.serve_forever(poll_interval=10)
